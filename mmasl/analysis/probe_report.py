"""Compares the author's ladder on a config's own data: linear heads on frozen features, as paragraphs of Markdown."""
import hashlib
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import ClassBalancedDataset, RepeatDataset, pseudo_collate
from mmengine.model import PretrainedInit
from mmengine.registry import DATASETS, WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from mmasl.analysis.advice import Progress, build_model, drop_downloads, is_local
from mmasl.analysis.gradient import Setting
from mmasl.analysis.loss_sites import find_loss_sites
from mmasl.analysis.probe import FOLDS, TRIALS, Scores, Trial, extract_features, search
from mmasl.analysis.suggestion import LADDER, Suggestion, write_config
from mmasl.errors import ConfigError
from mmasl.utils.config import is_kind, iter_dataset_configs
from mmasl.utils.markdown import markdown_table
from mmasl.utils.statistics import interval
from mmasl.utils.tools import building_data, is_classification

BATCH_SIZE = 32
# The author's ladder, the paper's settings without focusing of positives, and what was better than these with missing
# labels in benchmarks/photos/frozen.csv: the margin alone, and the gradient of the official code.
SETTINGS = {**LADDER, 'focusing of negatives': Setting(0, 2, 0), 'ASL of the paper': Setting(0, 4, 0.05),
            'ASL, constant weight': Setting(0, 4, 0.05, detach_focusing=True), 'margin alone': Setting(0, 0, 0.05)}


def compare_settings(cfg: Config, config: str, images: int = 2000, minutes: float = 10.,
                     cache: Path = Path('work_dirs/probe'), progress: Progress = lambda items, what: items
                     ) -> Iterator[str]:
    """Compare the settings of the ladder on the training data of a config.

    Features of the pretrained backbone are computed on a sample of the training images and cached. Each setting has its
    own search of learning rate and weight decay by cross-validation.

    Args:
        cfg: Config of a multi-label classifier of MMPretrain.
        config: Path of the config.
        images: Number of training images to sample.
        minutes: Time limit. Features take at most half of it. Settings that would start later are left out.
        cache: Folder for the features.
        progress: Wraps slow loops. Its second argument describes the step.

    Yields:
        Paragraphs of the report.

    Raises:
        ConfigError: The config is not of a multi-label classifier of MMPretrain, or has no weights on this machine.
    """
    start = time.monotonic()
    check_config(cfg, config)
    model, _ = build_model(cfg)
    site, = find_loss_sites(model)
    if site.softmax:
        raise ConfigError(f'{config}: --probe measures losses on sigmoids, and this config has a softmax')
    x, y, sampled = load_features(cfg, model, images, start + 30 * minutes, cache, progress)
    found: dict[str, tuple[Trial, Scores]] = {}
    for name, setting in progress(SETTINGS.items(), 'settings'):
        if not found or time.monotonic() < start + 60 * minutes:
            found[name] = search(x, y, setting)
    yield (f'## Probe: linear heads on frozen features of {len(x):,} training images\n'
           f'{FOLDS}-fold cross-validation, with {len(TRIALS)} learning rates and weight decays for each setting and '
           'more rates around the best; means over the folds with 95 % intervals. The last column is for these heads, '
           'not for your training.')
    best = max(found, key=lambda name: found[name][1].map.mean())
    yield describe(found, best)
    if len(x) < sampled:
        yield (f'The time for features ended after {len(x):,} of {sampled:,} images. A second call computes more; or '
               'set --probe-minutes.')
    if left := [name for name in SETTINGS if name not in found]:
        yield f'No time was left for: {", ".join(left)}. Set --probe-minutes.'
    others = sorted(set(found) - {best}, key=lambda name: (name == 'cross-entropy', found[name][1].map.mean()))
    yield ('The backbone was not trained, and training it can change the order (docs/choosing.md). Train '
           f'{" and ".join([best, *others[-1:]])} at several learning rates each before you decide. For {best}, save '
           'this beside your config:')
    text = write_config(cfg, f'./{Path(config).name}', site, Suggestion(SETTINGS[best], ()),
                        detach_focusing=SETTINGS[best].detach_focusing)
    yield f'```python\n{text}\n```'


def check_config(cfg: Config, config: str) -> None:
    """Check that a probe tells something about a config.

    Raises:
        ConfigError: The config is not MMPretrain's, or its pretrained weights are not on this machine.
    """
    if not is_classification(cfg):
        raise ConfigError(f'{config}: --probe measures classifiers of MMPretrain, not detectors. Run without --probe')
    missing = list(drop_downloads(deepcopy(cfg.model)))
    if cfg.get('load_from') and not is_local(cfg.load_from):
        missing.append(f'load_from = {cfg.load_from}')
    if missing:
        raise ConfigError(f'--probe needs the pretrained weights, but {missing[0]} is not a local file. Download it '
                          'and set the path')
    if not (cfg.get('load_from') or has_weights(cfg.model)):
        raise ConfigError(f'{config} has no pretrained weights, without which --probe tells nothing. Set load_from or '
                          'model.backbone.init_cfg')


def has_weights(model: dict | list) -> bool:
    """Whether a model config names a checkpoint to start from."""
    values = model.values() if isinstance(model, dict) else model
    named = isinstance(model, dict) and is_kind(model.get('type'), PretrainedInit, WEIGHT_INITIALIZERS)
    return named or any(has_weights(value) for value in values if isinstance(value, (dict, list)))


def describe(found: dict[str, tuple[Trial, Scores]], best: str) -> str:
    """The table of the settings, and those that cannot be told apart from the best."""
    def cell(values: Any, sign: str = '') -> str:
        mean, half = interval(values)
        return f'{mean:{sign}.1f} ± {half:.1f}'

    top = found[best][1].map
    rows = [[name, SETTINGS[name], cell(scores.map), '' if name == best else cell(scores.map - top, '+'),
             *(f'{values.mean():.1f}' for values in (scores.cf1, scores.of1, scores.cf1_calibrated,
                                                     scores.of1_calibrated)), f'{trial.lr:g}, {trial.weight_decay:g}']
            for name, (trial, scores) in found.items()]
    table = markdown_table(rows, ['setting', '(gamma_pos, gamma_neg, clip)', 'mAP', 'against the best', 'CF1', 'OF1',
                                  'CF1 calibrated', 'OF1 calibrated', 'lr, weight decay of the heads'], aligned=True)
    equal = [name for name, (_, scores) in found.items()
             if name != best and -(difference := interval(scores.map - top))[0] <= difference[1]]
    apart = (f'Cannot be told apart from {best}: {", ".join(equal)}. More images (--probe-images) narrow the intervals.'
             if equal else f'{best} is ahead of all others.')
    return f'{table}\n\n{apart}'


def without_repeats(data: ConfigDict, scope: str | None) -> ConfigDict:
    """Remove the wrappers that repeat images from the config of a data set: an image would be in two folds."""
    while is_kind(data.get('type'), (RepeatDataset, ClassBalancedDataset), DATASETS, scope):
        data = data.dataset
    if 'datasets' in data:
        data.datasets = [without_repeats(inner, scope) for inner in data.datasets]
    return data


def load_features(cfg: Config, model: nn.Module, images: int, end: float, cache: Path,
                  progress: Progress) -> tuple[Tensor, Tensor, int]:
    """Features of a random sample of the training images, as far as the time allows. The cache keeps them.

    Args:
        cfg, model, images, cache, progress: See :func:`compare_settings`.
        end: Time, as ``time.monotonic`` has it, after which no further batch is read.

    Returns:
        Features (N, D), labels (N, C), and the number of images in the whole sample, >= N.

    Raises:
        ConfigError: The training images have another number of classes than the head.
    """
    scope = cfg.get('default_scope')
    data = without_repeats(deepcopy(cfg.train_dataloader.dataset), scope)
    if cfg.get('val_dataloader'):  # without augmentation
        _, evaluated = next(iter_dataset_configs(cfg.val_dataloader.dataset, '', scope))
        for _, inner in iter_dataset_configs(data, '', scope):
            inner.pipeline = evaluated.get('pipeline', inner.get('pipeline'))
    with building_data(cfg):
        dataset: Any = DATASETS.build(data)
    weights = torch.stack([value.double().sum() for value in model.state_dict().values() if value.is_floating_point()])
    identity = json.dumps([data, weights.tolist(), cfg.get('data_preprocessor')], default=str)
    path = cache / f'{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt'
    found = [torch.load(path)] if path.exists() else []
    known = len(found[0][1]) if found else 0
    sample = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:images].tolist()
    if known < len(sample):
        loader = DataLoader(Subset(dataset, sample[known:]), BATCH_SIZE, collate_fn=pseudo_collate)
        model.to(memory_format=torch.channels_last)
        for batch in extract_features(model, progress(loader, 'features'), len(dataset.metainfo['classes'])):
            found.append(batch)
            if time.monotonic() > end:
                break
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(map(torch.cat, zip(*found))), f'{path}.part')
        Path(f'{path}.part').replace(path)
    x, y = map(torch.cat, zip(*found))
    return x[:len(sample)], y[:len(sample)], len(sample)
