# EfficientNet-Lite0 at 224 px on Corel-5k with asymmetric focusing (Table 2: gamma 0 and 3).
_base_ = './efficientnet-lite0_bce_corel5k.py'

model = dict(head=dict(loss=dict(gamma_neg=3.0)))
