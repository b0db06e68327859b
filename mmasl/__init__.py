"""Asymmetric Loss (ASL, arXiv 2009.14119) for plain PyTorch, MMDetection and MMPretrain.

Every public name is imported at its first use: ``import mmasl`` and the losses need torch and numpy alone.
"""
from importlib import import_module
from typing import Any

__version__ = '0.1.0'

_MODULES = {
    'mmasl.apis.inferencer': ['MultiLabelInferencer'],
    'mmasl.datasets.coco': ['CocoMultiLabel'],
    'mmasl.datasets.herbarium': ['Herbarium2020'],
    'mmasl.datasets.nus_wide': ['NUSWide'],
    'mmasl.datasets.open_images': ['OpenImages'],
    'mmasl.datasets.transforms': ['Cutout', 'OmitLabels'],
    'mmasl.datasets.voc': ['VOCMultiLabel'],
    'mmasl.engine.hooks': ['AdaptCheckpointHook', 'AdaptiveAsymmetryHook', 'ChannelsLastHook', 'CheckDataHook',
                           'CheckFiniteHook', 'ProbabilityGapHook', 'RelativeEMAHook', 'ResumeHook'],
    'mmasl.engine.schedulers': ['OneCycleMomentum'],
    'mmasl.errors': ['CheckpointError', 'ConfigError', 'DataError', 'DiskFullError', 'MMASLError', 'NonFiniteError',
                     'UnavailableError', 'UnreadableImageError'],
    'mmasl.evaluation.metrics': ['MacroF1', 'MultiLabelMetric'],
    'mmasl.models.backbones': ['OFA595'],
    'mmasl.models.calibrated_dense_head': ['CalibratedDenseHead'],
    'mmasl.models.heads': ['CSRAClsHead', 'LabelGraphHead', 'MLDecoderHead', 'MultiLabelClsHead',
                           'MultiLabelLinearClsHead', 'Query2LabelHead'],
    'mmasl.models.losses': ['AsymmetricLoss', 'AsymmetricSoftmaxLoss'],
    'mmasl.models.tta': ['MultiLabelTTAModel'],
    'mmasl.ops': ['asymmetric_loss', 'asymmetric_softmax_loss', 'effective_number_weights', 'inverse_frequency_weights',
                  'linear_asymmetric_loss', 'positive_weights', 'posterior', 'posterior_log_odds',
                  'posterior_threshold', 'posterior_upper_bound', 'use_implementation'],
}
_LOCATIONS = {name: module for module, names in _MODULES.items() for name in names}
__all__ = list(_LOCATIONS)


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_LOCATIONS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
