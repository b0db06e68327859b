# The 5 epochs at 448 px that follow tresnet-l_paper_bce_open-images-224.py (App. F of arXiv 2009.14119).
_base_ = './tresnet-l_paper_bce_open-images-224.py'

_base_.train_pipeline[1].scale = _base_.test_pipeline[1].scale = 448
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=5)
load_from = 'work_dirs/tresnet-l_paper_bce_open-images-224/epoch_30.pth'
