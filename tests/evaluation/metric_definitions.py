"""Generated scores, and metrics computed straight from their definitions."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator

COUNTS = ('CP', 'CR', 'CF1', 'OP', 'OR', 'OF1')


def make_data(seed=0, n=60, c=6, ignored=0., levels=None):
    """Scores and labels that correlate, each class with a positive; ``levels`` < n makes many tied scores."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, c)) < 0.3).astype(np.int8)
    scores = rng.random((n, c)) * 0.6 + 0.4 * labels * rng.random((n, c))
    if levels:
        scores = (scores * levels).round() / levels
    labels[rng.random((n, c)) < ignored] = -1
    labels[0], labels[1] = 1, 0
    return scores.astype(np.float32), labels


def make_samples(scores, labels):
    return [dict(pred_score=torch.tensor(s), gt_score=torch.tensor(y).float()) for s, y in zip(scores, labels)]


def evaluate(metric, scores, labels):
    """What a metric returns through mmengine's evaluator, without the prefix of the names."""
    evaluator = Evaluator(metrics=metric)
    evaluator.process(make_samples(scores, labels))
    return {name.split('/')[1]: value for name, value in evaluator.evaluate(len(scores)).items()}


def sklearn_counts(predicted, labels, cf1, **kwargs):
    from sklearn.metrics import precision_recall_fscore_support
    cp, cr, mean_f1, _ = precision_recall_fscore_support(labels, predicted, average='macro', **kwargs)
    micro = precision_recall_fscore_support(labels, predicted, average='micro', **kwargs)[:3]
    values = cp, cr, mean_f1 if cf1 == 'mean' else 2 * cp * cr / (cp + cr), *micro
    return {name: pytest.approx(100 * value, rel=1e-9) for name, value in zip(COUNTS, values)}


def ap_by_definition(scores, labels, mode):
    pairs = [(s, y) for s, y in zip(scores.tolist(), labels.tolist()) if y >= 0]
    curve = []
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        chosen = [y for s, y in pairs if s >= threshold]
        curve.append((Fraction(sum(chosen), sum(y for _, y in pairs)), Fraction(sum(chosen), len(chosen))))

    def envelope(recall):
        return max(precision for r, precision in curve if r >= recall)

    if mode == 'voc2007':
        return float(sum(envelope(Fraction(k, 10)) for k in range(11)) / 11)
    steps = zip([Fraction(0)] + [r for r, _ in curve], curve)
    return float(sum((r - last) * (envelope(r) if mode == 'voc2010' else p) for last, (r, p) in steps))


def auc_by_definition(scores, labels):
    """Share of the pairs of a positive and a negative that are in order; a tie is half a pair."""
    positives, negatives = (scores[labels == y].tolist() for y in (1, 0))
    won = sum((p > n) + Fraction(p == n) / 2 for p in positives for n in negatives)
    return float(won / (len(positives) * len(negatives))) if positives and negatives else np.nan


def calibration_error_by_definition(scores, labels, ends):
    """Of bins from each of ``ends`` to the next."""
    pairs = [(s, y) for s, y in zip(scores.ravel().tolist(), labels.ravel().tolist()) if y >= 0]
    total = 0.
    for low, high in zip(ends, [*ends[1:], np.inf]):
        inside = [(s, y) for s, y in pairs if low <= s < high]
        if inside:
            mean_s, mean_y = np.mean(inside, axis=0)
            total += len(inside) / len(pairs) * abs(mean_s - mean_y)
    return total


def metrics_by_definition(scores, labels, decisive, c):
    """Every figure that the metric returns, sample by sample and class by class; c.empty must be 'zero' or 'skip'."""
    pairs = [list(zip(*columns)) for columns in zip(*(x.T.tolist() for x in (scores, decisive, labels)))]
    thresholds = np.broadcast_to(c.threshold, labels.shape[1]).astype(decisive.dtype).tolist()
    used = [x for x in range(len(pairs)) if c.empty == 'zero' or (labels[:, x] == 1).any()]
    ap = [ap_by_definition(scores[:, x], labels[:, x], c.ap_mode) if (labels[:, x] == 1).any() else 0. for x in used]
    support = [(labels[:, x] == 1).sum() for x in used]
    auc = [value for value in map(auc_by_definition, scores.T, labels.T) if not np.isnan(value)]
    report = dict(mAP=100 * np.mean(ap), mAP_weighted=100 * np.dot(ap, support) / max(sum(support), 1),
                  AUC=100 * np.mean(auc) if auc else np.nan)
    better = (scores[:, :, None] < scores[:, None]).sum(2)
    for suffix, best in (('', None), (f'_top{c.topk}', better < c.topk)):
        counts = []
        for x, column in enumerate(pairs):
            chosen = [y for i, (_, d, y) in enumerate(column) if (best is None or best[i, x])
                      and ((best is not None and not c.topk_above_threshold) or d > thresholds[x]
                           or (c.inclusive and d == thresholds[x])) and (y >= 0 or c.ignored == 'negative')]
            counts.append((chosen.count(1), len(chosen), [y for *_, y in column].count(1)))
        ratio = [(tp / n if n else 0., tp / p if p else 0., 2 * tp / (n + p) if n + p else 0.) for tp, n, p in counts]
        cp, cr, mean_f1 = np.mean([ratio[x] for x in used], 0)
        tp, n, p = np.sum(counts, 0)
        harmonic = 2 * cp * cr / (cp + cr) if cp + cr else 0.
        cf1 = mean_f1 if c.cf1 == 'mean' else harmonic
        values = cp, cr, cf1, tp / max(n, 1), tp / max(p, 1), 2 * tp / max(n + p, 1)
        report |= {name + suffix: 100 * value for name, value in zip(COUNTS, values)}
    gap = [np.mean(scores[labels == y], dtype=np.float64) if (labels == y).any() else np.nan for y in (1, 0)]
    report |= dict(p_t_pos=gap[0], p_t_neg=1 - gap[1], gap=gap[0] - 1 + gap[1])
    known = (labels >= 0).any()
    ends = [k / 15 for k in range(15)]
    return report | dict(ECE=calibration_error_by_definition(decisive, labels, ends) if known else np.nan)
