# Digits that are harder to learn, with binary cross-entropy: half the images, a long tail of classes, and 30 % of the
# training labels missing. The baseline of its sister configs.
# Made by: python tools/make_digits.py data/digits_hard --train 6000 --long-tail 0.7 --missing 0.3
_base_ = './resnet_bce_digits.py'

train_dataloader = dict(batch_size=32, dataset=dict(data_root='data/digits_hard/'))
val_dataloader = dict(dataset=dict(data_root='data/digits_hard/'))
test_dataloader = val_dataloader

# The same for all losses: lower than the easy digits', with half their batch.
param_scheduler = dict(eta_max=1e-2)
