"""Reads what inference needs from a config and a checkpoint."""
from collections.abc import Sequence
from os import PathLike

import mmengine
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmasl.errors import ConfigError
from mmasl.utils.checkpoint import convert_official, is_official, read_checkpoint


def load_checkpoint(path: str | PathLike) -> dict:
    """Read a checkpoint on the CPU without executing anything in it; official checkpoints are converted.

    Args:
        path: File, or http(s) URL, which torch.hub caches.

    Raises:
        CheckpointError: See :func:`mmasl.utils.checkpoint.read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    return convert_official(checkpoint) if is_official(checkpoint) else checkpoint


def checkpoint_classes(checkpoint: dict) -> Sequence[str] | None:
    """The class names in a checkpoint of MMEngine or of older versions; None without names."""
    meta = checkpoint.get('meta') or {}
    return {key.lower(): value for key, value in (meta.get('dataset_meta') or meta).items()}.get('classes') or None


def config_classes(cfg: Config) -> Sequence[str] | None:
    """The class names of the test data set in a config or in its class; None without names.

    Raises:
        ConfigError: The config has no ``test_dataloader``.
    """
    dataset = inference_dataset(cfg)
    names = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    if isinstance(names, str):
        return mmengine.list_from_file(names)
    return names or (getattr(DATASETS.get(dataset.type), 'METAINFO', None) or {}).get('classes')


def inference_dataset(cfg: Config) -> Config:
    """The test data set in a config, without wrappers.

    Raises:
        ConfigError: The config has no ``test_dataloader``.
    """
    if not cfg.get('test_dataloader'):
        raise ConfigError('the config has no test_dataloader: inference uses the pipeline of its data set')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset
