# Fig. 8 on the digits: a small MobileNetV3 with focal loss (gamma 2).
_base_ = './mobilenet-v3_bce_digits_paper.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0)))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=2e-2)
