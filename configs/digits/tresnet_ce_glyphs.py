# Pre-training of the digits' TResNet on single glyphs: timm's, with stages of 1, 1, 2, 1 blocks and a quarter of its
# width.
_base_ = './resnet_ce_glyphs_24e.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMBackbone',
        model_name='tresnet_m',
        features_only=False,
        layers=(1, 1, 2, 1),
        width_factor=0.25),
    head=dict(in_channels=512))
