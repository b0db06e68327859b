"""Losses and label counts that the tests of advice share."""
import numpy as np
import torch
from torch import nn

from mmasl import AsymmetricLoss
from mmasl.analysis.label_statistics import LabelStatistics
from mmasl.analysis.loss_sites import LossSite, watch_losses
from mmasl.analysis.suggestion import LADDER


def stats_of(counts, images: int = 10, kind: str = 'multi-label', ignored: int = 0) -> LabelStatistics:
    counts = np.array(counts)
    per_image = np.full(images, counts.sum() // images)
    return LabelStatistics(tuple('abcdefgh'[:len(counts)]), counts, images - counts, per_image, ignored, kind)


def watched(module: nn.Module, *args, settings=None, key='model.head.loss', **kwargs) -> LossSite:
    site = LossSite(key, module)
    with watch_losses([site], [*LADDER.values()] if settings is None else settings):
        module(*args, **kwargs)
    return site


def classifier(z: float, **loss) -> LossSite:
    """An AsymmetricLoss that has seen 3 positives and 27 negatives at logit z."""
    y = torch.zeros(10, 3)
    y[:3, 0] = 1
    return watched(AsymmetricLoss(**loss), torch.full((10, 3), z), y, avg_factor=10)
