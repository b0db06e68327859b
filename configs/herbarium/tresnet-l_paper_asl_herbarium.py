# TResNet-L on Herbarium 2020 with ASL on sigmoids (App. G: gamma 0 and 4); the margin is that of App. B.
_base_ = './tresnet-l_paper_focal_herbarium.py'

model = dict(head=dict(loss=dict(gamma_pos=0.0, gamma_neg=4.0, clip=0.05)))
