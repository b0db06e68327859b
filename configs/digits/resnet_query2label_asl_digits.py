# The digits with ASL and Query2Label (arXiv 2107.10834) in place of pooling and a linear layer.
_base_ = './resnet_asl_digits.py'

# The last stage keeps a map of 4 x 4. The last layer starts at the labels' prior, as that of its base.
model = dict(
    backbone=dict(strides=(1, 2, 2, 1)),
    neck=None,
    head=dict(
        type='mmasl.Query2LabelHead',
        feedforward_channels=256,
        init_cfg=dict(layer='GroupLinear')))
# Of a transformer; no search was made.
param_scheduler = dict(eta_max=2e-3)
