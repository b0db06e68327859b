# TResNet-L on NUS-WIDE with ASL (gamma 0 and 4, margin 0.05: App. B) of arXiv 2009.14119.
_base_ = './tresnet-l_paper_bce_nus-wide.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))

released = dict(
    checkpoint='https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/'
    'NUS_WIDE_TRresNet_L_448_65.2.pth',
    mAP=65.2)
