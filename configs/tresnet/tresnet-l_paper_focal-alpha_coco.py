# TResNet-L at 448 px with the focal loss and a fixed weight of the positives (Table 2, "FL + linear weighting").
_base_ = './tresnet-l_paper_focal_coco.py'

# The paper searched 0.5, 0.55, ... 0.95 and does not tell the best: --cfg-options model.head.loss.alpha=0.5
model = dict(head=dict(loss=dict(alpha=0.75)))
