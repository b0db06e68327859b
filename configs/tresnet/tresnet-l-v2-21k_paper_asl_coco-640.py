# tresnet-l-v2-21k_paper_asl_coco.py at 640 px (Table 5).
_base_ = './tresnet-l-v2-21k_paper_asl_coco.py'

_base_.train_pipeline[1].scale = _base_.test_pipeline[1].scale = 640
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
