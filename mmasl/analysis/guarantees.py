"""Thresholds that keep a promised recall or precision on new images, whatever the distribution of the scores.

The images of the calibration and new images must be exchangeable, for example drawn at random from one source, and the
model must not have seen either. No other assumption is made, and the promises hold for any number of images.

Recall is monotone in the threshold: conformal risk control (Angelopoulos et al., arXiv 2208.02814) bounds the mean of
the missed share over calibration sets and new images. Precision is not monotone: Learn then Test (Angelopoulos et al.,
arXiv 2110.01052) chooses among thresholds by hypothesis tests, and its bound holds with a confidence 1 - ``delta`` over
calibration sets.
"""
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from mmasl.errors import ConfigError, DataError

CANDIDATES = 200  # thresholds of a class that are tested


class Guarantee(NamedTuple):
    """Thresholds with a promise: a label is predicted where p is at least the threshold of its class.

    Args:
        thresholds: float64 (C,). NaN where there is too little data to promise anything.
        positives: Number of positives that each threshold was computed from, (C,).
    """
    thresholds: np.ndarray
    positives: np.ndarray


def guarantee_recall(scores: np.ndarray, labels: np.ndarray, recall: float, by_class: bool = True) -> Guarantee:
    """Find the highest thresholds with a promised recall, by conformal risk control.

    By class, the loss of a positive is 1 if it is missed. Of n positives, k may be missed, where (k + 1) / (n + 1) is
    at most 1 - recall; a new positive of the class is then found with a probability of at least ``recall``. This needs
    n >= 1 / (1 - recall) - 1 positives, 19 for 0.95. Over all classes, the loss of an image is the share of its
    positives that are missed, as in Sec. 3 of the paper, and all classes share one threshold; images without positives
    are left out.

    Args:
        scores: Probabilities or logits (N, C).
        labels: (N, C) of 1, 0 and -1 (ignored).
        recall: Promised recall, in (0, 1).
        by_class: Whether to promise the recall of each class, or the mean recall of an image.

    Raises:
        ConfigError: ``recall`` is out of range.
    """
    budget = 1 - _exact('recall', recall)
    positives = (labels == 1).sum(0)
    if by_class:
        thresholds = [_highest(s[y == 1], np.ones((y == 1).sum()), budget) for s, y in zip(scores.T, labels.T)]
        return Guarantee(np.array(thresholds), positives)
    rows, columns = (labels == 1).nonzero()
    share = 1 / np.maximum((labels == 1).sum(1), 1)
    threshold = _highest(scores[rows, columns], share[rows], budget)
    return Guarantee(np.full(labels.shape[1], threshold), positives)


def _highest(scores: np.ndarray, losses: np.ndarray, budget: Fraction) -> float:
    """The highest threshold with (sum of the losses below it + 1) / (n + 1) <= budget; NaN if none has.

    Args:
        scores: Scores of all positives.
        losses: Loss of an image if the positive is missed; the losses of an image add up to 1.
        budget: Largest mean loss.
    """
    count = round(losses.sum())
    allowed = budget * (count + 1) - 1
    if allowed < 0:
        return float('nan')
    order = scores.argsort(kind='stable')
    # Whole losses add up exactly; the sum of rounded shares must not exceed the budget by its last digits.
    limit = math.floor(allowed) if (losses == 1).all() else float(allowed) - 1e-9
    missed = int(losses[order].cumsum().searchsorted(limit, side='right'))
    return float(scores[order[min(missed, len(order) - 1)]])


def guarantee_precision(scores: np.ndarray, labels: np.ndarray, precision: float, delta: float = 0.1,
                        by_class: bool = True, seed: int = 0) -> Guarantee:
    """Find the lowest thresholds with a promised precision, by Learn then Test with a fixed sequence.

    One half of the images orders the thresholds by their p-values. On the other half, the hypothesis that the precision
    is too low is tested in this order until the first is not rejected at ``delta``; the lowest threshold before is
    chosen. The first half does not depend on the second, so that the promise fails with a probability of at most
    ``delta``, for each class by itself. By class the test is the binomial tail. Over all classes, the loss of an image
    with predictions is the share that is wrong, all classes share one threshold, and the test is Hoeffding-Bentkus
    (Bates et al., arXiv 2101.02703). If no threshold is safe, there is no promise: n right predictions out of n are
    enough if precision^n <= delta, 22 for 0.9 and 0.1.

    Args:
        scores: Probabilities or logits (N, C).
        labels: (N, C) of 1, 0 and -1 (ignored).
        precision: Promised precision, in (0, 1).
        delta: Largest probability that the promise fails, in (0, 1).
        by_class: Whether to promise the precision of each class, or the mean precision of an image with predictions.
        seed: Seed of the split in halves.

    Raises:
        ConfigError: ``precision`` or ``delta`` is out of range.
        DataError: There are fewer than two images.
    """
    level = float(_exact('precision', precision))
    _exact('delta', delta)
    if len(labels) < 2:
        raise DataError(f'{len(labels)} images cannot be split in halves; give more')
    order = np.random.default_rng(seed).permutation(len(labels))
    halves = [(scores[rows], labels[rows]) for rows in np.array_split(order, 2)]
    test = _test_labels if by_class else _test_images
    columns: list = [[c] for c in range(labels.shape[1])] if by_class else [slice(None)]
    first, second = ([(s[:, c], y[:, c]) for c in columns] for s, y in halves)
    found = [_lowest_safe(*pair, test, level, delta) for pair in zip(first, second)]
    return Guarantee(np.broadcast_to(found, labels.shape[1]).copy(), (labels == 1).sum(0))


def _lowest_safe(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], test: Callable,
                 level: float, delta: float) -> float:
    """Order thresholds by the first half, and test them on the second."""
    thresholds = np.unique(first[0][first[1] == 1])[::-1]
    if thresholds.size > CANDIDATES:
        thresholds = thresholds[np.linspace(0, thresholds.size - 1, CANDIDATES).round().astype(int)]
    if not thresholds.size:
        return float('nan')
    order = test(*first, thresholds, level).argsort(kind='stable')
    rejected = test(*second, thresholds[order], level) <= delta
    safe = thresholds[order][:rejected.argmin() if not rejected.all() else None]
    return float(safe.min()) if safe.size else float('nan')


def _test_labels(scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, level: float) -> np.ndarray:
    """P-values of 'the precision at each threshold is at most ``level``' for one class: the binomial tail."""
    positives, known = (np.sort(scores[chosen]) for chosen in (labels == 1, labels >= 0))
    tp, predicted = (x.size - x.searchsorted(thresholds) for x in (positives, known))
    return binom.sf(tp - 1, predicted, level)


def _test_images(scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, level: float) -> np.ndarray:
    """The same for the mean precision of an image with predictions: Hoeffding-Bentkus."""
    values = []
    for threshold in thresholds:
        chosen = (scores >= threshold) & (labels >= 0)
        predicted = chosen.sum(1)
        wrong = (chosen & (labels == 0)).sum(1)[predicted > 0] / predicted[predicted > 0]
        values.append(hoeffding_bentkus(float(wrong.mean()) if wrong.size else 1., wrong.size, 1 - level))
    return np.array(values)


def hoeffding_bentkus(mean: float, count: int, bound: float) -> float:
    """P-value of 'the expected loss is above ``bound``' from the mean of losses in [0, 1].

    Args:
        mean: Mean of the losses.
        count: Number of independent losses n.
        bound: Bound of the expectation, in (0, 1).
    """
    if mean >= bound or not count:
        return 1.
    entropy = (mean * math.log(mean / bound) if mean else 0) + (1 - mean) * math.log((1 - mean) / (1 - bound))
    # The last digits of n * mean must not raise the number of losses that Bentkus' bound counts.
    losses = math.ceil(count * mean - 1e-9)
    return float(min(1., math.exp(-count * entropy), math.e * binom.cdf(losses, count, bound)))


def _exact(name: str, value: float) -> Fraction:
    """The number as it is written, since 1 - 0.95 in floating point is above 0.05."""
    if not 0 < value < 1:
        raise ConfigError(f'{name}={value} must be between 0 and 1')
    return Fraction(str(value))
