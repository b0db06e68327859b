# TResNet-L on Open Images at 224 px with ASL of gamma 0 and 7 (App. F); the margin is that of App. B.
_base_ = './tresnet-l_paper_bce_open-images-224.py'

model = dict(head=dict(loss=dict(gamma_neg=7.0, clip=0.05)))
