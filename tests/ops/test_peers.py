"""Where timm's and mmpretrain's losses agree with the equations, and where they do not: each test names one place.

The expected value is always the float64 reference. A peer that mends its difference fails its test here, and the
difference is then struck from the list.
"""
import pytest
import torch
from mmpretrain.models.losses import AsymmetricLoss as MMPretrain
from timm.loss import AsymmetricLossMultiLabel as Timm
from timm.loss import AsymmetricLossSingleLabel
from torch.testing import assert_close

from mmasl import AsymmetricLoss
from mmasl.ops.reference import asymmetric_loss as reference

SETTINGS = [(0., 4., 0.05), (1., 4., 0.05), (2., 2., 0.), (0., 0., 0.), (0., 0., 0.05), (1., 2., 0.2)]


def timm(gamma_pos, gamma_neg, clip, **kwargs):
    return Timm(gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, reduction='sum', **kwargs)


def mmpretrain(gamma_pos, gamma_neg, clip):
    return MMPretrain(gamma_pos, gamma_neg, clip, reduction='sum')


def ours(gamma_pos, gamma_neg, clip, **kwargs):
    return AsymmetricLoss(gamma_pos, gamma_neg, clip, reduction='sum', **kwargs)


def equations(*setting, **kwargs):
    named = dict(zip(('gamma_pos', 'gamma_neg', 'clip'), setting), **kwargs)
    return lambda logits, target: reference(logits, target, **named).sum()


def with_grad(loss, logits, target):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    return value.detach().double(), torch.autograd.grad(value, logits)[0].double()


def hard_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(16, 9, generator=generator).to(dtype) * 2,
            torch.randint(2, (16, 9), generator=generator).to(dtype))


@pytest.mark.parametrize('setting', SETTINGS, ids=str)
@pytest.mark.parametrize('peer', [timm, mmpretrain, ours])
def test_hard_labels_and_moderate_logits_agree(peer, setting):
    batch = hard_batch()
    assert_close(with_grad(peer(*setting), *batch), with_grad(equations(*setting), *batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('setting', SETTINGS, ids=str)
def test_constant_weight_agrees_with_timm(setting):
    batch = hard_batch()
    expected = with_grad(equations(*setting, detach_focusing=True), *batch)
    for loss in (timm(*setting, disable_torch_grad_focal_loss=True), ours(*setting, detach_focusing=True)):
        assert_close(with_grad(loss, *batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('peer', [timm, mmpretrain])
def test_soft_labels(peer):
    """Both mix inside the logarithm or the weight; Eq. 2 mixes the two losses."""
    setting, logits, target = (0., 4., 0.05), *hard_batch()
    target = 0.8 * target + 0.1
    expected = with_grad(equations(*setting), logits, target)
    assert_close(with_grad(ours(*setting), logits, target), expected, rtol=1e-5, atol=1e-6)
    assert abs(peer(*setting)(logits, target) / expected[0] - 1) > 0.1


@pytest.mark.parametrize('peer', [timm, mmpretrain])
def test_fractional_gamma_with_a_margin(peer):
    """Their gradient of a negative below the margin is that of pow(0, 0.5)."""
    setting, logits, target = (0., 0.5, 0.05), torch.full((1, 3), -5.), torch.zeros(1, 3)
    assert with_grad(peer(*setting), logits, target)[1].isnan().all()
    assert (with_grad(ours(*setting), logits, target)[1] == 0).all()


@pytest.mark.parametrize('peer', [timm, mmpretrain])
def test_confident_mistakes_get_no_gradient(peer):
    """The clamp at 1e-8 stops the gradient of the worst mistakes, where cross-entropy has its largest."""
    setting = (0., 0., 0.)
    for logits, target, expected in ((torch.full((1, 3), -20.), torch.ones(1, 3), -1.),
                                     (torch.full((1, 3), 20.), torch.zeros(1, 3), 1.)):
        assert (with_grad(peer(*setting), logits, target)[1] == 0).all()
        assert_close(with_grad(ours(*setting), logits, target)[1], torch.full((1, 3), expected).double())


def test_mmpretrain_in_half_precision():
    """1e-8 is 0 in float16, and 0 * log(0) is NaN."""
    logits, target = torch.full((1, 3), -20., dtype=torch.float16), torch.zeros(1, 3)
    assert MMPretrain(0., 4., 0., reduction='sum')(logits, 1 - target.half()).isinf()
    assert MMPretrain(1., 0., 0., reduction='sum')(-logits, target.half()).isinf()
    for y in (target, 1 - target):
        assert with_grad(ours(0., 4., 0.), logits, y)[0].isfinite()


def test_mmpretrain_takes_one_column_for_indices():
    """A dense target of one class, (N, 1), is read as class numbers and turned round."""
    setting, logits, target = (0., 0., 0.), torch.full((2, 1), 3.), torch.zeros(2, 1)
    assert_close(with_grad(ours(*setting), logits, target), with_grad(equations(*setting), logits, target),
                 rtol=1e-5, atol=0)
    turned = with_grad(equations(*setting), logits, 1 - target)
    assert_close(with_grad(mmpretrain(*setting), logits, target.long()), turned, rtol=1e-5, atol=0)


def test_mmpretrain_refuses_sum_from_its_own_head():
    """MultiLabelClsHead always passes avg_factor, which mmpretrain's reduction does not take with 'sum'."""
    logits, target = hard_batch()
    with pytest.raises(ValueError, match='avg_factor'):
        MMPretrain(reduction='sum')(logits, target, avg_factor=16)
    assert ours(0., 4., 0.05)(logits, target, avg_factor=16).isfinite()


@pytest.mark.parametrize('peer', [timm, mmpretrain])
def test_negative_labels_pass_silently(peer):
    logits = torch.zeros(1, 2)
    target = torch.tensor([[-1., 0.]])
    assert peer(0., 4., 0.05)(logits, target).isfinite()
    with pytest.raises(ValueError, match=r'target -1.0 at \[0, 0\]'):
        ours(0., 4., 0.05)(logits, target)


def test_defaults_differ():
    """gamma_pos = 1 in timm; the paper's classification, ours and mmpretrain's class have 0, its function has 1."""
    logits, target = hard_batch()
    assert (Timm().gamma_pos, MMPretrain().gamma_pos, AsymmetricLoss().gamma_pos.item()) == (1, 0, 0)
    assert abs(Timm(reduction='sum')(logits, target) / ours(0., 4., 0.05)(logits, target) - 1) > 0.1


@pytest.mark.parametrize('gamma_neg', [0., 4., 9.])
def test_softmax_form_without_gamma_pos_is_cross_entropy(gamma_neg):
    """timm's single-label loss is another loss under the same name: gamma_neg multiplies terms that are all zero."""
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    theirs = AsymmetricLossSingleLabel(gamma_pos=0, gamma_neg=gamma_neg, eps=0)(logits, labels)
    assert_close(theirs, torch.nn.functional.cross_entropy(logits, labels))
