# TResNet-L on Herbarium 2020 with the focal loss on sigmoids (App. G, Table 12; issue 68 of the official repository).
_base_ = [
    '../_base_/models/tresnet_multilabel.py', '../_base_/datasets/herbarium2020.py',
    '../_base_/schedules/onecycle_60e.py', '../_base_/tresnet_runtime.py'
]

# App. G states the gammas; epochs, learning rate and input size are those of App. B and Sec. 4.
model = dict(
    head=dict(
        type='LinearClsHead',
        num_classes=32094,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=2.0,
            gamma_neg=2.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))

# MMEngine cannot tell from this name that more is better.
default_hooks = dict(checkpoint=dict(save_best='single-label/f1-score', rule='greater'))
