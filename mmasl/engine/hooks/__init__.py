from .adaptive_asymmetry import AdaptiveAsymmetryHook
from .checkpoint import AdaptCheckpointHook, FitCheck
from .checks import CheckDataHook, CheckFiniteHook
from .ema import EMAHook
from .probability_gap import ProbabilityGapHook
from .resume import ResumeHook

__all__ = ['AdaptCheckpointHook', 'AdaptiveAsymmetryHook', 'CheckDataHook', 'CheckFiniteHook', 'EMAHook', 'FitCheck',
           'ProbabilityGapHook', 'ResumeHook']
