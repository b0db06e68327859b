# OFA-595 at 448 px with binary cross-entropy, after App. B of arXiv 2009.14119: the baseline of its sister configs.
_base_ = [
    '../_base_/models/ofa595_multilabel.py', '../_base_/datasets/coco_multilabel.py',
    '../_base_/schedules/onecycle_60e.py', '../_base_/classification_runtime.py'
]

# The head divides the sum over labels and images by the number of images.
model = dict(
    head=dict(
        num_classes=80,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=0.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))
