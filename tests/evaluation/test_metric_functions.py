"""The metric functions against their definitions, scikit-learn, torchmetrics and MMPretrain."""
import numpy as np
import pytest
import torch
from metric_definitions import COUNTS, ap_by_definition, calibration_error_by_definition, make_data, sklearn_counts

from mmasl.errors import ConfigError, DataError
from mmasl.evaluation.functional import (
    CHOICES,
    PRESETS,
    Conventions,
    average_precision,
    count_outcomes,
    expected_calibration_error,
    multilabel_metrics,
    precision_recall_f1,
    predicted_labels,
    probability_gap,
    reliability,
    roc_auc,
)

SHAPES = [(7, 2), (40, 5), (333, 20)]


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
def test_average_precision_by_definition(mode, levels):
    scores, labels = make_data(0, n=50, c=4, ignored=0.2, levels=levels)
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
def test_average_precision_agrees_with_sklearn_and_torchmetrics(shape, levels):
    from sklearn.metrics import average_precision_score
    from torchmetrics.functional.classification import multilabel_average_precision
    scores, labels = make_data(0, *shape, levels=levels)
    expected = [average_precision_score(y, s) for s, y in zip(scores.T, labels.T)]
    np.testing.assert_allclose(average_precision(scores, labels), expected, rtol=1e-9)
    scores, labels = make_data(0, *shape, ignored=0.2, levels=levels)
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
    with pytest.raises(DataError, match=r"no positive label in 1 of 6 classes \('c'\); .*set empty='skip'"):
        multilabel_metrics(scores, labels, Conventions(empty='error'), 'abcdef')
    with pytest.raises(DataError, match='No class has a positive label'):
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


@pytest.mark.parametrize('levels', [None, 6])
def test_roc_auc_is_sklearns(levels):
    from sklearn.metrics import roc_auc_score
    scores, labels = make_data(31, 300, 5, ignored=0.1, levels=levels)
    expected = [roc_auc_score(y[y >= 0], s[y >= 0]) for s, y in zip(scores.T, labels.T)]
    np.testing.assert_allclose(roc_auc(scores, labels), expected, rtol=1e-12)
    np.testing.assert_allclose(roc_auc(3 * scores - 7, labels), expected, rtol=1e-12)
    assert multilabel_metrics(scores, labels)[0]['AUC'] == pytest.approx(100 * np.mean(expected))
    labels[:, 0], labels[:, 1] = 1, 0
    labels[:, 2] = -1
    assert np.isnan(roc_auc(scores, labels)).tolist() == [True] * 3 + [False] * 2
    assert multilabel_metrics(scores, labels)[0]['AUC'] == pytest.approx(100 * np.mean(expected[3:]))


def test_probability_gap():
    scores, labels = np.array([[0.9, 0.3], [0.5, 0.2]]), np.array([[1, 0], [1, -1]])
    assert probability_gap(scores, labels) == pytest.approx(dict(p_t_pos=0.7, p_t_neg=0.7, gap=0), abs=1e-15)
    assert np.isnan(probability_gap(scores, np.ones((2, 2)))['gap'])


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


def test_functions_refuse_bad_arguments():
    scores, labels = make_data()
    with pytest.raises(ConfigError, match="mode='11points' is unknown; valid: 'non_interpolated'"):
        average_precision(scores, labels, '11points')
    with pytest.raises(ConfigError, match="ignored='drop' is unknown; valid: 'skip', 'negative'"):
        count_outcomes(scores > 0.5, labels, 'drop')
    with pytest.raises(DataError, match=r'scores have shape \(60, 6\) and the labels \(60, 5\)'):
        multilabel_metrics(scores, labels[:, 1:])
    with pytest.raises(DataError, match=r'calibrated scores have shape \(60, 5\) and the scores \(60, 6\)'):
        multilabel_metrics(scores, labels, calibrated=scores[:, 1:])
    with pytest.raises(DataError, match=r'calibrated scores range from -1.\d+ to .*, outside of \[0, 1\]'):
        multilabel_metrics(scores, labels, calibrated=scores - 2)
    with pytest.raises(DataError, match='scores range from nan to nan'):
        multilabel_metrics(scores * np.float32('nan'), labels)
    with pytest.raises(DataError, match='labels contain 2; use 1 for positive, 0 for negative, -1 for ignored'):
        multilabel_metrics(scores, 2 * labels)
    with pytest.raises(ConfigError, match='bins=0 is not a positive integer'):
        expected_calibration_error(scores, labels, 0)


def test_metrics_of_integers_and_doubles():
    scores, labels = make_data(22, 40, 5)
    binary = (scores > 0.5).astype(int)
    expected, _ = multilabel_metrics(binary.astype(np.float32), labels)
    assert multilabel_metrics(binary, labels)[0] == pytest.approx(expected)
    # apart in float64 only
    close = 0.5 + 1e-12 * np.arange(40)[:, None]
    _, ap = multilabel_metrics(close, (np.arange(40) >= 20)[:, None].astype(np.int8))
    assert ap == 100 and multilabel_metrics(close, labels[:, :1])[0]['OP'] > 0
