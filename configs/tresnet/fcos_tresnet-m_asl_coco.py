# FCOS on TResNet-M with ASL in place of the focal loss (App. H, Table 13 of arXiv 2009.14119).
_base_ = './fcos_tresnet-m_focal_coco.py'

# alpha: Table 13 does not state it. Without focal's 0.25, ASL would weigh positives 4 to 8 times as much as focal does.
# clip: no margin. The head starts at p = 0.01, where a margin of 0.01 or more leaves the negatives without gradient.
# detach_focusing: the gradient of Eq. 8.
model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type='mmasl.AsymmetricLoss',
            use_sigmoid=True,
            gamma_pos=1.0,
            gamma_neg=2.0,
            clip=0.0,
            alpha=0.25,
            detach_focusing=False,
            loss_weight=1.0)))
# p_t+, p_t- and their gap (Fig. 4), in the log.
custom_hooks = [dict(type='mmasl.ProbabilityGapHook')]
