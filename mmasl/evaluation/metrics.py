"""Metrics of multi-label classification, with every convention named, and :class:`MacroF1` for thousands of classes of
which a sample has one.

Pure functions on NumPy arrays do the arithmetic, :class:`MultiLabelMetric` collects what they need. ``scores`` are
float (N, C), ``labels`` int8 (N, C): 1 positive, 0 negative, -1 ignored.

The report keeps no matrix of scores beside one of labels: :func:`pack` puts both into one integer. Sorting those of a
class leaves its ignored, negative and positive labels side by side, each by probability, and all figures of the class
are read off there. It goes over blocks of classes, and of samples for the top-k, in as many threads as torch has; NumPy
lets them run at the same time. Where most labels are ignored, only the others are kept: see :class:`_Records`.
"""
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from numpy.typing import ArrayLike

from mmasl.registry import METRICS

CHOICES = dict(
    ap_mode=('non_interpolated', 'voc2007', 'voc2010'),
    cf1=('harmonic', 'mean'),
    empty=('skip', 'zero', 'error'),
    no_negative=('count', 'skip'),
    no_prediction=('zero', 'skip'),
    ignored=('skip', 'negative'))
BLOCK = 2**24  # labels that are worked on at a time
SLAB = 2**26  # bytes of samples that are kept in one piece


@dataclass(frozen=True)
class Conventions:
    """What implementations of these metrics disagree on; the defaults are the preset ``paper``.

    Args:
        ap_mode: 'non_interpolated': sum of (recall step x precision); 'voc2010': the same under the monotone envelope
            of precision; 'voc2007': mean of the envelope at the 11 recalls 0, 0.1, ..., 1.
        threshold: A label is predicted where its probability, in [0, 1], exceeds this.
        inclusive: Whether a probability equal to the threshold is predicted too.
        cf1: 'harmonic': harmonic mean of CP and CR; 'mean': mean of the classes' F1.
        topk: k >= 1 of the second set of precision, recall and F1; None leaves that set out.
        topk_above_threshold: Whether the k best labels of an image must also pass the threshold.
        empty: A class without positives is left out of mAP, CP, CR and CF1 ('skip'), counts 0 there ('zero') or is an
            'error'. OP, OR and OF1 always count its predictions.
        no_negative: A class without negatives, whose average precision is 1 whatever its scores, counts so ('count') or
            is left out of both means of average precision ('skip').
        no_prediction: A class that is never predicted has precision 0 ('zero') or is left out of CP ('skip').
        ignored: In precision, recall and F1, ignored labels are left out ('skip') or are negatives ('negative').
            Average precision and the probability gap always leave them out.

    Raises:
        ValueError: If a value is not one of these.
    """
    ap_mode: str = 'non_interpolated'
    threshold: float = 0.5
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
            _check_choice(name, getattr(self, name), valid)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f'threshold={self.threshold!r} is not a probability; give a number in [0, 1]')
        if self.topk is not None and (not isinstance(self.topk, int) or self.topk < 1):
            raise ValueError(f'topk={self.topk!r} is not a positive integer; None leaves the top-k metrics out')


def _check_choice(name: str, value: object, valid: Iterable) -> None:
    if value not in valid:
        raise ValueError(f'{name}={value!r} is unknown; valid: {", ".join(map(repr, valid))}')


PRESETS = dict(
    paper=Conventions(),
    ml_gcn=Conventions(inclusive=True, empty='error', ignored='negative'),
    official=Conventions(threshold=0.8, cf1='mean', empty='zero'),
    mmpretrain=Conventions(inclusive=True, cf1='mean', topk_above_threshold=False, empty='zero'))


def average_precision(scores: np.ndarray, labels: np.ndarray, mode: str = 'non_interpolated') -> np.ndarray:
    """Average precision of each class, (C,) in [0, 1]; NaN for a class without positives.

    Samples of equal score are one step of the curve, so the order of the samples does not matter. Scores need only be
    finite and may be logits. The forms are those of :class:`Conventions`; the recalls of 'voc2007' are compared in
    integers, hence exactly.
    """
    _check_choice('mode', mode, CHOICES['ap_mode'])
    return np.array([_average_precision(*_rank(s, y), mode) for s, y in zip(scores.T, labels.T)])


def _rank(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores of a class's negatives and of its positives, ascending."""
    return np.sort(scores[labels == 0]), np.sort(scores[labels == 1])


def _average_precision(negatives: np.ndarray, positives: np.ndarray, mode: str) -> float:
    # Recall rises only at the scores of positives, and precision is highest for each recall there: no other threshold
    # is needed, and negatives have only to be counted.
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


def predicted_labels(scores: np.ndarray,
                     threshold: float | None = None,
                     inclusive: bool = False,
                     topk: int | None = None) -> np.ndarray:
    """Predicted labels, bool (N, C): those that pass the threshold and are among the k best of their sample.

    A label is among the k best where fewer than k labels of the sample score higher: labels tied at the k-th place are
    all in, and the order of the classes does not matter. An ignored label keeps its place.
    """
    predicted = np.ones(scores.shape, bool)
    if threshold is not None:
        predicted = scores >= threshold if inclusive else scores > threshold
    if topk is not None and topk < scores.shape[1]:
        predicted &= scores >= np.partition(scores, -topk, axis=1)[:, -topk, None]
    return predicted


def count_outcomes(predicted: np.ndarray, labels: np.ndarray, ignored: str = 'skip') -> np.ndarray:
    """True positives, predictions and positives of each class, int (3, C), from two (N, C) arrays."""
    _check_choice('ignored', ignored, CHOICES['ignored'])
    positive = labels == 1
    if ignored == 'skip':
        predicted = predicted & (labels >= 0)
    return np.stack([(predicted & positive).sum(0), predicted.sum(0), positive.sum(0)])


def precision_recall_f1(tp: np.ndarray,
                        predicted: np.ndarray,
                        positive: np.ndarray,
                        conventions: Conventions = PRESETS['paper']) -> dict[str, float]:
    """CP, CR, CF1 over classes and OP, OR, OF1 over all labels, in percent, from counts of shape (C,).

    A mean over no class and a ratio of nothing are 0.
    """
    kept = positive > 0 if conventions.empty == 'skip' else np.ones(positive.shape, bool)
    chosen = kept & (predicted > 0) if conventions.no_prediction == 'skip' else kept
    cp = _mean(_ratio(tp, predicted)[chosen])
    cr = _mean(_ratio(tp, positive)[kept])
    cf1: Any = _ratio(2 * cp * cr, cp + cr)
    if conventions.cf1 == 'mean':
        cf1 = _mean(_ratio(2 * tp, predicted + positive)[kept])
    op, or_ = _ratio(tp.sum(), predicted.sum()), _ratio(tp.sum(), positive.sum())
    of1 = _ratio(2 * tp.sum(), predicted.sum() + positive.sum())
    figures: dict[str, Any] = dict(CP=cp, CR=cr, CF1=cf1, OP=op, OR=or_, OF1=of1)
    return {name: 100 * float(value) for name, value in figures.items()}


def probability_gap(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean probability ``p_t_pos`` of the positive labels, ``p_t_neg`` = mean of 1 - p of the negative ones, and their
    difference ``gap`` (Eq. 9-10, here over the whole set), as fractions; NaN where there is no such label."""
    sums = [(scores.sum(where=labels == y, dtype=np.float64), (labels == y).sum()) for y in (0, 1)]
    return _probability_gap(*np.array(sums))


def _probability_gap(negatives: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """Of (sum of probabilities, count) of either kind."""
    p_neg, p_t_pos = (float(total / count) if count else float('nan') for total, count in (negatives, positives))
    return dict(p_t_pos=p_t_pos, p_t_neg=1 - p_neg, gap=p_t_pos - (1 - p_neg))


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False) -> np.ndarray:
    """What a reliability diagram shows: the count, the sum of probabilities and the positives of each bin and class.

    Entries of the label matrix are binned by their probability; ignored ones are left out. A bin holds its lower end,
    the last one both.

    Args:
        scores: Probabilities (N, C), in [0, 1].
        labels: (N, C) of 1, 0 and -1.
        bins: Number of bins, >= 1.
        equal_mass: Bins of equal counts over all classes instead of equal width; equal probabilities share a bin.

    Returns:
        float64 (C, 3, bins).
    """
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f'bins={bins!r} is not a positive integer')
    ends = np.arange(1, bins) / bins
    if equal_mass and (labels >= 0).any():
        ends = np.quantile(scores[labels >= 0], ends)
    return np.array([_reliability(*_rank(s, y), ends) for s, y in zip(scores.T, labels.T)])


def _reliability(negatives: np.ndarray, positives: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Count, sum and positives of each bin, float64 (3, bins), from ascending probabilities."""
    def fill(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = values.astype(np.float64, copy=False)
        starts = np.concatenate([[0], values.searchsorted(ends)])
        count = np.diff(starts, append=values.size)
        # An empty bin gets the value behind it from reduceat, and there is one behind the last.
        return count, np.add.reduceat(np.append(values, 0), starts) * (count > 0)

    (n_neg, p_neg), (n_pos, p_pos) = fill(negatives), fill(positives)
    return np.stack([n_neg + n_pos, p_neg + p_pos, n_pos])


def expected_calibration_error(scores: np.ndarray,
                               labels: np.ndarray,
                               bins: int = 15,
                               classwise: bool = False,
                               equal_mass: bool = False) -> float:
    """Mean distance between the probability and the frequency of positives, over the entries of the label matrix.

    The entries of a bin are compared as one, and bins weigh by their entries (Guo et al., ICML 2017, for a single
    probability: that of the positive label, not of the predicted one).

    Args:
        scores, labels, bins, equal_mass: See :func:`reliability`.
        classwise: Compare each class by itself, and average over the classes that have labels. All classes together
            hide that one is overrated where another is underrated.

    Returns:
        A fraction, in [0, 1]; NaN where there is no label.
    """
    return _calibration_error(reliability(scores, labels, bins, equal_mass), classwise)


def _calibration_error(sums: np.ndarray, classwise: bool = False) -> float:
    """Of what :func:`reliability` returns."""
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
    """All metrics by the names of :class:`MultiLabelMetric`, and the classes' average precision (C,) in percent.

    ``scores`` are probabilities (N, C), ``labels`` (N, C) in {1, 0, -1}; ``classes`` only name the classes in errors.
    ``calibrated`` probabilities (N, C) pass the threshold, and have the calibration error, in place of ``scores``.

    Raises:
        ValueError: If the shapes differ, or values are out of range; by ``conventions.empty`` where classes have no
            positives; also where no class has any and empty ones are skipped.
    """
    kinds = [x.astype(np.result_type(x, np.float16), copy=False)
             for x in ([scores] if calibrated is None else [scores, calibrated])]
    if kinds[-1].shape != kinds[0].shape:
        raise ValueError(f'calibrated scores {kinds[-1].shape} and scores {kinds[0].shape} must both be (N, C)')
    if labels.ndim != 2 or kinds[0].shape != labels.shape or not labels.size:
        raise ValueError(f'scores {kinds[0].shape} and labels {labels.shape} must both be (N, C), N and C above 0')
    for name, values in zip(('scores', 'calibrated scores'), kinds):
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is refused too
            raise ValueError(f'{name} reach from {values.min()} to {values.max()}: probabilities lie in [0, 1], logits '
                             'need a sigmoid first')
    if (unknown := (labels != 0) & (labels != 1) & (labels != -1)).any():
        raise ValueError(f'labels hold {labels[unknown][0]}: positive, negative and ignored are 1, 0 and -1')

    def read(rows: slice, columns: slice) -> list[np.ndarray]:
        return [pack(values[rows, columns], labels[rows, columns]) for values in kinds]

    samples, num_classes = labels.shape
    report, ap, _ = _report(_Matrix(read, samples, num_classes), samples, num_classes, conventions, classes)
    return report, ap


def pack(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Label and probability in one unsigned integer as wide as the score, ordered by label, then by probability.

    The floats from 0 to 1 leave their upper two bits free, at 16, 32 and 64 bits alike. There stands the label plus 1.

    Args:
        scores: float16, float32 or float64 in [0, 1], of any shape.
        labels: 1, 0 and -1, of the same shape.
    """
    codes = np.abs(scores).view(f'u{scores.itemsize}')  # abs, because -0 has a bit there
    codes |= (labels + 1).astype(codes.dtype) << _label_place(codes)
    return codes


def unpack(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels (int8) of what :func:`pack` returned."""
    place = _label_place(codes)
    return (codes & (2**place - 1)).view(f'f{codes.itemsize}'), (codes >> place).astype(np.int8) - 1


def _label_place(codes: np.ndarray) -> int:
    return 8 * codes.itemsize - 2


class _Matrix:
    """Codes of all labels, a block at a time.

    Args:
        read: Returns some rows and columns of the codes of the scores, and of the decisive ones behind them if those
            are others.
        samples, num_classes: Rows and columns.
    """

    def __init__(self, read: Callable[[slice, slice], list[np.ndarray]], samples: int, num_classes: int) -> None:
        self.read = read
        if samples * num_classes <= BLOCK:
            whole = read(slice(None), slice(None))
            self.read = lambda rows, columns: [x[rows, columns] for x in whole]
        self.classes = np.arange(num_classes)

    def of_classes(self, columns: slice) -> list[np.ndarray]:
        """What :func:`_class_figures` takes: codes of some classes (M, B), of each kind of score."""
        return self.read(slice(None), columns)

    def of_samples(self, rows: slice) -> list[np.ndarray]:
        """What :func:`_count_best` takes: codes of some samples (R, M), of each kind of score, and their classes."""
        codes = self.read(rows, slice(None))
        return [*codes, np.broadcast_to(self.classes, codes[0].shape)]


class _Records:
    """Codes of the labels that are not ignored, and of the k ignored ones of each sample that score best, with the same
    methods as :class:`_Matrix`.

    That is enough: no ignored label beside those k decides whether another is among the k best of its sample, and for a
    class the order of its labels does not matter. Groups are filled up with 0, the code of an ignored label.

    Args:
        samples: Records of one sample each, from :meth:`make`.
        num_classes: C.
    """

    def __init__(self, samples: Sequence[np.ndarray], num_classes: int) -> None:
        self.by_sample, self.sample_sizes = np.concatenate(samples), np.array([len(x) for x in samples])
        self.by_class = self.by_sample[self.by_sample['class'].argsort(kind='stable')]
        self.class_sizes = np.bincount(self.by_sample['class'], minlength=num_classes)

    @staticmethod
    def make(scores: Sequence[np.ndarray], labels: np.ndarray, topk: int | None) -> list[np.ndarray] | None:
        """The records of a batch, one array a sample; None if they take more than half of what all codes take."""
        record = np.dtype([('class', np.uint32), ('codes', f'u{scores[0].itemsize}', len(scores))])
        kept, topk = labels >= 0, min(topk or 0, labels.shape[1])
        if 2 * record.itemsize * (kept.sum() + topk * len(labels)) > sum(x.nbytes for x in scores):
            return None
        others = torch.from_numpy(np.where(kept, -1, scores[0]).astype(np.float32))
        np.put_along_axis(kept, others.topk(topk)[1].numpy(), True, axis=1)
        records = np.empty(kept.sum(), record)
        records['class'] = kept.nonzero()[1]
        for kind, values in enumerate(scores):
            records['codes'][:, kind] = pack(values[kept], labels[kept])
        return np.split(records, kept.sum(1).cumsum()[:-1])

    @staticmethod
    def spread(sample: np.ndarray, num_classes: int) -> np.ndarray:
        """The codes of all labels (K, C) of one sample, which may have them already."""
        if not sample.dtype.names:
            return sample
        codes = np.zeros((sample['codes'].shape[1], num_classes), sample['codes'].dtype)
        codes[:, sample['class']] = sample['codes'].T
        return codes

    def of_classes(self, columns: slice) -> list[np.ndarray]:
        sizes, first = self.class_sizes[columns], self.class_sizes[:columns.start].sum()
        codes = _fill_up(self.by_class[first:first + sizes.sum()], sizes)['codes']
        return [codes[..., kind].T for kind in range(codes.shape[2])]

    def of_samples(self, rows: slice) -> list[np.ndarray]:
        sizes, first = self.sample_sizes[rows], self.sample_sizes[:rows.start].sum()
        records = _fill_up(self.by_sample[first:first + sizes.sum()], sizes)
        return [*np.moveaxis(records['codes'], 2, 0), records['class']]


def _fill_up(records: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Groups of records that lie one after another as rows (G, M)."""
    rows = np.zeros((sizes.size, sizes.max(initial=0)), records.dtype)
    rows[np.arange(rows.shape[1]) < sizes[:, None]] = records
    return rows


def _report(blocks: _Matrix | _Records, samples: int, num_classes: int, c: Conventions,
            classes: Sequence[str] | None) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The metrics by name, and AP in percent and positives of each class, (C,)."""
    figures = []
    for columns in _slices(num_classes, BLOCK // samples):
        figures += _in_threads(partial(_class_figures, c=c), blocks.of_classes(columns), axis=1)
    ap, counts, sums, bins = map(np.concatenate, zip(*figures))
    ap *= 100
    empty = np.isnan(ap)
    if empty.all() and c.empty == 'skip':
        raise ValueError(f'no class has a positive label among {samples} samples: check the annotations')
    if empty.any() and c.empty == 'error':
        raise ValueError(f"no positive label in {_names(empty, classes)}: give empty='skip' or empty='zero', or "
                         'check the annotations and the class names of the data set')
    if c.empty == 'zero':
        ap[empty] = 0
    positives = counts[:, 2]
    if c.no_negative == 'skip':
        ap[(positives > 0) & (sums[:, 0, 1] == 0)] = np.nan
        if np.isnan(ap).all():
            raise ValueError(f'no class has a positive and a negative label among {samples} samples: check the '
                             "annotations, or give no_negative='count'")
    used = ~np.isnan(ap)
    report = dict(mAP=float(ap[used].mean()),
                  mAP_weighted=float(_ratio(ap[used] @ positives[used], positives[used].sum())),
                  **precision_recall_f1(counts[:, 0], counts[:, 1], positives, c))
    if c.topk is not None:
        best: Any = 0
        for rows in _slices(samples, BLOCK // num_classes):
            count = partial(_count_best, c=c, num_classes=num_classes)
            best += sum(_in_threads(count, blocks.of_samples(rows), axis=0))
        tp, predicted = best
        report |= {f'{name}_top{c.topk}': value
                   for name, value in precision_recall_f1(tp, predicted, positives, c).items()}
    report |= _probability_gap(*sums.sum(0)) | dict(ECE=_calibration_error(bins))
    return report, ap, positives


def _slices(length: int, step: int) -> list[slice]:
    step = max(step, 1)
    return [slice(start, start + step) for start in range(0, length, step)]


def _in_threads(function: Callable[[Sequence[np.ndarray]], object], arrays: Sequence[np.ndarray], axis: int) -> list:
    """``function`` of every share of the arrays, cut along ``axis``, in order."""
    threads = torch.get_num_threads()
    shares = zip(*(np.array_split(x, min(4 * threads, x.shape[axis]), axis) for x in arrays))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, shares))


def _class_figures(codes: Sequence[np.ndarray], c: Conventions) -> list[np.ndarray]:
    """Of B classes: average precision (B,), in [0, 1]; true positives, predictions and positives (B, 3); sum of
    probabilities and count of the negatives and of the positives (B, 2, 2); :func:`reliability` (B, 3, 15)."""
    threshold = float(np.dtype(f'f{codes[-1].itemsize}').type(c.threshold))  # rounded as the scores are
    ends = np.arange(1, 15) / 15
    figures = []
    for ranked in zip(*map(_rank_codes, codes)):
        _, negatives, positives = _split(ranked[0])
        decisive = _split(ranked[-1])
        chosen = [x.size - x.searchsorted(threshold, 'left' if c.inclusive else 'right') for x in decisive]
        predicted = sum(chosen) if c.ignored == 'negative' else sum(chosen[1:])
        figures.append((_average_precision(negatives, positives, c.ap_mode), (chosen[2], predicted, positives.size),
                        [(x.sum(), x.size) for x in (negatives, positives)],
                        _reliability(decisive[1], decisive[2], ends)))
    return [np.array(x) for x in zip(*figures)]


def _rank_codes(codes: np.ndarray) -> np.ndarray:
    """Codes (N, B) of B classes as (B, N), ascending."""
    codes = codes.T.copy()
    # For 16 bits, NumPy's stable sort is a radix sort; wider codes it sorts digit after digit. That takes 13 ns for 32
    # bits everywhere, np.sort 4 ns where it is vectorised well, but 26 by AVX-512 on Zen 4 and more without vectors.
    if codes.itemsize == 2:
        codes.sort(axis=1, kind='stable')
    else:
        for row in codes:
            for shift in range(0, 8 * codes.itemsize, 16):
                row[:] = row[(row >> shift).astype(np.uint16).argsort(kind='stable')]
    return codes


def _split(ranked: np.ndarray) -> list[np.ndarray]:
    """Ascending probabilities of the ignored, negative and positive labels of a class, float64, from its codes."""
    ends = ranked.searchsorted(pack(np.zeros(2, f'f{ranked.itemsize}'), np.arange(2)))
    return np.split(unpack(ranked)[0].astype(np.float64), ends)


def _count_best(codes: Sequence[np.ndarray], c: Conventions, num_classes: int) -> np.ndarray:
    """True positives and predictions of each class, int (2, C), where only the k best of a sample are predicted.

    Behind the codes stand the classes that they are of.
    """
    *codes, classes = codes
    scores = unpack(codes[0])[0]
    # NumPy finds the k-th of 16 bits slowly
    best = predicted_labels(scores.astype(np.float32) if scores.itemsize == 2 else scores, topk=c.topk).nonzero()
    scores, labels = unpack(codes[-1][best])
    kept = labels >= 0 if c.ignored == 'skip' else np.ones(labels.size, bool)
    if c.topk_above_threshold:
        kept &= predicted_labels(scores, c.threshold, c.inclusive)
    classes = classes[best]
    return np.stack([np.bincount(classes[x], minlength=num_classes) for x in (kept & (labels == 1), kept)])


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    return np.asarray(part) / np.where(np.asarray(whole) == 0, 1, whole)


def _mean(values: np.ndarray) -> float:
    return values.mean() if values.size else 0.


def _names(chosen: np.ndarray, classes: Sequence[str] | None) -> str:
    first = [repr(classes[c]) if classes else str(c) for c in chosen.nonzero()[0][:10]]
    return f'{chosen.sum()} of {chosen.size} classes ({", ".join(first)}{", ..." if chosen.sum() > 10 else ""})'


@METRICS.register_module()
class MultiLabelMetric(BaseMetric):
    """mAP, precision, recall and F1 by class and overall, the same for top-k, probability gap and calibration error.

    It reads the samples that mmpretrain's multi-label heads return: ``pred_score``, probabilities (C,), and
    ``gt_score``, (C,) of 0, 1 and ``ignore_index``, or else ``gt_label``, class indices. It returns ``mAP``, the mean
    of the classes' average precision, and ``mAP_weighted``, their mean weighted by the classes' positives, which are
    'micro' and 'macro' of Table 7 of the ASL paper (arXiv 2009.14119); ``CP, CR, CF1, OP, OR, OF1``, again with
    ``_top3`` (Tables 4 and 8); all of them in percent; and as fractions ``p_t_pos, p_t_neg, gap`` (Eq. 9-10) and
    ``ECE``, see :func:`expected_calibration_error`, of 15 bins over all labels. Neither the order of samples or classes
    nor their distribution over processes matters.

    A sample is kept as one row of ``score_dtype``, which holds the labels too: 2 or 4 bytes a label. Where most labels
    are ignored, and with ``ignored='skip'``, a batch is kept as the other labels and the k best ignored ones of each
    sample, each with its class in 4 bytes, if that takes half or less: a hundredth for Open Images' 9,605 classes. The
    figures are the same, bit for bit. To compute them takes blocks of 2^24 labels beside what is kept.

    All presets use non-interpolated average precision and precision 0 for a class that is never predicted.

    - 'paper': harmonic CF1 and top-3 with the threshold are not stated but follow from the numbers of Table 8, and
      p > threshold stands in Sec. 2.6. The threshold is not stated: 0.5 is that of ML-GCN. Non-interpolated average
      precision is the authors' code; skipping empty classes is a choice (MS-COCO has none).
    - 'ml_gcn' (Chen et al., CVPR 2019, ``util.py``): as 'paper', but p >= 0.5, empty classes fail (a division by zero
      there), and ignored labels are negatives in precision and recall. Its OP also counts one wrong prediction for
      each class never predicted, which is not followed.
    - 'official' (Alibaba-MIIL/ASL, ``validate.py``): p > 0.8, mean of the classes' F1, empty classes 0. It has no
      top-k and no ignored labels; those follow 'paper'.
    - 'mmpretrain' (``AveragePrecision`` and ``MultiLabelMetric``, 1.2): p >= 0.5, mean of the classes' F1, top-k
      without the threshold, empty classes 0.

    The last three break ties by sample or class order; here ties are one step, see :func:`average_precision` and
    :func:`predicted_labels`.

    Args:
        preset: 'paper', 'ml_gcn', 'official' or 'mmpretrain'.
        ignore_index: Value of ``gt_score`` whose labels are left out, e.g. VOC's difficult ones; None: no value.
        per_class: Also return ``AP_<class>`` and log a table; skipped classes appear in the table only.
        calibrated: Decide by ``calibrated_score``, which the heads of :mod:`mmasl.models.heads.calibrated_predictions` predict, and
            report its ECE: the threshold is then one of the posterior. Average precision, the k best and the
            probability gap remain those of ``pred_score``.
        collect_device, prefix, collect_dir: See :class:`mmengine.evaluator.BaseMetric`.
        score_dtype: 'float32' or 'float16', what scores are kept in. 'float16' halves the memory, to 2 bytes a label,
            and tells probabilities apart by 11 bits: near 1 in steps of 2^-11, so that all above 1 - 2^-12 tie. Ties
            are one step of the curve and mostly lower the average precision: by 0.02 points of mAP in the case
            'precision' of benchmarks/speed/metrics.py, by 1.3 with 4 times its logits. The threshold is rounded alike.
        conventions: Fields of :class:`Conventions` that override the preset.

    Raises:
        ValueError: If an argument is unknown; if scores are no probabilities, labels out of range or class counts
            differ, at the first such sample; if there are no samples; and as :func:`multilabel_metrics`.

    Example:
        >>> metric = MultiLabelMetric(topk=1, empty='zero')
        >>> metric.process(None, [
        ...     dict(pred_score=torch.tensor([0.9, 0.6, 0.2]), gt_label=torch.tensor([0])),
        ...     dict(pred_score=torch.tensor([0.7, 0.8, 0.1]), gt_score=torch.tensor([1., 1., -1.]))])
        >>> report = metric.evaluate(size=2)
        >>> {name.split('/')[1]: round(value, 2) for name, value in report.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'mAP': 66.67, 'mAP_weighted': 100.0,
         'CP': 50.0, 'CR': 66.67, 'CF1': 57.14, 'OP': 75.0, 'OR': 100.0, 'OF1': 85.71,
         'CP_top1': 66.67, 'CR_top1': 50.0, 'CF1_top1': 57.14, 'OP_top1': 100.0, 'OR_top1': 66.67, 'OF1_top1': 80.0,
         'p_t_pos': 0.8, 'p_t_neg': 0.6, 'gap': 0.2, 'ECE': 0.28}
    """
    default_prefix = 'multi-label'

    def __init__(self,
                 preset: str = 'paper',
                 ignore_index: int | None = -1,
                 per_class: bool = False,
                 calibrated: bool = False,
                 collect_device: str = 'cpu',
                 prefix: str | None = None,
                 collect_dir: str | None = None,
                 score_dtype: str = 'float32',
                 **conventions: Any) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        _check_choice('preset', preset, PRESETS)
        _check_choice('score_dtype', score_dtype, ('float32', 'float16'))
        for name in conventions:
            _check_choice('argument', name, [field.name for field in fields(Conventions)])
        if ignore_index in (0, 1):
            raise ValueError(f'ignore_index={ignore_index} is itself a label; give another value, such as -1')
        self.conventions = replace(PRESETS[preset], **conventions)
        self.ignore_index = ignore_index
        self.per_class = per_class
        self.score_dtype = score_dtype
        self.score_keys = ['pred_score', 'calibrated_score'] if calibrated else ['pred_score']
        self.num_classes = 0  # of the samples so far

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Check a batch of samples and keep one array a sample: :func:`pack` of each kind of score, (1 or 2, C), or the
        records of :class:`_Records`."""
        scores = [self._read(data_samples, key) for key in self.score_keys]
        labels = self._read_labels(data_samples)
        for key, values in zip(self.score_keys, scores):
            if not (values.min() >= 0 and values.max() <= 1):  # NaN is refused too
                self._refuse(~((values >= 0) & (values <= 1)), values, data_samples,
                             f'{key} {{}} is no probability: logits need a sigmoid first; nan or inf mean that the '
                             'model diverged (lower the learning rate) or overflowed (evaluate in float32)')
        ignored = labels == self.ignore_index
        if (bad := (labels != 0) & (labels != 1) & ~ignored).any():
            self._refuse(bad, labels, data_samples,
                         f'gt_score {{}} is none of 0, 1 and ignore_index={self.ignore_index}: evaluate on hard '
                         'labels, or set ignore_index')
        labels = np.where(ignored, -1, labels).astype(np.int8)
        scores = [values.astype(self.score_dtype) for values in scores]
        self.num_classes, c = labels.shape[1], self.conventions
        if c.ignored == 'skip' and (records := _Records.make(scores, labels, c.topk)):
            self.results.extend(records)
            return
        rows = np.stack([pack(values, labels) for values in scores], axis=1)
        # Between the batches of a model they would scatter over the heap, and the gaps take as much memory again.
        slab = max(1, SLAB // rows[0].nbytes)
        start, end = (count // slab * slab for count in (len(self.results), len(self.results) + len(rows)))
        self.results.extend(rows)
        if start < end and not any(sample.dtype.names for sample in self.results[start:end]):
            self.results[start:end] = np.stack(self.results[start:end])

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """The metrics by name, from the samples of all processes."""
        if not results:
            raise ValueError('MultiLabelMetric got no samples: is the evaluated data set or its loader empty?')
        kinds, num_classes = len(self.score_keys), len(self._classes or ()) or self.num_classes
        as_records = [bool(sample.dtype.names) for sample in results]

        def read(rows: slice, columns: slice) -> list[np.ndarray]:
            samples = results[rows]
            if any(as_records):
                samples = [_Records.spread(sample, num_classes) for sample in samples]
            block = np.concatenate([sample[:, columns] for sample in samples])
            return [block[kind::kinds] for kind in range(kinds)]

        blocks = _Records(results, num_classes) if all(as_records) else _Matrix(read, len(results), num_classes)
        classes = self._classes or [str(c) for c in range(num_classes)]
        report, ap, positives = _report(blocks, len(results), num_classes, self.conventions, classes)
        for kind, mean, chosen in (('positive', 'the class means', positives == 0), ('negative', 'mAP', positives > 0)):
            if (skipped := chosen & np.isnan(ap)).any():
                print_log(f'no {kind} label in {_names(skipped, classes)}: left out of {mean}', 'current',
                          logging.WARNING)
        if self.per_class:
            width = max(map(len, [*classes, 'class']))
            rows = zip(classes, positives, ap)
            table = [f'{"class":<{width}} positives  AP [%]', *(f'{c:<{width}} {n:>9} {a:>7.2f}' for c, n, a in rows)]
            print_log('\n'.join(['average precision of each class', *table]), 'current')
            report |= {f'AP_{name}': float(value) for name, value in zip(classes, ap) if not np.isnan(value)}
        return report

    def labels(self) -> np.ndarray:
        """Labels of the samples so far, int8 (N, C): 1, 0 and -1."""
        return np.stack([unpack(_Records.spread(sample, self.num_classes)[0])[1] for sample in self.results])

    @property
    def _classes(self) -> Sequence[str] | None:
        return (self.dataset_meta or {}).get('classes')

    def _read(self, samples: Sequence[dict], key: str) -> np.ndarray:
        """Field ``key`` of the samples, float32 (B, C); C is the data set's number of classes, else the first
        sample's."""
        expected = torch.Size([self._num_classes(samples)])
        try:
            values = torch.stack([torch.as_tensor(sample[key]) for sample in samples])
        except (KeyError, RuntimeError):
            values = None
        if values is None or values.shape[1:] != expected:
            self._explain(samples, key, expected)
        return values.detach().float().cpu().numpy()

    def _explain(self, samples: Sequence[dict], key: str, expected: torch.Size) -> NoReturn:
        """Raise for the first sample that lacks the field, or has it in another shape."""
        for index, sample in enumerate(samples):
            if key not in sample:
                head = 'MultiLabelClsHead' if key == 'pred_score' else 'mmasl.MultiLabelClsHead'
                raise ValueError(f'{self._name(samples, index)} has no {key}: use a head that predicts it, such as '
                                 f'{head}')
            if (shape := torch.as_tensor(sample[key]).shape) != expected:
                raise ValueError(f"{self._name(samples, index)}: {key} has shape {tuple(shape)}, expected "
                                 f"{tuple(expected)}: the head's num_classes, the data set's metainfo.classes and the "
                                 'labels of every sample must agree')
        raise ValueError(f'the {key} of samples {self._name(samples, 0)} and after lie on several devices: put them on '
                         'one')

    def _read_labels(self, samples: Sequence[dict]) -> np.ndarray:
        """``gt_score`` of the samples, float32 (B, C), made of ``gt_label`` where a sample has none."""
        num_classes = self._num_classes(samples)
        samples = list(samples)
        for index, sample in enumerate(samples):
            if 'gt_score' in sample:
                continue
            if 'gt_label' not in sample:
                raise ValueError(f'{self._name(samples, index)} has neither gt_score nor gt_label: evaluate on an '
                                 "annotated set, and keep its labels in the pipeline's last step, as PackInputs does")
            labels = torch.as_tensor(sample['gt_label']).long().reshape(-1).tolist()
            if labels and not 0 <= min(labels) <= max(labels) < num_classes:
                raise ValueError(f'{self._name(samples, index)}: gt_label {labels} must lie in 0 ... '
                                 f'{num_classes - 1}: give the head and the data set the same classes')
            score = np.zeros(num_classes, np.float32)
            score[labels] = 1
            samples[index] = dict(sample, gt_score=score)
        return self._read(samples, 'gt_score')

    def _num_classes(self, samples: Sequence[dict]) -> int:
        if self.results and not self._classes:
            return self.num_classes
        return len(self._classes or samples[0].get('pred_score', ()))

    def _name(self, samples: Sequence[dict], index: int) -> str:
        return f'sample {samples[index].get("img_path", len(self.results) + index)}'

    def _refuse(self, bad: np.ndarray, values: np.ndarray, samples: Sequence[dict], message: str) -> None:
        row, index = np.argwhere(bad)[0]
        label = f'class {index}' + (f' ({self._classes[index]})' if self._classes else '')
        raise ValueError(f'{self._name(samples, row)}, {label}: {message.format(values[row, index])}')


@METRICS.register_module()
class MacroF1(BaseMetric):
    """Macro F1 and accuracy where a sample has one class of many: two numbers a sample are kept, and no scores.

    It reads the samples that mmpretrain's single-label heads return, ``gt_label``, one class, and ``pred_label``, one
    class, or else ``pred_score``, (C,), whose largest counts. It returns ``f1-score``, the mean of the classes' F1, and
    ``top1``, the accuracy, both in percent.

    The mean is over the classes that a sample has or that are predicted for one, as in scikit-learn's ``f1_score``.
    ``SingleLabelMetric`` of mmpretrain, whose name ``f1-score`` is, takes it over all C classes, where one without
    either counts 0. It keeps the scores, (N, C), and makes integers of them; torchmetrics counts in a table (C, C).

    Args:
        collect_device, prefix, collect_dir: See :class:`mmengine.evaluator.BaseMetric`.

    Raises:
        ValueError: If a sample lacks its label or a prediction, or has several labels; if a score is NaN; if there are
            no samples.

    Example:
        >>> metric = MacroF1()
        >>> metric.process(None, [dict(gt_label=torch.tensor([true]), pred_label=torch.tensor([predicted]))
        ...                       for true, predicted in ((0, 0), (0, 0), (7, 7), (7, 9))])
        >>> {name: round(value, 2) for name, value in metric.evaluate(size=4).items()}
        {'single-label/f1-score': 55.56, 'single-label/top1': 75.0}
    """
    default_prefix = 'single-label'

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Keep (true, predicted) of each sample."""
        self.results.extend([(self._read(sample, index, 'gt_label'), self._predicted(sample, index))
                             for index, sample in enumerate(data_samples, len(self.results))])

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """The metrics by name, from the samples of all processes."""
        if not results:
            raise ValueError('MacroF1 got no samples: is the evaluated data set or its loader empty?')
        true, predicted = np.array(results).T
        hits, positives, predictions = (np.bincount(classes, minlength=np.max(results) + 1)
                                        for classes in (true[true == predicted], true, predicted))
        seen = positives + predictions
        return {'f1-score': float(100 * (2 * hits[seen > 0] / seen[seen > 0]).mean()),
                'top1': float(100 * hits.sum() / len(results))}

    def _predicted(self, sample: dict, index: int) -> int:
        scores = sample.get('pred_score')
        if scores is None:
            return self._read(sample, index, 'pred_label')
        scores = torch.as_tensor(scores)
        if scores.isnan().any():
            raise ValueError(f'{self._name(sample, index)}: pred_score is nan: the model diverged (lower the learning '
                             'rate) or overflowed (evaluate in float32)')
        return self._read(sample, index, 'pred_label') if 'pred_label' in sample else int(scores.argmax())

    def _read(self, sample: dict, index: int, key: str) -> int:
        """The one class of a field."""
        if key not in sample:
            raise ValueError(f'{self._name(sample, index)} has no {key}: evaluate a single-label head, such as '
                             'LinearClsHead, on an annotated set')
        value = torch.as_tensor(sample[key]).reshape(-1)
        if len(value) != 1:
            raise ValueError(f'{self._name(sample, index)}: {key} {value.tolist()} is not one class: of samples with '
                             'several, take mmasl.MultiLabelMetric')
        return int(value)

    @staticmethod
    def _name(sample: dict, index: int) -> str:
        return f'sample {sample.get("img_path", index)}'
