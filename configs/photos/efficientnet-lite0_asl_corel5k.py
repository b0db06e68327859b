# EfficientNet-Lite0 at 224 px on Corel-5k with ASL (gamma 0 and 4, margin 0.05: App. B of arXiv 2009.14119).
_base_ = './efficientnet-lite0_bce_corel5k.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))
