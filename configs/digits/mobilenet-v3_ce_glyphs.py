# Pre-training of the digits' MobileNetV3 on single glyphs: the small one of half the usual width.
_base_ = './resnet_ce_glyphs_24e.py'

model = dict(
    backbone=dict(_delete_=True, type='MobileNetV3', arch='small_050', out_indices=(11, )),
    head=dict(in_channels=48))
