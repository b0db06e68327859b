# Fig. 8 on the digits: a small TResNet with ASL (gamma 0 and 4, margin 0.05).
_base_ = './tresnet_bce_digits_paper.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=2e-2)
