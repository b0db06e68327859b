# The setting of tools/reproduce.py with adaptive asymmetry (Sec. 2.7): gamma_neg is steered to a probability gap.
_base_ = './resnet_asl_digits_paper.py'

# It logs what ProbabilityGapHook does.
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1)]
