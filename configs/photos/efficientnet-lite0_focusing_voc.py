# EfficientNet-Lite0 at 224 px on Pascal VOC 2007 with asymmetric focusing (Table 2: gamma 0 and 3).
_base_ = './efficientnet-lite0_bce_voc.py'

model = dict(head=dict(loss=dict(gamma_neg=3.0)))
