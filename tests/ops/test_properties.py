"""What holds for every input of the losses and the metrics, on inputs that hypothesis looks for.

The same examples in every run; the slow test takes 40 times as many, others each time, and prints their seed.
"""
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from torch.testing import assert_close

from mmasl import AsymmetricLoss, AsymmetricSoftmaxLoss, MultiLabelMetric
from mmasl.evaluation.functional import CHOICES, Conventions, average_precision, multilabel_metrics
from mmasl.ops import asymmetric_loss

set_hypothesis_home_dir(Path(__file__).parents[2] / '.pytest_cache/hypothesis')
SEED = 'MMASL_PROPERTIES_SEED'
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IGNORED = -1


def examples(count: int):
    long = SEED in os.environ
    return settings(max_examples=count * (40 if long else 1), derandomize=not long, database=None, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# --- what is drawn

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
gammas = st.sampled_from([0., 1e-30, 0.01, 0.5, 0.99, 1., 2., 4., 100.]) | st.floats(0, 16)
clips = st.sampled_from([0., 1e-40, 1e-7, 1e-4, 0.05, 0.5, 0.999999]) | st.floats(0, 0.999)
alphas = st.none() | st.floats(0, 1)
# Denormal in float16, float32 and float64, and where sigmoid, its complement or the logarithm end in each of them.
EDGES = [0., 6e-8, 1e-40, 5e-324, 8.5, 11., 16.7, 17.4, 18.5, 36.8, 88., 89., 103.9, 104.5, 709., 746., 1e4]
logits = st.sampled_from([*EDGES, *(-z for z in EDGES)]) | st.floats(-20, 20) | st.floats(-1e4, 1e4)


def vectors(length: int):
    return st.lists(logits, min_size=length, max_size=length).map(lambda z: torch.tensor(z, dtype=torch.float64))


parameters = st.fixed_dictionaries(dict(gamma_pos=gammas, gamma_neg=gammas, clip=clips, alpha=alphas,
                                        detach_focusing=st.booleans()))


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, rows: int, classes: int) -> torch.Tensor:
    """Logits of every size, none of which is at a margin's edge, where rounding may decide about a gradient."""
    z = torch.randn(rows, classes, generator=random(seed), dtype=torch.float64)
    return z * 10**(3 * torch.rand(rows, 1, generator=random(seed + 1)) - 1)


def value_and_grad(loss, z: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and the gradient of its sum."""
    z = z.detach().clone().requires_grad_()
    value = loss(z, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def assert_no_less(larger: torch.Tensor, smaller: torch.Tensor) -> None:
    """Elementwise, but for rounding: of the loss's size, and of p_m, which is a difference of numbers about 1."""
    slack = 64 * torch.finfo(larger.dtype).eps
    assert (larger >= smaller - slack * (1 + smaller.abs())).all(), (larger, smaller)


# --- the loss: where it is monotone
#
# L+ = q^g+ * -log p: both factors fall as z rises, q being 1 - p. L- = p_m^g- * -log(1 - p_m): both rise with p_m, and
# p_m = max(p - m, 0) rises with z. So L+ falls and L- rises in z for any gamma, margin and alpha, and as q, p_m and the
# logarithm's argument lie in [0, 1], both fall as gamma rises, and L- falls as m rises. The gradient has one sign.

@examples(100)
@given(vectors(8), parameters, st.sampled_from(DTYPES[:2]))
def test_loss_is_monotone_in_the_logit(z, setting, dtype):
    z = z.to(dtype).sort()[0]
    for target, sign in ((0, 1), (1, -1)):
        loss, grad = value_and_grad(asymmetric_loss, z, torch.full_like(z, target), **setting)
        assert_no_less(sign * loss[1:], sign * loss[:-1])
        assert (sign * grad >= 0).all()
        assert (loss >= 0).all()


@examples(60)
@given(vectors(6), parameters, st.lists(gammas, min_size=2, max_size=2), st.lists(clips, min_size=2, max_size=2))
def test_loss_falls_as_the_parameters_rise(z, setting, two_gammas, two_clips):
    z = z.repeat(2)
    target = torch.arange(12) < 6
    for name, values in (('gamma_pos', two_gammas), ('gamma_neg', two_gammas), ('clip', two_clips)):
        smaller, larger = (asymmetric_loss(z, target, **setting | {name: value}) for value in sorted(values))
        assert_no_less(smaller, larger)


@examples(60)
@given(vectors(8), parameters)
def test_holding_the_focusing_weight_only_lowers_the_gradient(z, setting):
    target = torch.arange(8) % 2
    (loss, through), (same, held) = (
        value_and_grad(asymmetric_loss, z, target, **setting | dict(detach_focusing=detach))
        for detach in (False, True))
    assert torch.equal(loss, same)
    assert_no_less(through.abs(), held.abs())


@examples(50)
@given(gammas, st.floats(1e-3, 0.9))
def test_negatives_are_bounded_by_the_margin(gamma, clip):
    z = torch.tensor([-1e4, math.log(clip / (1 - clip)) - 1e-3, 0., 20., 1e4], dtype=torch.float64)
    loss, grad = value_and_grad(asymmetric_loss, z, torch.zeros(5), gamma_neg=gamma, clip=clip)
    assert (loss <= (1 - clip)**gamma * -math.log(clip) * (1 + 1e-12)).all()
    assert not loss[:2].any() and not grad[:2].any()


# --- and where it is not
#
# With a margin q / (1 - p_m) goes to 0 as p goes to 1, so that the gradient rises and falls again (Sec. 2.5): L- is
# monotone but not convex. A soft label adds a part that falls to one that rises. The gradient through the focusing
# weight has gamma as a factor, and may rise with it.

@examples(50)
@given(gammas, st.floats(1e-3, 0.9), st.booleans())
def test_gradient_of_hard_negatives_falls_again(gamma, clip, detach):
    assume(gamma < 20)  # with 100, p_m^gamma is 0 nearly everywhere
    z = torch.linspace(-10, 40, 2001, dtype=torch.float64)
    grad = value_and_grad(asymmetric_loss, z, torch.zeros_like(z), gamma_neg=gamma, clip=clip,
                          detach_focusing=detach)[1]
    peak = grad.argmax()
    assert 0 < peak < 2000 and grad[0] == 0 and grad[-1] < 1e-3 * grad[peak]
    assert (grad[peak:].diff() <= 1e-12).all()


@examples(50)
@given(gammas, gammas, st.floats(0.01, 0.99))
def test_soft_labels_have_their_lowest_loss_between(gamma_pos, gamma_neg, y):
    loss = asymmetric_loss(torch.tensor([-1e4, 0., 1e4], dtype=torch.float64), torch.full((3, ), y),
                           gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=0.)
    assert loss[0] > loss[1] < loss[2]


def test_gradient_may_rise_with_gamma():
    z, zero = torch.tensor([math.log(9)], dtype=torch.float64), torch.zeros(1)  # p = 0.9
    grads = [value_and_grad(asymmetric_loss, z, zero, gamma_neg=gamma, clip=0.)[1].item() for gamma in (0., 1., 100.)]
    assert grads[0] == pytest.approx(0.9)
    assert grads[1] == pytest.approx(0.9 * (0.9 - 0.1 * math.log(0.1)))
    assert grads[1] > grads[0] > grads[2]


# --- the loss: what does not matter

@st.composite
def batches(draw) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits (N, C), soft and hard targets of which some are ignored, and keywords, with values for one or all classes.
    """
    rows, classes, seed = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(seeds)
    z = batch(seed, rows, classes).to(draw(dtypes))
    target = torch.rand(rows, classes, generator=random(seed + 2))
    target = torch.where(target < 0.3, target, (target > 0.7).float())
    target[torch.rand(rows, classes, generator=random(seed + 3)) < 0.1] = IGNORED
    setting = draw(parameters)
    for name, strategy in (('gamma_pos', gammas), ('gamma_neg', gammas), ('clip', clips)):
        if draw(st.booleans()):
            setting[name] = draw(st.lists(strategy, min_size=classes, max_size=classes))
    return z, target, setting


def tolerance(z: torch.Tensor) -> dict[str, float]:
    """Of a loss or gradient whose order of computation differs; p_m is a difference of numbers about 1."""
    eps = torch.finfo(torch.float64 if z.dtype == torch.float64 else torch.float32).eps
    return dict(rtol=max(2000 * eps, 2 * torch.finfo(z.dtype).eps), atol=200 * eps, check_dtype=False)


@examples(60)
@given(batches(), seeds)
def test_order_of_samples_and_classes(drawn, seed):
    z, target, setting = drawn
    rows, columns = (torch.randperm(n, generator=random(seed)) for n in z.shape)
    moved = {name: [value[c] for c in columns.tolist()] if isinstance(value, list) else value
             for name, value in setting.items()}
    one, other = (AsymmetricLoss(**kwargs, ignore_index=IGNORED, reduction='none') for kwargs in (setting, moved))
    expected = value_and_grad(one, z, target)
    found = value_and_grad(other, z[rows][:, columns], target[rows][:, columns])
    for a, b in zip(found, expected):
        assert_close(a, b[rows][:, columns], **tolerance(z))
    for reduction in ('sum', 'mean'):
        assert_close(other(z[rows][:, columns], target[rows][:, columns], reduction_override=reduction),
                     one(z, target, reduction_override=reduction), **tolerance(z))


@examples(60)
@given(batches(), st.integers(0, 9), st.sampled_from(['sum', 'mean', 'avg_factor']))
def test_parts_of_a_batch_and_ranks(drawn, cut, reduction):
    """Sums add up, means by their divisors; so do the gradient and the sums of the probability gap, which ranks add."""
    z, target, setting = drawn
    loss = AsymmetricLoss(**setting, ignore_index=IGNORED, reduction='sum' if reduction == 'sum' else 'mean')
    loss.probability_sums.enabled = True
    factor = 7. if reduction == 'avg_factor' else None

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, grad = value_and_grad(loss, z[part], target[part], avg_factor=factor)
        sums = loss.probability_sums.take()
        share = (target[part] != IGNORED).sum() if reduction == 'mean' else 1
        return value * share, grad.double() * share, sums

    whole, parts = run(slice(None)), [run(slice(0, cut)), run(slice(cut, None))]
    assert_close(sum(part[0] for part in parts), whole[0], **tolerance(z))
    assert_close(torch.cat([part[1] for part in parts]), whole[1], **tolerance(z))
    assert_close(sum(part[2] for part in parts), whole[2], **tolerance(z))


@examples(40)
@given(batches(), seeds)
def test_label_forms_agree(drawn, seed):
    z, _, setting = drawn
    rows, classes = z.shape
    loss = AsymmetricLoss(**setting, ignore_index=255, reduction='none')
    labels = torch.randint(classes + 1, (rows, ), generator=random(seed))
    labels[torch.rand(rows, generator=random(seed + 1)) < 0.2] = 255
    one_hot = torch.arange(classes) == labels[:, None]
    dense = torch.where(labels[:, None] == 255, 255, one_hot.long())
    quality = torch.rand(rows, generator=random(seed + 2))
    soft = torch.where(labels[:, None] == 255, 255., one_hot * quality[:, None])
    kept = labels != 255

    expected = value_and_grad(loss, z, labels)
    forms = dict(labels32=labels.int(), int64=dense, uint8=dense.to(torch.uint8), float32=dense.float(),
                 float64=dense.double(), pair=(labels, torch.ones(rows)))
    for form in forms.values():
        assert_close(value_and_grad(loss, z, form), expected, **tolerance(z))
    assert_close(value_and_grad(loss, z[kept], one_hot[kept]), tuple(x[kept] for x in expected), **tolerance(z))
    assert_close(value_and_grad(loss, z, (labels, quality)), value_and_grad(loss, z, soft), **tolerance(z))


# --- the loss: finite whatever is set

def assert_finite(*tensors: torch.Tensor) -> None:
    for x in tensors:
        assert x.isfinite().all(), x


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('detach', [False, True], ids=['eq8', 'detached'])
def test_ten_thousand_settings_at_the_edges(dtype, detach):
    """Each class has its own setting."""
    count, rng = 10_000, np.random.default_rng(0)
    rounds = np.array([0., 1e-30, 0.01, 0.5, 1., 2., 100.])
    gamma_pos, gamma_neg = np.where(rng.random((2, count)) < 0.3, rng.choice(rounds, (2, count)),
                                    rng.exponential(4., (2, count)))
    clip = np.where(rng.random(count) < 0.3, rng.choice([0., 1e-40, 1e-7, 0.05, 0.5], count), rng.random(count) * 0.999)
    z = torch.tensor([*EDGES, *(-z for z in EDGES)], dtype=torch.float64).to(dtype)[:, None].expand(-1, count)
    loss = AsymmetricLoss(gamma_pos, gamma_neg, clip, 0.25, detach_focusing=detach, ignore_index=IGNORED)
    for target in (0., 1., 0.3, IGNORED):
        for reduction in ('none', 'sum', 'mean'):
            value, grad = value_and_grad(loss, z, torch.full(z.shape, target), reduction_override=reduction)
            assert_finite(value, grad)
            assert target != IGNORED or (not value.any() and not grad.any())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('clip', [0., 1e-45, 1e-40, 3e-39, 1e-7, 0.05, 0.5, 0.99999994])
def test_one_setting_for_all_classes_at_the_edges(dtype, clip):
    """Numbers take shorter formulas than tensors."""
    z = torch.tensor([*EDGES, *(-z for z in EDGES)], dtype=torch.float64).to(dtype)
    for gamma, target, detach in itertools.product((0., 1e-30, 0.5, 1., 2., 1e3), (0., 1., 0.3), (False, True)):
        loss = AsymmetricLoss(gamma, gamma, clip, detach_focusing=detach, reduction='none')
        assert_finite(*value_and_grad(loss, z, torch.full(z.shape, target)))


@examples(300)
@given(st.lists(logits, min_size=6, max_size=6), parameters, dtypes,
       st.sampled_from(['dense', 'soft', 'labels', 'quality', 'ignored', 'ignored labels']),
       st.sampled_from(['none', 'mean', 'sum']), st.sampled_from([None, 0., 1., 1e6]), seeds)
def test_any_setting_is_finite(z, setting, dtype, form, reduction, avg_factor, seed):
    z = torch.tensor(z, dtype=torch.float64).to(dtype).view(2, 3)
    labels = torch.randint(4, (2, ), generator=random(seed))
    target = dict(dense=torch.randint(2, (2, 3), generator=random(seed)), soft=torch.rand(2, 3, generator=random(seed)),
                  labels=labels, quality=(labels, torch.rand(2, generator=random(seed))),
                  ignored=torch.full((2, 3), IGNORED), **{'ignored labels': torch.full((2, ), IGNORED)})[form]
    loss = AsymmetricLoss(**setting, ignore_index=IGNORED, reduction=reduction)
    loss.probability_sums.enabled = True
    # Divided by the least that it is divided by, a loss of 10,000 and a gradient in float16 are beyond their range.
    avg_factor = 1. if avg_factor == 0 and dtype == torch.float16 and 'ignored' not in form else avg_factor
    value, grad = value_and_grad(loss, z, target, avg_factor=avg_factor)
    assert_finite(value, grad, loss.probability_sums.total)
    assert value.dtype == torch.promote_types(dtype, torch.float32) and grad.dtype == dtype
    assert 'ignored' not in form or (not value.any() and not grad.any())


# --- the softmax form

softmax_settings = st.fixed_dictionaries(dict(gamma_pos=gammas, gamma_neg=gammas, smoothing=st.floats(0, 0.99)))


@st.composite
def labelled(draw) -> tuple[torch.Tensor, torch.Tensor]:
    rows, classes, seed = draw(st.integers(1, 9)), draw(st.integers(2, 7)), draw(seeds)
    labels = torch.randint(classes, (rows, ), generator=random(seed))
    labels[torch.rand(rows, generator=random(seed + 1)) < 0.2] = IGNORED
    return batch(seed, rows, classes).to(draw(dtypes)), labels


@examples(60)
@given(labelled(), softmax_settings, seeds, st.integers(0, 9))
def test_softmax_order_and_parts(drawn, setting, seed, cut):
    z, labels = drawn
    rows, columns = (torch.randperm(n, generator=random(seed)) for n in z.shape)
    loss = AsymmetricSoftmaxLoss(**setting, ignore_index=IGNORED, reduction='none')
    moved = torch.where(labels == IGNORED, IGNORED, columns.argsort()[labels])[rows]
    value, grad = value_and_grad(loss, z, labels)
    moved_value, moved_grad = value_and_grad(loss, z[rows][:, columns], moved)
    assert_close(moved_value, value[rows], **tolerance(z))
    assert_close(moved_grad, grad[rows][:, columns], **tolerance(z))
    parts = [value_and_grad(loss, z[part], labels[part]) for part in (slice(0, cut), slice(cut, None))]
    for whole, *pieces in zip((value, grad), *parts):
        assert_close(torch.cat(pieces), whole, **tolerance(z))
    assert_close(loss(z, labels, reduction_override='sum'), value.sum(), **tolerance(z))


@examples(60)
@given(vectors(5), gammas, gammas, st.floats(-100, 100))
def test_softmax_is_monotone_without_smoothing_and_only_knows_differences(z, gamma_pos, gamma_neg, shift):
    # -(1 - p)^g log p falls as p rises, and p rises with the label's logit and falls with the others'.
    loss = AsymmetricSoftmaxLoss(gamma_pos, gamma_neg, 0., reduction='none')
    lead = z.sort()[0]
    rows = torch.stack([lead, torch.zeros(5), torch.full((5, ), 2.)], 1)
    for label, sign in ((0, -1), (1, 1)):
        value, grad = value_and_grad(loss, rows, torch.full((5, ), label))
        assert_no_less(sign * value[1:], sign * value[:-1])
        assert (sign * grad[:, 0] >= 0).all()
        assert_close(loss(rows + shift, torch.full((5, ), label)), value, rtol=1e-9, atol=1e-9)


@examples(200)
@given(st.lists(logits, min_size=6, max_size=6), softmax_settings, dtypes, st.booleans())
def test_softmax_any_setting_is_finite(z, setting, dtype, ignored):
    z = torch.tensor(z, dtype=torch.float64).to(dtype).view(2, 3)
    loss = AsymmetricSoftmaxLoss(**setting, ignore_index=IGNORED)
    value, grad = value_and_grad(loss, z, torch.full((2, ), IGNORED) if ignored else torch.tensor([0, 2]))
    assert_finite(value, grad)
    assert not ignored or (not value.any() and not grad.any())


# --- the metrics

@st.composite
def scored(draw, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) on a grid, with many ties or none in a class, and labels of which some are ignored."""
    samples, classes, rng = draw(st.integers(1, 12)), draw(st.integers(1, 5)), np.random.default_rng(draw(seeds))
    grid = draw(st.sampled_from([2, 4, 64])) if ties else 64
    scores = (rng.integers(grid + 1, size=(samples, classes)) if ties else
              np.stack([rng.permutation(65)[:samples] for _ in range(classes)], 1)) / grid
    labels = rng.choice(np.array([1, 0, -1], np.int8), (samples, classes), p=draw(
        st.sampled_from([(0.4, 0.5, 0.1), (0.1, 0.9, 0.), (0.9, 0.1, 0.)])))
    return scores, labels


conventions = st.builds(
    Conventions, threshold=st.sampled_from([0., 0.25, 0.5, 0.7, 1.]), inclusive=st.booleans(),
    topk=st.none() | st.integers(1, 6), topk_above_threshold=st.booleans(), empty=st.just('zero'),
    **{name: st.sampled_from(CHOICES[name]) for name in ('ap_mode', 'cf1', 'no_prediction', 'ignored')})
modes = st.sampled_from(CHOICES['ap_mode'])


def assert_same(found: dict, expected: dict) -> None:
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@examples(100)
@given(scored(), modes, st.integers(0, 3))
def test_average_precision_is_bounded_and_only_knows_the_order(drawn, mode, which):
    scores, labels = drawn
    ap = average_precision(scores, labels, mode)
    # Strictly rising on a grid of 1/64, also as rounded.
    transform = (lambda x: 3 * x - 7, lambda x: x**3, np.exp, lambda x: np.log((x + 0.01) / (1.01 - x)))[which]
    np.testing.assert_array_equal(average_precision(transform(scores), labels, mode), ap)
    for value, s, y in zip(ap, scores.T, labels.T):
        positives, negatives = (y == 1).sum(), (y == 0).sum()
        assert np.isnan(value) == (positives == 0)
        if positives:
            # All positives last is the worst.
            rank = np.arange(1, positives + 1)
            worst = (rank / (negatives + rank)).mean()
            assert (0 if mode == 'voc2007' else worst - 1e-12) <= value <= 1
            if negatives == 0 or s[y == 1].min() > s[y == 0].max():
                assert value == pytest.approx(1)
            if mode == 'voc2010':
                assert value >= average_precision(s[:, None], y[:, None])[0] - 1e-12
            assert average_precision(0 * s[:, None], y[:, None], mode)[0] == pytest.approx(
                positives / (positives + negatives))


@examples(60)
@given(scored(ties=False), seeds, st.sampled_from(['voc2010', 'non_interpolated']))
def test_a_better_score_of_a_positive_never_lowers_average_precision(drawn, seed, mode):
    # The k-th best positive then has no more negatives above it than before, and its precision is k / (k + those).
    scores, labels = (x[:, :1] for x in drawn)
    assume((labels == 1).any())
    rng = np.random.default_rng(seed)
    better = scores.copy()
    better[rng.choice(np.flatnonzero(labels == 1))] += rng.integers(65) / 64 + 1 / 128  # between two others
    assert average_precision(better, labels, mode)[0] >= average_precision(scores, labels, mode)[0] - 1e-12


def test_among_ties_a_better_score_may_lower_average_precision():
    # The ten that tie have the precision of the last of them, 10/11 each. One that catches up with the negative, 1/2.
    labels = np.array([0] + [1] * 10, np.int8)[:, None]
    scores = np.array([0.9] + [0.5] * 10)[:, None]
    better = scores.copy()
    better[1] = 0.9
    assert average_precision(scores, labels)[0] == pytest.approx(10 / 11)
    assert average_precision(better, labels)[0] == pytest.approx((1 / 2 + 9 * 10 / 11) / 10)


@examples(60)
@given(scored(), conventions, seeds)
def test_report_is_bounded_and_order_and_repetition_do_not_matter(drawn, c, seed):
    scores, labels = drawn
    report, ap = multilabel_metrics(scores, labels, c)
    for name, value in report.items():
        low, high = (-1, 1) if name == 'gap' else (0, 1 if name in ('p_t_pos', 'p_t_neg', 'ECE') else 100)
        assert np.isnan(value) or low <= value <= high * (1 + 1e-12), name
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    moved, moved_ap = multilabel_metrics(scores[rows][:, columns], labels[rows][:, columns], c)
    assert_same(moved, report)
    np.testing.assert_array_equal(moved_ap, ap[columns])
    twice, _ = multilabel_metrics(np.concatenate([scores] * 2), np.concatenate([labels] * 2), c)
    assert_same(twice, report)


@examples(60)
@given(scored(), conventions, seeds)
def test_scores_of_ignored_labels_do_not_matter(drawn, c, seed):
    scores, labels = drawn
    assume(c.topk is None and c.ignored == 'skip')  # an ignored label keeps its place among the k best
    other = np.where(labels == -1, np.random.default_rng(seed).random(scores.shape), scores)
    assert_same(multilabel_metrics(other, labels, c)[0], multilabel_metrics(scores, labels, c)[0])


@examples(60)
@given(scored(), conventions, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_report_of_ranks_is_that_of_one_process(drawn, c, ranks, batch_size, as_lists):
    """Samples dealt out by DistributedSampler, which repeats some, and merged by MMEngine's collect_results."""
    scores, labels = drawn
    samples = [dict(pred_score=torch.tensor(s, dtype=torch.float32), gt_score=torch.tensor(y))
               for s, y in zip(scores, labels)]
    if as_lists:  # class indices, in any order and number, know no ignored labels
        labels = np.where(labels == 1, 1, 0).astype(np.int8)
        samples = [dict(pred_score=sample['pred_score'], gt_label=torch.tensor(np.flatnonzero(y)[::-1].copy()))
                   for sample, y in zip(samples, labels)]

    dealt = [i % len(samples) for i in range(math.ceil(len(samples) / ranks) * ranks)]
    metrics = [MultiLabelMetric(**vars(c)) for _ in range(ranks)]
    for rank, metric in enumerate(metrics):
        share = [samples[i] for i in dealt[rank::ranks]]
        for start in range(0, len(share), batch_size):
            metric.process(None, share[start:start + batch_size])
    merged = [result for results in zip(*(metric.results for metric in metrics)) for result in results]
    expected, _ = multilabel_metrics(scores.astype(np.float32), labels, c)
    assert_same(metrics[0].compute_metrics(merged[:len(samples)]), expected)


# --- more of them

@pytest.mark.slow
def test_other_examples():
    seed = int.from_bytes(os.urandom(4), 'little')
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'not slow', f'--hypothesis-seed={seed}', __file__]
    print(f'{SEED}={seed}', *command)
    done = subprocess.run(command, env={**os.environ, SEED: str(seed)}, text=True, capture_output=True)
    assert done.returncode == 0, f'{SEED}={seed} {" ".join(command)}\n{done.stdout[-20000:]}'
