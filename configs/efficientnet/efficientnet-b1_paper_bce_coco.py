# EfficientNet-B1 with binary cross-entropy, after App. B of arXiv 2009.14119: the baseline of its sister configs. It
# stands in for OFA-595 (Fig. 8), a network that no maintained package has: 570 million multiply-adds at 224 px.
_base_ = [
    '../_base_/models/tresnet_multilabel.py', '../_base_/datasets/coco_multilabel.py',
    '../_base_/schedules/onecycle_60e.py', '../_base_/tresnet_runtime.py'
]

# The head divides the sum over labels and images by the number of images.
model = dict(
    backbone=dict(model_name='efficientnet_b1.ft_in1k'),
    head=dict(
        in_channels=1280,
        num_classes=80,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=0.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))
