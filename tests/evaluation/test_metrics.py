"""The metrics against their definitions, scikit-learn, torchmetrics and mmpretrain, and where those differ."""
import doctest
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope

import mmasl.evaluation.metrics
from mmasl.evaluation.metrics import (
    CHOICES,
    PRESETS,
    Conventions,
    MacroF1,
    MultiLabelMetric,
    average_precision,
    count_outcomes,
    expected_calibration_error,
    multilabel_metrics,
    pack,
    precision_recall_f1,
    predicted_labels,
    probability_gap,
    reliability,
    unpack,
)

SHAPES = [(7, 2), (40, 5), (333, 20)]
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


@pytest.mark.parametrize('labels, plain, voc2010, voc2007', [
    ((1, 0, 1, 0), 5 / 6, 5 / 6, (6 + 5 * 2 / 3) / 11),
    ((0, 1, 1, 0), 7 / 12, 2 / 3, 2 / 3),
    ((1, 0, 0, 1), 3 / 4, 3 / 4, (6 + 5 / 2) / 11),
    ((-1, 1, -1, 1), 1, 1, 1),
    ((0, 0, 0, 1), 1 / 4, 1 / 4, 1 / 4),
])
def test_average_precision_by_hand(labels, plain, voc2010, voc2007):
    scores = np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
    got = [average_precision(scores, np.array(labels)[:, None], mode)[0]
           for mode in ('non_interpolated', 'voc2010', 'voc2007')]
    assert got == pytest.approx([plain, voc2010, voc2007], abs=1e-12)


@pytest.mark.parametrize('mode', CHOICES['ap_mode'])
@pytest.mark.parametrize('levels', [None, 5], ids=['distinct', 'tied'])
@pytest.mark.parametrize('seed', range(3))
def test_average_precision_by_definition(mode, levels, seed):
    scores, labels = make_data(seed, n=50, c=4, ignored=0.2, levels=levels)
    expected = [ap_by_definition(s, y, mode) for s, y in zip(scores.T, labels.T)]
    np.testing.assert_allclose(average_precision(scores, labels, mode), expected, rtol=1e-12)


@pytest.mark.parametrize('positives', [3, 7, 10])
def test_voc2007_recalls_are_exact(positives):
    # one negative after each positive: in floats, 3 of 10 positives would miss the recall 0.1 * 3
    labels = np.tile([1, 0], positives)[:, None]
    scores = np.linspace(1, 0, 2 * positives, dtype=np.float32)[:, None]
    expected = ap_by_definition(scores[:, 0], labels[:, 0], 'voc2007')
    assert average_precision(scores, labels, 'voc2007')[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('levels', [None, 8], ids=['distinct', 'tied'])
@pytest.mark.parametrize('seed', range(2))
def test_average_precision_agrees_with_sklearn_and_torchmetrics(shape, levels, seed):
    from sklearn.metrics import average_precision_score
    from torchmetrics.functional.classification import multilabel_average_precision
    scores, labels = make_data(seed, *shape, levels=levels)
    expected = [average_precision_score(y, s) for s, y in zip(scores.T, labels.T)]
    np.testing.assert_allclose(average_precision(scores, labels), expected, rtol=1e-9)
    scores, labels = make_data(seed, *shape, ignored=0.2, levels=levels)
    mean = average_precision(scores, labels).mean()
    theirs = multilabel_average_precision(torch.tensor(scores), torch.tensor(labels).long(), shape[1], ignore_index=-1)
    assert mean == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('cf1', CHOICES['cf1'])
@pytest.mark.parametrize('k', [None, 3])
def test_counts_agree_with_sklearn(shape, cf1, k):
    scores, labels = make_data(1, *shape)
    ranks = np.argsort(np.argsort(-scores, axis=1), axis=1)
    expected = sklearn_counts((scores > 0.5) & (ranks < (k or 20)), labels, cf1, zero_division=0)
    predicted = predicted_labels(scores, 0.5, topk=k)
    assert precision_recall_f1(*count_outcomes(predicted, labels), Conventions(cf1=cf1)) == expected


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('average, names', [('macro', COUNTS[:3]), ('micro', COUNTS[3:])])
def test_counts_agree_with_torchmetrics_and_mmpretrain(shape, average, names):
    from mmpretrain.evaluation import MultiLabelMetric as StockMultiLabelMetric
    from torchmetrics.functional.classification import multilabel_f1_score, multilabel_precision, multilabel_recall
    scores, labels = make_data(2, *shape, ignored=0.2)
    report, _ = multilabel_metrics(scores, labels, Conventions(cf1='mean'))
    args = torch.tensor(scores), torch.tensor(labels).long()
    for function, name in zip((multilabel_precision, multilabel_recall, multilabel_f1_score), names):
        theirs = function(*args, shape[1], threshold=0.5, average=average, ignore_index=-1)
        assert report[name] == pytest.approx(100 * theirs.item(), rel=1e-5)
    theirs = StockMultiLabelMetric.calculate(*args, thr=0.5, average=average)
    assert [report[name] for name in names] == pytest.approx([float(v) for v in theirs[:3]], rel=1e-5)


def test_cf1_is_harmonic_in_table_8():
    # CP 87.2 and CR 76.4 of Table 8, split over two classes; their F1 average to 77.2 instead of the printed 81.4
    counts = np.array([528, 744]), np.array([528, 1000]), np.array([1000, 744])
    report = precision_recall_f1(*counts, PRESETS['paper'])
    assert [round(report[name], 1) for name in COUNTS[:3]] == [87.2, 76.4, 81.4]
    assert round(precision_recall_f1(*counts, PRESETS['official'])['CF1'], 1) == 77.2


def test_topk_with_and_without_threshold():
    # Table 8 counts about 2.1 labels an image: top 3 and above the threshold. Without it each image has exactly 3.
    scores, labels = make_data(3, 100, 10)
    both, _ = multilabel_metrics(scores, labels, Conventions(topk=3, topk_above_threshold=True))
    only, _ = multilabel_metrics(scores, labels, Conventions(topk=3, topk_above_threshold=False))
    assert predicted_labels(scores, topk=3).sum(1).tolist() == [3] * 100
    assert only['OP_top3'] == pytest.approx(only['OR_top3'] * (labels == 1).sum() / 300)
    assert both['OP_top3'] > only['OP_top3'] and both['OR_top3'] < only['OR_top3']
    none, _ = multilabel_metrics(scores, labels, Conventions(topk=None))
    assert none == {name: value for name, value in both.items() if 'top' not in name}


def test_ties_at_the_threshold_and_the_kth_place():
    scores = np.array([[0.9, 0.5, 0.5, 0.1]], np.float32)
    assert predicted_labels(scores, 0.5).tolist() == [[True, False, False, False]]
    assert predicted_labels(scores, 0.5, inclusive=True).tolist() == [[True, True, True, False]]
    assert predicted_labels(scores, topk=2).tolist() == [[True, True, True, False]]
    assert predicted_labels(scores, topk=3).tolist() == [[True, True, True, False]]
    assert predicted_labels(scores, topk=9).all()


def test_tied_scores_do_not_depend_on_the_order_as_in_mmpretrain():
    from mmpretrain.evaluation import AveragePrecision
    scores, labels = np.full((4, 1), 0.5, np.float32), np.array([[1], [0], [0], [0]])
    theirs = [AveragePrecision.calculate(torch.tensor(scores), torch.tensor(y)) for y in (labels, labels[::-1].copy())]
    assert theirs[0] != theirs[1]
    assert average_precision(scores, labels) == average_precision(scores, labels[::-1]) == 0.25


@pytest.mark.parametrize('levels', [None, 4], ids=['distinct', 'tied'])
def test_permutation_invariance(levels):
    scores, labels = make_data(4, 80, 7, ignored=0.1, levels=levels)
    expected, ap = multilabel_metrics(scores, labels)
    rows, columns = np.random.default_rng(0).permutation(80), np.random.default_rng(1).permutation(7)
    got, got_ap = multilabel_metrics(scores[rows][:, columns], labels[rows][:, columns])
    assert got == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(got_ap, ap[columns], rtol=1e-12)


def test_empty_classes():
    scores, labels = make_data(5, 60, 6)
    labels[:, 2] = 0
    kept = [0, 1, 3, 4, 5]
    for cf1 in CHOICES['cf1']:
        skip, ap = multilabel_metrics(scores, labels, Conventions(empty='skip', cf1=cf1))
        rest, _ = multilabel_metrics(scores[:, kept], labels[:, kept], Conventions(cf1=cf1))
        assert [skip[k] for k in ('mAP', 'CP', 'CR', 'CF1')] == [rest[k] for k in ('mAP', 'CP', 'CR', 'CF1')]
    assert np.isnan(ap).nonzero()[0].tolist() == [2] and skip['OP'] < rest['OP']
    zero, ap = multilabel_metrics(scores, labels, Conventions(empty='zero'))
    assert zero == {**zero, **sklearn_counts(scores > 0.5, labels, 'harmonic', zero_division=0)}
    assert zero['mAP'] == pytest.approx(skip['mAP'] * 5 / 6) and ap[2] == 0
    with pytest.raises(ValueError, match=r"no positive label in 1 of 6 classes \('c'\): give empty='skip'"):
        multilabel_metrics(scores, labels, Conventions(empty='error'), 'abcdef')
    with pytest.raises(ValueError, match='no class has a positive label'):
        multilabel_metrics(scores, np.zeros_like(labels))


def test_both_averages_of_table_7():
    from sklearn.metrics import average_precision_score
    scores, labels = make_data(24, 300, 6)
    labels[50:, 1] = labels[20:, 4] = 0
    report, _ = multilabel_metrics(scores, labels)
    assert [report['mAP'], report['mAP_weighted']] == pytest.approx(
        [100 * average_precision_score(labels, scores, average=x) for x in ('macro', 'weighted')], rel=1e-9)
    # A class without positives has no share in the weighted mean, however it counts in the other.
    labels[:, 2], kept = 0, [0, 1, 3, 4, 5]
    expected = 100 * average_precision_score(labels[:, kept], scores[:, kept], average='weighted')
    for empty in ('skip', 'zero'):
        report, _ = multilabel_metrics(scores, labels, Conventions(empty=empty))
        assert report['mAP_weighted'] == pytest.approx(expected, rel=1e-9)


def test_class_without_negatives(monkeypatch):
    scores, labels = make_data(25, 60, 5)
    labels[:, 1] = np.where(labels[:, 1] == 1, 1, -1)
    labels[:, 3] = 0
    messages = []
    monkeypatch.setattr(mmasl.evaluation.metrics, 'print_log', lambda message, *_: messages.append(message))
    count, skip = (evaluate(MultiLabelMetric(no_negative=x), scores, labels) for x in ('count', 'skip'))
    ap, n = 100 * average_precision(scores, labels), (labels == 1).sum(0)
    assert ap[1] == 100
    for report, kept in ((count, [0, 1, 2, 4]), (skip, [0, 2, 4])):
        assert report['mAP'] == pytest.approx(ap[kept].mean(), rel=1e-12)
        assert report['mAP_weighted'] == pytest.approx((ap * n)[kept].sum() / n[kept].sum(), rel=1e-12)
    assert {k: v for k, v in count.items() if 'mAP' not in k} == {k: v for k, v in skip.items() if 'mAP' not in k}
    empty = "no positive label in 1 of 5 classes ('3'): left out of the class means"
    assert messages == [empty, empty, "no negative label in 1 of 5 classes ('1'): left out of mAP"]
    for kept in ([1], [1, 3]):
        with pytest.raises(ValueError, match="no class has a positive and a negative label .* no_negative='count'"):
            multilabel_metrics(scores[:, kept], labels[:, kept], Conventions(no_negative='skip'))
    zero, _ = multilabel_metrics(scores, labels, Conventions(no_negative='skip', empty='zero'))
    assert zero['mAP'] == pytest.approx(skip['mAP'] * 3 / 4)


def test_class_without_predictions():
    scores, labels = make_data(6, 60, 5)
    scores[:, 3] = 0.1
    for choice, zero_division in (('zero', 0), ('skip', np.nan)):
        report, _ = multilabel_metrics(scores, labels, Conventions(no_prediction=choice))
        expected = sklearn_counts(scores > 0.5, labels, 'harmonic', zero_division=zero_division)
        assert report == {**report, **expected}
    report, _ = multilabel_metrics(np.zeros_like(scores), labels, Conventions(no_prediction='skip'))
    assert [report[name] for name in COUNTS] == [0] * 6


def test_class_with_ignored_labels_only():
    from mmpretrain.evaluation import AveragePrecision
    scores, labels = make_data(7, 30, 4)
    labels[:, 1] = -1
    with pytest.raises(IndexError):
        AveragePrecision.calculate(torch.tensor(scores), torch.tensor(labels))
    report, ap = multilabel_metrics(scores, labels)
    rest, _ = multilabel_metrics(scores[:, [0, 2, 3]], labels[:, [0, 2, 3]], Conventions(topk=None))
    assert np.isnan(ap[1]) and report == {**report, **rest}


def test_probability_gap():
    scores, labels = np.array([[0.9, 0.3], [0.5, 0.2]]), np.array([[1, 0], [1, -1]])
    assert probability_gap(scores, labels) == pytest.approx(dict(p_t_pos=0.7, p_t_neg=0.7, gap=0), abs=1e-15)
    assert np.isnan(probability_gap(scores, np.ones((2, 2)))['gap'])


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


@pytest.mark.parametrize('bins', [1, 4, 15])
def test_expected_calibration_error(bins):
    scores, labels = make_data(13, 200, 7, ignored=0.2)
    scores[0, :3] = 0, 0.25, 1
    ends = [k / bins for k in range(bins)]
    expected = calibration_error_by_definition(scores, labels, ends)
    assert expected_calibration_error(scores, labels, bins) == pytest.approx(expected, rel=1e-9)
    expected = np.mean([calibration_error_by_definition(s, y, ends) for s, y in zip(scores.T, labels.T)])
    assert expected_calibration_error(scores, labels, bins, classwise=True) == pytest.approx(expected, rel=1e-9)


def test_expected_calibration_error_is_torchmetrics_of_one_label():
    from torchmetrics.functional.classification import binary_calibration_error
    scores, labels = make_data(14, 500, 3, ignored=0.1)
    theirs = binary_calibration_error(torch.tensor(scores), torch.tensor(labels).int(), 15, ignore_index=-1).item()
    assert expected_calibration_error(scores, labels) == pytest.approx(theirs, rel=1e-5)


def test_bins_of_equal_mass():
    scores, labels = make_data(15, 300, 4, ignored=0.1)
    known = np.sort(scores[labels >= 0])
    counts = reliability(scores, labels, 10, equal_mass=True)[:, 0].sum(0)
    assert counts.sum() == known.size and np.ptp(counts) <= 1
    ends = [0, *known[np.ceil(np.arange(1, 10) / 10 * (known.size - 1)).astype(int)].tolist()]
    expected = calibration_error_by_definition(scores, labels, ends)
    assert expected_calibration_error(scores, labels, 10, equal_mass=True) == pytest.approx(expected, rel=1e-9)
    # What the margin maps to 0 is one bin, in whatever order.
    scores[:200] = 0
    expected = expected_calibration_error(scores, labels, 10, equal_mass=True)
    order = np.random.default_rng(0).permutation(300)
    assert expected_calibration_error(scores[order], labels[order], 10, equal_mass=True) == pytest.approx(expected)
    counts = reliability(scores, labels, 10, equal_mass=True)[:, 0].sum(0)
    assert (counts > 0).sum() == 4 and counts.max() >= (labels[:200] >= 0).sum()


def test_calibration_errors_of_classes_do_not_cancel():
    scores = np.full((100, 2), 0.5)
    labels = np.stack([np.arange(100) < 70, np.arange(100) < 30], 1).astype(np.int8)
    assert expected_calibration_error(scores, labels) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(scores, labels, classwise=True) == pytest.approx(0.2)


def test_calibration_error_without_labels():
    scores, labels = make_data(16, 20, 3)
    labels[:, 1] = -1
    kept = expected_calibration_error(scores[:, [0, 2]], labels[:, [0, 2]], classwise=True)
    assert expected_calibration_error(scores, labels, classwise=True) == pytest.approx(kept, rel=1e-12)
    for equal_mass in (False, True):
        assert np.isnan(expected_calibration_error(scores, np.full_like(labels, -1), equal_mass=equal_mass))


def test_report_decides_by_calibrated_scores():
    scores, labels = make_data(17, 100, 6, ignored=0.1)
    calibrated = np.where(scores < 0.3, 0, scores**2)
    samples = [dict(sample, calibrated_score=torch.tensor(c))
               for sample, c in zip(make_samples(scores, labels), calibrated)]
    plain, got = (MultiLabelMetric(calibrated=flag) for flag in (False, True))
    for metric in (plain, got):
        metric.process(None, samples)
    plain, got = ({k.split('/')[1]: v for k, v in metric.evaluate(100).items()} for metric in (plain, got))
    assert plain == multilabel_metrics(scores, labels)[0]
    by_square, _ = multilabel_metrics(calibrated, labels)
    ranked = ('mAP', 'mAP_weighted', 'p_t_pos', 'p_t_neg', 'gap')
    assert got == {**by_square, **{name: plain[name] for name in ranked}}
    assert got['OF1'] != plain['OF1'] and got['ECE'] != plain['ECE'] and by_square['mAP'] != plain['mAP']
    # The k best of a sample are told by the raw scores where the calibrated ones are all 0.
    none = multilabel_metrics(scores, labels, Conventions(topk_above_threshold=False), calibrated=0 * scores)[0]
    assert none['OF1'] == 0
    expected = multilabel_metrics(scores, labels, Conventions(topk_above_threshold=False))[0]
    assert none['OF1_top3'] == expected['OF1_top3'] > 0


@pytest.fixture
def preset_data():
    # scores on the thresholds, ties, ignored labels and a class without positives: all that the presets disagree on
    scores, labels = make_data(8, 200, 8, ignored=0.1, levels=20)
    labels[:, 7] = 0
    assert (scores == np.float32(0.5)).any() and (scores == np.float32(0.8)).any()
    return scores, labels


def test_preset_paper(preset_data):
    scores, labels = preset_data
    report = evaluate(dict(type='mmasl.MultiLabelMetric', preset='paper'), scores, labels)
    best = (scores[:, :, None] < scores[:, None]).sum(2) < 3
    for above, suffix in ((scores > 0.5, ''), ((scores > 0.5) & best, '_top3')):
        predicted = above & (labels >= 0)
        by_class = sklearn_counts(predicted[:, :7], labels[:, :7] == 1, 'harmonic')
        overall = sklearn_counts(predicted, labels == 1, 'harmonic', zero_division=0)
        assert [report[name + suffix] for name in COUNTS[:3]] == [by_class[name] for name in COUNTS[:3]]
        assert [report[name + suffix] for name in COUNTS[3:]] == [overall[name] for name in COUNTS[3:]]
    assert report['mAP'] == pytest.approx(100 * average_precision(scores[:, :7], labels[:, :7]).mean())


def test_preset_official(preset_data):
    scores, labels = preset_data
    report = evaluate(MultiLabelMetric('official'), scores, labels)
    predicted = (scores > np.float32(0.8)) & (labels >= 0)
    assert report == {**report, **sklearn_counts(predicted, labels == 1, 'mean', zero_division=0)}
    assert report['mAP'] == pytest.approx(100 * average_precision(scores[:, :7], labels[:, :7]).sum() / 8)


def test_preset_ml_gcn(preset_data):
    scores, labels = preset_data
    with pytest.raises(ValueError, match='no positive label in 1 of 8 classes'):
        evaluate(MultiLabelMetric('ml_gcn'), scores, labels)
    scores, labels = scores[:, :7], labels[:, :7]
    report = evaluate(MultiLabelMetric('ml_gcn'), scores, labels)
    # its counts take difficult labels for negatives, its average precision leaves them out
    assert report == {**report, **sklearn_counts(scores >= 0.5, labels == 1, 'harmonic')}
    assert report['mAP'] == pytest.approx(100 * average_precision(scores, labels).mean())
    best = (scores >= 0.5) & ((scores[:, :, None] < scores[:, None]).sum(2) < 3)
    assert report['OP_top3'] == sklearn_counts(best, labels == 1, 'harmonic')['OP']


def test_preset_mmpretrain():
    from mmpretrain.evaluation import AveragePrecision
    from mmpretrain.evaluation import MultiLabelMetric as StockMultiLabelMetric
    scores, labels = make_data(9, 200, 8, ignored=0.1)
    np.fill_diagonal(scores, 0.5)
    labels[:, 2] = 0
    report = evaluate(MultiLabelMetric('mmpretrain'), scores, labels)
    theirs = [StockMultiLabelMetric(thr=0.5), StockMultiLabelMetric(thr=0.5, average='micro'), StockMultiLabelMetric(topk=3),
              StockMultiLabelMetric(topk=3, average='micro'), AveragePrecision()]
    expected = [v for metric in theirs for v in evaluate(metric, scores, labels).values()]
    got = [report[name + k] for k in ('', '_top3') for name in COUNTS] + [report['mAP']]
    assert got == pytest.approx(expected, rel=1e-5)
    # given both, mmpretrain's metric takes the threshold and forgets k
    assert evaluate(StockMultiLabelMetric(thr=0.5, topk=3), scores, labels) == evaluate(theirs[0], scores, labels)


def test_explicit_arguments_override_the_preset():
    metric = MultiLabelMetric('official', threshold=0.3, topk=5)
    assert metric.conventions == Conventions(threshold=0.3, cf1='mean', empty='zero', topk=5)


def test_reads_what_the_stock_head_returns():
    from mmpretrain.models import MultiLabelClsHead
    from mmpretrain.structures import DataSample
    logits, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), make_data(0, 20, 4)[1]
    expected = evaluate(MultiLabelMetric(), logits.sigmoid().numpy(), labels)
    for label in (lambda y: DataSample().set_gt_score(y), lambda y: DataSample().set_gt_label(y.nonzero()[0])):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            evaluator = Evaluator(metrics=dict(type='mmasl.MultiLabelMetric'))
        evaluator.dataset_meta = dict(classes=('a', 'b', 'c', 'd'))
        evaluator.process(MultiLabelClsHead().predict((logits, ), [label(y) for y in labels]))
        assert {k.split('/')[1]: v for k, v in evaluator.evaluate(20).items()} == expected


def test_ignore_index_and_half_precision():
    scores, labels = make_data(10, 30, 4, ignored=0.2, levels=8)
    samples = [dict(pred_score=torch.tensor(s).bfloat16(), gt_score=np.where(y < 0, 3, y))
               for s, y in zip(scores, labels)]
    metric = MultiLabelMetric(ignore_index=3, prefix='x')
    metric.process(None, samples)
    expected, _ = multilabel_metrics(torch.tensor(scores).bfloat16().float().numpy(), labels)
    assert metric.evaluate(30) == {f'x/{name}': value for name, value in expected.items()}


def test_per_class_values_and_table(monkeypatch):
    scores, labels = make_data(11, 40, 3)
    labels[:, 1] = 0
    metric = MultiLabelMetric(per_class=True)
    metric.dataset_meta = dict(classes=('cat', 'traffic light', 'dog'))
    messages = []
    monkeypatch.setattr(mmasl.evaluation.metrics, 'print_log', lambda message, *_: messages.append(message))
    report = evaluate(metric, scores, labels)
    ap = 100 * average_precision(scores, labels)
    assert {k: v for k, v in report.items() if k.startswith('AP_')} == {'AP_cat': ap[0], 'AP_dog': ap[2]}
    assert messages[0] == "no positive label in 1 of 3 classes ('traffic light'): left out of the class means"
    assert [line.split()[-2:] for line in messages[1].splitlines()[2:]] == [
        [str((labels[:, c] == 1).sum()), f'{ap[c]:.2f}'] for c in range(3)]


GOOD = dict(pred_score=torch.tensor([0.1, 0.2]), gt_label=[0], img_path='a.jpg')


@pytest.mark.parametrize('change, message', [
    (dict(pred_score=torch.tensor([0.1, float('nan')])), r'sample a.jpg, class 1 \(dog\): pred_score nan .* diverged'),
    (dict(pred_score=torch.tensor([3., 0.])), r'class 0 \(cat\): pred_score 3.0 .* logits need a sigmoid'),
    (dict(pred_score=torch.rand(3)), r'sample a.jpg: pred_score has shape \(3,\), expected \(2,\): .*num_classes'),
    (dict(gt_score=torch.ones(3)), r'sample a.jpg: gt_score has shape \(3,\), expected \(2,\)'),
    (dict(gt_score=torch.tensor([0.3, 1])), r'class 0 \(cat\): gt_score 0.3\d* is none of 0, 1 and ignore_index=-1'),
    (dict(gt_label=[0, 2]), r'sample a.jpg: gt_label \[0, 2\] must lie in 0 ... 1'),
    (dict(gt_label=[-1]), r'gt_label \[-1\] must lie in 0 ... 1'),
])
def test_refuses_bad_samples_at_once(change, message):
    metric = MultiLabelMetric()
    metric.dataset_meta = dict(classes=('cat', 'dog'))
    with pytest.raises(ValueError, match=message):
        metric.process(None, [GOOD, {**GOOD, **change}])
    assert metric.results == []


def test_refuses_missing_fields_and_other_lengths():
    metric = MultiLabelMetric()
    with pytest.raises(ValueError, match='no samples'):
        metric.evaluate(0)
    with pytest.raises(ValueError, match='sample 0 has no pred_score: use a head'):
        metric.process(None, [dict(gt_label=[0])])
    with pytest.raises(ValueError, match='sample a.jpg has neither gt_score nor gt_label'):
        metric.process(None, [dict(pred_score=torch.rand(2), img_path='a.jpg')])
    with pytest.raises(ValueError, match='sample a.jpg has no calibrated_score: use a head .* mmasl.MultiLabelClsHead'):
        MultiLabelMetric(calibrated=True).process(None, [GOOD])
    with pytest.raises(ValueError, match='class 0: calibrated_score 2.0 is no probability'):
        MultiLabelMetric(calibrated=True).process(None, [dict(GOOD, calibrated_score=torch.tensor([2., 0.]))])
    metric.process(None, [GOOD])
    with pytest.raises(ValueError, match=r'sample 1: pred_score has shape \(3,\), expected \(2,\)'):
        metric.process(None, [dict(pred_score=torch.rand(3), gt_label=[])])


@pytest.mark.parametrize('arguments, message', [
    (dict(preset='coco'), "preset='coco' is unknown; valid: 'paper', 'ml_gcn', 'official', 'mmpretrain'"),
    (dict(cf1='macro'), "cf1='macro' is unknown; valid: 'harmonic', 'mean'"),
    (dict(thr=0.5), "argument='thr' is unknown; valid: 'ap_mode', 'threshold'"),
    (dict(threshold=50), 'threshold=50 is not a probability'),
    (dict(score_dtype='bfloat16'), "score_dtype='bfloat16' is unknown; valid: 'float32', 'float16'"),
    (dict(topk=0), 'topk=0 is not a positive integer'),
    (dict(ignore_index=0), 'ignore_index=0 is itself a label'),
])
def test_refuses_unknown_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelMetric(**arguments)


def test_functions_refuse_bad_arguments():
    scores, labels = make_data()
    with pytest.raises(ValueError, match="mode='11points' is unknown; valid: 'non_interpolated'"):
        average_precision(scores, labels, '11points')
    with pytest.raises(ValueError, match="ignored='drop' is unknown; valid: 'skip', 'negative'"):
        count_outcomes(scores > 0.5, labels, 'drop')
    with pytest.raises(ValueError, match=r'scores \(60, 6\) and labels \(60, 5\)'):
        multilabel_metrics(scores, labels[:, 1:])
    with pytest.raises(ValueError, match=r'calibrated scores \(60, 5\) and scores \(60, 6\)'):
        multilabel_metrics(scores, labels, calibrated=scores[:, 1:])
    with pytest.raises(ValueError, match=r'calibrated scores reach from -1.\d+ to .*: probabilities lie in \[0, 1\]'):
        multilabel_metrics(scores, labels, calibrated=scores - 2)
    with pytest.raises(ValueError, match='scores reach from nan to nan'):
        multilabel_metrics(scores * np.float32('nan'), labels)
    with pytest.raises(ValueError, match='labels hold 2: positive, negative and ignored are 1, 0 and -1'):
        multilabel_metrics(scores, 2 * labels)
    with pytest.raises(ValueError, match='bins=0 is not a positive integer'):
        expected_calibration_error(scores, labels, 0)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_pack_keeps_and_orders(dtype):
    bits = np.arange(0x3C01, dtype=np.uint16).view(np.float16)  # all probabilities of float16
    tiny = np.finfo(dtype).smallest_subnormal
    scores = np.unique(np.concatenate([bits.astype(dtype), np.array([tiny, 1 - np.finfo(dtype).epsneg], dtype)]))
    codes = np.concatenate([pack(scores, np.full(scores.shape, y, np.int8)) for y in (-1, 0, 1)])
    assert codes.itemsize == scores.itemsize and (codes[1:] > codes[:-1]).all()
    got, labels = unpack(codes)
    assert got.dtype == dtype and labels.dtype == np.int8
    np.testing.assert_array_equal(got, np.tile(scores, 3))
    np.testing.assert_array_equal(labels, np.repeat([-1, 0, 1], scores.size))
    assert pack(np.array([-0.], dtype), np.array([1])) == pack(np.array([0.], dtype), np.array([1]))


def report_by_definition(scores, labels, decisive, c):
    """Every figure of the report, sample by sample and class by class; c.empty must be 'zero' or 'skip'."""
    pairs = [list(zip(*columns)) for columns in zip(*(x.T.tolist() for x in (scores, decisive, labels)))]
    threshold = float(decisive.dtype.type(c.threshold))
    used = [x for x in range(len(pairs)) if c.empty == 'zero' or (labels[:, x] == 1).any()]
    ap = [ap_by_definition(scores[:, x], labels[:, x], c.ap_mode) if (labels[:, x] == 1).any() else 0. for x in used]
    support = [(labels[:, x] == 1).sum() for x in used]
    report = dict(mAP=100 * np.mean(ap), mAP_weighted=100 * np.dot(ap, support) / max(sum(support), 1))
    better = (scores[:, :, None] < scores[:, None]).sum(2)
    for suffix, best in (('', None), (f'_top{c.topk}', better < c.topk)):
        counts = []
        for x, column in enumerate(pairs):
            chosen = [y for i, (_, d, y) in enumerate(column) if (best is None or best[i, x])
                      and ((best is not None and not c.topk_above_threshold) or d > threshold
                           or (c.inclusive and d == threshold)) and (y >= 0 or c.ignored == 'negative')]
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


@pytest.fixture(params=[(1, 1), (3, 2)], ids=['one_thread', 'blocks_and_threads'])
def blocks(request, monkeypatch):
    threads, divisor = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(mmasl.evaluation.metrics, 'BLOCK', 2**24 if divisor == 1 else 100)
    yield
    torch.set_num_threads(before)


REPORT_CASES = [
    ((40, 9), dict()), ((40, 9), dict(ap_mode='voc2010', empty='skip')),
    ((40, 9), dict(inclusive=True, cf1='mean', topk_above_threshold=False)), ((40, 9), dict(ignored='negative')),
    ((40, 9), dict(ignored='negative', topk=1, threshold=0.2, inclusive=True)), ((1, 9), dict(topk=2)),
    ((40, 1), dict(ap_mode='voc2007')), ((1, 1), dict())]


@pytest.mark.parametrize('score_dtype', ['float32', 'float16'])
@pytest.mark.parametrize('calibrated', [False, True], ids=['plain', 'calibrated'])
@pytest.mark.parametrize('shape, conventions', REPORT_CASES, ids=range(len(REPORT_CASES)))
def test_report_by_definition(shape, conventions, calibrated, score_dtype, blocks):
    scores, labels = make_data(18, *(max(n, 2) for n in shape), ignored=0.2, levels=20)
    scores, labels = scores[:shape[0], :shape[1]], labels[:shape[0], :shape[1]]
    labels[1:, 4:5] = 0
    labels[:, 5:6], labels[:, 6:7] = 0, -1
    # a second score which is no function of the first, as that of per-class parameters
    other = np.clip(scores**2 + np.linspace(0, 0.3, shape[1], dtype=np.float32), 0, 1)
    samples = [dict(sample, calibrated_score=o) for sample, o in zip(make_samples(scores, labels), other)]
    metric = MultiLabelMetric(calibrated=calibrated, score_dtype=score_dtype, **dict(empty='zero') | conventions)
    for start in range(0, len(samples), 16):
        metric.process(None, samples[start:start + 16])
    assert {x.dtype.itemsize for x in metric.results} == {np.dtype(score_dtype).itemsize}
    got = {name.split('/')[1]: value for name, value in metric.evaluate(len(samples)).items()}
    scores, other = scores.astype(score_dtype), other.astype(score_dtype)
    expected = report_by_definition(scores, labels, other if calibrated else scores, metric.conventions)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-9, nan_ok=True)
    direct, _ = multilabel_metrics(scores, labels, metric.conventions, calibrated=other if calibrated else None)
    np.testing.assert_equal(direct, got)


def test_float16_rounds_the_threshold_too():
    # 0.8 rounds down: in float16 it must not fall below its own threshold
    args = np.full((4, 1), 0.8, np.float32), np.ones((4, 1), np.int8)
    for inclusive in (False, True):
        metric = MultiLabelMetric(threshold=0.8, inclusive=inclusive, score_dtype='float16')
        assert evaluate(metric, *args)['OR'] == (100 if inclusive else 0)


@pytest.mark.parametrize('score_dtype', ['float32', 'float16'])
def test_order_and_parts_of_the_samples_do_not_matter(score_dtype, monkeypatch):
    samples = make_samples(*make_data(19, 90, 11, ignored=0.3, levels=30))
    reports = []
    orders = ([samples], 2**24), ([samples[1::2], samples[::2]], 2**24), ([samples[50:], samples[:50]], 200)
    for parts, block in orders:
        monkeypatch.setattr(mmasl.evaluation.metrics, 'BLOCK', block)
        gathered = []
        for part in parts:
            metric = MultiLabelMetric(score_dtype=score_dtype)
            metric.process(None, part)
            gathered += metric.results
        reports.append(metric.compute_metrics(gathered))
    assert reports[0] == reports[1] == reports[2]


def test_memory_beside_the_samples_is_that_of_blocks(monkeypatch):
    monkeypatch.setattr(mmasl.evaluation.metrics, 'BLOCK', 2**16)
    scores, labels = make_data(20, 2000, 700, ignored=0.5)
    metric = MultiLabelMetric(score_dtype='float16')
    for start in range(0, 2000, 100):
        metric.process(None, [dict(pred_score=s, gt_score=y) for s, y in zip(scores[start:start + 100],
                                                                             labels[start:start + 100])])
    kept = sum(x.nbytes for x in metric.results)
    assert kept == 2 * scores.size and len(metric.results) == 2000
    tracemalloc.start()
    metric.compute_metrics(metric.results)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < kept / 2


def keep_all_labels(monkeypatch):
    monkeypatch.setattr(mmasl.evaluation.metrics._Records, 'make', lambda *_: None)


@pytest.mark.parametrize('score_dtype', ['float32', 'float16'])
@pytest.mark.parametrize('calibrated', [False, True], ids=['plain', 'calibrated'])
@pytest.mark.parametrize('conventions', [
    dict(), dict(topk=None), dict(topk=1, topk_above_threshold=False), dict(topk=2, threshold=0.1, inclusive=True),
    dict(preset='official', ap_mode='voc2010'), dict(preset='mmpretrain'), dict(no_negative='skip')], ids=str)
def test_annotated_labels_are_all_that_is_kept_and_needed(conventions, calibrated, score_dtype, blocks, monkeypatch):
    scores, labels = make_data(26, 50, 90, ignored=0.9, levels=15)
    labels[:, 4], labels[:, 5], labels[3], labels[4:8, 6] = 0, -1, -1, 1
    labels[:, 4:40] = -1
    scores[5] = scores[6, :80] = 0  # many labels tied among the k best
    samples = [dict(sample, calibrated_score=torch.tensor(s**2))
               for sample, s in zip(make_samples(scores, labels), scores)]
    few = MultiLabelMetric(calibrated=calibrated, score_dtype=score_dtype, **conventions)
    with monkeypatch.context() as patch:
        keep_all_labels(patch)
        all_ = MultiLabelMetric(calibrated=calibrated, score_dtype=score_dtype, **conventions)
        all_.process(None, samples)
    few.process(None, samples[:20])
    few.process(None, samples[20:])
    assert sum(x.nbytes for x in few.results) < sum(x.nbytes for x in all_.results) / 2
    np.testing.assert_array_equal(few.labels(), labels)
    np.testing.assert_array_equal(all_.labels(), labels)
    expected = all_.compute_metrics(all_.results)
    assert few.compute_metrics(few.results) == expected
    # As of two processes, one of which has more labels.
    assert few.compute_metrics([*all_.results[:20], *few.results[20:]]) == expected


def test_all_labels_are_kept_where_ignored_ones_matter_or_few_are():
    for share, conventions, records in ((0.9, dict(), True), (0.9, dict(ignored='negative'), False),
                                        (0.6, dict(), False), (0.9, dict(topk=80), False), (1, dict(topk=None), True)):
        scores, labels = make_data(27, 20, 80, ignored=share)
        metric = MultiLabelMetric(empty='zero', **conventions)
        metric.process(None, make_samples(scores, labels))
        assert {bool(x.dtype.names) for x in metric.results} == {records}
        got = {k.split('/')[1]: v for k, v in metric.evaluate(20).items()}
        np.testing.assert_equal(got, multilabel_metrics(scores, labels, metric.conventions)[0])


def test_memory_is_that_of_annotated_labels(monkeypatch):
    scores, labels = make_data(28, 2000, 700, ignored=0.995)
    monkeypatch.setattr(mmasl.evaluation.metrics, 'BLOCK', 2**16)

    def peak():
        metric = MultiLabelMetric()
        samples = [dict(pred_score=s, gt_score=y) for s, y in zip(scores, labels)]
        tracemalloc.start()
        for start in range(0, 2000, 50):
            metric.process(None, samples[start:start + 50])
        metric.compute_metrics(metric.results)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    few = peak()
    keep_all_labels(monkeypatch)
    assert few < 2.5e6 and peak() > 4 * 2000 * 700


def test_samples_are_moved_into_slabs_in_their_order(monkeypatch):
    samples = make_samples(*make_data(23, 26, 4, ignored=0.2))
    loose, moved = MultiLabelMetric(score_dtype='float16'), MultiLabelMetric(score_dtype='float16')
    loose.process(None, samples)
    monkeypatch.setattr(mmasl.evaluation.metrics, 'SLAB', 7 * 4 * 2 + 1)
    for size, start in ((5, 0), (5, 5), (16, 10)):
        moved.process(None, samples[start:start + size])
    np.testing.assert_array_equal(loose.results, moved.results)
    assert [moved.results[i].base.shape[0] for i in (0, 6, 7, 20, 21, 25)] == [7, 7, 14, 14, 16, 16]
    # Records stay where they are.
    few = [dict(sample, gt_score=torch.full((4, ), -1.)) for sample in samples[:3]]
    moved, loose = (MultiLabelMetric(topk=None) for _ in range(2))
    for batch in (samples[:3], few, samples[3:23]):
        moved.process(None, batch)
    assert [bool(x.dtype.names) for x in moved.results] == [False] * 3 + [True] * 3 + [False] * 20
    loose.process(None, samples[:3] + few + samples[3:23])
    assert moved.evaluate(26) == loose.evaluate(26)


def test_samples_with_classes_and_with_scores_in_one_batch():
    scores, labels = make_data(21, 20, 6)
    expected = evaluate(MultiLabelMetric(), scores, labels)
    samples = make_samples(scores, labels)
    for sample in samples[1::3]:
        sample['gt_label'] = sample.pop('gt_score').nonzero()[:, 0]
    samples[2]['gt_label'] = samples[2].pop('gt_score').nonzero()[:, 0].tolist()
    metric = MultiLabelMetric()
    metric.process(None, samples)
    assert {k.split('/')[1]: v for k, v in metric.evaluate(20).items()} == expected


def test_report_of_integers_and_doubles():
    scores, labels = make_data(22, 40, 5)
    binary = (scores > 0.5).astype(int)
    expected, _ = multilabel_metrics(binary.astype(np.float32), labels)
    assert multilabel_metrics(binary, labels)[0] == pytest.approx(expected)
    # apart in float64 only
    close = 0.5 + 1e-12 * np.arange(40)[:, None]
    _, ap = multilabel_metrics(close, (np.arange(40) >= 20)[:, None].astype(np.int8))
    assert ap == 100 and multilabel_metrics(close, labels[:, :1])[0]['OP'] > 0


def samples_of_two_kinds():
    """Of which every other one has few labels."""
    scores, labels = make_data(12, 21, 60, levels=6)
    labels[::2, 4:] = -1
    return make_samples(scores, labels)


def samples_of_one_label():
    return single(np.arange(21) % 5, np.arange(21) % 4)


def evaluate_on_rank(rank, folder):
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    samples = samples_of_two_kinds()
    metric = MultiLabelMetric(collect_dir=f'{folder}/parts')
    # as DistributedSampler deals them: alternating, and the first sample once more to fill up
    metric.process(None, (samples + samples[:1])[rank::2])
    assert bool(metric.results[0].dtype.names) == (rank == 0)
    single_label = MacroF1(collect_dir=f'{folder}/single_label')
    samples = samples_of_one_label()
    single_label.process(None, (samples + samples[:1])[rank::2])
    torch.save([metric.evaluate(21), single_label.evaluate(21)], f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(evaluate_on_rank, (str(tmp_path), ), nprocs=2)
    metric = MultiLabelMetric()
    metric.process(None, samples_of_two_kinds())
    expected = [metric.evaluate(21), macro_f1(samples_of_one_label())]
    assert torch.load(tmp_path / '0.pt') == torch.load(tmp_path / '1.pt') == expected


# --- one label a sample


def single(true, predicted):
    """Samples as a single-label head of mmpretrain returns them, without their scores."""
    return [dict(gt_label=torch.tensor([t]), pred_label=torch.tensor([p])) for t, p in zip(true, predicted)]


def macro_f1(samples):
    metric = MacroF1()
    metric.process(None, samples)
    return metric.evaluate(len(samples))


def test_macro_f1_is_sklearns():
    from sklearn.metrics import accuracy_score, f1_score
    rng = np.random.default_rng(0)
    true = rng.integers(30, size=200) ** 2  # classes with gaps between them
    predicted = np.where(rng.random(200) < 0.5, true, rng.integers(1000, size=200))
    assert macro_f1(single(true, predicted)) == pytest.approx({
        'single-label/f1-score': 100 * f1_score(true, predicted, average='macro'),
        'single-label/top1': 100 * accuracy_score(true, predicted)})


def test_a_species_without_an_image_counts_if_it_is_predicted():
    """Class 3 is neither seen nor predicted, and class 2 is predicted alone: mmpretrain counts both, with 0."""
    from mmpretrain.evaluation import SingleLabelMetric
    true, predicted = torch.tensor([0, 0, 1, 4]), torch.tensor([0, 2, 1, 4])
    found = macro_f1(single(true, predicted))['single-label/f1-score']
    assert found == pytest.approx(100 * (2 / 3 + 1 + 0 + 1) / 4)
    _, _, f1, _ = SingleLabelMetric.calculate(predicted, true, num_classes=5, average='macro')
    assert found * 4 / 5 == pytest.approx(f1.item())


@pytest.mark.parametrize('label', [[], [0]], ids=['scalar', 'one of a list'])
def test_macro_f1_of_scores(label):
    samples = [dict(gt_label=torch.tensor(1).reshape([1] * len(label)), pred_score=torch.tensor(scores))
               for scores in ([0.1, 0.7, 0.2], [0.6, 0.3, 0.1])]
    assert macro_f1(samples) == pytest.approx({'single-label/f1-score': 100 / 3, 'single-label/top1': 50})
    # What the head decided comes before what its scores say.
    assert macro_f1([dict(sample, pred_label=1) for sample in samples])['single-label/top1'] == 100


def test_macro_f1_keeps_no_scores():
    """Herbarium 2020 has 32,094 species."""
    count, classes, batch = 20_000, 32_094, 100
    scores = torch.rand(batch, classes)
    metric = MacroF1()
    tracemalloc.start()
    for start in range(0, count, batch):
        metric.process(None, [dict(gt_label=torch.tensor([i % classes]), pred_score=row)
                              for i, row in enumerate(scores, start)])
    report = metric.compute_metrics(metric.results)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 <= report['f1-score'] <= report['top1'] < 1
    # A float32 of each score would be 2.6 GB. PyTorch's memory is not traced: the results are to be numbers.
    assert peak < 250 * count + 50 * classes
    assert {type(number) for pair in metric.results for number in pair} == {int}


@pytest.mark.parametrize('sample, message', [
    (dict(pred_label=1), 'sample 0 has no gt_label: evaluate a single-label head, such as LinearClsHead'),
    (dict(gt_label=1, img_path='a.jpg'), 'sample a.jpg has no pred_label'),
    (dict(gt_label=torch.tensor([0, 2]), pred_label=1), r'gt_label \[0, 2\] is not one class: .*MultiLabelMetric'),
    (dict(gt_label=1, pred_label=1, pred_score=torch.tensor([0.1, float('nan')])), 'sample 0: pred_score is nan')])
def test_samples_that_have_no_f1(sample, message):
    with pytest.raises(ValueError, match=message):
        MacroF1().process(None, [sample])


def test_macro_f1_of_nothing():
    with pytest.raises(ValueError, match='MacroF1 got no samples'):
        MacroF1().evaluate(0)


def test_docstring_example():
    result = doctest.testmod(mmasl.evaluation.metrics)
    assert result.attempted > 2 and result.failed == 0
