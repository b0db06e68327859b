"""The meanings of a soft label against their equations: in float64 by autograd, at extremes in 60 digits by mpmath.

tests/models/losses/test_losses.py compares them with MMDetection's losses. Every test runs for both implementations, as
in test_functional.py.
"""
import mpmath
import pytest
import torch
from test_functional import DEVICE, TOLERANCE_GRAD, compiled, implementation, tolerance, value_and_grad  # noqa: F401
from test_functional import on_device as asymmetric_loss
from torch.testing import assert_close

from mmasl.errors import ConfigError, DataError
from mmasl.ops import use_implementation
from mmasl.ops.reference import asymmetric_loss as reference

KINDS = ('qfl', 'vfl', 'mal')
kinds = pytest.mark.parametrize('kind', KINDS)


def batch(dtype=torch.float32):
    """Logits, labels with background, and qualities with 0 and 1 among them."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(37, 5, generator=generator, dtype=torch.float64) * 24 - 12).to(dtype)
    labels = torch.randint(6, (37, ), generator=generator)
    quality = torch.rand(37, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    assert {0., 1.} < set(quality[labels < 5].tolist())
    return logits, labels, quality


SETTINGS = dict(gamma_pos=torch.tensor([0., 0.5, 1, 2, 1.5]), gamma_neg=torch.tensor([4., 0, 2, 0.5, 1]),
                clip=torch.tensor([0.05, 0, 0, 0.3, 0]), alpha=0.25, class_weight=torch.tensor([1., 2, 0.75, 1, 0]),
                pos_weight=torch.tensor([1., 1, 4 / 3, 0, 3]))


CASES = [(kind, dtype, detach) for kind in KINDS for dtype, detach in (
    (torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, True),
    (torch.float16, False))]


@pytest.mark.parametrize('kind, dtype, detach', [
    pytest.param(*case, marks=[] if case[1] == torch.float32 or case[0] == 'qfl' else [pytest.mark.slow])
    for case in CASES], ids=str)
def test_value_and_gradient(kind, dtype, detach, implementation):  # noqa: F811
    """Qualities are float32, whatever the logits. In dense targets an entry of quality 0 is not labelled."""
    logits, labels, quality = batch(dtype)
    one_hot = (labels[:, None] == torch.arange(5)).double()
    kwargs = SETTINGS | dict(soft_label=kind, detach_focusing=detach)
    cotangent = torch.randn(37, 5, generator=torch.Generator().manual_seed(1))
    dense = one_hot * quality[:, None]
    for target, labelled in (((labels, quality), one_hot), (dense.float(), dense > 0)):
        expected, expected_grad = value_and_grad(reference, logits.double(), dense, labelled=labelled,
                                                 cotangent=cotangent, **kwargs)
        loss, grad = value_and_grad(asymmetric_loss, logits, target, cotangent=cotangent, **kwargs)
        assert_close(loss, expected, **tolerance(dtype))
        assert_close(grad, expected_grad, **tolerance(dtype, TOLERANCE_GRAD, implementation))


@kinds
def test_sum_of_labels(kind):
    """Labels without a quality have that of 1."""
    logits, labels, _ = batch()
    expected, expected_grad = value_and_grad(asymmetric_loss, logits, (labels, torch.ones(37)), soft_label=kind,
                                             **SETTINGS)
    total, grad = value_and_grad(asymmetric_loss, logits, labels, soft_label=kind, **SETTINGS, reduction='sum',
                                 scale=0.5, cotangent=torch.tensor(3.))
    assert_close((total, grad), (expected.sum() / 2, expected_grad * 1.5), rtol=1e-5, atol=1e-5)


def exact(z, t, gamma, kind, detach):
    """Loss of a labelled entry and its derivative in 60 digits."""
    with mpmath.workdps(60):
        z, t, gamma = mpmath.mpf(z), mpmath.mpf(t), mpmath.mpf(gamma)
        p, q = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
        weight, through = mpmath.mpf(1), mpmath.mpf(0)
        if kind == 'vfl':
            weight = t**gamma
        if kind == 'mal':
            t = t**gamma
        difference = (1 - t) - q if z > 0 else p - t
        if kind == 'qfl':
            weight = abs(difference)**gamma
            if not detach and gamma:
                through = gamma * abs(difference)**gamma / difference * p * q
        cross_entropy = t * mpmath.log1p(mpmath.exp(-z)) + (1 - t) * mpmath.log1p(mpmath.exp(z))
        return float(weight * cross_entropy), float(weight * difference + through * cross_entropy)


GAMMAS = torch.tensor([0., 0.5, 1., 2.])


@pytest.mark.parametrize('kind, detach', [('qfl', False), ('qfl', True), ('vfl', False), ('mal', False)])
def test_extreme_logits_and_qualities(kind, detach):
    """Up to |z| = 87, where p and 1 - p are normal numbers, with float32's digits; beyond, absolute errors."""
    near = torch.tensor([0., 1e-2, 3., 8., 12.5, 17.5, 20., 40., 60., 85.])
    far = torch.tensor([88., 104., 700., 5e4, 1e30, torch.finfo(torch.float32).max])
    qualities = torch.tensor([0., 1e-18, 1e-6, 0.25, 0.6, 1 - 2**-20, 1.])
    for sizes, atol in ((near, 1e-37), (far, 1e-7)):
        z, t, which = (x.flatten() for x in torch.meshgrid(torch.cat([sizes, -sizes]), qualities, torch.arange(4.),
                                                           indexing='ij'))
        which = which.long()
        loss, grad = value_and_grad(asymmetric_loss, z[:, None].expand(-1, 4), (which, t), gamma_pos=GAMMAS,
                                    soft_label=kind, detach_focusing=detach)
        expected = torch.tensor([exact(*row, kind, detach) for row in zip(
            z.tolist(), t.tolist(), GAMMAS[which].tolist())], dtype=torch.float64)
        found = torch.stack([loss, grad], -1)[torch.arange(len(z)), which]
        assert_close(found.double(), expected, rtol=2e-5, atol=atol)


def test_gradient_is_zero_where_the_score_is_the_quality():
    """There autograd of abs(t - p)^gamma is NaN for gamma < 1. The minimum of MAL is at p = t^gamma."""
    logits, quality = torch.tensor([[0.], [200.]]).expand(2, 4), torch.tensor([[0.5], [1.]]).expand(2, 4)
    for kind in ('qfl', 'vfl', 'mal'):
        t = quality**(1 / GAMMAS.clamp(min=0.5)) if kind == 'mal' else quality
        _, grad = value_and_grad(asymmetric_loss, logits, t, gamma_pos=GAMMAS, soft_label=kind)
        assert_close(grad[:, 1:], torch.zeros(2, 3), rtol=0, atol=1e-7 if kind == 'mal' else 0)
        assert_close(grad[:, 0], torch.tensor([-0.5, 0.]) if kind == 'mal' else torch.zeros(2))


@kinds
def test_hard_labels_are_focused_or_not(kind):
    """On hard labels QFL is ASL, and the other two are ASL with gamma_pos = 0."""
    logits, labels, _ = batch()
    assert_close(value_and_grad(asymmetric_loss, logits, labels, gamma_pos=1.5, soft_label=kind),
                 value_and_grad(asymmetric_loss, logits, labels, gamma_pos=1.5 if kind == 'qfl' else 0.),
                 rtol=2e-5, atol=1e-7)


def test_transforms_and_compilation(compiled):  # noqa: F811
    """Under torch.func and in compiled graphs, as elsewhere; under vmap a quality out of range gives NaN."""
    logits, labels, quality = batch()
    kwargs = dict(gamma_pos=1.5, gamma_neg=2., soft_label='qfl', reduction='sum')
    expected = value_and_grad(asymmetric_loss, logits, (labels, quality), **kwargs)
    assert_close(value_and_grad(compiled, logits, (labels, quality), **kwargs), expected)
    for kind in KINDS:
        kwargs['soft_label'] = kind
        _, expected_grad = value_and_grad(asymmetric_loss, logits, (labels, quality), **kwargs)
        per_sample = torch.func.vmap(torch.func.grad(lambda z, y, t: asymmetric_loss(z, (y, t), **kwargs)))
        assert_close(per_sample(logits, labels, quality), expected_grad)
        loss = torch.func.vmap(lambda z, y, t: asymmetric_loss(z, (y, t), **kwargs))(logits, labels, quality + 5)
        assert loss.isnan().all()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != 'cpu', reason='the formula is compiled for the CPU')
@kinds
def test_compiled_formula(kind):
    logits, labels, quality = batch()
    one_hot = (labels[:, None] == torch.arange(5)).float()
    for target in ((labels, quality), one_hot * quality[:, None], one_hot):
        kwargs = dict(SETTINGS, soft_label=kind, reduction='sum')
        with use_implementation('inductor'):
            found = value_and_grad(asymmetric_loss, logits, target, **kwargs)
        assert_close(found, value_and_grad(asymmetric_loss, logits, target, **kwargs), rtol=2e-5, atol=1e-6)


@kinds
def test_bad_values(kind, implementation):  # noqa: F811
    """As for a mixture: the soft label of ignored rows may be anything, and the sums of the gap are those of it."""
    logits, labels, quality = batch()
    at = torch.tensor(3)
    bad = quality.index_fill(0, at, 1.5)
    loss, sums = asymmetric_loss(logits, (labels.index_fill(0, at, -1), bad), ignore_index=-1, soft_label=kind,
                                 return_sums=True)
    assert (loss[3] == 0).all() and loss.isfinite().all()
    assert_close(sums, asymmetric_loss(logits, (labels.index_fill(0, at, -1), bad), ignore_index=-1,
                                       return_sums=True)[1])
    one_hot = (labels[:, None] == torch.arange(5)).float()
    for target in ((labels, bad), (labels.index_fill(0, at, 7), quality), one_hot.index_fill(0, at, 1.5)):
        if implementation == 'triton' or DEVICE != 'cpu':
            loss, grad = value_and_grad(asymmetric_loss, logits, target, soft_label=kind)
            assert loss[3].isnan().all() and grad[3].isnan().all() and loss[:3].isfinite().all()
        else:
            with pytest.raises(DataError, match=r'(quality 1.5|label 7|target 1.5) at \[3'):
                asymmetric_loss(logits, target, soft_label=kind)


def test_unknown_meaning():
    with pytest.raises(ConfigError, match=r"soft_label='QFL' must be one of \('mixture', 'qfl', 'vfl', 'mal'\)"):
        asymmetric_loss(torch.zeros(1, 2), torch.zeros(1, 2), soft_label='QFL')
