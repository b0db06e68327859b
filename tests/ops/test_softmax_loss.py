"""The softmax form against its equation in many digits, as MMPretrain's heads call it."""
import mpmath
import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models import LinearClsHead
from mmpretrain.structures import DataSample
from torch.testing import assert_close

from mmasl import AsymmetricSoftmaxLoss, asymmetric_softmax_loss, use_implementation
from mmasl.errors import UnavailableError

NAMES = 'gamma_pos', 'gamma_neg', 'smoothing'
SETTINGS = [(0, 4, 0.1), (0, 0, 0.1), (2, 4, 0), (1, 2, 0.3), (0.5, 0.5, 0.1), (0, 7, 0)]


def softmax_loss(logits, labels, *setting, **kwargs):
    return asymmetric_softmax_loss(logits, labels, **dict(zip(NAMES, setting)), **kwargs)


@pytest.fixture
def logits():
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture
def labels():
    return torch.arange(12) % 5


def equation(logits, labels, gamma_pos, gamma_neg, smoothing, class_weight=1.):
    """The formula as it is written, in float64 and by autograd."""
    p = logits.double().softmax(-1)
    y = F.one_hot(labels, logits.shape[-1]).double()
    target = (1 - smoothing) * y + smoothing / logits.shape[-1]
    focus = y * (1 - p)**gamma_pos + (1 - y) * p**gamma_neg
    return -(class_weight * target * focus * p.log()).sum(-1)


def with_grad(loss, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


# ---------------------------------------------------------------------------------------------------------- values

@pytest.mark.parametrize('setting', SETTINGS, ids=str)
def test_equation(logits, labels, setting):
    value, grad = with_grad(softmax_loss, logits.double(), labels, *setting)
    assert_close((value, grad), with_grad(equation, logits.double(), labels, *setting), rtol=1e-10, atol=1e-12)
    assert_close(with_grad(softmax_loss, logits, labels, *setting), (value.float(), grad.float()))


@pytest.mark.parametrize('setting', SETTINGS, ids=str)
def test_weights_by_class(logits, labels, setting):
    weight = torch.tensor([0., 0.1, 1, 3, 50])
    expected, expected_grad = with_grad(equation, logits.double(), labels, *setting, class_weight=weight)
    value, grad = with_grad(softmax_loss, logits.double(), labels, *setting, class_weight=weight.tolist())
    assert_close((value, grad), (expected, expected_grad), rtol=1e-7, atol=1e-12)
    loss = AsymmetricSoftmaxLoss(*setting[:2], weight, *setting[2:], reduction='none')
    assert_close(with_grad(loss, logits, labels), (expected.float(), expected_grad.float()))
    if setting[:2] == (0, 0):
        theirs = F.cross_entropy(logits, labels, weight, label_smoothing=setting[2], reduction='none')
        assert_close(loss(logits, labels), theirs)


@pytest.mark.parametrize('dtype, rtol', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('setting', SETTINGS, ids=str)
def test_half_precision_computes_in_float32(logits, labels, setting, dtype, rtol):
    logits = logits.to(dtype)
    value, grad = with_grad(softmax_loss, logits, labels, *setting)
    expected, expected_grad = with_grad(equation, logits.double(), labels, *setting)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-4)


def test_gradcheck(logits, labels):
    z = logits[:5].double().requires_grad_()
    for setting in SETTINGS:
        assert torch.autograd.gradcheck(lambda x, setting=setting: softmax_loss(x, labels[:5], *setting), z)


@pytest.mark.parametrize('smoothing', [0, 0.1, 0.9])
def test_without_focusing_it_is_smoothed_cross_entropy(logits, labels, smoothing):
    assert_close(with_grad(softmax_loss, logits, labels, 0, 0, smoothing),
                 with_grad(F.cross_entropy, logits, labels, label_smoothing=smoothing, reduction='none'))


@pytest.mark.parametrize('gamma_neg', [0, 0.5, 4, 100])
def test_without_smoothing_gamma_neg_changes_nothing(logits, labels, gamma_neg):
    ours = with_grad(softmax_loss, logits, labels, 0, gamma_neg, 0)
    assert_close(ours, with_grad(F.cross_entropy, logits, labels, reduction='none'))
    assert_close(with_grad(softmax_loss, logits, labels, 2, gamma_neg, 0),
                 with_grad(softmax_loss, logits, labels, 2, 4, 0), rtol=0, atol=0)


def test_smoothing_turns_round_under_focusing(labels):
    # Three equal others of p = 0.05, below exp(-1/4): smoothing alone raises them, focused smoothing lowers them.
    z = torch.tensor([[0.85, 0.05, 0.05, 0.05]]).double().log()

    def share(gamma_neg):  # of smoothing in the gradient of a logit that is not the label's
        parts = [with_grad(softmax_loss, z, labels[:1], 100, gamma_neg, s)[1] for s in (0.5, 0)]
        return (parts[0] - parts[1])[0, 1]

    assert share(0) < 0 < share(4)


# --------------------------------------------------------------------------------------------------------- extremes

def exact(z, label, gamma_pos, gamma_neg, smoothing):
    """Loss and gradient of one sample in 1000 digits."""
    with mpmath.workdps(1000):
        def loss(*z):
            e = [mpmath.exp(x) for x in z]
            p = [x / mpmath.fsum(e) for x in e]
            share = mpmath.mpf(smoothing) / len(z)
            rest = mpmath.fsum(x for c, x in enumerate(e) if c != label) / mpmath.fsum(e)  # 1 - p of the label
            terms = [-share * x**gamma_neg * mpmath.log(x) for c, x in enumerate(p) if c != label]
            return mpmath.fsum(terms) - (1 - smoothing + share) * rest**gamma_pos * mpmath.log(p[label])

        z = [mpmath.mpf(x) for x in z]
        step = mpmath.mpf(10)**-300
        value = loss(*z)
        grad = [(loss(*[x + step * (c == k) for c, x in enumerate(z)]) - value) / step for k in range(len(z))]
        return float(value), [float(g) for g in grad]


@pytest.mark.parametrize('setting', [(0, 4, 0.1), (0, 0, 0), (2, 4, 0), (1, 0.5, 0.25)], ids=str)
@pytest.mark.parametrize('z', [
    (1000., -1000., 0.), (-1000., 1000., 0.), (1000., 999.5, 1000.), (-1000., -1000., -1000.), (30., 0., -5.),
    (-30., 0., 5.), (80., 0., 0.), (-80., 1., 0.)], ids=str)
def test_extremes(z, setting):
    value, grad = exact(z, 0, *setting)
    for dtype, rtol in ((torch.float16, 1e-3), (torch.float32, 1e-5), (torch.float64, 1e-11)):
        if torch.tensor(z).to(dtype).tolist() != list(z):
            continue
        logits = torch.tensor([z], dtype=dtype)
        ours, ours_grad = with_grad(softmax_loss, logits, torch.tensor([0]), *setting)
        tiny = torch.finfo(ours.dtype).smallest_normal
        assert_close(ours.double(), torch.tensor([value], dtype=torch.float64), rtol=min(rtol, 1e-5), atol=tiny)
        # A softmax's gradients cancel in part: they are as exact as the largest of them.
        atol = rtol * max(map(abs, grad)) + torch.finfo(dtype).smallest_normal
        assert_close(ours_grad.double(), torch.tensor([grad], dtype=torch.float64), rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------- module

@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_defaults_and_reductions(logits, labels, reduction):
    elements = equation(logits, labels, 0, 4, 0.1).float()
    loss = AsymmetricSoftmaxLoss(reduction=reduction, loss_weight=3)
    expected = dict(none=elements, mean=elements.mean(), sum=elements.sum())[reduction]
    assert_close(loss(logits, labels), 3 * expected)
    for name, value in (('none', elements), ('mean', elements.mean()), ('sum', elements.sum())):
        assert_close(loss(logits, labels, reduction_override=name), 3 * value)


@pytest.mark.parametrize('avg_factor', [7, 3.5, torch.tensor(7.), torch.tensor([7])], ids=str)
def test_weight_and_avg_factor(logits, labels, avg_factor):
    weight = torch.rand(12, generator=torch.Generator().manual_seed(2))
    total = (equation(logits, labels, 0, 4, 0.1) * weight).sum().float()
    assert_close(AsymmetricSoftmaxLoss()(logits, labels, weight, avg_factor=avg_factor), total / float(avg_factor))
    assert_close(AsymmetricSoftmaxLoss(reduction='sum')(logits, labels, weight, avg_factor=avg_factor), total)
    assert_close(AsymmetricSoftmaxLoss(gamma_neg=0, smoothing=0)(logits, labels),
                 F.cross_entropy(logits, labels))


@pytest.mark.parametrize('ignore_index', [-1, 255, 3])
def test_ignored_samples(logits, labels, ignore_index):
    labels = labels.masked_fill(labels == 3, ignore_index)
    kept = labels != ignore_index
    loss = AsymmetricSoftmaxLoss(ignore_index=ignore_index, gamma_pos=1)
    value, grad = with_grad(loss, logits, labels)
    expected, expected_grad = with_grad(AsymmetricSoftmaxLoss(gamma_pos=1), logits[kept], labels[kept])
    assert_close((value, grad[kept]), (expected, expected_grad))
    assert (grad[~kept] == 0).all()
    assert loss(logits, torch.full_like(labels, ignore_index)) == 0


def test_other_shapes(logits, labels):
    loss = AsymmetricSoftmaxLoss(reduction='none')
    assert_close(loss(logits.view(3, 4, 5), labels.view(3, 4)), loss(logits, labels).view(3, 4))
    assert_close(loss(logits[0], labels[0]), loss(logits, labels)[0])
    assert_close(loss(logits.T.contiguous().T, labels.int()), loss(logits, labels))
    value, grad = with_grad(AsymmetricSoftmaxLoss(), torch.empty(0, 5), torch.empty(0, dtype=torch.long))
    assert value == 0 and grad.shape == (0, 5)


def test_in_a_head_of_mmpretrain(logits, labels):
    head = LinearClsHead(5, 8, loss=dict(type='mmasl.AsymmetricSoftmaxLoss', gamma_neg=2, smoothing=0.2))
    samples = [DataSample().set_gt_label(label) for label in labels]
    feature = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    value = head.loss((feature, ), samples)['loss']
    assert_close(value, equation(head.fc(feature), labels, 0, 2, 0.2).mean().float())


def test_compiled(logits, labels):
    loss = AsymmetricSoftmaxLoss(gamma_pos=1, ignore_index=2)
    compiled = torch.compile(loss, backend='aot_eager', fullgraph=True)
    assert_close(with_grad(compiled, logits, labels), with_grad(loss, logits, labels))
    bad = labels.clone()
    bad[1] = 9
    with pytest.raises(ValueError, match=r'label 9 at \[1\]'):
        compiled(logits, bad)


def test_largest_numbers_stay_finite():
    for z in ((1e38, -1e38, 0.), (-1e38, 1e38, 1e38)):
        for setting in SETTINGS:
            value, grad = with_grad(softmax_loss, torch.tensor([z]), torch.tensor([0]), *setting)
            assert value.isfinite() and grad.isfinite().all()


@pytest.mark.slow
def test_compiled_formula_is_eager():
    """As large logits on the CPU run, with an ignored label, and in another shape without compiling again."""
    for rows, classes in ((12, 5), (7, 300)):
        logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows)) * 6
        labels = torch.arange(rows) % 5
        labels[rows // 2] = -1
        expected = with_grad(softmax_loss, logits, labels, 1, 4, 0.1, ignore_index=-1)
        with use_implementation('inductor'):
            found = with_grad(softmax_loss, logits, labels, 1, 4, 0.1, ignore_index=-1)
            with pytest.raises(ValueError, match=r'label -1 at'):
                softmax_loss(logits, labels, 1, 4, 0.1)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_function_transforms(logits, labels):
    _, expected = with_grad(softmax_loss, logits, labels, 1, 4, 0.1)
    per_sample = torch.func.vmap(torch.func.grad(lambda z, y: softmax_loss(z, y, 1, 4, 0.1)))
    assert_close(per_sample(logits, labels), expected)
    with pytest.raises(UnavailableError, match='no second derivative'):
        torch.func.jacrev(torch.func.grad(lambda z: softmax_loss(z, labels, 1, 4, 0.1).sum()))(logits)
    with pytest.raises(UnavailableError, match='no second derivative'):
        torch.autograd.functional.hessian(lambda z: softmax_loss(z, labels, 1, 4, 0.1).sum(), logits)
    leaf = logits.clone().requires_grad_()
    losses = torch.stack([softmax_loss(leaf, labels, 1, 4, 0.1).sum(), leaf.sum()])
    together, = torch.autograd.grad(losses, leaf, torch.eye(2, dtype=losses.dtype), is_grads_batched=True)
    assert_close(together, torch.stack([expected, torch.ones_like(expected)]))
    labels[1] = 9
    grad = per_sample(logits, labels)
    assert grad[1].isnan().all() and grad[2].isfinite().all()


def test_state_and_repr():
    loss = AsymmetricSoftmaxLoss(gamma_neg=2)
    assert not loss.state_dict()
    assert repr(loss) == ('AsymmetricSoftmaxLoss(gamma_pos=0.0, gamma_neg=2, smoothing=0.1, reduction=mean, '
                          'loss_weight=1.0, ignore_index=None)')


# ----------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('kwargs, message', [
    (dict(gamma_neg=-1), r'gamma_neg=-1 must be a number in \[0, inf\)'),
    (dict(gamma_pos=float('nan')), 'gamma_pos=nan'),
    (dict(class_weight=[1, -1]), r'class_weight=\[1, -1\] must be a number in \[0, inf\)'),
    (dict(pos_weight=[1, 2]), r'pos_weight=\[1, 2\] must be None: .* Use class_weight'),
    (dict(smoothing=1), r'smoothing=1 must be a number in \[0, 1\)'),
    (dict(use_sigmoid=True), 'use_sigmoid=True.*mmasl.AsymmetricLoss'),
    (dict(reduction='batchmean'), "reduction='batchmean' must be one of"),
    (dict(loss_weight=float('inf')), 'loss_weight=inf'),
    (dict(gamma_neg=[1., 2.]), r'gamma_neg=\[1.0, 2.0\] must be a number'),
], ids=str)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricSoftmaxLoss(**kwargs)


def test_bad_calls(logits, labels):
    loss = AsymmetricSoftmaxLoss()
    with pytest.raises(ValueError, match=r'labels of shape \(12, 5\) do not fit logits of shape \(12, 5\).*Mixup'):
        loss(logits, F.one_hot(labels, 5))
    with pytest.raises(TypeError, match='labels must be integers, got torch.float32'):
        loss(logits, labels.float())
    with pytest.raises(TypeError, match='logits must be floating point, got torch.int64'):
        loss(logits.long(), labels)
    with pytest.raises(ValueError, match=r'have 1 class: .* Use mmasl.AsymmetricLoss'):
        loss(logits[:, :1], labels)
    for bad, ignore_index in ((5, None), (-1, None), (5, -1)):
        wrong = labels.clone()
        wrong[7] = bad
        with pytest.raises(ValueError, match=rf'label {bad} at \[7\] is out of range, which is 0 to 4'):
            AsymmetricSoftmaxLoss(ignore_index=ignore_index)(logits, wrong)
    with pytest.raises(ValueError, match=r'weight of shape \(12, 5\) does not fit labels of shape \(12,\)'):
        loss(logits, labels, torch.ones(12, 5))
    with pytest.raises(ValueError, match=r'avg_factor of shape \(2,\)'):
        loss(logits, labels, avg_factor=torch.ones(2))
    with pytest.raises(ValueError, match="reduction_override='max'"):
        loss(logits, labels, reduction_override='max')
