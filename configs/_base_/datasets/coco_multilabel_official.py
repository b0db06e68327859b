# coco_multilabel.py as the official train.py has it: a batch of 128 on one GPU, and the threshold of its validate.py.
_base_ = ['./coco_multilabel.py', './official_pipeline.py']

train_dataloader = dict(batch_size=128, dataset=dict(pipeline=_base_.official_train_pipeline))
val_evaluator = dict(preset='official')
test_evaluator = val_evaluator
