# Fig. 8 on the digits: the setting of tools/reproduce.py with a small MobileNetV3.
_base_ = './resnet_bce_digits_paper.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV3',
        arch='small_050',
        out_indices=(11, ),
        init_cfg=dict(
            type='Pretrained', checkpoint='work_dirs/mobilenet-v3_ce_glyphs/epoch_24.pth', prefix='backbone.')),
    head=dict(in_channels=48))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=1e-2)
