# TResNet-L at 448 px with the probability margin alone (Table 2: focal loss of gamma 2, margin 0.3).
_base_ = './tresnet-l_paper_bce_coco.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0, clip=0.3)))
