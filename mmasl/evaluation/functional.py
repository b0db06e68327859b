"""Metrics of multi-label classification as functions of NumPy arrays.

Implementations of these metrics differ in many details. :class:`Conventions` names every such choice, and ``PRESETS``
holds those of four published implementations.
"""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from mmasl.errors import ConfigError, DataError

from .score_storage import ScoreMatrix, pack, unpack

CHOICES = dict(
    ap_mode=('non_interpolated', 'voc2007', 'voc2010'),
    cf1=('harmonic', 'mean'),
    empty=('skip', 'zero', 'error'),
    no_negative=('count', 'skip'),
    no_prediction=('zero', 'skip'),
    ignored=('skip', 'negative'))
RANGES = dict(p_t_pos=(0, 1), p_t_neg=(0, 1), gap=(-1, 1), ECE=(0, 1))  # of metrics that are not in percent


@dataclass(frozen=True)
class Conventions:
    """Choices that differ between implementations of the metrics. The defaults are the preset ``paper``.

    Args:
        ap_mode: Form of the average precision. 'non_interpolated': sum of (recall step x precision); 'voc2010': the
            same with the monotone envelope of the precision; 'voc2007': mean of the envelope at the 11 recalls 0, 0.1,
            ..., 1.
        threshold: Labels with a probability above this value, in [0, 1], are predicted: one number, or one per class.
        inclusive: Also predict labels whose probability equals the threshold.
        cf1: 'harmonic': harmonic mean of CP and CR; 'mean': mean of the F1 of all classes.
        topk: k >= 1 of the second set of precision, recall and F1; None omits that set.
        topk_above_threshold: Whether the k highest labels of a sample must also pass the threshold.
        empty: Treatment of a class without positives in mAP, CP, CR and CF1. 'skip' omits the class, 'zero' counts 0,
            'error' raises. OP, OR and OF1 always include its predictions.
        no_negative: Treatment of a class without negatives in the two means of average precision. Its average precision
            is always 1. 'count' includes the class, 'skip' omits it.
        no_prediction: Treatment of a class without predictions in CP. 'zero' counts 0, 'skip' omits the class.
        ignored: Treatment of ignored labels in precision, recall and F1. 'skip' omits them, 'negative' counts them as
            negatives. Average precision and the probability gap always omit them.

    Raises:
        ConfigError: A value is not valid.
    """
    ap_mode: str = 'non_interpolated'
    threshold: float | Sequence[float] = 0.5
    inclusive: bool = False
    cf1: str = 'harmonic'
    topk: int | None = 3
    topk_above_threshold: bool = True
    empty: str = 'skip'
    no_negative: str = 'count'
    no_prediction: str = 'zero'
    ignored: str = 'skip'

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            check_choice(name, getattr(self, name), valid)
        try:
            values = np.asarray(self.threshold, np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f'threshold={self.threshold!r}: set a number in [0, 1], or one per class.') from None
        if values.ndim > 1 or not ((values >= 0) & (values <= 1)).all():
            raise ConfigError(f'threshold={self.threshold!r} is not a probability; set a number in [0, 1], or one per '
                              'class.')
        object.__setattr__(self, 'threshold', tuple(values.tolist()) if values.ndim else float(values))
        if self.topk is not None and (not isinstance(self.topk, int) or self.topk < 1):
            raise ConfigError(f'topk={self.topk!r} is not a positive integer; set None to omit the top-k metrics.')

    def thresholds(self, num_classes: int) -> np.ndarray:
        """The threshold of each class, float64 (C,).

        Raises:
            ConfigError: There is another number of thresholds than of classes.
        """
        values = np.asarray(self.threshold)
        if values.ndim and len(values) != num_classes:
            raise ConfigError(f'threshold has {len(values)} values for {num_classes} classes; set one number, or one '
                              'per class.')
        return np.broadcast_to(values, num_classes)


def check_choice(name: str, value: object, valid: Iterable) -> None:
    """Raise ConfigError unless ``value`` of the argument ``name`` is one of ``valid``."""
    if value not in valid:
        raise ConfigError(f'{name}={value!r} is unknown; valid: {", ".join(map(repr, valid))}.')


PRESETS = dict(
    paper=Conventions(),
    ml_gcn=Conventions(inclusive=True, empty='error', ignored='negative'),
    official=Conventions(threshold=0.8, cf1='mean', empty='zero'),
    mmpretrain=Conventions(inclusive=True, cf1='mean', topk_above_threshold=False, empty='zero'))


def average_precision(scores: np.ndarray, labels: np.ndarray, mode: str = 'non_interpolated') -> np.ndarray:
    """Average precision of each class.

    Samples with equal scores form one step of the curve, so the order of the samples does not matter. The recalls of
    'voc2007' are compared as integers and therefore exactly.

    Args:
        scores: Finite scores (N, C); logits are allowed.
        labels: (N, C) of 1, 0 and -1 (ignored).
        mode: ``ap_mode`` of :class:`Conventions`.

    Returns:
        (C,) in [0, 1]; NaN for a class without positives.

    Raises:
        ConfigError: ``mode`` is unknown.
    """
    check_choice('mode', mode, CHOICES['ap_mode'])
    return np.array([_class_average_precision(*_sort_by_label(s, y), mode) for s, y in zip(scores.T, labels.T)])


def _sort_by_label(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the negatives and of the positives of a class, ascending."""
    return np.sort(scores[labels == 0]), np.sort(scores[labels == 1])


def _class_average_precision(negatives: np.ndarray, positives: np.ndarray, mode: str) -> float:
    # Recall rises only at the scores of positives, and precision is highest for each recall there. Other thresholds are
    # not needed.
    thresholds, gained = np.unique(positives, return_counts=True)
    if thresholds.size == 0:
        return float('nan')
    thresholds, gained = thresholds[::-1], gained[::-1]
    tp = gained.cumsum()
    fp = negatives.size - negatives.searchsorted(thresholds)
    precision = tp / (tp + fp)
    if mode != 'non_interpolated':
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if mode == 'voc2007':
        return precision[(10 * tp).searchsorted(np.arange(11) * tp[-1])].mean()
    return (precision * gained).sum() / tp[-1]


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class: the probability that a positive scores higher than a negative.

    A tie of a positive and a negative counts one half (Mann-Whitney U), as in scikit-learn's ``roc_auc_score``.

    Args:
        scores: Finite scores (N, C); logits are allowed.
        labels: (N, C) of 1, 0 and -1 (ignored).

    Returns:
        (C,) in [0, 1]; NaN for a class without positives or without negatives.
    """
    return np.array([_class_roc_auc(*_sort_by_label(s, y)) for s, y in zip(scores.T, labels.T)])


def _class_roc_auc(negatives: np.ndarray, positives: np.ndarray) -> float:
    if not negatives.size or not positives.size:
        return float('nan')
    won = sum(int(negatives.searchsorted(positives, side).sum()) for side in ('left', 'right'))
    return won / (2 * negatives.size * positives.size)


def predicted_labels(scores: np.ndarray,
                     threshold: float | np.ndarray | None = None,
                     inclusive: bool = False,
                     topk: int | None = None) -> np.ndarray:
    """Labels that pass the threshold and are among the k highest of their sample.

    A label is among the k highest if fewer than k labels of its sample, ignored ones included, score higher. All labels
    tied for the k-th place are included, so the order of the classes does not matter.

    Args:
        scores: Scores (N, C).
        threshold: Scores above it pass, one number or what broadcasts to the scores; None: all pass.
        inclusive: Scores equal to the threshold pass too.
        topk: k >= 1; None: no limit.

    Returns:
        bool (N, C).
    """
    predicted = np.ones(scores.shape, bool)
    if threshold is not None:
        predicted = scores >= threshold if inclusive else scores > threshold
    if topk is not None and topk < scores.shape[1]:
        predicted &= scores >= np.partition(scores, -topk, axis=1)[:, -topk, None]
    return predicted


def count_outcomes(predicted: np.ndarray, labels: np.ndarray, ignored: str = 'skip') -> np.ndarray:
    """Count the true positives, predictions and positives of each class.

    Args:
        predicted: Predicted labels, bool (N, C).
        labels: (N, C) of 1, 0 and -1.
        ignored: As in :class:`Conventions`.

    Returns:
        int (3, C).

    Raises:
        ConfigError: ``ignored`` is unknown.
    """
    check_choice('ignored', ignored, CHOICES['ignored'])
    positive = labels == 1
    if ignored == 'skip':
        predicted = predicted & (labels >= 0)
    return np.stack([(predicted & positive).sum(0), predicted.sum(0), positive.sum(0)])


def precision_recall_f1(tp: np.ndarray,
                        predicted: np.ndarray,
                        positive: np.ndarray,
                        conventions: Conventions = PRESETS['paper']) -> dict[str, float]:
    """Precision, recall and F1: means over classes (CP, CR, CF1) and over all labels (OP, OR, OF1).

    Args:
        tp, predicted, positive: Counts of each class (C,), from :func:`count_outcomes`.
        conventions: Its ``cf1``, ``empty`` and ``no_prediction`` apply.

    Returns:
        The six values by name, in percent. A mean over no class and a ratio with denominator 0 are 0.
    """
    kept = positive > 0 if conventions.empty == 'skip' else np.ones(positive.shape, bool)
    chosen = _with_precision(kept, predicted, conventions)
    cp = _mean(_ratio(tp, predicted)[chosen])
    cr = _mean(_ratio(tp, positive)[kept])
    cf1: Any = _ratio(2 * cp * cr, cp + cr)
    if conventions.cf1 == 'mean':
        cf1 = _mean(_ratio(2 * tp, predicted + positive)[kept])
    op, or_ = _ratio(tp.sum(), predicted.sum()), _ratio(tp.sum(), positive.sum())
    of1 = _ratio(2 * tp.sum(), predicted.sum() + positive.sum())
    values: dict[str, Any] = dict(CP=cp, CR=cr, CF1=cf1, OP=op, OR=or_, OF1=of1)
    return {name: 100 * float(value) for name, value in values.items()}


def _with_precision(kept: np.ndarray, predicted: np.ndarray, conventions: Conventions) -> np.ndarray:
    """Classes of ``kept`` whose precision counts, by ``no_prediction``."""
    return kept & (predicted > 0) if conventions.no_prediction == 'skip' else kept


def probability_gap(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Probability gap of Eq. 9-10 of the ASL paper (arXiv 2009.14119), over a whole data set.

    Args:
        scores: Probabilities (N, C).
        labels: (N, C) of 1, 0 and -1.

    Returns:
        ``p_t_pos``: mean p of the positive labels; ``p_t_neg``: mean 1 - p of the negative labels; ``gap``: their
        difference. All are fractions, NaN where there is no such label.
    """
    sums = [(scores.sum(where=labels == y, dtype=np.float64), (labels == y).sum()) for y in (0, 1)]
    return _gap_from_sums(*np.array(sums))


def _gap_from_sums(negatives: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """:func:`probability_gap` from (sum of probabilities, count) of each kind of label."""
    p_neg, p_t_pos = (float(total / count) if count else float('nan') for total, count in (negatives, positives))
    return dict(p_t_pos=p_t_pos, p_t_neg=1 - p_neg, gap=p_t_pos - (1 - p_neg))


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False) -> np.ndarray:
    """Data of a reliability diagram: labels binned by their probability.

    A bin includes its lower end, the last bin both ends. Ignored labels are omitted.

    Args:
        scores: Probabilities (N, C).
        labels: (N, C) of 1, 0 and -1.
        bins: Number of bins, >= 1.
        equal_mass: Use bins of equal counts over all classes instead of equal width. Equal probabilities share a bin.

    Returns:
        float64 (C, 3, bins): count, sum of probabilities and number of positives.

    Raises:
        ConfigError: ``bins`` is not a positive integer.
    """
    if not isinstance(bins, int) or bins < 1:
        raise ConfigError(f'bins={bins!r} is not a positive integer.')
    ends = np.arange(1, bins) / bins
    if equal_mass and (labels >= 0).any():
        ends = np.quantile(scores[labels >= 0], ends)
    return np.array([_class_reliability(*_sort_by_label(s, y), ends) for s, y in zip(scores.T, labels.T)])


def _class_reliability(negatives: np.ndarray, positives: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """:func:`reliability` of one class, (3, bins), from ascending probabilities."""
    def fill(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = values.astype(np.float64, copy=False)
        starts = np.concatenate([[0], values.searchsorted(ends)])
        count = np.diff(starts, append=values.size)
        # For an empty bin, reduceat returns the value at its start. The appended 0 keeps the last start in range.
        return count, np.add.reduceat(np.append(values, 0), starts) * (count > 0)

    (n_neg, p_neg), (n_pos, p_pos) = fill(negatives), fill(positives)
    return np.stack([n_neg + n_pos, p_neg + p_pos, n_pos])


def expected_calibration_error(scores: np.ndarray,
                               labels: np.ndarray,
                               bins: int = 15,
                               classwise: bool = False,
                               equal_mass: bool = False) -> float:
    """Expected calibration error over all labels (Guo et al., ICML 2017, applied to the positive probability).

    Args:
        scores: Probabilities (N, C).
        labels: (N, C) of 1, 0 and -1.
        bins: Number of bins, >= 1.
        classwise: Average the errors of the classes that have labels. Without it, errors of opposite sign in different
            classes cancel.
        equal_mass: As in :func:`reliability`.

    Returns:
        A fraction in [0, 1]; NaN if there is no label.

    Raises:
        ConfigError: ``bins`` is not a positive integer.
    """
    return _error_from_bins(reliability(scores, labels, bins, equal_mass), classwise)


def _error_from_bins(sums: np.ndarray, classwise: bool = False) -> float:
    """:func:`expected_calibration_error` from what :func:`reliability` returns."""
    count, probability, positives = (sums if classwise else sums.sum(0, keepdims=True)).transpose(1, 0, 2)
    labelled = count.sum(1) > 0
    if not labelled.any():
        return float('nan')
    error = np.abs(probability - positives).sum(1)[labelled] / count.sum(1)[labelled]
    return float(error.mean())


def multilabel_metrics(scores: np.ndarray,
                       labels: np.ndarray,
                       conventions: Conventions = PRESETS['paper'],
                       classes: Sequence[str] | None = None,
                       calibrated: np.ndarray | None = None) -> tuple[dict[str, float], np.ndarray]:
    """All metrics of :class:`mmasl.MultiLabelMetric`.

    Args:
        scores: Probabilities (N, C).
        labels: (N, C) of 1, 0 and -1.
        conventions: Choices between definitions.
        classes: Class names for the error messages.
        calibrated: Calibrated probabilities (N, C). The threshold and the calibration error then use them.

    Returns:
        The metrics by name, and the average precision of each class (C,) in percent.

    Raises:
        ConfigError: The conventions have another number of thresholds than there are classes.
        DataError: Shapes differ, or values are out of range; no class has positives; or a class has none and
            ``conventions.empty`` is 'error'.
    """
    kinds = [x.astype(np.result_type(x, np.float16), copy=False)
             for x in ([scores] if calibrated is None else [scores, calibrated])]
    if kinds[-1].shape != kinds[0].shape:
        raise DataError(f'The calibrated scores have shape {kinds[-1].shape} and the scores {kinds[0].shape}; '
                        'both must be (N, C).')
    if labels.ndim != 2 or kinds[0].shape != labels.shape or not labels.size:
        raise DataError(f'The scores have shape {kinds[0].shape} and the labels {labels.shape}; both must be (N, C) '
                        'with N and C above 0.')
    for name, values in zip(('scores', 'calibrated scores'), kinds):
        if not (values.min() >= 0 and values.max() <= 1):  # also true for NaN
            raise DataError(f'The {name} range from {values.min()} to {values.max()}, outside of [0, 1]; apply a '
                            'sigmoid to logits.')
    if (unknown := (labels != 0) & (labels != 1) & (labels != -1)).any():
        raise DataError(f'The labels contain {labels[unknown][0]}; use 1 for positive, 0 for negative, -1 for ignored.')

    def read(rows: slice, columns: slice) -> list[np.ndarray]:
        return [pack(values[rows, columns], labels[rows, columns]) for values in kinds]

    metrics, by_class = metrics_from_blocks(ScoreMatrix(read, *labels.shape), conventions, classes)
    return metrics, by_class.ap


class ClassMetrics(NamedTuple):
    """Metrics of each class, (C,), in percent. NaN marks a value that is undefined, or that the conventions leave out.

    Args:
        positives: Number of positives.
        ap: Average precision.
        auc: Area under the ROC curve.
        precision, recall: At the threshold.
    """
    positives: np.ndarray
    ap: np.ndarray
    auc: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def metrics_from_blocks(blocks: ScoreMatrix, conventions: Conventions,
                        classes: Sequence[str] | None) -> tuple[dict[str, float], ClassMetrics]:
    """All metrics from stored scores, computed in as many threads as PyTorch uses.

    Args:
        blocks: The scores and labels.
        conventions: Choices between definitions.
        classes: Class names for the error messages.

    Returns:
        The metrics by name, and those of each class.

    Raises:
        ConfigError, DataError: As :func:`multilabel_metrics`.
    """
    c, thresholds = conventions, conventions.thresholds(blocks.num_classes)
    with_thresholds = ([*codes, part[None]]
                       for codes, part in zip(blocks.class_blocks(), blocks.split_by_class(thresholds)))
    parts = zip(*_map_threads(partial(_summarize_classes, c=c), with_thresholds, axis=1))
    areas, counts, sums, bins = map(np.concatenate, parts)
    ap, auc = 100 * areas.T
    empty = np.isnan(ap)
    if empty.all() and c.empty == 'skip':
        raise DataError(f'No class has a positive label among {blocks.num_samples} samples; check the annotations.')
    if empty.any() and c.empty == 'error':
        raise DataError(f'There is no positive label in {list_classes(empty, classes)}; check the annotations and '
                        "class names, or set empty='skip' or empty='zero'.")
    if c.empty == 'zero':
        ap[empty] = 0
    positives = counts[:, 2]
    if c.no_negative == 'skip':
        ap[(positives > 0) & (sums[:, 0, 1] == 0)] = np.nan
        if np.isnan(ap).all():
            raise DataError(f'No class has both a positive and a negative label among {blocks.num_samples} samples; '
                            "check the annotations, or set no_negative='count'.")
    used = ~np.isnan(ap)
    metrics = dict(mAP=float(ap[used].mean()),
                   mAP_weighted=float(_ratio(ap[used] @ positives[used], positives[used].sum())),
                   AUC=float(auc[~np.isnan(auc)].mean()) if (~np.isnan(auc)).any() else float('nan'),
                   **precision_recall_f1(counts[:, 0], counts[:, 1], positives, c))
    if c.topk is not None:
        count = partial(_count_topk, c=c, thresholds=thresholds)
        tp, predicted = sum(_map_threads(count, blocks.sample_blocks(), axis=0))
        metrics |= {f'{name}_top{c.topk}': value
                    for name, value in precision_recall_f1(tp, predicted, positives, c).items()}
    metrics |= _gap_from_sums(*sums.sum(0)) | dict(ECE=_error_from_bins(bins))
    found = (positives > 0) | (c.empty == 'zero')
    precision = np.where(_with_precision(found, counts[:, 1], c), 100 * _ratio(counts[:, 0], counts[:, 1]), np.nan)
    recall = np.where(found, 100 * _ratio(counts[:, 0], positives), np.nan)
    return metrics, ClassMetrics(positives, ap, auc, precision, recall)


def bootstrap_intervals(metrics: Mapping[str, float], resample: Callable[[np.ndarray], dict[str, float]],
                        num_samples: int, resamples: int, level: float = 0.95, seed: int = 0
                        ) -> dict[str, tuple[float, float]]:
    """Normal bootstrap intervals over images (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, Ch. 13).

    They are the metric plus and minus multiples of the standard deviation of the draws, cut to the metric's range.
    Quantiles of the draws would be no interval of mAP: a positive that is drawn twice ties with itself, which raises
    the average precision of rare classes.

    Args:
        metrics: The metrics of all images by name, as :func:`multilabel_metrics` has them.
        resample: Computes them from the indices of N images, drawn with replacement.
        num_samples: Number of images N.
        resamples: Number of draws, >= 2.
        level: Coverage of the intervals, in (0, 1).
        seed: Seed of the draws.

    Returns:
        Lower and upper end of each metric; NaN for a metric that is undefined in all draws but one.
    """
    rng = np.random.default_rng(seed)
    drawn = [resample(rng.integers(num_samples, size=num_samples)) for _ in range(resamples)]
    width, ends = NormalDist().inv_cdf((1 + level) / 2), {}
    for name, value in metrics.items():
        values = np.array([one.get(name, np.nan) for one in drawn])
        values = values[~np.isnan(values)]
        half = width * values.std(ddof=1) if values.size > 1 else np.nan
        low, high = RANGES.get(name, (0, 100))
        ends[name] = float(np.maximum(value - half, low)), float(np.minimum(value + half, high))
    return ends


def list_classes(chosen: np.ndarray, classes: Sequence[str] | None) -> str:
    """Describe the chosen classes, bool (C,), for a message: how many, and the names of the first ten."""
    first = [repr(classes[c]) if classes else str(c) for c in chosen.nonzero()[0][:10]]
    return f'{chosen.sum()} of {chosen.size} classes ({", ".join(first)}{", ..." if chosen.sum() > 10 else ""})'


def _map_threads(function: Callable[[Sequence[np.ndarray]], Any], blocks: Iterable[Sequence[np.ndarray]],
                 axis: int) -> Iterator[Any]:
    """Apply ``function`` to shares of each block, cut along ``axis``, and yield the results in order."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for arrays in blocks:
            yield from pool.map(function, zip(*(np.array_split(x, min(4 * threads, x.shape[axis]), axis)
                                                for x in arrays)))


def _summarize_classes(codes: Sequence[np.ndarray], c: Conventions) -> list[np.ndarray]:
    """Summarize B classes from their codes (N, B) and, last, their thresholds (1, B).

    Returns:
        Average precision and area under the ROC curve (B, 2) in [0, 1]; true positives, predictions and positives
        (B, 3); sum of probabilities and count of the negatives and of the positives (B, 2, 2); :func:`reliability`
        (B, 3, 15).
    """
    *codes, thresholds = codes
    thresholds = thresholds[0].astype(f'f{codes[-1].itemsize}').astype(np.float64)  # rounded as the scores are
    ends = np.arange(1, 15) / 15
    summaries = []
    for threshold, *ranked in zip(thresholds, *map(_sort_codes, codes)):
        _, negatives, positives = _split(ranked[0])
        decisive = _split(ranked[-1])
        chosen = [x.size - x.searchsorted(threshold, 'left' if c.inclusive else 'right') for x in decisive]
        predicted = sum(chosen) if c.ignored == 'negative' else sum(chosen[1:])
        summaries.append(((_class_average_precision(negatives, positives, c.ap_mode),
                           _class_roc_auc(negatives, positives)),
                          (chosen[2], predicted, positives.size),
                          [(x.sum(), x.size) for x in (negatives, positives)],
                          _class_reliability(decisive[1], decisive[2], ends)))
    return [np.array(x) for x in zip(*summaries)]


def _sort_codes(codes: np.ndarray) -> np.ndarray:
    """Codes (N, B) of B classes as (B, N), ascending."""
    # NumPy's stable sort of 16-bit integers is a radix sort, six times as fast as its default. Wider integers are
    # faster with the default.
    ranked = codes.T.copy()
    ranked.sort(axis=1, kind='stable' if ranked.itemsize == 2 else None)
    return ranked


def _split(ranked: np.ndarray) -> list[np.ndarray]:
    """Ascending probabilities (float64) of the ignored, negative and positive labels of a class."""
    ends = ranked.searchsorted(pack(np.zeros(2, f'f{ranked.itemsize}'), np.arange(2)))
    return np.split(unpack(ranked)[0].astype(np.float64), ends)


def _count_topk(codes: Sequence[np.ndarray], c: Conventions, thresholds: np.ndarray) -> np.ndarray:
    """True positives and predictions of each class, int (2, C), where only the k highest of a sample are predicted.

    The last array of ``codes`` holds the classes of the codes.
    """
    *codes, classes = codes
    scores = unpack(codes[0])[0]
    # np.partition is slow for float16.
    best = predicted_labels(scores.astype(np.float32) if scores.itemsize == 2 else scores, topk=c.topk).nonzero()
    scores, labels = unpack(codes[-1][best])
    classes = classes[best]
    kept = labels >= 0 if c.ignored == 'skip' else np.ones(labels.size, bool)
    if c.topk_above_threshold:
        kept &= predicted_labels(scores, thresholds.astype(scores.dtype)[classes], c.inclusive)
    return np.stack([np.bincount(classes[x], minlength=thresholds.size) for x in (kept & (labels == 1), kept)])


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    return np.asarray(part) / np.where(np.asarray(whole) == 0, 1, whole)


def _mean(values: np.ndarray) -> float:
    return values.mean() if values.size else 0.
