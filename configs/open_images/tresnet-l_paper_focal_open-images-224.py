# TResNet-L on Open Images at 224 px with the focal loss of gamma 4 (App. F of arXiv 2009.14119).
_base_ = './tresnet-l_paper_bce_open-images-224.py'

model = dict(head=dict(loss=dict(gamma_pos=4.0, gamma_neg=4.0)))
