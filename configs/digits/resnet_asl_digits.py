# Multi-label classification of the digits with ASL (gamma 0 and 4, margin 0.05: App. B) of arXiv 2009.14119.
_base_ = './resnet_bce_digits.py'

# detach_focusing: the gradient of Eq. 8, through the focusing weight.
model = dict(
    head=dict(
        loss=dict(
            _delete_=True,
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=0.0,
            gamma_neg=4.0,
            clip=0.05,
            detach_focusing=False,
            reduction='mean')))
# Best of the search in benchmarks/learning_rates/digits.csv.
param_scheduler = dict(eta_max=2.4e-2)
