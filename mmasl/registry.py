"""Registries of mmasl, children of MMEngine's.

``type='mmasl.X'`` resolves under every default scope. What needs mmdet or mmpretrain lives in a location that is
imported at the first lookup, so that ``import mmasl`` needs neither.
"""
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmasl', locations=['mmasl.losses'])
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='mmasl', locations=['mmasl.datasets.coco', 'mmasl.datasets.voc'])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='mmasl', locations=['mmasl.metrics'])
