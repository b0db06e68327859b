"""Reads what inference needs from a config and a checkpoint."""
from collections.abc import Sequence
from os import PathLike

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, MODELS

from mmasl.datasets.annotation_files import read_class_names
from mmasl.errors import ConfigError
from mmasl.models.calibrated_dense_head import CalibratedDenseHead
from mmasl.utils.checkpoint import convert_official, is_official, read_checkpoint
from mmasl.utils.config import is_kind, iter_dataset_configs, resolve_type
from mmasl.utils.tools import is_classification


def load_checkpoint(path: str | PathLike) -> dict:
    """Read a checkpoint on the CPU without executing anything in it; official checkpoints are converted.

    Args:
        path: File, or http(s) URL, which torch.hub caches.

    Raises:
        CheckpointError: See :func:`mmasl.utils.checkpoint.read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    return convert_official(checkpoint) if is_official(checkpoint) else checkpoint


def config_classes(cfg: Config) -> Sequence[str] | None:
    """The class names of the test data set in a config or in its class; None without names.

    Raises:
        ConfigError: The config has no ``test_dataloader``.
    """
    dataset = inference_dataset(cfg)
    names = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    if isinstance(names, str):
        return read_class_names(names, 'test_dataloader.dataset.metainfo.classes', expand_user=True)
    kind = resolve_type(dataset.get('type'), DATASETS, cfg.get('default_scope'))
    return names or (getattr(kind, 'METAINFO', None) or {}).get('classes')


def inference_dataset(cfg: Config) -> ConfigDict:
    """The test data set in a config, without wrappers; the first one of several.

    Raises:
        ConfigError: The config has no ``test_dataloader``.
    """
    if not cfg.get('test_dataloader'):
        raise ConfigError('the config has no test_dataloader: inference uses the pipeline of its data set')
    return next(iter_dataset_configs(cfg.test_dataloader.dataset, '', cfg.get('default_scope')))[1]


def use_calibrated_head(cfg: Config) -> None:
    """Replace the head of a classifier or detector by mmasl's, which has the same weights.

    Raises:
        ConfigError: mmasl has no such head, or the detector has no dense head.
    """
    model = cfg.model
    if not is_classification(cfg):
        head = model.get('bbox_head')
        if not isinstance(head, dict):
            raise ConfigError(f'model {model.get("type")} has no bbox_head: only scores of dense heads are calibrated')
        if not is_kind(head['type'], CalibratedDenseHead, MODELS, cfg.get('default_scope')):
            head.update(type='mmasl.CalibratedDenseHead', head_type=head['type'])
        return
    from mmasl.models.heads.calibrated_predictions import CalibratedPredictions

    while isinstance(model.get('module'), dict):  # of LoRA
        model = model['module']
    head = model.get('head') or {}
    found = resolve_type(head.get('type'), MODELS, cfg.get('default_scope') or 'mmpretrain')
    if found is None or is_kind(found, CalibratedPredictions, MODELS):
        return
    ours = f'mmasl.{found.__name__}'
    if not is_kind(ours, CalibratedPredictions, MODELS):
        raise ConfigError(f'model.head is {found.__name__}, which predicts no calibrated score: use a multi-label '
                          "head, such as model.head.type='mmasl.MultiLabelLinearClsHead'; existing checkpoints work")
    head['type'] = ours
