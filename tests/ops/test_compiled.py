"""The compiled loop against the eager one, which tests/ops/test_asymmetric_loss.py holds against the equations.

Each form of a loss is compiled for seconds: two in the fast tests, all in the slow ones.
"""
import itertools

import pytest
import torch
from test_asymmetric_loss import SETTINGS, batch_of, exact, value_and_grad
from torch.testing import assert_close

from mmasl.ops import asymmetric_loss, compiled, eager
from mmasl.ops.asymmetric_loss import _pick

WITHOUT_ALPHA = [setting for setting in SETTINGS.values() if setting[3] is None]  # alpha is another compilation


def compare(form, settings, dtype=torch.float32, rows=37, classes=11, **kwargs):
    logits, target = batch_of(form, rows, classes)
    for setting in settings:
        eager, inductor = (value_and_grad(asymmetric_loss, logits.to(dtype), target, *setting, implementation=name,
                                          **kwargs) for name in ('eager', 'inductor'))
        tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=1e-6)
        assert_close(inductor[0], eager[0], **tolerance)
        if dtype.itemsize == 2:
            tolerance = dict(rtol=2**-7, atol=1e-6)
        assert_close(inductor[1], eager[1], **tolerance)


def test_dense_sum_and_extremes():
    compare('dense', WITHOUT_ALPHA[:1], reduction='sum')
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare('dense', WITHOUT_ALPHA, reduction='sum')
    sizes = [0., 1e-3, 3., 8., 12.5, 17.5, 20., 40., 88., 104., 700., 5e4]
    logits = torch.tensor([[*sizes, *[-z for z in sizes]]])
    for setting, positive in itertools.product(WITHOUT_ALPHA, (False, True)):
        _, grad = value_and_grad(asymmetric_loss, logits, torch.full_like(logits, positive), *setting, reduction='sum',
                                 implementation='inductor')
        seen = tuple(x if x is None else torch.tensor(x).item() for x in setting)
        expected = [exact(z, positive, *seen, False)[1] for z in logits[0].tolist()]
        assert_close(grad[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('setting', WITHOUT_ALPHA, ids=str)
@pytest.mark.parametrize('positive', [True, False], ids=['positive', 'negative'])
def test_small_values_have_as_many_digits(setting, positive):
    """The formula before it is compiled, as tests/ops/test_asymmetric_loss.py does for the others."""
    logits, sign = torch.linspace(-104, 104, 105), -1 if positive else 1
    gamma, clip = torch.tensor([setting[0], 0.] if positive else setting[1:3])
    loss, slope, _, _ = compiled._negative_part(sign * logits, gamma, clip, False)
    expected = torch.tensor([exact(z, positive, gamma.item(), gamma.item(), clip.item(), None, False)
                             for z in logits.tolist()], dtype=torch.float64).T
    assert_close(torch.stack([loss, sign * slope]).double(), expected, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize('form', ['dense', 'bool', 'soft', 'labels'])
def test_alpha_in_float64(form):
    """Again before it is compiled."""
    logits, target = batch_of(form, 37, 11)
    parameters = torch.tensor([0.5, 0.3, 0.05, 1.], dtype=torch.float64)
    settings = (None, None, *parameters, 0.7, False, None, 'sum', True, True, False, None)
    expected = eager.run(logits.double(), target, *settings)
    found = compiled._formula(logits.double(), target.reshape(37, -1), *settings, soft=form == 'soft',
                              dense=form != 'labels')
    assert_close(found[:2], expected[:2], rtol=1e-12, atol=1e-12)


def test_labels_with_ignored_rows_and_weight():
    compare('labels', WITHOUT_ALPHA, ignore_index=2, weight=torch.linspace(0, 2, 37)[:, None], reduction='sum',
            scale=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'bool', 'soft', 'labels', 'quality'])
@pytest.mark.parametrize('reduction', ['none', 'rows', 'sum'])
@pytest.mark.parametrize('detach', [False, True], ids=['eq8', 'detached'])
def test_every_form(form, reduction, detach):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        compare(form, SETTINGS.values(), dtype, reduction=reduction, detach_focusing=detach)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'soft', 'labels', 'quality'])
def test_probability_sums(form):
    logits, target = batch_of(form, 37, 11)
    kwargs = dict(reduction='sum', return_sums=True, weight=(torch.arange(37) % 3)[:, None] / 2)
    assert_close(asymmetric_loss(logits, target, implementation='inductor', **kwargs),
                 asymmetric_loss(logits, target, implementation='eager', **kwargs), rtol=1e-5, atol=1e-5)


def test_soft_targets_that_look_hard_at_first_and_bad_ones():
    logits, target = batch_of('dense', 37, 11)
    for value, error in ((0.5, None), (2., r'target 2.0 at \[30, 4\]'), (float('nan'), r'target nan at \[30, 4\]')):
        target[30, 4] = value
        if error is None:
            assert_close(*(asymmetric_loss(logits, target, reduction='sum', implementation=name)
                           for name in ('inductor', 'eager')))
        else:
            with pytest.raises(ValueError, match=error):
                asymmetric_loss(logits, target, reduction='sum', implementation='inductor')


def test_chosen_for_large_logits_where_a_compiler_is(monkeypatch):
    small, large = torch.zeros(1000, 80), torch.zeros(1, 1).expand(compiled.LARGE // 8, 8)
    assert (_pick(None, small), _pick(None, large)) == ('eager', 'inductor')
    monkeypatch.setattr(compiled, 'obstacle', lambda: 'torch.compile finds no C++ compiler')
    assert _pick(None, large) == 'eager'
    with pytest.raises(RuntimeError, match="'inductor' cannot run: torch.compile finds no C\\+\\+ compiler"):
        _pick('inductor', small)
    with pytest.raises(RuntimeError, match='it is for the CPU, and the logits are on meta'):
        _pick('inductor', torch.zeros(1, device='meta'))
