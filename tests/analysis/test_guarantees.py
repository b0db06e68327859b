"""Thresholds with a promise: against their definitions, and the promises themselves."""
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest

from mmasl.analysis.guarantees import guarantee_precision, guarantee_recall, hoeffding_bentkus
from mmasl.errors import MMASLError


def make(seed, images, classes, grid=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, classes)) < 0.4).astype(np.int8)
    scores = rng.random((images, classes)) + 0.5 * labels
    scores = (scores * grid).round() / grid if grid else scores
    labels[rng.random((images, classes)) < 0.1] = -1
    return scores, labels


@pytest.mark.parametrize('grid', [None, 5], ids=['distinct', 'ties'])
@pytest.mark.parametrize('recall', [0.5, 0.8, 0.9, 0.95])
def test_a_left_out_image_is_found_as_promised(recall, grid):
    """What exchangeability makes of n + 1 images, without chance: each is left out once, the mean loss is bounded."""
    scores, labels = make(0, 40, 3, grid)
    for by_class in (True, False):
        missed = []
        for left_out in range(len(labels)):
            rest = np.arange(len(labels)) != left_out
            thresholds = guarantee_recall(scores[rest], labels[rest], recall, by_class).thresholds
            positive = labels[left_out] == 1
            lost = np.where(positive, ~(scores[left_out] >= np.nan_to_num(thresholds)), np.nan)
            missed.append(lost if by_class else [np.nanmean(lost)] if positive.any() else [np.nan])
        assert (np.nanmean(missed, 0) <= 1 - recall + 1e-12).all()


@pytest.mark.parametrize('recall, least', [(0.95, 19), (0.9, 9), (0.8, 4), (0.7, 3)])
def test_the_least_number_of_positives(recall, least):
    """1 - 0.95 in floating point is above 1/20, and 20 times 1 - 0.9 below 2."""
    scores = np.linspace(0, 1, least)[:, None]
    found = guarantee_recall(scores, np.ones((least, 1), np.int8), recall)
    assert found.thresholds.tolist() == [0] and found.positives.tolist() == [least]
    less = guarantee_recall(scores[1:], np.ones((least - 1, 1), np.int8), recall)
    assert np.isnan(less.thresholds).all()
    many = guarantee_recall(np.arange(2000.)[:, None], np.ones((2000, 1), np.int8), recall).thresholds
    assert many.tolist() == [math.floor((1 - Fraction(str(recall))) * 2001) - 1]


def test_the_highest_threshold_of_images_by_definition():
    scores, labels = make(1, 30, 4, 20)
    found, = set(guarantee_recall(scores, labels, 0.8, by_class=False).thresholds)
    has = (labels == 1).any(1)

    def bound(threshold):
        lost = ((scores < threshold) & (labels == 1)).sum(1)[has] / (labels == 1).sum(1)[has]
        return (lost.sum() + 1) / (has.sum() + 1)

    allowed = [t for t in np.unique(scores[labels == 1]) if bound(t) <= 0.2]
    assert found == max(allowed)


@pytest.mark.parametrize('level, by_class', [
    (0.5, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.5, False), (0.9, True), (0.9, False)))])
def test_a_promise_that_cannot_be_kept_is_rarely_made(level, by_class):
    """Labels that do not depend on the scores: the precision is ``level`` at every threshold, and any promise of more
    would fail. It may be made with a probability of ``delta`` at most; 4 standard errors of slack."""
    rng, delta, repeats = np.random.default_rng(2), 0.2, 600
    made = 0
    for seed in range(repeats):
        scores, labels = rng.random((100, 1)), (rng.random((100, 1)) < level - 1e-6).astype(np.int8)
        made += not np.isnan(guarantee_precision(scores, labels, level, delta, by_class, seed).thresholds[0])
    assert made <= repeats * delta + 4 * math.sqrt(repeats * delta * (1 - delta))
    assert made > 0 or not by_class  # the binomial tail is exact


@pytest.mark.parametrize('by_class', [True, False], ids=['class', 'image'])
def test_a_promise_that_is_easily_kept(by_class):
    """Positives score above negatives: the lowest threshold that is safe is found near the gap between them."""
    rng = np.random.default_rng(3)
    labels = (rng.random((600, 2)) < 0.5).astype(np.int8)
    scores = rng.random((600, 2)) / 2 + labels / 2
    scores[:, 1] -= 0.1
    found = guarantee_precision(scores, labels, 0.8, 0.1, by_class)
    assert found.positives.tolist() == (labels == 1).sum(0).tolist()
    chosen = scores >= found.thresholds
    precision, recall = (labels[chosen] == 1).mean(), chosen[labels == 1].mean()
    assert 0.8 <= precision and recall > 0.95


@pytest.mark.parametrize('images, found', [(2 * 22, True), (2 * 21, False)])
def test_the_least_number_of_right_predictions(images, found):
    scores, labels = np.full((images, 1), 0.7), np.ones((images, 1), np.int8)
    thresholds = guarantee_precision(scores, labels, 0.9, 0.1).thresholds
    assert thresholds.tolist() == [0.7] if found else np.isnan(thresholds).all()


def test_p_values():
    for wrong, count, bound in ((0, 30, 0.1), (1, 50, 0.1), (3, 200, 0.05), (10, 40, 0.3)):
        bentkus = math.e * binomtest(wrong, count, bound, 'less').pvalue
        mean = wrong / count
        h1 = (mean * math.log(mean / bound) if wrong else 0) + (1 - mean) * math.log((1 - mean) / (1 - bound))
        assert hoeffding_bentkus(mean, count, bound) == pytest.approx(min(1, bentkus, math.exp(-count * h1)), rel=1e-9)
        assert hoeffding_bentkus(mean, count, bound) >= (1 - 1e-12) * binomtest(wrong, count, bound, 'less').pvalue
    assert hoeffding_bentkus(0.2, 1000, 0.2) == hoeffding_bentkus(0., 0, 0.2) == 1


def test_labels_that_are_ignored_do_not_matter():
    scores, labels = make(4, 200, 2)
    other = np.where(labels == -1, 1 - scores, scores)
    for by_class in (True, False):
        for function in (guarantee_recall, guarantee_precision):
            found = [function(x, labels, 0.5, by_class=by_class).thresholds for x in (scores, other)]
            np.testing.assert_array_equal(*found)
            assert not np.isnan(found[0]).any()


@pytest.mark.parametrize('call, message', [
    (lambda s, y: guarantee_recall(s, y, 1.), 'recall=1.0 must be between 0 and 1'),
    (lambda s, y: guarantee_precision(s, y, 95), 'precision=95 must be'),
    (lambda s, y: guarantee_precision(s, y, 0.9, delta=0), 'delta=0 must be'),
    (lambda s, y: guarantee_precision(s[:1], y[:1], 0.9), '1 images cannot be split in halves')])
def test_refusals(call, message):
    with pytest.raises(MMASLError, match=message):
        call(*make(5, 20, 2))
