"""The compiled formula against the eager one, which tests/ops/test_functional.py compares with the equations.

Each form of a loss is compiled for seconds: two in the fast tests, all in the slow ones.
"""
import itertools

import pytest
import torch
from test_functional import SETTINGS, batch_of, exact, value_and_grad
from torch.testing import assert_close

from mmasl.errors import UnavailableError
from mmasl.ops import asymmetric_loss, torch_impl, use_implementation
from mmasl.ops.functional import pick_implementation

WITHOUT_ALPHA = [setting for setting in SETTINGS.values() if setting['alpha'] is None]  # alpha is another compilation


def run_with(name):
    def loss(*args, **kwargs):
        with use_implementation(name):
            return asymmetric_loss(*args, **kwargs)
    return loss


def compare(form, settings, dtype=torch.float32, rows=37, classes=11, **kwargs):
    logits, target = batch_of(form, rows, classes)
    for setting in settings:
        eager, inductor = (value_and_grad(run_with(name), logits.to(dtype), target, **setting, **kwargs)
                           for name in ('eager', 'inductor'))
        tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=1e-6)
        assert_close(inductor[0], eager[0], **tolerance)
        if dtype.itemsize == 2:
            tolerance = dict(rtol=2**-7, atol=1e-6)
        assert_close(inductor[1], eager[1], **tolerance)


@pytest.mark.slow
def test_dense_sum_and_extremes():
    compare('dense', WITHOUT_ALPHA[:1], reduction='sum')
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare('dense', WITHOUT_ALPHA, reduction='sum')
    sizes = [0., 1e-3, 3., 8., 12.5, 17.5, 20., 40., 88., 104., 700., 5e4]
    logits = torch.tensor([[*sizes, *[-z for z in sizes]]])
    for setting, positive in itertools.product(WITHOUT_ALPHA, (False, True)):
        _, grad = value_and_grad(run_with('inductor'), logits, torch.full_like(logits, positive), **setting,
                                 reduction='sum')
        seen = tuple(x if x is None else torch.tensor(x).item() for x in setting.values())
        expected = [exact(z, positive, *seen, False)[1] for z in logits[0].tolist()]
        assert_close(grad[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=1e-7)


def test_labels_with_ignored_rows_and_weight():
    compare('labels', WITHOUT_ALPHA, ignore_index=2, weight=torch.linspace(0, 2, 37)[:, None], reduction='sum',
            scale=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'bool', 'soft', 'labels', 'quality'])
@pytest.mark.parametrize('reduction', ['none', 'sum'])
@pytest.mark.parametrize('detach', [False, True], ids=['eq8', 'detached'])
def test_every_form(form, reduction, detach):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        compare(form, SETTINGS.values(), dtype, reduction=reduction, detach_focusing=detach)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'soft', 'labels', 'quality'])
@pytest.mark.parametrize('names', [('alpha', ), ('class_weight', ), ('pos_weight', ), ('alpha', 'class_weight',
                                                                                      'pos_weight')], ids='+'.join)
def test_weights_by_class(form, names):
    compare(form, [dict(zip(names, torch.linspace(0, 1, 11 * len(names)).view(len(names), 11)))])


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'soft', 'labels', 'quality'])
def test_probability_sums(form):
    logits, target = batch_of(form, 37, 11)
    kwargs = dict(reduction='sum', return_sums=True, weight=(torch.arange(37) % 3)[:, None] / 2)
    assert_close(run_with('inductor')(logits, target, **kwargs), run_with('eager')(logits, target, **kwargs), rtol=1e-5,
                 atol=1e-5)


@pytest.mark.slow
def test_soft_targets_that_look_hard_at_first_and_bad_ones():
    logits, target = batch_of('dense', 37, 11)
    for value, error in ((0.5, None), (2., r'target 2.0 at \[30, 4\]'), (float('nan'), r'target nan at \[30, 4\]')):
        target[30, 4] = value
        if error is None:
            assert_close(*(run_with(name)(logits, target, reduction='sum') for name in ('inductor', 'eager')))
        else:
            with pytest.raises(ValueError, match=error):
                run_with('inductor')(logits, target, reduction='sum')


def test_chosen_for_large_logits_where_a_compiler_is(monkeypatch):
    small, large = torch.zeros(1000, 80), torch.zeros(1, 1).expand(torch_impl.LARGE // 8, 8)
    assert (pick_implementation(small), pick_implementation(large)) == ('eager', 'inductor')
    monkeypatch.setattr(torch_impl, 'unavailable_reason', lambda: 'torch.compile finds no C++ compiler')
    assert pick_implementation(large) == 'eager'
    with use_implementation('inductor'), pytest.raises(UnavailableError, match=r'finds no C\+\+ compiler'):
        pick_implementation(small)


@pytest.mark.parametrize('form', ['dense', 'bool', 'soft', 'labels', 'quality'])
def test_without_looking_at_values(form):
    """As on an accelerator and in the compiled loop: the same numbers, NaN for a target out of range, no host sync."""
    logits, target = batch_of(form, 37, 11)
    target, quality = target if form == 'quality' else (target, None)
    one = torch.ones(())
    weight = torch.linspace(0, 2, 37)[:, None].expand(37, 11)
    problem = torch_impl.Problem(logits, target, quality, weight, one, 4 * one, one / 20, one / 4,
                                 torch.linspace(0, 3, 11), torch.linspace(1, 4, 11), None, False,
                                 3 if form == 'labels' else None, 'none')
    soft = form in ('soft', 'quality')
    looked, blind = (torch_impl.formula(problem, True, True, True, soft=value) for value in (None, soft))
    assert_close(blind, looked)
    meta = torch_impl.Problem(*(x.to('meta') if isinstance(x, torch.Tensor) else x for x in problem))
    assert [x.shape for x in torch_impl.run(meta, True, True, True)] == [(37, 11), (37, 11), (4, 11)]
    if form != 'bool':
        bad = problem._replace(target=target.clone().index_fill_(0, torch.tensor(5), 99))
        loss, grad, _ = torch_impl.formula(bad, True, True, False, soft=soft)
        assert loss[5].isnan().all() and grad[5].isnan().all() and loss[:5].isfinite().all()


@pytest.mark.parametrize('form', ['dense', 'soft', 'labels', 'quality'])
def test_blocks_give_what_one_block_gives(monkeypatch, form):
    logits, target = batch_of(form, 37, 11)
    upstream = torch.rand(37, 11, generator=torch.Generator().manual_seed(3))
    kwargs = dict(weight=torch.linspace(0, 2, 37)[:, None], return_sums=True)

    def results():
        loss = run_with('eager')
        return [loss(logits, target, **kwargs), value_and_grad(loss, logits, target, cotangent=upstream),
                value_and_grad(loss, logits, target, reduction='sum')]

    expected = results()
    monkeypatch.setitem(torch_impl.BLOCK, 'cpu', 100)
    assert_close(results(), expected)
