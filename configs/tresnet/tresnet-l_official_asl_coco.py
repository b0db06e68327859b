# TResNet-L at 448 px with ASL, as the official train.py trains (docs/recipes.md).
_base_ = [
    '../_base_/models/tresnet_multilabel.py', '../_base_/datasets/coco_multilabel_official.py',
    '../_base_/schedules/official_41e.py', '../_base_/official_runtime.py'
]

# The loss is summed: Adam adds the weight decay to the gradient, so the scale of the loss matters. On N processes set
# batch_size to 128 / N and loss_weight to N. detach_focusing: the script holds the focusing weight constant.
model = dict(
    head=dict(
        num_classes=80,
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
    'MS_COCO_TRresNet_L_448_86.6.pth',
    mAP=86.6)
