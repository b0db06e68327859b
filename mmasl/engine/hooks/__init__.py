"""Hooks for MMEngine's Runner."""
from .adaptive_asymmetry import AdaptiveAsymmetryHook
from .channels_last import ChannelsLastHook
from .checkpoint import AdaptCheckpointHook, CheckStateDictHook
from .checks import CheckDataHook, CheckFiniteHook
from .ema import RelativeEMAHook
from .probability_gap import ProbabilityGapHook
from .resume import ResumeHook

__all__ = ['AdaptCheckpointHook', 'AdaptiveAsymmetryHook', 'ChannelsLastHook', 'CheckDataHook', 'CheckFiniteHook',
           'CheckStateDictHook', 'ProbabilityGapHook', 'RelativeEMAHook', 'ResumeHook']
