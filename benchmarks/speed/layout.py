"""Training steps of EfficientNet-Lite0 with and without mmasl.ChannelsLastHook."""
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from benchmarks.speed.measure import ROOT, in_turn
from benchmarks.speed.step import ASL, classifier_inputs, train_step
from mmasl.registry import HOOKS, MODELS

SIZE = 128  # pixels
IMAGES = dict(cpu=64, cuda=256)


def build_classifier(channels_last: bool) -> Callable[..., tuple[nn.Module, torch.Tensor, list]]:
    """A builder for :func:`train_step`: the classifier of configs/photos with random weights."""
    def build(loss: dict, images: int, size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor, list]:
        cfg = Config.fromfile(ROOT / 'configs' / '_base_' / 'models' / 'efficientnet-lite0_multilabel.py').model
        cfg.backbone.pop('init_cfg')
        cfg.head.update(num_classes=20, loss=loss)
        model = MODELS.build(cfg)
        if channels_last:
            HOOKS.build(dict(type='mmasl.ChannelsLastHook')).before_run(SimpleNamespace(model=model))
        return model, *classifier_inputs(images, size, 20)
    return build


def measure(device: str, quick: bool = False) -> Iterator[dict]:
    """Time the steps in both layouts; ``quick`` runs one small batch, to see that everything works.

    On a CPU, the time is that of one thread on its core, which other work on the machine disturbs least.
    """
    clock, threads = time.perf_counter, torch.get_num_threads()
    if device == 'cpu':
        clock = time.process_time
        torch.set_num_threads(1)
    try:
        size, count, seconds, least = (64, 2, 0, 1) if quick else (SIZE, IMAGES[device], 60, 4)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            steps = in_turn({layout: train_step(ASL, build_classifier(last), count, (size, size), device)
                             for layout, last in (('default', False), ('channels last', True))},
                            seconds, least, min, clock=clock)
        for layout, step in steps.items():
            yield dict(model=f'EfficientNet-Lite0, {size} px', images=count, layout=layout,
                       step_ms=round(1e3 * step, 2), images_per_second=round(count / step, 2),
                       speedup=round(steps['default'] / step, 4), load=round(os.getloadavg()[0], 1))
    finally:
        torch.set_num_threads(threads)


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Targets: description, measured value, whether it is reached."""
    return [(f"{row['model']}: a step with the channels last takes less time",
             f"{float(row['speedup']):.2f} times as fast", float(row['speedup']) > 1)
            for row in rows if row['layout'] == 'channels last']
