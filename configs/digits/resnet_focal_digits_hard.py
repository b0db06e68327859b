# The harder digits with focal loss (gamma 2, App. B) of arXiv 2009.14119.
_base_ = './resnet_bce_digits_hard.py'

# detach_focusing: the gradient of Eq. 8, through the focusing weight.
model = dict(
    head=dict(
        loss=dict(
            _delete_=True,
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=2.0,
            gamma_neg=2.0,
            clip=0.0,
            detach_focusing=False,
            reduction='mean')))
