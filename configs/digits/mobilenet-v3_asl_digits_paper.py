# Fig. 8 on the digits: a small MobileNetV3 with ASL (gamma 0 and 4, margin 0.05).
_base_ = './mobilenet-v3_bce_digits_paper.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=2e-2)
