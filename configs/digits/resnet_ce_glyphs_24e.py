# The digits' pre-training, four times as long: 97.6 % of the single glyphs instead of 93.4.
_base_ = './resnet_ce_glyphs.py'

train_cfg = dict(max_epochs=24)
