# EfficientNet-Lite0 at 224 px on Corel-5k with adaptive asymmetry (Sec. 2.7 of arXiv 2009.14119).
_base_ = './efficientnet-lite0_asl_corel5k.py'

# It logs what ProbabilityGapHook does.
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1), dict(type='mmasl.ChannelsLastHook')]
