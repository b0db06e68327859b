"""The module as MMDetection and MMPretrain call it."""
import copy

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.losses import QualityFocalLoss, VarifocalLoss
from mmdet.models.losses.focal_loss import FocalLoss, py_sigmoid_focal_loss
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from mmasl import AsymmetricLoss
from mmasl.models.batch_augments import MultiLabelMixup
from mmasl.ops import asymmetric_loss, reference

CE = dict(gamma_pos=0, gamma_neg=0, clip=0)
FOCAL = dict(gamma_pos=2, gamma_neg=2, clip=0)


@pytest.fixture
def logits():
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture
def target():
    return torch.randint(2, (12, 5), generator=torch.Generator().manual_seed(1)).float()


@pytest.fixture
def labels():
    return torch.arange(12) % 6


def with_grad(loss, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_ce_is_torch_bce(logits, target, reduction):
    soft = target * 0.8 + 0.1
    for y in (target, soft):
        assert_close(with_grad(AsymmetricLoss(**CE, reduction=reduction), logits, y),
                     with_grad(lambda z, y=y: F.binary_cross_entropy_with_logits(z, y, reduction=reduction), logits))


@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('alpha', [None, 0.25, 0.9])
def test_focal_is_torchvision(logits, target, reduction, alpha):
    theirs = -1 if alpha is None else alpha
    assert_close(with_grad(AsymmetricLoss(**FOCAL, alpha=alpha, reduction=reduction), logits, target),
                 with_grad(lambda z: sigmoid_focal_loss(z, target, theirs, 2, reduction), logits))


@pytest.mark.parametrize('avg_factor', [None, 7, 3.5, torch.tensor(7.), torch.tensor([7])], ids=str)
@pytest.mark.parametrize('weight', [None, 'row', 'element', 'flat'])
def test_focal_is_mmdet(logits, labels, weight, avg_factor):
    weight = {None: None, 'row': torch.rand(12), 'element': torch.rand(12, 5), 'flat': torch.rand(60)}[weight]
    one_hot = F.one_hot(labels, 6)[:, :5]
    ours = AsymmetricLoss(**FOCAL, alpha=0.25, loss_weight=0.5)
    value, grad = with_grad(ours, logits, labels, weight, avg_factor=avg_factor)
    expected = with_grad(lambda z: 0.5 * py_sigmoid_focal_loss(z, one_hot, weight, avg_factor=avg_factor), logits)
    assert_close((value, grad), (expected[0].reshape(()), expected[1]))
    assert_close(with_grad(ours, logits, one_hot, weight, avg_factor=avg_factor), (value, grad))
    # mmdet's module, through mmcv's compiled kernel.
    expected = with_grad(FocalLoss(use_sigmoid=True, gamma=2., alpha=0.25, loss_weight=0.5), logits, labels, weight,
                         avg_factor=avg_factor)
    assert_close((value, grad), (expected[0].reshape(()), expected[1]))


QUALITY = torch.tensor([0.3, 1, 0.9, 0, 0.02, 0.5, 0.6, 0.7, 0.1, 1, 0, 0.4])  # two labelled entries of quality 0


@pytest.mark.parametrize('weight', [None, torch.linspace(0, 2, 12)], ids=['plain', 'weight'])
@pytest.mark.parametrize('beta', [2., 1., 0.5])
def test_quality_focal_is_mmdet(logits, labels, weight, beta):
    theirs = QualityFocalLoss(beta=beta, loss_weight=0.5)
    ours = AsymmetricLoss(beta, beta, clip=0, soft_label='qfl', loss_weight=0.5)
    target = labels, QUALITY
    expected = with_grad(theirs, logits.double(), (labels, QUALITY.double()), weight, avg_factor=7)
    assert_close(with_grad(ours, logits, target, weight, avg_factor=7), expected, check_dtype=False)
    dense = F.one_hot(labels, 6)[:, :5] * QUALITY[:, None]
    assert_close(with_grad(ours, logits, dense, weight, avg_factor=7), with_grad(
        theirs, logits.double(), dense.double(), weight, avg_factor=7), check_dtype=False)
    # Probabilities, as from TOOD; bfloat16 logits with qualities in float32, as under autocast.
    ours.activated = theirs.activated = True
    p = logits.sigmoid()
    assert_close(with_grad(ours, p, target, weight, avg_factor=7), with_grad(
        theirs, p.double(), (labels, QUALITY.double()), weight, avg_factor=7), rtol=1e-4, atol=1e-5, check_dtype=False)
    ours.activated = theirs.activated = False
    half = logits.bfloat16()
    value, grad = with_grad(ours, half, target, weight, avg_factor=7)
    expected = with_grad(theirs, half.double(), (labels, QUALITY.double()), weight, avg_factor=7)
    assert_close((value, grad), expected, rtol=2**-8, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize('iou_weighted', [True, False])
def test_varifocal_is_mmdet(logits, labels, iou_weighted):
    dense = F.one_hot(labels, 6)[:, :5] * QUALITY[:, None]
    ours = AsymmetricLoss(float(iou_weighted), 2, clip=0, class_weight=3 / 4, pos_weight=4 / 3, soft_label='vfl')
    expected = with_grad(VarifocalLoss(iou_weighted=iou_weighted), logits.double(), dense.double(), avg_factor=7)
    assert_close(with_grad(ours, logits, dense, avg_factor=7), expected, check_dtype=False)


def test_matchability_aware_is_its_definition(logits, labels):
    """arXiv 2412.04234: -q^g log p - (1 - q^g) log(1 - p) of matched entries, also of those with q = 0, and
    -p^g log(1 - p) of others. As in the authors' code, the weight p^g has no gradient, and g = 1.5 by default."""
    def definition(z):
        p, one_hot = z.sigmoid(), F.one_hot(labels, 6)[:, :5] > 0
        t = QUALITY.double()[:, None]**1.5
        return torch.where(one_hot, -t * p.log() - (1 - t) * (1 - p).log(), -p.detach()**1.5 * (1 - p).log()).sum() / 7

    ours = AsymmetricLoss(1.5, 1.5, clip=0, soft_label='mal', detach_focusing=True)
    assert_close(with_grad(ours, logits, (labels, QUALITY), avg_factor=7), with_grad(definition, logits.double()),
                 check_dtype=False)


@pytest.mark.parametrize('kind', ['qfl', 'vfl', 'mal'])
def test_asymmetry_acts_on_the_negatives_alone(logits, labels, kind):
    """gamma_neg and clip leave labelled entries as they are, and weight_unannotated adds negatives."""
    one_hot = F.one_hot(labels, 6)[:, :5] > 0
    plain, asymmetric = (AsymmetricLoss(1.5, *x, soft_label=kind, reduction='none') for x in ((0, 0), (4, 0.05)))
    base, found = (loss(logits, (labels, QUALITY)) for loss in (plain, asymmetric))
    assert_close(found, torch.where(one_hot, base, asymmetric_loss(logits, torch.zeros(12, 5))))
    unknown = AsymmetricLoss(1.5, soft_label=kind, reduction='none', ignore_index=5, weight_unannotated=1)
    assert_close(unknown(logits, (labels, QUALITY)), found)


def test_reduction_override_and_shapes(logits, target):
    loss = AsymmetricLoss()
    elements = loss(logits, target, reduction_override='none')
    assert_close(elements, asymmetric_loss(logits, target))
    assert_close(loss(logits, target), elements.mean())
    assert_close(loss(logits, target, reduction_override='sum'), elements.sum())
    assert_close(loss(logits, target, avg_factor=12), elements.sum() / 12)
    # MultiLabelClsHead always gives avg_factor; the official 'sum' does not divide.
    assert_close(AsymmetricLoss(reduction='sum')(logits, target, avg_factor=12), elements.sum())
    assert_close(AsymmetricLoss(reduction='none', loss_weight=3)(logits, target, avg_factor=12), 3 * elements)


def test_broadcast_weight():
    logits, target, weight = torch.randn(2, 6, 4), torch.rand(2, 6, 4), torch.rand(2, 6, 1)
    loss = AsymmetricLoss(reduction='sum')
    assert_close(loss(logits, target, weight), loss(logits, target, weight.expand(2, 6, 4)))
    assert_close(loss(logits, target, weight), loss(logits, target, weight[..., 0]))


def test_mean_leaves_ignored_elements_out(logits, target, labels):
    target[3] = target[5, 2] = -1
    kept = target != -1
    loss = AsymmetricLoss(ignore_index=-1)
    assert_close(loss(logits, target), loss(logits[kept], target[kept]))
    labels[3] = -1
    assert_close(loss(logits, labels), loss(logits[labels != -1], labels[labels != -1]))
    assert_close(loss(logits, (labels, torch.ones(12))), loss(logits, labels))


@pytest.mark.parametrize('target', [torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)], ids=['dense', 'labels'])
@pytest.mark.parametrize('kwargs', [{}, dict(avg_factor=0), dict(avg_factor=torch.tensor(0.)),
                                    dict(weight=torch.zeros(0))], ids=str)
def test_empty_batch_is_zero_with_a_gradient(target, kwargs):
    value, grad = with_grad(AsymmetricLoss(), torch.zeros(0, 5), target, **kwargs)
    assert value == 0 and grad.shape == (0, 5)


def test_all_ignored_and_no_positives(logits):
    value, grad = with_grad(AsymmetricLoss(ignore_index=-1), logits, torch.full((12, 5), -1.))
    assert value == 0 and (grad == 0).all()
    value, grad = with_grad(AsymmetricLoss(clip=0), logits, torch.full((12, ), 5))
    assert value.isfinite() and (grad >= 0).all() and grad.any()


@pytest.fixture(params=['hard', 'soft', 'labels', 'quality'])
def partial(request, target, labels):
    """A target that marks some of it as not annotated, the same as negatives, and what is marked, (12, 5)."""
    generator = torch.Generator().manual_seed(2)
    if request.param in ('hard', 'soft'):
        target = target if request.param == 'hard' else target * torch.rand(12, 5, generator=generator)
        marked = torch.rand(12, 5, generator=generator) < 0.6
        return target.masked_fill(marked, -1), target.masked_fill(marked, 0), marked
    marked = torch.rand(12, generator=generator) < 0.6
    pair = labels.masked_fill(marked, -1), labels.masked_fill(marked, 5)
    if request.param == 'quality':
        quality = torch.rand(12, generator=generator)
        pair = tuple((x, quality) for x in pair)
    return *pair, marked.unsqueeze(1).expand(12, 5)


def dense(target):
    """0 and 1 for labels, and what is between for qualities."""
    labels, quality = target if isinstance(target, tuple) else (target, torch.ones(12))
    return target if labels.dim() == 2 else F.one_hot(labels, 6)[:, :5] * quality.unsqueeze(1)


@pytest.mark.parametrize('gamma', [None, 0.5, [0, 1, 2.5, 4, 7]], ids=str)
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('kwargs', [dict(alpha=0.25, gamma_pos=1, clip=0), dict(detach_focusing=True)], ids=str)
def test_unannotated_labels_by_the_equations(logits, partial, gamma, reduction, kwargs):
    target, negative, marked = partial
    logits, weight = logits.double(), torch.rand(12, 5, dtype=torch.double)
    settings = dict(gamma_pos=0, gamma_neg=4, clip=0.05) | kwargs

    def expected(z):
        own = settings if gamma is None else settings | dict(gamma_neg=torch.as_tensor(gamma))
        value = weight * torch.where(marked, 0.3 * reference.asymmetric_loss(z, torch.zeros(12, 5), **own),
                                     reference.asymmetric_loss(z, dense(negative), **settings))
        count = (~marked).sum() + 0.3 * marked.sum()
        return {'none': value, 'sum': value.sum(), 'mean': value.sum() / count}[reduction]

    loss = AsymmetricLoss(**settings, ignore_index=-1, weight_unannotated=0.3, gamma_unannotated=gamma,
                          reduction=reduction)
    # Parameters are kept in float32.
    assert_close(with_grad(loss, logits, target, weight), with_grad(expected, logits), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('logits', [torch.linspace(-9, 9, 60), torch.tensor([-1e4, -200, -17.5, 0, 17, 200, 1e4] * 10)],
                         ids=['usual', 'extreme'])
@pytest.mark.parametrize('clip', [0, 0.05])
def test_unannotated_labels_between_ignored_and_negative(logits, partial, dtype, clip):
    target, negative, marked = partial
    logits = logits[:60].reshape(12, 5).to(dtype)
    ignored = AsymmetricLoss(clip=clip, ignore_index=-1)
    for reduction in ('none', 'mean', 'sum'):
        none = AsymmetricLoss(clip=clip, ignore_index=-1, weight_unannotated=0, reduction=reduction)
        assert_close(with_grad(none, logits, target),
                     with_grad(ignored, logits, target, reduction_override=reduction), rtol=0, atol=0)
    as_negatives = with_grad(AsymmetricLoss(clip=clip, reduction='none'), logits, negative)
    assert all(x.isfinite().all() for x in as_negatives)
    for gamma in (None, 4):
        full = AsymmetricLoss(clip=clip, ignore_index=-1, weight_unannotated=1, gamma_unannotated=gamma)
        assert_close(with_grad(full, logits, target, reduction_override='none'), as_negatives, rtol=0, atol=0)
        assert_close(full(logits, target), AsymmetricLoss(clip=clip)(logits, negative))
    half = with_grad(AsymmetricLoss(clip=clip, ignore_index=-1, weight_unannotated=0.5, reduction='none'), logits,
                     target)
    # Halving is exact but for the smallest numbers.
    for got, whole in zip(half, as_negatives):
        assert_close(got, torch.where(marked, whole / 2, whole), rtol=0, atol=torch.finfo(dtype).tiny)


def test_a_batch_without_annotations(logits):
    loss = AsymmetricLoss(ignore_index=-1, weight_unannotated=0.01)
    loss.probability_sums.enabled = True
    expected = with_grad(AsymmetricLoss(), logits, torch.zeros(12, 5))
    for target in (torch.full((12, 5), -1.), torch.full((12, ), -1)):
        assert_close(with_grad(loss, logits, target), expected)  # 0.6 elements
        p = logits.sigmoid()
        expected_sums = [torch.zeros(5), torch.zeros(5), 0.01 * (1 - p).sum(0), torch.full((5, ), 0.12)]
        assert_close(loss.probability_sums.total, torch.stack(expected_sums))
        loss.probability_sums.take()
    assert loss(logits[:0], torch.zeros(0, 5)) == 0


def test_unannotated_labels_are_a_share_of_the_negatives_in_the_gap(logits, partial):
    target, negative, marked = partial
    weight = (torch.arange(12) % 3 > 0).float()
    loss = AsymmetricLoss(ignore_index=-1, weight_unannotated=0.3, gamma_unannotated=7)
    loss.probability_sums.enabled = True
    loss(logits, target, weight)
    p, y = logits.sigmoid(), dense(negative)
    share = torch.where(marked, 0.3, 1.) * weight.unsqueeze(1)
    expected = torch.stack([(share * x).sum(0) for x in (y * p, y, (1 - y) * (1 - p), 1 - y)])
    assert_close(loss.probability_sums.total, expected)


def test_unannotated_labels_follow_the_gamma_of_negatives_or_keep_their_own(logits):
    unknown, zeros = torch.full((12, 5), -1.), torch.zeros(12, 5)
    torch._dynamo.reset()
    for own in (None, 7):
        loss = AsymmetricLoss(ignore_index=-1, weight_unannotated=1, gamma_unannotated=own)
        compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
        for gamma in (4., 3.99, 1.):
            loss.gamma_neg.fill_(gamma)
            assert_close(with_grad(compiled, logits, unknown),
                         with_grad(AsymmetricLoss(gamma_neg=own or gamma), logits, zeros))
    torch._dynamo.reset()
    assert not loss.state_dict() and 'gamma_unannotated=7.0' in repr(loss) and 'weight_unannotated=1' in repr(loss)
    loss.gamma_unannotated.zero_()
    loss.bfloat16().reset_parameters()
    assert loss.gamma_unannotated == 7 and loss.gamma_unannotated.dtype == torch.float32


def test_unannotated_labels_take_those_that_they_are_mixed_with(logits):
    """Why batches are not to be mixed: positives become negatives, where ignored labels do no harm."""
    target = torch.stack([torch.ones(5), torch.full((5, ), -1.)]).repeat(6, 1)
    torch.manual_seed(0)
    _, mixed = MultiLabelMixup(0.8)(torch.zeros(12, 3, 4, 4), target)
    lost = (mixed == -1) & (target == 1)
    assert lost.any()
    _, grad = with_grad(AsymmetricLoss(ignore_index=-1), logits, mixed)
    assert (grad[lost] == 0).all()
    _, grad = with_grad(AsymmetricLoss(ignore_index=-1, weight_unannotated=0.1, clip=0), logits, mixed)
    assert (grad[lost] > 0).all()


def test_activated_takes_probabilities(logits, labels):
    value, grad = with_grad(AsymmetricLoss(activated=True), logits.sigmoid(), labels)
    expected, expected_grad = with_grad(AsymmetricLoss(), logits, labels)
    assert_close(value, expected)
    assert_close(grad * logits.sigmoid() * (-logits).sigmoid(), expected_grad, rtol=1e-4, atol=1e-7)
    for p in (0., 1.):
        value, grad = with_grad(AsymmetricLoss(activated=True), torch.full((2, 5), p), torch.tensor([0, 5]))
        assert value.isfinite() and grad.isfinite().all()


def test_parameters_change_in_place_and_stay_float32(logits, target):
    loss = AsymmetricLoss()
    assert not loss.state_dict(), 'stock checkpoints must load strictly'
    loss.gamma_neg.fill_(2.01)
    loss.clip.zero_()
    assert_close(loss(logits, target), AsymmetricLoss(gamma_neg=2.01, clip=0)(logits, target))
    loss.bfloat16().half().double()
    assert loss.gamma_neg.dtype == torch.float32 and loss.gamma_neg.item() == pytest.approx(2.01)
    assert loss.to('meta').gamma_neg.is_meta and 'gamma_neg=meta' in repr(loss)


def test_one_value_per_class(logits, target, labels):
    values = [0., 1, 2, 3, 4]
    loss = AsymmetricLoss(gamma_neg=values, gamma_pos=values, clip=[0, .1, .2, .3, .4])
    for y in (target, labels):
        elements = loss(logits, y, reduction_override='none')
        for k in range(5):
            column = y[:, k:k + 1] if y.dim() == 2 else (y == k).float()[:, None]
            one = AsymmetricLoss(gamma_neg=values[k], gamma_pos=values[k], clip=k / 10, reduction='none')
            assert_close(elements[:, k:k + 1], one(logits[:, k:k + 1], column))
    with pytest.raises(ValueError, match=r'gamma_pos of shape \(5,\) does not fit logits of shape \(12, 3\)'):
        loss(logits[:, :3], target[:, :3])


@pytest.mark.parametrize('kwargs', [dict(class_weight=[1., 0, 3, 4, .5]), dict(pos_weight=[1., 0, 3, 4, .5]),
                                    dict(class_weight=[2., 1, 1, 0, 3], pos_weight=[1., 0, 3, 4, .5])], ids=str)
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_weights_by_class_are_those_of_mmpretrain(logits, target, kwargs, reduction):
    from mmpretrain.models.losses import CrossEntropyLoss
    ours = AsymmetricLoss(gamma_neg=0, clip=0, reduction=reduction, **kwargs)
    theirs = CrossEntropyLoss(use_sigmoid=True, reduction=reduction, **kwargs)
    rows = torch.linspace(0, 2, 12)
    assert_close(with_grad(ours, logits, target), with_grad(theirs, logits, target))
    assert_close(with_grad(ours, logits, target, rows), with_grad(theirs, logits, target, rows))


def test_weights_by_class_change_in_place_and_are_never_those_of_rows(logits, target):
    weight = torch.tensor([1., 2, 3, 4, 5])
    loss, plain = AsymmetricLoss(class_weight=weight, reduction='none'), AsymmetricLoss(reduction='none')
    square, y = logits[:5], target[:5]
    assert_close(loss(square, y), plain(square, y, weight[None]))
    assert_close(loss(square, y, weight), plain(square, y, weight[None] * weight[:, None]))
    loss.class_weight.fill_(2)
    assert_close(loss(logits, target), 2 * plain(logits, target))
    loss.reset_parameters()
    assert loss.half().class_weight.tolist() == weight.tolist() and not loss.state_dict()
    assert 'class_weight=[1.0, 2.0, 3.0, 4.0, 5.0]' in repr(loss)
    for name in ('alpha', 'class_weight', 'pos_weight'):
        with pytest.raises(ValueError, match=rf'{name} of shape \(3,\) does not fit logits of shape \(12, 5\)'):
            AsymmetricLoss(**{name: [0.1, 0.2, 0.3]})(logits, target)


def test_repr_shows_what_was_set():
    shown = repr(AsymmetricLoss(gamma_neg=[1, 2.5]))
    assert shown.startswith('AsymmetricLoss(gamma_pos=0.0, gamma_neg=[1.0, 2.5], clip=0.05,')


@pytest.mark.parametrize('form', ['dense', 'labels'])
@pytest.mark.parametrize('track', [False, True])
def test_compiled_module_follows_a_hook(logits, target, labels, form, track):
    target = dict(dense=target, labels=labels)[form]
    torch._dynamo.reset()
    loss = AsymmetricLoss()
    loss.probability_sums.enabled = track
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    for step, gamma in enumerate((4., 3.99, 1., 0.)):
        loss.gamma_neg.fill_(gamma)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert_close(with_grad(compiled, logits, target, avg_factor=12),
                         with_grad(AsymmetricLoss(gamma_neg=gamma), logits, target, avg_factor=12))
        if track:
            assert_close(loss.probability_sums.total, asymmetric_loss(logits, target, return_sums=True)[1])
            loss.probability_sums.take()
    torch._dynamo.reset()


def test_tracked_sums_add_up_over_calls_in_training(logits, target, labels):
    loss = AsymmetricLoss(ignore_index=3)
    loss(logits, labels)
    assert loss.probability_sums.total is None, 'nobody asked'
    loss.probability_sums.enabled = True
    loss(logits, target, avg_factor=4)
    first = loss.probability_sums.total.clone()
    assert_close(first, asymmetric_loss(logits, target, return_sums=True)[1])
    loss(logits, labels, torch.arange(12) % 2, reduction_override='none')
    assert_close(loss.probability_sums.total - first, asymmetric_loss(
        logits, labels, ignore_index=3, weight=(torch.arange(12) % 2).unsqueeze(1), return_sums=True)[1])
    before = loss.probability_sums.total
    loss.eval()(logits, labels)
    with torch.no_grad():
        loss.train()(logits, labels)
    assert loss.probability_sums.total is before, 'neither evaluation nor assignment may count'


def test_a_loss_weight_of_0_keeps_the_sums(logits, target):
    losses = AsymmetricLoss(loss_weight=0., weight_unannotated=0.5, ignore_index=-1), AsymmetricLoss(
        weight_unannotated=0.5, ignore_index=-1)
    for loss in losses:
        loss.probability_sums.enabled = True
        value, grad = with_grad(loss, logits, target, avg_factor=4)
        assert (value == 0 and (grad == 0).all()) == (loss is losses[0])
    assert_close(losses[0].probability_sums.total, losses[1].probability_sums.total)
    assert_close(losses[0].probability_sums.loss, losses[1].probability_sums.loss)


def test_half_precision_counts_beyond_its_integers():
    """float16 ends at 65504 and bfloat16 counts to 256: the sums are float32."""
    loss = AsymmetricLoss()
    loss.probability_sums.enabled = True
    for dtype in (torch.float16, torch.bfloat16):
        loss(torch.zeros(70000, 1, dtype=dtype), torch.ones(70000, 1, dtype=dtype))
        assert loss.probability_sums.total.flatten().tolist() == [35000, 70000, 0, 0]
        loss.probability_sums.take()


def test_reset_parameters_undoes_a_controller():
    loss = AsymmetricLoss(gamma_neg=3, clip=[0.1, 0.2])
    loss.gamma_neg.fill_(7)
    loss.clip.zero_()
    loss.reset_parameters()
    assert loss.gamma_neg == 3
    assert_close(loss.clip, torch.tensor([0.1, 0.2]))
    loss.gamma_neg = torch.full((2, ), 7.)  # one a class
    loss.reset_parameters()
    loss.gamma_neg += 1
    assert loss.gamma_neg.shape == () and loss.gamma_neg == 4
    loss.reset_parameters()
    assert loss.gamma_neg == 3
    with torch.device('meta'):
        model = torch.nn.ModuleList([AsymmetricLoss(gamma_neg=2.5)])
    model.to_empty(device='cpu')[0].reset_parameters()
    assert model[0].gamma_neg == 2.5


def test_no_margin_is_none_too():
    """As MMPretrain's AsymmetricLoss has it."""
    logits, target = torch.randn(4, 3), torch.eye(4, 3)
    assert_close(AsymmetricLoss(clip=None)(logits, target), AsymmetricLoss(clip=0.)(logits, target))


@pytest.mark.parametrize('kwargs, message', [
    (dict(gamma_neg=-1), r'gamma_neg=-1 must be a number in \[0, inf\)'),
    (dict(gamma_pos=float('nan')), 'gamma_pos=nan'),
    (dict(gamma_pos=[[1.]]), r'gamma_pos=\[\[1.0\]\]'),
    (dict(gamma_neg=[]), 'gamma_neg=.*one such number per class'),
    (dict(gamma_neg=None), 'gamma_neg=None: give numbers, 0 for no focusing'),
    (dict(clip=1.), r'clip=1.0 must be a number in \[0, 1\)'),
    (dict(alpha=1.5), r'alpha=1.5 must be a number in \[0, 1\]'),
    (dict(alpha=[0.5, -1]), r'alpha=\[0.5, -1\] must be a number in \[0, 1\], or one such number per class'),
    (dict(class_weight=[1, -1]), r'class_weight=\[1, -1\] must be a number in \[0, inf\)'),
    (dict(pos_weight=float('inf')), 'pos_weight=inf must be'),
    (dict(use_sigmoid=False), 'set use_sigmoid=True'),
    (dict(soft_label='iou'), r"soft_label='iou' must be one of \('mixture', 'qfl', 'vfl', 'mal'\)"),
    (dict(reduction='batchmean'), "reduction='batchmean' must be one of"),
    (dict(loss_weight=float('inf')), 'loss_weight=inf'),
    (dict(loss_weight=[1., 2.]), r'loss_weight=\[1.0, 2.0\] must be a number'),
    (dict(gamma_neg='four'), 'gamma_neg=four must be a number'),
    (dict(alpha=[[1.], [1., 2.]]), r'alpha=\[\[1.0\], \[1.0, 2.0\]\] must be a number'),
    (dict(ignore_index=-1, weight_unannotated=-1), r'weight_unannotated=-1 must be a number in \[0, inf\)'),
    (dict(weight_unannotated=0.1), 'weight_unannotated=0.1 is that of labels marked by ignore_index: set that too'),
    (dict(ignore_index=-1, gamma_unannotated=7), 'gamma_unannotated=7 has no effect .*: set weight_unannotated too'),
    (dict(ignore_index=-1, weight_unannotated=1, gamma_unannotated=-7), 'gamma_unannotated=-7 must be a number'),
], ids=str)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricLoss(**kwargs)


def test_bad_calls(logits, target):
    loss = AsymmetricLoss()
    with pytest.raises(ValueError, match=r'weight of shape \(4,\) does not fit predictions of shape \(12, 5\)'):
        loss(logits, target, torch.ones(4))
    with pytest.raises(ValueError, match=r'avg_factor of shape \(2,\)'):
        loss(logits, target, avg_factor=torch.ones(2))
    with pytest.raises(ValueError, match="reduction_override='max'"):
        loss(logits, target, reduction_override='max')


def train_on(loss, batches):
    for batch in batches:
        loss(batch, torch.zeros_like(batch))


def test_a_second_sigmoid_is_noticed_once():
    batches = [torch.rand(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(25)]
    loss = AsymmetricLoss()
    with pytest.warns(UserWarning, match='all logits of the first 10 training calls are from 0.0.* to 0.9.*: '
                      'AsymmetricLoss applies the sigmoid itself') as found:
        train_on(loss, batches + batches)
    assert len(found) == 1 and copy.deepcopy(loss)(batches[0], batches[0]).isfinite()


@pytest.mark.parametrize('kwargs, change, training', [
    ({}, lambda x: x - 0.1, True), ({}, lambda x: 3 * x, True), ({}, torch.zeros_like, True), ({}, lambda x: x, False),
    (dict(activated=True), lambda x: x, True)], ids=['below', 'above', 'zeros', 'evaluation', 'activated'])
def test_other_logits_are_not_noticed(kwargs, change, training, recwarn):
    batches = [change(torch.rand(4, 3, generator=torch.Generator().manual_seed(n))) for n in range(25)]
    train_on(AsymmetricLoss(**kwargs).train(training), batches)
    assert not recwarn.list
