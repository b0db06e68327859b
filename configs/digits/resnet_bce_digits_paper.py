# The setting of tools/reproduce.py: the harder digits from the longer pre-training. Binary cross-entropy.
_base_ = './resnet_bce_digits_hard.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/resnet_ce_glyphs_24e/epoch_24.pth')))

# Best of the search in benchmarks/learning_rates/digits_paper.csv, where every loss had the same learning rates to try.
param_scheduler = dict(eta_max=2e-2)
