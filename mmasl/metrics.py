"""Metrics of multi-label classification, with every convention named.

Pure functions on NumPy arrays do the arithmetic, :class:`MultiLabelReport` collects what they need. ``scores`` are
float (N, C), ``labels`` int8 (N, C): 1 positive, 0 negative, -1 ignored. Counts add up over blocks of samples and
average precision goes class by class, so that large sets can be worked off in blocks.
"""
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from mmasl.registry import METRICS

CHOICES = dict(
    ap_mode=('non_interpolated', 'voc2007', 'voc2010'),
    cf1=('harmonic', 'mean'),
    empty=('skip', 'zero', 'error'),
    no_prediction=('zero', 'skip'),
    ignored=('skip', 'negative'))


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
    return np.array([_class_average_precision(s, y, mode) for s, y in zip(scores.T, labels.T)])


def _class_average_precision(scores: np.ndarray, labels: np.ndarray, mode: str) -> float:
    # Recall rises only at the scores of positives, and precision is highest for each recall there: no other threshold
    # is needed, and negatives have only to be counted.
    thresholds, gained = np.unique(scores[labels == 1], return_counts=True)
    if thresholds.size == 0:
        return float('nan')
    thresholds, gained = thresholds[::-1], gained[::-1]
    negatives = np.sort(scores[labels == 0])
    tp = gained.cumsum()
    fp = negatives.size - negatives.searchsorted(thresholds)
    precision = tp / (tp + fp)
    if mode != 'non_interpolated':
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if mode == 'voc2007':
        return precision[(10 * tp).searchsorted(np.arange(11) * tp[-1])].mean()
    return np.average(precision, weights=gained)


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


def count_labels(predicted: np.ndarray, labels: np.ndarray, ignored: str = 'skip') -> np.ndarray:
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
    cf1 = _ratio(2 * cp * cr, cp + cr)
    if conventions.cf1 == 'mean':
        cf1 = _mean(_ratio(2 * tp, predicted + positive)[kept])
    op, or_ = _ratio(tp.sum(), predicted.sum()), _ratio(tp.sum(), positive.sum())
    of1 = _ratio(2 * tp.sum(), predicted.sum() + positive.sum())
    return {k: 100 * float(v) for k, v in dict(CP=cp, CR=cr, CF1=cf1, OP=op, OR=or_, OF1=of1).items()}


def probability_gap(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean probability ``p_t_pos`` of the positive labels, ``p_t_neg`` = mean of 1 - p of the negative ones, and their
    difference ``gap`` (Eq. 9-10, here over the whole set), as fractions; NaN where there is no such label."""
    def mean(chosen: np.ndarray) -> float:
        return float(scores.mean(where=chosen, dtype=np.float64)) if chosen.any() else float('nan')

    p_t_pos, p_t_neg = mean(labels == 1), 1 - mean(labels == 0)
    return dict(p_t_pos=p_t_pos, p_t_neg=p_t_neg, gap=p_t_pos - p_t_neg)


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
    return np.array([_class_reliability(s[y >= 0], y[y >= 0], ends) for s, y in zip(scores.T, labels.T)])


def _class_reliability(scores: np.ndarray, labels: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    scores = scores.astype(np.float64)
    bins = ends.searchsorted(scores, side='right')
    return [np.bincount(bins, weights, len(ends) + 1) for weights in (None, scores, labels)]


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
    sums = reliability(scores, labels, bins, equal_mass)
    count, probability, positives = (sums if classwise else sums.sum(0, keepdims=True)).transpose(1, 0, 2)
    labelled = count.sum(1) > 0
    if not labelled.any():
        return float('nan')
    error = np.abs(probability - positives).sum(1)[labelled] / count.sum(1)[labelled]
    return float(error.mean())


def multilabel_report(scores: np.ndarray,
                      labels: np.ndarray,
                      conventions: Conventions = PRESETS['paper'],
                      classes: Sequence[str] | None = None,
                      calibrated: np.ndarray | None = None) -> tuple[dict[str, float], np.ndarray]:
    """All metrics by the names of :class:`MultiLabelReport`, and the classes' average precision (C,) in percent.

    ``scores`` are probabilities (N, C), ``labels`` (N, C) in {1, 0, -1}; ``classes`` only name the classes in errors.
    ``calibrated`` probabilities (N, C) pass the threshold, and have the calibration error, in place of ``scores``.

    Raises:
        ValueError: If the shapes differ, or by ``conventions.empty`` where classes have no positives; also where no
            class has any and empty ones are skipped.
    """
    c = conventions
    decisive = scores if calibrated is None else calibrated
    if decisive.shape != scores.shape:
        raise ValueError(f'calibrated scores {decisive.shape} and scores {scores.shape} must both be (N, C)')
    if scores.ndim != 2 or scores.shape != labels.shape or not scores.size:
        raise ValueError(f'scores {scores.shape} and labels {labels.shape} must both be (N, C), with N and C above 0')
    ap = 100 * average_precision(scores, labels, c.ap_mode)
    empty = np.isnan(ap)
    if empty.all() and c.empty == 'skip':
        raise ValueError(f'no class has a positive label among {len(scores)} samples: check the annotations')
    if empty.any() and c.empty == 'error':
        raise ValueError(f"no positive label in {_names(empty, classes)}: give empty='skip' or empty='zero', or check "
                         'the annotations and the class names of the data set')
    if c.empty == 'zero':
        ap[empty] = 0

    def evaluate(predicted: np.ndarray) -> dict[str, float]:
        return precision_recall_f1(*count_labels(predicted, labels, c.ignored), c)

    chosen = predicted_labels(decisive, c.threshold, c.inclusive)
    report = dict(mAP=float(np.nanmean(ap)), **evaluate(chosen))
    if c.topk is not None:
        best = predicted_labels(scores, topk=c.topk)
        best = evaluate(best & chosen if c.topk_above_threshold else best)
        report |= {f'{name}_top{c.topk}': value for name, value in best.items()}
    return report | probability_gap(scores, labels) | dict(ECE=expected_calibration_error(decisive, labels)), ap


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.where(whole == 0, 1, whole)


def _mean(values: np.ndarray) -> float:
    return values.mean() if values.size else 0.


def _names(chosen: np.ndarray, classes: Sequence[str] | None) -> str:
    first = [repr(classes[c]) if classes else str(c) for c in chosen.nonzero()[0][:10]]
    return f'{chosen.sum()} of {chosen.size} classes ({", ".join(first)}{", ..." if chosen.sum() > 10 else ""})'


@METRICS.register_module()
class MultiLabelReport(BaseMetric):
    """mAP, precision, recall and F1 by class and overall, the same for top-k, probability gap and calibration error.

    It reads the samples that mmpretrain's multi-label heads return: ``pred_score``, probabilities (C,), and
    ``gt_score``, (C,) of 0, 1 and ``ignore_index``, or else ``gt_label``, class indices. It returns ``mAP, CP, CR,
    CF1, OP, OR, OF1``, the last six again with ``_top3`` (Tables 4 and 8 of the ASL paper, arXiv 2009.14119), all in
    percent, and as fractions ``p_t_pos, p_t_neg, gap`` (Eq. 9-10) and ``ECE``, see
    :func:`expected_calibration_error`, of 15 bins over all labels. Neither the order of samples or classes nor their
    distribution over processes matters; scores are kept in float32, one row a sample.

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
        calibrated: Decide by ``calibrated_score``, which the heads of :mod:`mmasl.heads.multi_label` predict, and
            report its ECE: the threshold is then one of the posterior. Average precision, the k best and the
            probability gap remain those of ``pred_score``.
        collect_device, prefix, collect_dir: See :class:`mmengine.evaluator.BaseMetric`.
        conventions: Fields of :class:`Conventions` that override the preset.

    Raises:
        ValueError: If an argument is unknown; if scores are no probabilities, labels out of range or class counts
            differ, at the first such sample; if there are no samples; and as :func:`multilabel_report`.

    Example:
        >>> metric = MultiLabelReport(topk=1, empty='zero')
        >>> metric.process(None, [
        ...     dict(pred_score=torch.tensor([0.9, 0.6, 0.2]), gt_label=torch.tensor([0])),
        ...     dict(pred_score=torch.tensor([0.7, 0.8, 0.1]), gt_score=torch.tensor([1., 1., -1.]))])
        >>> report = metric.evaluate(size=2)
        >>> {name.split('/')[1]: round(value, 2) for name, value in report.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'mAP': 66.67, 'CP': 50.0, 'CR': 66.67, 'CF1': 57.14, 'OP': 75.0, 'OR': 100.0, 'OF1': 85.71,
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
                 **conventions) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        _check_choice('preset', preset, PRESETS)
        for name in conventions:
            _check_choice('argument', name, [field.name for field in fields(Conventions)])
        if ignore_index in (0, 1):
            raise ValueError(f'ignore_index={ignore_index} is itself a label; give another value, such as -1')
        self.conventions = replace(PRESETS[preset], **conventions)
        self.ignore_index = ignore_index
        self.per_class = per_class
        self.score_keys = ['pred_score', 'calibrated_score'] if calibrated else ['pred_score']

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Check a batch of samples and keep (labels, scores, ...) of each, int8 and float32 of shape (C,)."""
        names = [f'sample {s.get("img_path", len(self.results) + i)}' for i, s in enumerate(data_samples)]
        *scores, labels = (np.stack([self._row(s, key, name) for s, name in zip(data_samples, names)])
                           for key in (*self.score_keys, 'gt_score'))
        for key, values in zip(self.score_keys, scores):
            # written so that NaN is refused too
            self._refuse(~((values >= 0) & (values <= 1)), values, names,
                         f'{key} {{}} is no probability: logits need a sigmoid first; nan or inf mean that the model '
                         'diverged (lower the learning rate) or overflowed (evaluate in float32)')
        ignored = labels == self.ignore_index
        self._refuse(~((labels == 0) | (labels == 1) | ignored), labels, names,
                     f'gt_score {{}} is none of 0, 1 and ignore_index={self.ignore_index}: evaluate on hard labels, or '
                     'set ignore_index')
        self.results.extend(zip(np.where(ignored, -1, labels).astype(np.int8), *scores))

    def compute_metrics(self, results: list[tuple[np.ndarray, ...]]) -> dict[str, float]:
        """The metrics by name, from the samples of all processes."""
        if not results:
            raise ValueError('MultiLabelReport got no samples: is the evaluated data set or its loader empty?')
        labels, scores, *calibrated = map(np.stack, zip(*results))
        classes = self._classes or [str(c) for c in range(scores.shape[1])]
        report, ap = multilabel_report(scores, labels, self.conventions, classes, *calibrated)
        if (skipped := np.isnan(ap)).any():
            print_log(f'no positive label in {_names(skipped, classes)}: left out of the class means', 'current',
                      logging.WARNING)
        if self.per_class:
            width = max(map(len, [*classes, 'class']))
            rows = zip(classes, (labels == 1).sum(0), ap)
            table = [f'{"class":<{width}} positives  AP [%]', *(f'{c:<{width}} {n:>9} {a:>7.2f}' for c, n, a in rows)]
            print_log('\n'.join(['average precision of each class', *table]), 'current')
            report |= {f'AP_{name}': float(value) for name, value in zip(classes, ap) if not np.isnan(value)}
        return report

    @property
    def _classes(self) -> Sequence[str] | None:
        return (self.dataset_meta or {}).get('classes')

    def _row(self, sample: dict, key: str, name: str) -> np.ndarray:
        """Field ``key`` of a sample, float32 (C,); C is the data set's number of classes, else the first sample's."""
        if key == 'gt_score' and key not in sample:
            return self._one_hot(sample, name, len(sample['pred_score']))
        if key not in sample:
            raise ValueError(f'{name} has no {key}: use a head that predicts it, such as '
                             f'{"MultiLabelClsHead" if key == "pred_score" else "mmasl.MultiLabelClsHead"}')
        row = torch.as_tensor(sample[key]).detach().float().cpu().numpy()
        first = self.results[0][0] if self.results else sample['pred_score']
        if row.shape != (expected := (len(self._classes or first), )):
            raise ValueError(f"{name}: {key} has shape {row.shape}, expected {expected}: the head's num_classes, the "
                             "data set's metainfo.classes and the labels of every sample must agree")
        return row

    @staticmethod
    def _one_hot(sample: dict, name: str, num_classes: int) -> np.ndarray:
        if 'gt_label' not in sample:
            raise ValueError(f'{name} has neither gt_score nor gt_label: evaluate on an annotated set, and keep its '
                             "labels in the pipeline's last step, as PackInputs does")
        indices = torch.as_tensor(sample['gt_label']).cpu().long().reshape(-1).numpy()
        if indices.size and not 0 <= indices.min() <= indices.max() < num_classes:
            raise ValueError(f'{name}: gt_label {indices.tolist()} must lie in 0 ... {num_classes - 1}: give the head '
                             'and the data set the same classes')
        row = np.zeros(num_classes, np.float32)
        row[indices] = 1
        return row

    def _refuse(self, bad: np.ndarray, values: np.ndarray, names: Sequence[str], message: str) -> None:
        if bad.any():
            row, index = np.argwhere(bad)[0]
            label = f'class {index}' + (f' ({self._classes[index]})' if self._classes else '')
            raise ValueError(f'{names[row]}, {label}: {message.format(values[row, index])}')
