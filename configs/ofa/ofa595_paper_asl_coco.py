# OFA-595 at 448 px with ASL (gamma 0 and 4, margin 0.05: App. B) of arXiv 2009.14119.
_base_ = './ofa595_paper_bce_coco.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))
