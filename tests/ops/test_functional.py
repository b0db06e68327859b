"""The operator against the equations: in float64 by autograd, at extremes in 60 digits by mpmath.

Every test runs for both implementations, Triton's through its interpreter (tests/conftest.py). float64 runs eagerly.
With MMASL_DEVICE=cuda the operator runs on the GPU, and what it is compared with on the CPU.
"""
import itertools
import math
import os
import sys

import mpmath
import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from mmasl import AsymmetricLoss
from mmasl.errors import ConfigError, UnavailableError
from mmasl.ops import asymmetric_loss, functional, use_implementation
from mmasl.ops.functional import pick_implementation
from mmasl.ops.reference import asymmetric_loss as reference

SETTINGS = {name: dict(zip(('gamma_pos', 'gamma_neg', 'clip', 'alpha'), values)) for name, values in {
    'ce': (0., 0., 0., None),
    'ce+margin': (0., 0., 0.05, None),
    'focal': (2., 2., 0., None),
    'focal+alpha': (2., 2., 0., 0.25),
    'focal+margin': (2., 2., 0.3, None),
    'focusing': (0., 4., 0., None),
    'asl': (0., 4., 0.05, None),
    'detection': (1., 2., 0., 0.25),
    'fractional': (0.5, 0.3, 0.05, 0.7),
    'open-images': (0., 7., 0.05, None),
    'tiny-margin': (0., 2., 1e-4, None),
}.items()}
settings = pytest.mark.parametrize('setting', SETTINGS.values(), ids=SETTINGS)
detach = pytest.mark.parametrize('detach', [False, True], ids=['eq8', 'detached'])
# float64 runs eagerly, whichever implementation is asked for.
dtypes = pytest.mark.parametrize('implementation, dtype', [
    ('eager', torch.float64), *itertools.product(('eager', 'triton'), (torch.float32, torch.bfloat16, torch.float16))],
    indirect=['implementation'], ids=str)
# Relative, absolute: of the arithmetic; the gradient in half precision is rounded once more at the end.
TOLERANCE = {torch.float64: (1e-7, 1e-12), torch.float32: (2e-5, 1e-7)}
TOLERANCE_GRAD = {**TOLERANCE, torch.bfloat16: (2**-8, 1e-7), torch.float16: (2**-10, 2**-24)}
DEVICE = os.environ.get('MMASL_DEVICE', 'cpu')


def on_device(*args, **kwargs):
    """The operator on DEVICE, with tensors on the CPU before and after."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x if x.is_meta else x.to(DEVICE), (args, kwargs))
    results = functional.asymmetric_loss(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda x: x if x.is_meta else x.cpu(), results)


@pytest.fixture(params=['eager', 'triton'], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(functional, 'pick_implementation', lambda logits, soft_label: (
        'eager' if logits.dtype == torch.float64 or logits.is_meta else request.param))
    if DEVICE != 'cpu':
        monkeypatch.setattr(sys.modules[__name__], 'asymmetric_loss', on_device)
    return request.param


def value_and_grad(function, logits, target, *args, cotangent=None, **kwargs):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, *args, **kwargs)
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent.to(loss.dtype)
    grad, = torch.autograd.grad(loss, logits, cotangent)
    return loss.detach(), grad


def tolerance(dtype, table=TOLERANCE, implementation='eager'):
    rtol, atol = table.get(dtype, TOLERANCE[torch.float32])
    if (dtype, implementation) == (torch.bfloat16, 'triton') and table is TOLERANCE_GRAD:
        rtol *= 2  # the interpreter cuts digits off where the hardware rounds
    return dict(rtol=rtol, atol=atol, check_dtype=False)


@settings
@detach
@dtypes
def test_value_and_gradient(setting, detach, dtype, implementation):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(37, 11, generator=generator, dtype=torch.float64) * 24 - 12).to(dtype)
    soft = torch.rand(37, 11, generator=generator).to(dtype)
    target = torch.where(torch.rand(37, 11, generator=generator) < 0.5, soft, soft.round())
    cotangent = torch.randn(37, 11, generator=generator)

    loss, grad = value_and_grad(asymmetric_loss, logits, target, **setting, detach_focusing=detach, cotangent=cotangent)
    expected, expected_grad = value_and_grad(reference, logits.double(), target, **setting, detach_focusing=detach,
                                             cotangent=cotangent)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_close(loss, expected, **tolerance(dtype))
    assert_close(grad, expected_grad, **tolerance(dtype, TOLERANCE_GRAD, implementation))


@settings
@pytest.mark.parametrize('implementation', ['eager'], indirect=True)
def test_gradcheck(setting):
    logits = torch.linspace(-9, 9, 60, dtype=torch.float64).view(-1, 4).requires_grad_()
    target = torch.linspace(0, 1, 7, dtype=torch.float64).repeat(9)[:60].view(-1, 4)
    assert torch.autograd.gradcheck(lambda z: asymmetric_loss(z, target, **setting), logits)


def exact(z, positive, gamma_pos, gamma_neg, clip, alpha, detach):
    """Eq. 7 and its derivative in 60 digits."""
    with mpmath.workdps(60):
        z, one = mpmath.mpf(z), mpmath.mpf(1)
        p, q = one / (1 + mpmath.exp(-z)), one / (1 + mpmath.exp(z))
        scale = one if alpha is None else mpmath.mpf(alpha if positive else 1 - alpha)
        if positive:
            log_term = -mpmath.log(p)
            return float(scale * q**gamma_pos * log_term), float(
                -scale * q**gamma_pos * (q + (0 if detach else gamma_pos * p * log_term)))
        if p < clip:
            return 0., 0.
        p_m, rest = p - mpmath.mpf(clip), q + mpmath.mpf(clip)
        log_term = -mpmath.log(rest)
        through = 0 if detach or gamma_neg == 0 else gamma_neg * log_term / p_m
        return float(scale * p_m**gamma_neg * log_term), float(
            scale * p_m**gamma_neg * p * q * (1 / rest + through))


@settings
@detach
@dtypes
@pytest.mark.parametrize('positive', [True, False], ids=['positive', 'negative'])
def test_extreme_logits(setting, detach, dtype, positive, implementation):
    top = torch.finfo(dtype).max
    sizes = [z for z in (0., 1e-3, 3., 8., 12.5, 17.5, 20., 40., 88., 104., 700., 5e4, top) if z <= min(top, 1e6)]
    logits = torch.tensor([*sizes, *[-z for z in sizes]], dtype=dtype)
    loss, grad = value_and_grad(asymmetric_loss, logits, torch.full_like(logits, positive), **setting,
                                detach_focusing=detach)
    # The setting's numbers as the arithmetic sees them.
    seen = tuple(x if x is None else torch.tensor(x, dtype=loss.dtype).item() for x in setting.values())
    expected, expected_grad = torch.tensor([exact(z, positive, *seen, detach) for z in logits.tolist()],
                                           dtype=torch.float64).T
    assert_close(loss, expected, **tolerance(dtype))
    assert_close(grad, expected_grad, **tolerance(dtype, TOLERANCE_GRAD, implementation))


@settings
@pytest.mark.parametrize('positive', [True, False], ids=['positive', 'negative'])
def test_small_values_have_as_many_digits(setting, positive):
    """Down to where float32 has them; what a product with p^2 in it has long lost."""
    logits = torch.linspace(-85, 85, 69)  # p and 1 - p are normal numbers
    loss, grad = value_and_grad(asymmetric_loss, logits, torch.full_like(logits, positive), **setting)
    seen = tuple(x if x is None else torch.tensor(x).item() for x in setting.values())
    expected, expected_grad = torch.tensor([exact(z, positive, *seen, False) for z in logits.tolist()],
                                           dtype=torch.float64).T
    assert_close((loss.double(), grad.double()), (expected, expected_grad), rtol=2e-5, atol=1e-37)


@settings
@dtypes
def test_largest_numbers_stay_finite(setting, dtype):
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, -top, top / 2, -top / 2, torch.finfo(dtype).tiny]] * 3, dtype=dtype)
    target = torch.tensor([[0.], [1.], [0.5]]).expand(3, 5).to(dtype)
    loss, grad = value_and_grad(asymmetric_loss, logits, target, **setting)
    assert loss.isfinite().all() and grad.isfinite().all()


@settings
def test_loss_scale_in_half_precision(setting):
    """A float16 gradient of 1 times GradScaler's first scale is past float16's end."""
    logits = torch.linspace(-60000, 60000, 61).half()
    for target in (0., 1.):
        _, grad = value_and_grad(asymmetric_loss, logits, torch.full_like(logits, target), **setting,
                                 cotangent=torch.full((61, ), 65536.))
        assert grad.isfinite().all()
    _, grad = value_and_grad(asymmetric_loss, logits[:1], torch.ones_like(logits[:1]), cotangent=torch.tensor([2.**20]))
    assert grad.isinf().all(), 'GradScaler must see an overflow'


def test_autocast():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 5)
    inputs, target = torch.randn(64, 8) * 30, torch.randint(2, (64, 5)).float()
    with torch.autocast('cpu', torch.bfloat16):
        logits = layer(inputs)
        loss = asymmetric_loss(logits, target).sum()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (loss * 65536).backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('gamma', [0.01, 0.5, 0.99])
@pytest.mark.parametrize('clip', [0.05, 0.3])
def test_fractional_gamma_below_the_margin(gamma, clip):
    """Where autograd of pow(0, gamma) is NaN, nothing is learnt from the element."""
    margin = torch.tensor(clip, dtype=torch.float64).logit()
    logits = margin + torch.tensor([-50., -1, -1e-9, 1e-9, 1], dtype=torch.float64)
    loss, grad = value_and_grad(asymmetric_loss, logits, torch.zeros_like(logits), gamma_neg=gamma, clip=clip)
    assert (loss[:3] == 0).all() and (grad[:3] == 0).all()
    assert (grad[3:] > 0).all() and grad.isfinite().all()


def test_gradient_at_the_margin_is_the_right_one():
    """p = m = 0.5 exactly: the side p > m counts."""
    _, grad = value_and_grad(asymmetric_loss, torch.zeros(1), torch.zeros(1), gamma_pos=0., gamma_neg=0., clip=0.5)
    assert grad.item() == pytest.approx(0.25, rel=2e-5)


@settings
@detach
@pytest.mark.parametrize('shape', [
    (13, 4), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 5, 3), (1, 1), (6, 1)))], ids=str)
def test_labels_are_one_hot_targets(setting, detach, shape):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, generator=generator) * 4
    cotangent = torch.randn(shape, generator=generator)
    labels = torch.randint(shape[-1] + 1, shape[:-1], generator=generator)
    quality = torch.rand(shape[:-1], generator=generator)
    one_hot = (labels.unsqueeze(-1) == torch.arange(shape[-1])).float()
    for target, dense in ((labels, one_hot), (labels.int(), one_hot),
                          ((labels, quality), one_hot * quality[..., None])):
        kwargs = dict(setting, detach_focusing=detach, cotangent=cotangent)
        assert_close(value_and_grad(asymmetric_loss, logits, target, **kwargs),
                     value_and_grad(asymmetric_loss, logits, dense, **kwargs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('shape', [(7, ), (4, 3), (2, 3, 4, 5)], ids=str)
def test_dense_targets_of_any_dtype_and_shape(dtype, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    target = torch.randint(2, shape, generator=torch.Generator().manual_seed(3))
    assert_close(value_and_grad(asymmetric_loss, logits, target.to(dtype)),
                 value_and_grad(asymmetric_loss, logits, target.float()), rtol=0, atol=0)


def test_one_value_per_class():
    gamma_pos, gamma_neg, clip = torch.tensor([[0., 1, 2], [4, .5, 0], [.05, 0, .3]])
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(4)) * 3
    labels = torch.arange(9) % 4
    for target in (torch.rand(9, 3, generator=torch.Generator().manual_seed(5)), labels):
        loss, grad = value_and_grad(asymmetric_loss, logits, target, gamma_pos=gamma_pos, gamma_neg=gamma_neg,
                                    clip=clip)
        for k in range(3):
            column = target[:, k:k + 1] if target.dim() == 2 else (target == k).float()[:, None]
            expected, expected_grad = value_and_grad(asymmetric_loss, logits[:, k:k + 1], column,
                                                     gamma_pos=gamma_pos[k].item(), gamma_neg=gamma_neg[k].item(),
                                                     clip=clip[k].item())
            assert_close(loss[:, k:k + 1], expected)
            assert_close(grad[:, k:k + 1], expected_grad)


WEIGHTS = dict(alpha=torch.tensor([0., .25, .5, .9, 1., .01], dtype=torch.float64),
               class_weight=torch.tensor([1., .5, 0., 30., 1e-3, 7.], dtype=torch.float64),
               pos_weight=torch.tensor([2., 0., 100., .1, 1., 1e3], dtype=torch.float64))
NAMES = [('alpha', ), ('class_weight', ), ('pos_weight', ), ('alpha', 'pos_weight'), tuple(WEIGHTS)]


# All weights at once in every dtype; each alone in float32, or slow.
@pytest.mark.parametrize('names, dtype', [
    pytest.param(names, dtype, marks=[] if dtype == torch.float32 or len(names) == 3 else [pytest.mark.slow])
    for names in NAMES for dtype in TOLERANCE_GRAD], ids=str)
@pytest.mark.parametrize('setting', ['asl', 'detection'])
def test_weights_by_class(names, setting, dtype, implementation):
    """As many rows as classes: a weight of the class must not become one of the row."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(6, 6, generator=generator, dtype=torch.float64) * 24 - 12).to(dtype)
    soft, labels = torch.rand(6, 6, generator=generator).to(dtype), torch.tensor([0, 1, 2, 3, 4, 6])
    kwargs = dict(SETTINGS[setting], cotangent=torch.randn(6, 6, generator=generator))
    weights = {name: WEIGHTS[name] for name in names}
    for target, dense in ((soft, soft), (soft.round(), soft.round()), (labels, torch.eye(7)[labels][:, :6])):
        expected, expected_grad = value_and_grad(reference, logits.double(), dense, **kwargs | weights)
        for given in (weights, {name: weight.tolist() for name, weight in weights.items()}):
            loss, grad = value_and_grad(asymmetric_loss, logits, target, **kwargs | given)
            assert_close(loss, expected, **tolerance(dtype))
            assert_close(grad, expected_grad, **tolerance(dtype, TOLERANCE_GRAD, implementation))
    # At extremes, where the reference is not exact, the weights are factors.
    y = (labels[:, None] == torch.arange(6)).double()
    factor = reference(torch.zeros(6, 6), y, gamma_pos=0., gamma_neg=0., clip=0., **dict(
        alpha=SETTINGS[setting]['alpha']) | weights) / math.log(2)
    far = logits * 1000
    plain, plain_grad = value_and_grad(asymmetric_loss, far, labels, **kwargs | dict(alpha=None))
    loss, grad = value_and_grad(asymmetric_loss, far, labels, **kwargs | weights)
    assert_close(loss, factor * plain, rtol=1e-5, atol=1e-37, check_dtype=False)
    assert_close(grad, factor * plain_grad, rtol=max(1e-5, torch.finfo(dtype).eps * 2), atol=1e-7, check_dtype=False)
    # One number for all classes, which is a factor of the sum too.
    numbers = dict.fromkeys(names, 0.7)
    expected = value_and_grad(lambda z, y: reference(z, y, **SETTINGS[setting] | numbers).sum(), logits.double(), soft)
    total = value_and_grad(asymmetric_loss, logits, soft, **SETTINGS[setting] | numbers, reduction='sum')
    assert_close(total[0], expected[0], rtol=2e-5, atol=0, check_dtype=False)
    assert_close(total[1], expected[1], **tolerance(dtype, TOLERANCE_GRAD, implementation))


@settings
def test_ignored_elements_and_rows(setting):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(6))
    target = torch.tensor([[1., -1, 0]]).repeat(6, 1)
    loss, grad = value_and_grad(asymmetric_loss, logits, target, **setting, ignore_index=-1)
    kept, kept_grad = value_and_grad(asymmetric_loss, logits, target.clamp(min=0), **setting)
    assert (loss[:, 1] == 0).all() and (grad[:, 1] == 0).all()
    assert_close((loss[:, ::2], grad[:, ::2]), (kept[:, ::2], kept_grad[:, ::2]))
    assert (target[:, 1] == -1).all(), 'the target is read only'

    labels = torch.tensor([0, 255, 2, 3, 255, 1])
    loss, grad = value_and_grad(asymmetric_loss, logits, labels, **setting, ignore_index=255)
    ignored = labels == 255
    kept, kept_grad = value_and_grad(asymmetric_loss, logits[~ignored], labels[~ignored], **setting)
    assert (loss[ignored] == 0).all() and (grad[ignored] == 0).all()
    assert_close((loss[~ignored], grad[~ignored]), (kept, kept_grad))


@pytest.mark.parametrize('quality', [-1., 2., math.nan])
def test_the_quality_of_ignored_rows_may_be_anything(quality):
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(6)), torch.tensor([0, 255, 2, 3, 255, 1])
    qualities = torch.linspace(0, 1, 6)
    expected = value_and_grad(asymmetric_loss, logits, (labels, qualities), ignore_index=255)
    filled = qualities.masked_fill(labels == 255, quality)
    assert_close(value_and_grad(asymmetric_loss, logits, (labels, filled), ignore_index=255), expected, rtol=0, atol=0)


@pytest.mark.parametrize('shape', [(0, 5), (0, ), (3, 0), (0, 4, 5)], ids=str)
def test_empty(shape):
    loss, grad = value_and_grad(asymmetric_loss, torch.zeros(shape), torch.zeros(shape))
    assert loss.shape == grad.shape == shape
    if shape[-1] and len(shape) > 1:
        loss, grad = value_and_grad(asymmetric_loss, torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long))
        assert loss.shape == grad.shape == shape


@pytest.mark.parametrize('target, error, message', [
    (torch.tensor([[0., 2.]]), ValueError, r'target 2.0 at \[0, 1\] is out of range'),
    (torch.tensor([[-1., 0.]]), ValueError, r'target -1.0 at \[0, 0\].*Set ignore_index'),
    (torch.tensor([[0., float('nan')]]), ValueError, r'target nan at \[0, 1\]'),
    (torch.tensor([3]), ValueError, r'label 3 at \[0\].*0 to 1 for a class, 2 for background'),
    (torch.tensor([-100]), ValueError, 'label -100'),
    ((torch.tensor([1]), torch.tensor([1.5])), ValueError, r'quality 1.5 at \[0\]'),
    ((torch.tensor([1]), torch.tensor([1., 1])), ValueError, r'quality of shape \(2,\) does not fit labels'),
    (torch.tensor([1.]), TypeError, 'labels .* must be integers, got torch.float32'),
    (torch.zeros(2, 3), ValueError, r'target of shape \(2, 3\) does not fit logits of shape \(1, 2\)'),
    (torch.zeros(1, 1), ValueError, r'target of shape \(1, 1\) does not fit'),
], ids=str)
def test_bad_targets(target, error, message, implementation):
    if (implementation == 'triton' or DEVICE != 'cpu') and 'fit' not in message and 'must be' not in message:
        # To look would make the host wait for the device.
        for reduction in ('none', 'sum'):
            loss, grad = value_and_grad(asymmetric_loss, torch.zeros(1, 2), target, reduction=reduction)
            assert loss.isnan().any() and grad.isnan().any()
        return
    with pytest.raises(error, match=message):
        asymmetric_loss(torch.zeros(1, 2), target)


def test_bad_logits_and_parameters():
    with pytest.raises(TypeError, match='logits must be floating point, got torch.int64'):
        asymmetric_loss(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r'gamma_neg of shape \(3,\) does not fit logits of shape \(1, 2\)'):
        asymmetric_loss(torch.zeros(1, 2), torch.zeros(1, 2), gamma_neg=torch.ones(3))
    with pytest.raises(ValueError, match='get no gradient'):
        asymmetric_loss(torch.zeros(1, 2), torch.zeros(1, 2), gamma_neg=torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match='target, parameters, .* get no gradient: detach them'):
        asymmetric_loss(torch.zeros(1, 2), torch.zeros(1, 2, requires_grad=True))
    with pytest.raises(ValueError, match='have no class'):
        asymmetric_loss(torch.zeros(1, 0), torch.zeros(1, dtype=torch.long))


def saved_tensors(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call()
    return saved


@pytest.mark.parametrize('target', [torch.ones(50, 20), torch.arange(50) % 21], ids=['dense', 'labels'])
def test_a_reduced_loss_saves_one_tensor(target):
    logits = torch.randn(50, 20, dtype=torch.bfloat16, requires_grad=True)
    saved, = saved_tensors(lambda: asymmetric_loss(logits, target, ignore_index=-1, alpha=0.25, reduction='sum'))
    assert saved.shape == logits.shape and saved.dtype == logits.dtype


@pytest.mark.parametrize('dtype, reduction', [(torch.float32, 'none'), (torch.float16, 'sum')], ids=str)
def test_otherwise_only_inputs_are_saved(dtype, reduction):
    logits, target = torch.randn(50, 20, device=DEVICE).to(dtype).requires_grad_(), torch.ones(50, 20, device=DEVICE)
    saved = saved_tensors(lambda: asymmetric_loss(logits, target, reduction=reduction))
    assert {x.data_ptr() for x in saved if x.numel() > 1} == {logits.data_ptr(), target.data_ptr()}


@pytest.mark.parametrize('reduction', ['none', 'sum'])
def test_second_derivative_is_refused(reduction):
    """Whatever the loss is multiplied with, and by whichever interface; the first derivative is not."""
    logits = torch.randn(3, requires_grad=True)

    def value(z):
        return asymmetric_loss(z, torch.ones(3), reduction=reduction).sum()

    for loss in (value, lambda z: (z**2 * value(z)).sum()):
        with pytest.raises(UnavailableError, match='no second derivative: .* without create_graph=True'):
            torch.autograd.grad(loss(logits), logits, create_graph=True)
        gradient = torch.func.grad(loss)
        assert_close(gradient(logits), torch.autograd.grad(loss(logits), logits)[0])
        for second in (torch.func.grad(lambda z, gradient=gradient: gradient(z).sum()), torch.func.jacrev(gradient),
                       lambda z, loss=loss: torch.autograd.functional.hessian(loss, z)):
            with pytest.raises(UnavailableError, match='no second derivative'):
                second(logits)


@pytest.mark.parametrize('target', [torch.zeros(4, 3, device='meta'),
                                    torch.zeros(4, dtype=torch.long, device='meta')], ids=['dense', 'labels'])
def test_no_host_wait(target):
    """A meta tensor has no values: whatever waits for one raises."""
    logits = torch.zeros(4, 3, device='meta', requires_grad=True)
    asymmetric_loss(logits, target, gamma_pos=torch.zeros((), device='meta'), ignore_index=-1).sum().backward()
    assert logits.grad.shape == (4, 3)
    with pytest.raises(RuntimeError, match='meta'):
        logits.sum().item()


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield torch.compile(lambda logits, target, gamma_neg, **kwargs: asymmetric_loss(
        logits, target, gamma_neg=gamma_neg, **kwargs), fullgraph=True, backend='aot_eager')
    torch._dynamo.reset()


@pytest.mark.parametrize('target', [torch.rand(8, 3, generator=torch.Generator().manual_seed(7)),
                                    torch.arange(8) % 4], ids=['dense', 'labels'])
def test_compiled_is_eager_and_stays_compiled(compiled, target):
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(8))
    for step in range(4):
        gamma_neg = torch.tensor(4. - step / 2)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            result = value_and_grad(compiled, logits, target, gamma_neg, ignore_index=3)
        assert_close(result, value_and_grad(asymmetric_loss, logits, target, gamma_neg=gamma_neg, ignore_index=3))


@pytest.mark.parametrize('reduction', ['none', 'sum'])
def test_compiled_map_of_one_image(compiled, reduction):
    """Its channels come last by a view, unlike those of several images."""
    def rows(maps):
        return maps.permute(0, 2, 3, 1).reshape(-1, 3)

    for images in (1, 2):
        maps, labels, gamma_neg = torch.randn(images, 3, 4, 5), torch.arange(20 * images) % 4, torch.tensor(4.)
        assert rows(maps).is_contiguous() == (images > 1)
        found = value_and_grad(lambda z, y, g: compiled(rows(z), y, g, reduction=reduction), maps, labels, gamma_neg)
        assert_close(found, value_and_grad(
            lambda z, y, g: asymmetric_loss(rows(z), y, gamma_neg=g, reduction=reduction), maps, labels, gamma_neg))


def test_compiled_out_of_range_target_raises(compiled, implementation):
    gamma_neg = torch.tensor(4.)
    if implementation == 'triton' or DEVICE != 'cpu':
        assert compiled(torch.zeros(2, 3), torch.full((2, 3), -1.), gamma_neg).isnan().all()
        assert compiled(torch.zeros(2, 3), torch.tensor([1, 4]), gamma_neg).isnan().any(1).tolist() == [False, True]
        return
    with pytest.raises(ValueError, match=r'target -1.0 at \[0, 0\]'):
        compiled(torch.zeros(2, 3), torch.full((2, 3), -1.), gamma_neg)
    with pytest.raises(ValueError, match=r'label 4 at \[1\]'):
        compiled(torch.zeros(2, 3), torch.tensor([1, 4]), gamma_neg)


def sums_by_loop(logits, y, counted):
    """Eq. 9 element by element: p of the positives, 1 - p of the negatives, and how many they are, per class."""
    sums = torch.zeros(4, logits.shape[-1], dtype=torch.float64)
    for index in itertools.product(*map(range, logits.shape)):
        if counted[index]:
            p, label, c = torch.sigmoid(logits[index].double()), float(y[index]), index[-1]
            sums[:, c] += torch.tensor([label * p, label, (1 - label) * (1 - p), 1 - label])
    return sums


@pytest.mark.parametrize('shape', [(7, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize('form', ['dense', 'soft', 'labels', 'quality'])
@pytest.mark.parametrize('weight', [None, 'row', 'element'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['float32', 'float16'])
def test_probability_sums(shape, form, weight, dtype):
    generator = torch.Generator().manual_seed(2)
    classes = shape[-1]
    logits = (torch.randn(shape, generator=generator) * 5).to(dtype)
    labels = torch.randint(classes + 1, shape[:-1], generator=generator)
    ignored = torch.rand(shape if form in ('dense', 'soft') else shape[:-1], generator=generator) < 0.2
    quality = torch.rand(shape[:-1], generator=generator)
    y = torch.nn.functional.one_hot(labels, classes + 1)[..., :classes].double()
    if form == 'soft':
        y = torch.rand(shape, generator=generator).double()
    if form == 'quality':
        y = y * quality.unsqueeze(-1)
    target = {'dense': y, 'soft': y, 'labels': labels, 'quality': (labels, quality)}[form]
    target = (labels.masked_fill(ignored, -1), quality) if form == 'quality' else target.masked_fill(ignored, -1)
    counted = ~ignored if form in ('dense', 'soft') else (~ignored).unsqueeze(-1).expand(shape)
    if weight is not None:
        weight = torch.randint(3, shape[:-1] + ((1,) if weight == 'row' else (classes,)), generator=generator) / 2
        counted = counted & (weight != 0)

    loss, sums = asymmetric_loss(logits, target, ignore_index=-1, weight=weight, return_sums=True)
    assert_close(sums, sums_by_loop(logits, y, counted), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert not sums.requires_grad
    plain = asymmetric_loss(logits, target, ignore_index=-1)
    assert_close(loss, plain if weight is None else plain * weight)


@pytest.mark.parametrize('shape', [(3, 1), (3, 4), (1, 4)], ids=str)
def test_weight_is_a_factor_of_loss_and_gradient(shape):
    weight = torch.linspace(0, 2, math.prod(shape)).reshape(shape)
    logits, target = torch.randn(3, 4), torch.randint(2, (3, 4))
    assert_close(value_and_grad(asymmetric_loss, logits, target, weight=weight),
                 value_and_grad(lambda *args: asymmetric_loss(*args) * weight, logits, target))


def test_weight_is_checked():
    logits, target = torch.randn(3, 4), torch.randint(2, (3, 4))
    with pytest.raises(ValueError, match=r'weight of shape \(3,\) does not fit .* class_weight has one per class'):
        asymmetric_loss(logits, target, weight=torch.rand(3))
    with pytest.raises(ValueError, match=r'weight of shape \(2, 3, 4\) does not fit logits of shape \(3, 4\)'):
        asymmetric_loss(logits, target, weight=torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match='weights and scale of the loss get no gradient: detach them'):
        asymmetric_loss(logits, target, class_weight=torch.rand(4, requires_grad=True))


@pytest.mark.parametrize('shape', [(0, 3), (5, 0)], ids=str)
def test_sums_of_nothing_are_zero(shape):
    _, sums = asymmetric_loss(torch.zeros(shape), torch.zeros(shape), return_sums=True)
    assert_close(sums, torch.zeros(4, shape[1]))


forms = pytest.mark.parametrize('form', ['dense', 'bool', 'soft', 'labels', 'quality'])


def batch_of(form, rows, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * 5
    labels = torch.randint(classes + 1, (rows, ), generator=generator)
    soft = torch.rand(rows, classes, generator=generator)
    return logits, {'dense': (soft < 0.1).float(), 'bool': soft < 0.1, 'soft': soft, 'labels': labels,
                    'quality': (labels, soft[:, 0])}[form]


@forms
@pytest.mark.parametrize('rows, classes', [
    (1, 1), (37, 80), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((5, 3), (300, 7), (2, 257)))], ids=str)
def test_reductions_are_sums(form, rows, classes):
    logits, target = batch_of(form, rows, classes)
    kwargs = dict(gamma_pos=1., alpha=0.25, ignore_index=2 if form in ('labels', 'quality') else None,
                  weight=torch.linspace(0, 2, rows)[:, None])
    up = torch.linspace(-1, 2, rows)
    element, grad = value_and_grad(asymmetric_loss, logits, target, cotangent=up[:, None].expand(rows, classes),
                                   **kwargs)
    _, plain = value_and_grad(asymmetric_loss, logits, target, **kwargs)
    assert_close(grad, up[:, None] * plain, rtol=1e-5, atol=1e-5)
    total, total_grad = value_and_grad(asymmetric_loss, logits, target, cotangent=torch.tensor(3.), reduction='sum',
                                       scale=0.5, **kwargs)
    assert_close((total, total_grad), (element.sum() / 2, plain * 1.5), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('form', ['dense', 'labels', 'quality'])
@pytest.mark.parametrize('reduction', ['none', 'sum'])
def test_the_same_in_every_run_and_no_matter_what_memory_held(form, reduction):
    logits, target = batch_of(form, 261, 19)
    results = []
    for _ in range(2 if DEVICE == 'cpu' else 20):
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        results.append((*value_and_grad(asymmetric_loss, logits, target, reduction=reduction), asymmetric_loss(
            logits, target, reduction=reduction, return_sums=True)[1]))
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize('shape, order', [
    pytest.param((6, 5), (1, 0), marks=pytest.mark.slow), ((4, 6, 7), (1, 2, 0)), ((3, 4, 6, 7), (0, 2, 3, 1)),
    pytest.param((2, 5, 3), (0, 2, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize('reduction', ['none', 'sum'])
def test_permuted_maps(shape, order, reduction):
    """Channels-first, as a convolution makes them, and the same copied to classes last."""
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 4).permute(order)
    labels = torch.randint(logits.shape[-1] + 1, logits.shape[:-1], generator=torch.Generator().manual_seed(10))
    dense = (labels[..., None] == torch.arange(logits.shape[-1])).float()
    for target in (labels, dense, (labels, torch.full(labels.shape, 0.3))):
        results = []
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(3)).permute(order)
        for x in (logits, logits.contiguous()):
            z = x.detach().requires_grad_()  # keeps the strides, unlike clone
            loss, sums = asymmetric_loss(z, target, gamma_pos=1., weight=weight, reduction=reduction, return_sums=True)
            (loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum().backward()
            results.append((loss, sums, z.grad))
        assert_close(*results, rtol=1e-5, atol=1e-5)


def test_backward_twice():
    """A kept graph leaves its gradient as it was."""
    logits, target = batch_of('dense', 7, 5)
    logits.requires_grad_()
    loss = asymmetric_loss(logits, target, reduction='sum')
    grads = [torch.autograd.grad(loss * factor, logits, retain_graph=factor < 3)[0] for factor in (1, 2, 3)]
    assert_close(grads[1:], [2 * grads[0], 3 * grads[0]])


def test_operator_is_registered_well(implementation):
    """The fake kernel's shapes, dtypes and strides, and autograd, as torch.library checks them."""
    for form, transposed in itertools.product(('dense', 'labels', 'quality'), (False, True)):
        for reduction in ('none', 'sum'):
            logits, target = batch_of(form, 6, 5)
            if transposed:  # as the map of one image with the channels last
                logits = logits.T.contiguous().T
            target, quality = target if form == 'quality' else (target, None)
            one = torch.ones(())
            logits, target, quality, one, clip = tree_map_only(
                torch.Tensor, lambda x: x.to(DEVICE), (logits, target, quality, one, one / 20))
            torch.library.opcheck(torch.ops.mmasl.asymmetric_loss, (
                logits.requires_grad_(), target, quality, None, one, one, clip, one / 4, one.expand(5).clone(), None,
                None, False, None, reduction, 'mixture', implementation, True, True), test_utils=(
                    'test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic'))


def test_arguments_of_the_implementation():
    with pytest.raises(ValueError, match="reduction='mean' must be one of"):
        asymmetric_loss(torch.zeros(2, 2), torch.zeros(2, 2), reduction='mean')
    with pytest.raises(ValueError, match=r'scale of shape \(1,\) must be a number'):
        asymmetric_loss(torch.zeros(2, 2), torch.zeros(2, 2), scale=torch.ones(1))


@pytest.mark.skipif(DEVICE != 'cpu', reason='says what is chosen for the CPU')
def test_use_implementation():
    cpu, double, meta = torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, device='meta')
    assert pick_implementation(cpu) == 'eager'
    with use_implementation('triton'):
        assert pick_implementation(cpu) == 'triton'
        with use_implementation('inductor'):
            assert pick_implementation(cpu) == 'inductor'
            with pytest.raises(UnavailableError, match='it is for the CPU, and the logits are on meta'):
                pick_implementation(meta)
        with pytest.raises(UnavailableError, match='the kernel computes in float32, .* torch.float64'):
            pick_implementation(double)
        with pytest.raises(UnavailableError, match='the kernel needs a GPU .* the logits are on meta'):
            pick_implementation(meta)
    assert pick_implementation(cpu) == 'eager'
    with pytest.raises(ConfigError, match="implementation 'cuda' is unknown"), use_implementation('cuda'):
        pass


def test_why_the_kernel_is_missing(monkeypatch):
    monkeypatch.setattr(functional, 'triton_impl', None)
    monkeypatch.setattr(functional, '_no_triton', 'Triton is not installed')
    with use_implementation('triton'), pytest.raises(UnavailableError, match='not possible: Triton is not installed'):
        pick_implementation(torch.zeros(1))


def test_function_transforms():
    """torch.func's gradient, and vmap's for each sample, which cannot look at values."""
    logits, target = batch_of('soft', 6, 5)
    labels, kwargs = torch.arange(6), dict(reduction='sum', gamma_pos=1., alpha=0.25)
    for y in (target, target.round(), labels % 6):
        _, expected = value_and_grad(asymmetric_loss, logits, y, **kwargs)
        assert_close(torch.func.grad(lambda z, y=y: asymmetric_loss(z, y, **kwargs))(logits), expected)
        for kwargs['reduction'] in ('none', 'sum'):
            per_sample = torch.func.vmap(torch.func.grad(lambda z, y: 2 * asymmetric_loss(z, y, **kwargs).sum()))
            assert_close(per_sample(logits, y), 2 * expected)
    assert torch.func.vmap(lambda z, y: asymmetric_loss(z, y, **kwargs))(logits, torch.full((6, 5), 2.)).isnan().all()


def test_function_transforms_of_parameters_and_large_logits():
    """A transform cannot write in place, neither blocks of rows nor a result of a batched parameter."""
    logits, target = batch_of('dense', 3000, 80)
    small, target = logits[:4], target.float()
    for name, values in dict(gamma_neg=[0., 1.5], gamma_pos=[0., 2.], clip=[0., 0.2], alpha=[0.25, 0.5],
                             pos_weight=[1., 3.]).items():
        for z, y in ((logits, target), (small, target[:4]), (small, target[:4] / 2)):
            together = torch.func.vmap(lambda x, z=z, y=y, name=name: asymmetric_loss(z, y, **{name: x}))(
                torch.tensor(values))
            assert_close(together, torch.stack([asymmetric_loss(z, y, **{name: x}) for x in values]))
    targets = torch.stack([target, 1 - target])
    together = torch.func.vmap(lambda y: torch.func.grad(lambda z: asymmetric_loss(z, y, reduction='sum'))(logits))(
        targets)
    assert_close(together, torch.stack([value_and_grad(asymmetric_loss, logits, y, reduction='sum')[1]
                                        for y in targets]))


@pytest.mark.parametrize('reduction', ['none', 'sum'])
@pytest.mark.parametrize('rows', [4, 3000])
def test_gradients_of_several_losses_at_once(reduction, rows):
    """As a training of several tasks takes them."""
    logits, target = batch_of('dense', rows, 80)
    logits.requires_grad_()
    losses = torch.stack([asymmetric_loss(logits, target, reduction=reduction).sum(), logits.pow(2).mean()])
    found, = torch.autograd.grad(losses, logits, torch.eye(2), is_grads_batched=True, retain_graph=True)
    assert_close(found, torch.stack([torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32], ids=str)
def test_integers_do_not_wrap(dtype):
    """Narrow labels with more classes, or another ignore_index, than their dtype can hold."""
    logits, labels = torch.randn(3, 300), torch.tensor([100, 3, 44])  # 44 is 300 and 100 is -156 modulo 256
    for ignore_index in (None, -156, -253, 3):
        narrow, wide = (asymmetric_loss(logits, y, ignore_index=ignore_index) for y in (labels.to(dtype), labels))
        assert_close(narrow, wide)
        narrow, wide = (asymmetric_loss(logits, y, ignore_index=-255 if ignore_index else None)
                        for y in ((logits > 0).to(dtype), (logits > 0).long()))
        assert_close(narrow, wide)
        loss = AsymmetricLoss(ignore_index=ignore_index)
        assert_close(loss(logits, labels.to(dtype)), loss(logits, labels))


@pytest.mark.slow
@pytest.mark.parametrize('compile', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_two_hundred_steps_under_autocast(implementation, compile, dtype):
    """Half precision, GradScaler, and a gamma that moves end where float32 ends."""
    torch._dynamo.reset()

    def train(dtype):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).to(DEVICE)
        inputs = torch.randn(256, 16)
        target = (inputs @ torch.randn(16, 8) > 3).float().to(DEVICE)
        inputs = inputs.to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)

        def loss_of(inputs, target, gamma_neg):
            return functional.asymmetric_loss(model(inputs), target, gamma_neg=gamma_neg, reduction='sum',
                                              scale=1 / len(inputs))

        step = torch.compile(loss_of, fullgraph=True) if compile and dtype != torch.float32 else loss_of
        for i in range(200):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                loss = step(inputs, target, torch.tensor(4. - i / 100, device=DEVICE))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert loss.isfinite()
        return loss.item()

    assert train(dtype) == pytest.approx(train(torch.float32), rel=0.05)
