# OFA-595 at 448 px with the focal loss (gamma 2, no alpha: Eq. 3) of arXiv 2009.14119.
_base_ = './ofa595_paper_bce_coco.py'

model = dict(head=dict(loss=dict(gamma_pos=2.0, gamma_neg=2.0)))
