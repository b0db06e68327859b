# EfficientNet-Lite0 at 224 px on Pascal VOC 2007 with adaptive asymmetry (Sec. 2.7 of arXiv 2009.14119).
_base_ = './efficientnet-lite0_asl_voc.py'

# It logs what ProbabilityGapHook does.
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1), dict(type='mmasl.ChannelsLastHook')]
