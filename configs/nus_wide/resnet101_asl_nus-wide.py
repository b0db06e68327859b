# ResNet-101 on NUS-WIDE with ASL (gamma 0 and 4, margin 0.05: App. B) of arXiv 2009.14119.
_base_ = './resnet101_bce_nus-wide.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))
