# EfficientNet-Lite2 at 224 px on Pascal VOC 2007 with focal loss (gamma 2).
_base_ = './efficientnet-lite2_bce_voc.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0)))
