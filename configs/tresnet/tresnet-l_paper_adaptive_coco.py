# TResNet-L at 448 px with adaptive asymmetry (Sec. 2.7, Table 3, Fig. 9): gamma_neg is steered to a probability gap.
_base_ = './tresnet-l_paper_asl_coco.py'

# The targets of Table 3 are 0, 0.1, 0.2 and 0.3: --cfg-options custom_hooks.0.target=0.2
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1), dict(type='mmasl.AdaptCheckpointHook')]
