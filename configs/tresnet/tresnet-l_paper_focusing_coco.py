# TResNet-L at 448 px with asymmetric focusing alone (Table 2: gamma 0 and 3, no margin).
_base_ = './tresnet-l_paper_bce_coco.py'

model = dict(head=dict(loss=dict(gamma_neg=3.0)))
