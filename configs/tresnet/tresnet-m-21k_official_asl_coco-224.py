# TResNet-M at 224 px with ASL, the defaults of train.py, pretrained on ImageNet-21K: the model zoo's smallest.
_base_ = './tresnet-l_official_asl_coco.py'

_base_.official_train_pipeline[1].scale = _base_.test_pipeline[1].scale = 224
train_dataloader = dict(dataset=dict(pipeline=_base_.official_train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

model = dict(backbone=dict(model_name='tresnet_m.miil_in21k'), head=dict(in_channels=2048))

released = dict(
    checkpoint='https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/'
    'MS_COCO_TRresNet_M_224_81.8.pth',
    mAP=81.8)
