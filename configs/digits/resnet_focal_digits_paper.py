# The setting of tools/reproduce.py with focal loss (gamma 2, App. B) of arXiv 2009.14119.
_base_ = './resnet_bce_digits_paper.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0)))

# Best of the search in benchmarks/learning_rates/digits_paper.csv.
param_scheduler = dict(eta_max=1e-2)
