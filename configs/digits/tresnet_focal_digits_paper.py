# Fig. 8 on the digits: a small TResNet with focal loss (gamma 2).
_base_ = './tresnet_bce_digits_paper.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0)))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=4e-2)
