# Fig. 8 on the digits: the setting of tools/reproduce.py with a small TResNet.
_base_ = './resnet_bce_digits_paper.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMBackbone',
        model_name='tresnet_m',
        features_only=False,
        layers=(1, 1, 2, 1),
        width_factor=0.25,
        init_cfg=dict(
            type='Pretrained', checkpoint='work_dirs/tresnet_ce_glyphs/epoch_24.pth', prefix='backbone.')),
    head=dict(in_channels=512))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=4e-2)
