# EfficientNet-Lite0 at 224 px on Corel-5k with the probability margin (Table 2: gamma 2, margin 0.3).
_base_ = './efficientnet-lite0_bce_corel5k.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0, clip=0.3)))
