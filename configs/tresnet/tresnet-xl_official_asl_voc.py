# TResNet-XL at 448 px with ASL on VOC 2007: the model zoo's. What it was pretrained on is not told.
_base_ = [
    '../_base_/models/tresnet_multilabel.py', '../_base_/datasets/voc2007_multilabel_official.py',
    '../_base_/schedules/official_41e.py', '../_base_/official_runtime.py'
]

# The loss is summed: Adam adds the weight decay to the gradient, so the scale of the loss matters. On N processes set
# batch_size to 128 / N and loss_weight to N. detach_focusing: the script holds the focusing weight constant.
model = dict(
    backbone=dict(model_name='tresnet_xl.miil_in1k'),
    head=dict(
        in_channels=2656,
        num_classes=20,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=4.0,
            clip=0.05,
            detach_focusing=True,
            reduction='sum')))

released = dict(
    checkpoint='https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/'
    'PASCAL_VOC_TResNet_xl_448_96.0.pth',
    mAP=96.0)
