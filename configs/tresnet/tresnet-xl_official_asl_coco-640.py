# TResNet-XL at 640 px with ASL: the model zoo's best, not a row of the paper.
_base_ = './tresnet-l_official_asl_coco.py'

_base_.official_train_pipeline[1].scale = _base_.test_pipeline[1].scale = 640
train_dataloader = dict(dataset=dict(pipeline=_base_.official_train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

model = dict(backbone=dict(model_name='tresnet_xl.miil_in1k'), head=dict(in_channels=2656))

released = dict(
    checkpoint='https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/'
    'MS_COCO_TResNet_xl_640_88.4.pth',
    mAP=88.4)
