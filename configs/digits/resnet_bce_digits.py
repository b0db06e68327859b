# Multi-label classification of the digits with binary cross-entropy: the baseline of its sister configs.
_base_ = [
    '../_base_/models/resnet18_digits.py', '../_base_/datasets/digits_multilabel.py', '../_base_/schedules/digits.py',
    '../_base_/classification_runtime.py'
]

# The head starts at the labels' prior, 2.5 of 40.
model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/resnet_ce_glyphs/epoch_6.pth', prefix='backbone.')),
    head=dict(
        type='MultiLabelLinearClsHead',
        in_channels=128,
        num_classes=40,
        init_cfg=dict(type='Normal', layer='Linear', std=0.01, bias=-2.7),
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=0.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))

# Best of the search in benchmarks/learning_rates/digits.csv, where every loss had the same learning rates to try.
param_scheduler = dict(eta_max=4.8e-2)
randomness = dict(seed=0)
