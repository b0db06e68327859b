# EfficientNet-Lite0 at 224 px on Pascal VOC 2007 with binary cross-entropy: the baseline of its sisters.
_base_ = [
    '../_base_/models/efficientnet-lite0_multilabel.py',
    '../_base_/datasets/voc2007_224.py', '../_base_/schedules/photos.py',
    '../_base_/classification_runtime.py'
]

model = dict(
    head=dict(
        num_classes=20,
        loss=dict(
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=0.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))
# Convolutions on a CPU are faster with the channels last.
custom_hooks = [dict(type='mmasl.ProbabilityGapHook'), dict(type='mmasl.ChannelsLastHook')]
