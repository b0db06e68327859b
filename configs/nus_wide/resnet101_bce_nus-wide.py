# ResNet-101 at 448 px with binary cross-entropy, after App. B and E of arXiv 2009.14119: the baseline of its sister.
_base_ = [
    '../_base_/models/resnet101_multilabel.py', '../_base_/datasets/nus_wide.py', '../_base_/schedules/onecycle_60e.py',
    '../_base_/classification_runtime.py'
]

model = dict(
    head=dict(
        num_classes=81,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=0.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))
