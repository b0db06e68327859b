"""The usual weights by class, from the counts of a training set, for the losses' ``class_weight`` and ``pos_weight``.

A count below 1 counts as 1, so that a class without positives, or without negatives, has a finite weight above 0.
"""
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmasl.errors import ConfigError, DataError

Counts = Tensor | np.ndarray | Sequence[float]


def inverse_frequency_weights(counts: Counts) -> Tensor:
    """Weight of each class proportional to 1 / n, with mean 1, for ``class_weight``.

    Args:
        counts: Number n of positives of each class, (C,), >= 0.

    Returns:
        float32 (C,), > 0.

    Raises:
        DataError: The counts are not finite numbers >= 0, one per class.
    """
    return _with_mean_one(1 / _check_counts('counts', counts))


def effective_number_weights(counts: Counts, *, beta: float = 0.999) -> Tensor:
    """Weight of each class proportional to 1 / E with the effective number of samples E, with mean 1.

    E = (1 - beta^n) / (1 - beta) is Eq. 2 of Cui et al. (CVPR 2019, arXiv 1901.05555). E is n for few positives and at
    most 1 / (1 - beta), so the classes with more positives than that have about the same weight. The paper weights
    samples of one label each; here the weight is that of a class, for ``class_weight``.

    Args:
        counts: Number n of positives of each class, (C,), >= 0.
        beta: In [0, 1). 0 gives equal weights; towards 1 they become those of :func:`inverse_frequency_weights`.

    Returns:
        float32 (C,), > 0.

    Raises:
        ConfigError: ``beta`` is out of its range.
        DataError: The counts are not finite numbers >= 0, one per class.
    """
    if not 0 <= beta < 1:
        raise ConfigError(f'beta={beta} must be in [0, 1): for weights of 1 / n use inverse_frequency_weights')
    n = _check_counts('counts', counts)
    return _with_mean_one(-1 / torch.expm1(n * math.log(beta)) if beta else torch.ones_like(n))


def positive_weights(positives: Counts, negatives: Counts, *, temperature: float = 1.,
                     cap: float = math.inf) -> Tensor:
    """Weight of the positives of each class, (negatives / positives)^(1 / T), at most ``cap``, for ``pos_weight``.

    With T = 1 the positives of each class have the same total weight as its negatives. With other temperatures the
    weights are nearer to 1.

    Args:
        positives: Number of positives of each class, (C,), >= 0.
        negatives: Number of negatives of each class, (C,), >= 0, without ignored labels.
        temperature: T > 0.
        cap: Largest weight, > 0.

    Returns:
        float32 (C,), > 0; below 1 for a class with more positives than negatives.

    Raises:
        ConfigError: ``temperature`` or ``cap`` is out of its range.
        DataError: The counts are not finite numbers >= 0, one per class.
    """
    for name, value in (('temperature', temperature), ('cap', cap)):
        if not value > 0:
            raise ConfigError(f'{name}={value} must be a number > 0')
    pos, neg = _check_counts('positives', positives), _check_counts('negatives', negatives)
    if len(pos) != len(neg):
        raise DataError(f'{len(pos)} counts of positives and {len(neg)} of negatives: give one of each per class')
    return (neg / pos).pow(1 / temperature).clamp(max=cap).float()


def _check_counts(name: str, counts: Counts) -> Tensor:
    """Counts as float64 (C,) of at least 1."""
    values = torch.as_tensor(counts, dtype=torch.float64)
    if values.dim() != 1 or not len(values) or not (values.isfinite() & (values >= 0)).all():
        raise DataError(f'{name}={counts} must be numbers >= 0, one per class')
    return values.clamp(min=1)


def _with_mean_one(weights: Tensor) -> Tensor:
    return (weights / weights.mean()).float()
