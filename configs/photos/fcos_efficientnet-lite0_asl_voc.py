# FCOS on EfficientNet-Lite0 and Pascal VOC 2007 with ASL in place of the focal loss (App. H of arXiv 2009.14119).
_base_ = './fcos_efficientnet-lite0_focal_voc.py'

# alpha and clip: see ../fcos_asl_coco.py. detach_focusing: the gradient of Eq. 8.
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
# Its sister's hook, and p_t+, p_t- and their gap (Fig. 4) in the log.
custom_hooks = [dict(type='mmasl.ChannelsLastHook'), dict(type='mmasl.ProbabilityGapHook')]
