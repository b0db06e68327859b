# EfficientNet-Lite1 at 224 px on Pascal VOC 2007 with ASL (gamma 0 and 4, margin 0.05: App. B of arXiv 2009.14119).
_base_ = './efficientnet-lite1_bce_voc.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))
