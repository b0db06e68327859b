"""The classifier and loss in one against F.linear and the operator."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmasl.errors import UnavailableError
from mmasl.ops import asymmetric_loss, linear_asymmetric_loss, use_implementation

N, C, D = 6, 11, 5
SETTINGS = {
    'asl': dict(),
    'detection': dict(gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25),
    'detached': dict(detach_focusing=True, gamma_neg=torch.tensor(3.)),
    'per-class': dict(gamma_pos=torch.linspace(0, 2, C), gamma_neg=torch.linspace(0, 5, C),
                      clip=torch.linspace(0, 0.3, C)),
}
settings = pytest.mark.parametrize('setting', SETTINGS.values(), ids=SETTINGS)
sizes = pytest.mark.parametrize('chunk_size', [1, 3, C, 1000])


def draw(dtype=torch.float64, rows=N, seed=0):
    """Features, weight and bias of logits from about -10 to 10."""
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
            for shape in ((rows, D), (C, D), (C, ))]


def hard(rows=N):
    return torch.randint(2, (rows, C), generator=torch.Generator().manual_seed(1))


def sparse(rows, columns, values):
    return torch.sparse_coo_tensor([rows, columns], values, (N, C), check_invariants=False)


def plain(features, weight, bias, target, **kwargs):
    logits = F.linear(features, weight, bias)
    target = target if target.layout == torch.strided else target.to_dense()
    return asymmetric_loss(logits, target, reduction='sum', **kwargs)


def value_and_grads(function, inputs, *args, cotangent=1., **kwargs):
    inputs = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs, *args, **kwargs)
    given = [x for x in inputs if x is not None]
    return value.detach(), *torch.autograd.grad(value, given, value.new_tensor(cotangent))


def check(inputs, *args, **kwargs):
    chunk_size = kwargs.pop('chunk_size', 4)
    assert_close(value_and_grads(linear_asymmetric_loss, inputs, *args, chunk_size=chunk_size, **kwargs),
                 value_and_grads(plain, inputs, *args, **kwargs), rtol=1e-12, atol=1e-12)


TARGETS = {
    'bool': hard().bool(), 'uint8': hard().byte(), 'int8': hard().to(torch.int8), 'int64': hard(),
    'soft': torch.rand(N, C, generator=torch.Generator().manual_seed(2)),
    'sparse': hard().float().to_sparse(), 'sparse-bool': hard().bool().to_sparse(),
    'sparse-soft': (hard() * torch.rand(N, C, generator=torch.Generator().manual_seed(3))).to_sparse(),
    'sparse-csc': hard().double().to_sparse_csc(), 'sparse-empty': torch.zeros(N, C).to_sparse(),
}


@settings
@sizes
@pytest.mark.parametrize('form', TARGETS)
def test_equals_linear_and_loss(setting, chunk_size, form):
    check(draw(), TARGETS[form], chunk_size=chunk_size, cotangent=-1.7, **setting)


@sizes
def test_weights_by_class(chunk_size):
    weights = torch.linspace(0, 1, 3 * C).view(3, C).tolist()
    check(draw(), TARGETS['soft'], chunk_size=chunk_size, **dict(zip(('alpha', 'class_weight', 'pos_weight'), weights)))


@sizes
def test_without_bias(chunk_size):
    check([*draw()[:2], None], hard(), chunk_size=chunk_size)


@sizes
@pytest.mark.parametrize('target, ignore_index', [
    (hard().masked_fill(torch.rand(N, C, generator=torch.Generator().manual_seed(4)) < 0.3, -1), -1),
    (sparse([0, 0, 1, 5], [0, C - 1, 2, 2], [1., -1, -1, 0.5]), -1),
], ids=['dense', 'sparse'])
def test_ignored(chunk_size, target, ignore_index):
    check(draw(), target, ignore_index=ignore_index, chunk_size=chunk_size)


@pytest.mark.parametrize('scale', [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=['number', 'tensor'])
def test_scale(scale):
    check(draw(), hard(), scale=scale)


@sizes
def test_probability_sums(chunk_size):
    inputs = draw()
    for target in (TARGETS['soft'], TARGETS['sparse']):
        loss, sums = linear_asymmetric_loss(*inputs, target, chunk_size=chunk_size, return_sums=True)
        expected, expected_sums = plain(*inputs, target, return_sums=True)
        assert_close((loss, sums), (expected, expected_sums), rtol=1e-12, atol=1e-12)
        assert loss.requires_grad and not sums.requires_grad


@pytest.mark.parametrize('form', ['soft', 'uint8', 'sparse'])
def test_with_the_kernel(form):
    """Read from a part of the columns."""
    pytest.importorskip('triton')
    inputs, target, kwargs = draw(torch.float32), TARGETS[form], dict(SETTINGS['per-class'], scale=0.3)
    with use_implementation('triton'):
        actual = value_and_grads(linear_asymmetric_loss, inputs, target, chunk_size=4, **kwargs)
        _, sums = linear_asymmetric_loss(*inputs, target, chunk_size=4, return_sums=True)
    assert_close(actual, value_and_grads(plain, inputs, target, **kwargs), rtol=1e-4, atol=1e-5)
    assert_close(sums, plain(*inputs, target, return_sums=True)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', ['int64', 'sparse'])
def test_no_rows(form):
    target = {'int64': hard(0), 'sparse': torch.zeros(0, C).to_sparse()}
    value, *grads = value_and_grads(linear_asymmetric_loss, draw(rows=0), target[form], chunk_size=4)
    assert value == 0 and not any(grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [(0, D), (C, D), (C, )]


def test_gradients_that_are_not_wanted():
    inputs, expected = draw(), plain(*draw(), hard()).detach()
    _, *grads = value_and_grads(plain, inputs, hard())
    for number, expected_grad in enumerate(grads):
        frozen = [x.detach().requires_grad_(n == number) for n, x in enumerate(inputs)]
        linear_asymmetric_loss(*frozen, hard(), chunk_size=4).backward()
        assert_close(frozen[number].grad, expected_grad, rtol=1e-12, atol=1e-12)
        assert [x.grad is None for x in frozen] == [n != number for n in range(3)]

    with torch.no_grad():
        assert_close(linear_asymmetric_loss(*inputs, hard(), chunk_size=4), expected)
    with torch.inference_mode():
        assert_close(linear_asymmetric_loss(*inputs, hard(), chunk_size=4), expected)
    loss = linear_asymmetric_loss(*(x.detach() for x in inputs), hard(), chunk_size=4)
    assert_close(loss, expected)
    assert not loss.requires_grad


@pytest.mark.parametrize('wanted', [True, False])
def test_without_gradient_none_is_computed(wanted):
    """Nothing of the weight's size is allocated."""
    features, weight, target = torch.randn(2, 64), torch.randn(999, 64, requires_grad=True), torch.zeros(2, 999)

    def sizes(call):
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        return [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']

    with torch.set_grad_enabled(wanted):
        largest = max(sizes(lambda: linear_asymmetric_loss(features, weight, None, target, chunk_size=100)))
    assert (largest >= 4 * weight.numel()) == wanted


@pytest.mark.parametrize('form', ['bool', 'sparse'])
def test_no_tensor_of_rows_and_classes(form):
    """By the sizes of all that is allocated, in rows of 64 and a chunk of 8 of 512 classes."""
    rows, classes = 64, 512
    features, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(classes, 2, requires_grad=True)
    dense = torch.rand(rows, classes, generator=torch.Generator().manual_seed(0)) < 0.01
    target = dict(bool=dense, sparse=dense.to_sparse())[form]

    def largest(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(features, weight, None, target).backward()
        return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]')

    assert largest(lambda *args: linear_asymmetric_loss(*args, chunk_size=8)) < rows * classes
    assert largest(plain) >= 4 * rows * classes


@pytest.mark.parametrize('factor', [1, 2])
def test_the_gradient_of_the_weight_is_not_copied(factor):
    features, weight, bias = draw()
    loss = linear_asymmetric_loss(features, weight, bias, hard(), chunk_size=4)
    buffer = loss.grad_fn.saved_tensors[1].data_ptr()
    (factor * loss).backward()
    assert weight.grad.data_ptr() == buffer


@pytest.mark.parametrize('factor', [1, 2])
def test_backward_twice(factor):
    inputs = draw()
    loss = factor * linear_asymmetric_loss(*inputs, hard(), chunk_size=4)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in inputs]
    loss.backward()
    assert_close([x.grad for x in inputs], [2 * grad for grad in once])
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        loss.backward()


def test_second_derivative_is_refused():
    inputs = draw()
    with pytest.raises(UnavailableError, match='no second derivative'):
        torch.autograd.grad(linear_asymmetric_loss(*inputs, hard()), inputs[1], create_graph=True)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('parameters', [torch.float32, None], ids=['autocast', 'half'])
def test_half_precision(dtype, parameters):
    """Against float64 of the same rounded numbers: not further away than F.linear, but for the accident."""
    exact = [x.detach().to(dtype).double() for x in draw()]
    inputs = [x.to(parameters or dtype) for x in exact]
    expected = value_and_grads(plain, exact, hard())
    with torch.autocast('cpu', dtype, enabled=parameters is not None):
        actual = value_and_grads(linear_asymmetric_loss, inputs, hard(), chunk_size=4)
        peer = value_and_grads(plain, inputs, hard())
    for ours, theirs, truth, name in zip(actual, peer, expected, ('loss', 'features', 'weight', 'bias')):
        assert ours.dtype == theirs.dtype
        error, error_of_peer = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 1.5 * error_of_peer + 1e-6, name


def test_features_of_autocast():
    """In its dtype, as a backbone gives them, the parameters in float32; float64 stays."""
    features, weight, bias = draw(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        actual = value_and_grads(linear_asymmetric_loss, (features.bfloat16(), weight, bias), hard(), chunk_size=4)
        check(draw(), hard())
    assert [x.dtype for x in actual] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_features_add_up_in_float32():
    """In bfloat16, 400 chunks of 0.5 each would stop at 128."""
    weight = torch.ones(400, 1, dtype=torch.bfloat16)
    features = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_asymmetric_loss(features, weight, None, torch.zeros(1, 400), gamma_neg=0., clip=0., chunk_size=1).backward()
    assert features.grad.item() == 200


def test_small_gradients_of_float16_outlive_the_loss_scale():
    """1e-9 is 0 in float16; GradScaler's factor arrives in backward."""
    features, weight, bias = draw(torch.float32)
    kwargs = dict(scale=1e-9, cotangent=2.**20)
    with torch.autocast('cpu', torch.float16):
        actual = value_and_grads(linear_asymmetric_loss, (features, weight, bias), hard(), chunk_size=4, **kwargs)
    expected = value_and_grads(plain, (features, weight, bias), hard(), **kwargs)
    for ours, truth in zip(actual, expected):
        assert_close(ours, truth, rtol=0.02, atol=0.01 * truth.abs().max().item())


def test_compiled_model():
    features, weight, bias = draw(torch.float32)
    torch._dynamo.reset()

    def step(features, weight, bias, target):
        return 2 * linear_asymmetric_loss(features * 2, weight, bias, target, chunk_size=4)

    compiled = torch.compile(step, backend='aot_eager')
    assert_close(value_and_grads(compiled, (features, weight, bias), hard()),
                 value_and_grads(step, (features, weight, bias), hard()))
    torch._dynamo.reset()


@pytest.mark.parametrize('target, error, message', [
    (hard().float().index_fill(1, torch.tensor(9), 2), ValueError,
     r'target 2.0 at \[0, 1\] is out of range.*column 0 here is class 8'),
    (sparse([3], [9], [-1.]), ValueError, r'target -1.0 at \[3, 1\].*is class 8'),
    (sparse([3, 3], [9, 9], [1., 1.]), ValueError, r'target 2.0 at \[3, 1\].*is class 8'),
    (sparse([0], [C], [1.]), ValueError, r'class 11 at \[0\] is out of range, which is 0 to 10'),
    (sparse([-1], [0], [1.]), ValueError, r'row -1 at \[0\]'),
    (torch.zeros(N, C + 1), ValueError, r'target \(6, 12\) does not fit 6 rows and 11 classes'),
    (torch.zeros(N, dtype=torch.long), ValueError, r'target \(6,\) does not fit'),
    ((torch.zeros(N).long(), torch.ones(N)), ValueError, 'target tuple does not fit'),
], ids=['value', 'sparse', 'twice', 'class', 'row', 'dense', 'rows', 'pair'])
def test_bad_targets(target, error, message):
    with pytest.raises(error, match=message):
        linear_asymmetric_loss(*draw(), target, ignore_index=255, chunk_size=4)


@pytest.mark.parametrize('kwargs, message', [
    (dict(gamma_neg=torch.ones(C + 4)), r'gamma_neg of shape \(15,\) does not fit 11 classes'),
    (dict(clip=torch.ones(1)), r'clip of shape \(1,\) does not fit'),
    (dict(bias=torch.ones(C + 1)), r'bias of shape \(12,\) does not fit'),
    (dict(weight=torch.ones(C, D + 1)), r'features of shape \(6, 5\) and weight of shape \(11, 6\) must be'),
    (dict(chunk_size=0), 'chunk_size=0 must be 1'),
    (dict(weight=torch.ones(0, D)), r'weight of shape \(0, 5\) must be .*C >= 1'),
    (dict(scale=torch.ones(1)), r'scale of shape \(1,\) does not fit 11 classes: give \(\)'),
    (dict(gamma_pos=torch.ones(C, requires_grad=True)), 'gets no gradient: detach'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_bad_arguments(kwargs, message):
    inputs = dict(zip(('features', 'weight', 'bias'), draw())) | kwargs
    with pytest.raises(ValueError, match=message):
        linear_asymmetric_loss(**inputs, target=hard())
