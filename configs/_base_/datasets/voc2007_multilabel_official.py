# voc2007_multilabel.py as the official train.py has COCO.
_base_ = ['./voc2007_multilabel.py', './official_pipeline.py']

train_dataloader = dict(batch_size=128, dataset=dict(pipeline=_base_.official_train_pipeline))
val_evaluator = dict(preset='official')
test_evaluator = val_evaluator
