# The harder digits with adaptive asymmetry (Sec. 2.7 of arXiv 2009.14119): gamma_neg is steered to a probability gap.
_base_ = './resnet_asl_digits_hard.py'

# It logs what ProbabilityGapHook does.
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1)]
