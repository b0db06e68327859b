"""Counts the errors of a multi-label classifier and finds its most confident ones, which may be wrong labels."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mmasl.analysis.gradient import Setting, analyse_gradient, loss_and_gradient
from mmasl.evaluation.functional import Conventions, count_outcomes, multilabel_metrics, probability_gap
from mmasl.ops import posterior, posterior_threshold

BINS = 100  # of the histograms over p
MATRIX_CLASSES = 20  # in the matrices of pairs
PAIR_CLASSES = 200  # whose pairs are counted
PAIRS = 15  # in the list of pairs


class Predictions(NamedTuple):
    """Predictions of a classifier for N labelled images.

    Args:
        logits: float32 (N, C).
        labels: int8 (N, C): 1 positive, 0 negative, -1 ignored.
        images: Path or URL of each image, '' if unknown.
        classes: Names of the C classes.
        thresholds: p from which labels are predicted, float (C,); None: see :func:`analyse_errors`.
        settings: Parameters of the loss as keyword arguments of :func:`mmasl.ops.posterior`: numbers, or tensors of
            shape () or (C,). None for a loss without a posterior in closed form.
    """
    logits: np.ndarray
    labels: np.ndarray
    images: Sequence[str]
    classes: Sequence[str]
    settings: Mapping[str, Any] | None = None
    thresholds: np.ndarray | None = None


class Misprediction(NamedTuple):
    """A label that the model contradicts.

    Args:
        row, column: Indices of image and class.
        label: The annotated label, 0 or 1.
        p: Sigmoid of the logit.
        posterior: Calibrated probability of a positive; None without settings.
        beyond_p_star: Whether the loss discards this negative: p > p* (Sec. 2.5 of the paper).
        gradient: Gradient of the negative relative to the largest that a negative can have; None for a positive.
    """
    row: int
    column: int
    label: int
    p: float
    posterior: float | None
    beyond_p_star: bool
    gradient: float | None


@dataclass(frozen=True)
class ErrorAnalysis:
    """Errors of a classifier. Arrays of classes have C entries.

    Args:
        reports: Metrics for each decision rule, keyed by the rule's name. The first rule is used for all other fields.
        ap: Average precision in percent; NaN without positives.
        counts: True positives, predictions and positives, (3, C).
        gaps: Probability gap of each class and, last, of all labels, (C + 1,).
        histograms: Negatives and positives by p, (C, 2, BINS). Bin k counts k / BINS < p <= (k + 1) / BINS; the first
            bin includes p = 0.
        half: p from which labels are predicted: the threshold, or where the posterior is 1/2. It is 1/2 without either,
            and 1 if the posterior stays below 1/2.
        p_star: p beyond which the loss discards negatives; NaN if it discards none.
        false_positives: The most confident first: the ``top`` first, and all beyond p*.
        false_negatives: The ``top`` most confident, the most confident first.
        together: (K, K): share of the images with the first label that also have the second; NaN if none is known.
        confused: (K, K): number of images in which the first label was missed and the second wrongly predicted.
        frequent, worst: Classes of ``together`` (most positives) and ``confused`` (most errors).
        pairs: (missed, predicted, number of images) of the most frequent pairs among the PAIR_CLASSES worst classes.
    """
    reports: dict[str, dict[str, float]]
    ap: np.ndarray
    counts: np.ndarray
    gaps: np.ndarray
    histograms: np.ndarray
    half: np.ndarray
    p_star: np.ndarray
    false_positives: list[Misprediction]
    false_negatives: list[Misprediction]
    together: np.ndarray
    confused: np.ndarray
    frequent: np.ndarray
    worst: np.ndarray
    pairs: list[tuple[int, int, int]]


def analyse_errors(predictions: Predictions, top: int = 60) -> ErrorAnalysis:
    """Count the errors and find the most confident ones.

    A label is predicted where p is at least its threshold, if there are thresholds; or else where its posterior exceeds
    1/2; or p, if there is no posterior.

    Args:
        predictions: Logits and labels.
        top: Number of false positives and of false negatives to keep.

    Raises:
        ValueError: See :func:`mmasl.evaluation.functional.multilabel_metrics`.
    """
    logits, labels, classes = predictions.logits, predictions.labels, list(predictions.classes)
    p = torch.from_numpy(logits).sigmoid().numpy()
    conventions = Conventions(topk=None)
    report, ap = multilabel_metrics(p, labels, conventions, classes)
    decisive, half, reports = p, np.full(len(classes), 0.5), {'p > 1/2': report}
    if predictions.settings is not None:
        blocks = torch.from_numpy(logits).split(max(1, 2**24 // len(classes)))  # bounds the memory of intermediates
        decisive = torch.cat([posterior(block, **predictions.settings) for block in blocks]).numpy()
        half[:] = posterior_threshold(0.5, **predictions.settings).sigmoid().numpy()
        reports = {'posterior > 1/2': multilabel_metrics(p, labels, conventions, classes, decisive)[0], **reports}

    predicted = decisive > 0.5
    if predictions.thresholds is not None:
        half, predicted = predictions.thresholds, p >= predictions.thresholds
        stored = replace(conventions, threshold=half.tolist(), inclusive=True)
        reports = {'p at its threshold': multilabel_metrics(p, labels, stored, classes)[0], **reports}
    counts = count_outcomes(predicted, labels)
    missed, wrong = ~predicted & (labels == 1), predicted & (labels == 0)
    worst = _largest(missed.sum(0) + wrong.sum(0), PAIR_CLASSES)
    frequent = _largest(counts[2], MATRIX_CLASSES)
    confused = _count_pairs(missed[:, worst], wrong[:, worst])
    order = confused.ravel().argsort(kind='stable')[::-1][:PAIRS]
    pairs = [(int(worst[i]), int(worst[j]), int(confused[i, j])) for i, j in (divmod(k, len(worst)) for k in order)]
    positive = labels[:, frequent] == 1
    with np.errstate(invalid='ignore'):
        together = _count_pairs(positive, positive) / _count_pairs(positive, labels[:, frequent] >= 0)

    groups = _group_by_setting(predictions.settings, len(classes))
    p_star = _p_star(groups, len(classes))

    def list_errors(found: np.ndarray, sign: int) -> list[Misprediction]:
        rows, columns = found.nonzero()
        order = np.lexsort([columns, rows, sign * logits[rows, columns]])
        rows, columns = rows[order], columns[order]
        beyond = (labels[rows, columns] == 0) & (p[rows, columns] > p_star[columns])
        kept = beyond | (np.arange(len(rows)) < top)
        rows, columns, beyond = rows[kept], columns[kept], beyond[kept]
        shares = _gradient_shares(groups, logits[rows, columns], columns)
        values = zip(*(x.tolist() for x in (rows, columns, labels[rows, columns], p[rows, columns],
                                            decisive[rows, columns], beyond, shares)))
        return [Misprediction(row, column, label, score, calibrated if groups else None, discarded,
                              share if groups and not label else None)
                for row, column, label, score, calibrated, discarded, share in values]

    gaps = [probability_gap(scores, known)['gap'] for scores, known in zip(p.T, labels.T)]
    return ErrorAnalysis(
        reports=reports, ap=ap, counts=counts, gaps=np.array([*gaps, report['gap']]),
        histograms=np.stack([_histogram(scores, known) for scores, known in zip(p.T, labels.T)]), half=half,
        p_star=p_star, together=together, confused=confused[:MATRIX_CLASSES, :MATRIX_CLASSES], frequent=frequent,
        worst=worst[:MATRIX_CLASSES], pairs=[pair for pair in pairs if pair[2]],
        false_positives=list_errors(wrong, -1), false_negatives=list_errors(missed, 1))


def list_suspects(errors: ErrorAnalysis, predictions: Predictions) -> list[dict[str, object]]:
    """List labels that may be wrong, one row each: the false positives, then the false negatives.

    Returns:
        Rows with the keys image, class, label, p, posterior, beyond_p_star and gradient.
    """
    return [dict(image=predictions.images[m.row], **{'class': predictions.classes[m.column]}, label=m.label,
                 p=f'{m.p:.6g}', posterior='' if m.posterior is None else f'{m.posterior:.6g}',
                 beyond_p_star=int(m.beyond_p_star), gradient='' if m.gradient is None else f'{m.gradient:.4g}')
            for m in (*errors.false_positives, *errors.false_negatives)]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values in descending order, without zeros; ties keep their order."""
    order = (-values).argsort(kind='stable')[:count]
    return order[values[order] > 0]


def _count_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Number of rows in which both are true, for each pair of columns; float32 is exact up to 2^24."""
    return left.T.astype(np.float32) @ right.astype(np.float32)


def _histogram(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    bins = np.maximum(np.ceil(scores.astype(np.float64) * BINS).astype(int) - 1, 0)
    return np.stack([np.bincount(bins[labels == y], minlength=BINS) for y in (0, 1)])


def _group_by_setting(settings: Mapping[str, Any] | None, classes: int) -> dict[Setting, np.ndarray]:
    """The classes of each setting, bool (C,).

    Weights of labels are left out: they move neither p* nor the gradient relative to its peak. Parameters per class are
    rounded to two decimals to limit the number of settings. This moves p* by less than 0.01.
    """
    if settings is None:
        return {}
    settings = {name: value for name, value in settings.items() if name not in ('alpha', 'pos_weight')}
    values = {name: value.double().numpy() for name, value in settings.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in settings.items() if name not in values}
    rounded = [np.broadcast_to(value.round(2 if value.ndim else 6), classes) for value in values.values()]
    distinct, which = np.unique(np.stack(rounded, axis=1), axis=0, return_inverse=True)
    return {Setting(**plain, **dict(zip(values, row.tolist()))): which.ravel() == k for k, row in enumerate(distinct)}


def _p_star(groups: Mapping[Setting, np.ndarray], classes: int) -> np.ndarray:
    p_star = np.full(classes, np.nan)
    for setting, members in groups.items():
        properties = analyse_gradient(setting)
        if properties.discards_mislabelled and properties.p_star is not None:
            p_star[members] = properties.p_star
    return p_star


def _gradient_shares(groups: Mapping[Setting, np.ndarray], logits: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Gradient of each negative relative to the largest possible; NaN without a setting."""
    shares = np.full(len(logits), np.nan)
    p = torch.from_numpy(logits).double().sigmoid()
    for setting, members in groups.items():
        properties, chosen = analyse_gradient(setting), members[columns]
        shares[chosen] = properties.remaining  # at p = 1
        chosen &= (p < 1).numpy()
        shares[chosen] = loss_and_gradient(p[chosen], setting)[1] / properties.peak if chosen.any() else 0
    return shares
