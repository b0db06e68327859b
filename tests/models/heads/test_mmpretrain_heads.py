"""Stock MMPretrain heads, from their stock configs, train with ``mmasl.AsymmetricLoss`` swapped in by config alone.

To be fast, the models have no pre-trained weights, ResNet-18 for the deeper backbones, and small images.
"""
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.losses import AsymmetricLoss as MMPretrainAsymmetricLoss
from mmpretrain.structures import DataSample

from mmasl import AsymmetricLoss
from mmasl.ops import reference

RESNET18 = {'model.backbone.depth': 18, 'model.backbone.init_cfg': None, 'model.head.in_channels': 512}
# This head has no parameters: the stock backbone, VGG-16, ends in the classifier.
RESNET18_CLASSIFIER = {
    'model.backbone': dict(_delete_=True, type='ResNet', depth=18, num_stages=4, out_indices=(3, )),
    'model.neck': dict(_delete_=True, type='LinearNeck', in_channels=512, out_channels=20, gap_dim=2, norm_cfg=None),
}
# head: (stock config, number of classes, further options)
HEADS = {
    'MultiLabelClsHead': ('vgg/vgg16_8xb16_voc', 20, RESNET18_CLASSIFIER),
    'MultiLabelLinearClsHead': ('resnet/resnet50_8xb32-mixup_in1k', 1000, RESNET18),
    'CSRAClsHead': ('csra/resnet101-csra_1xb16_voc07-448px', 20, RESNET18),
    'LinearClsHead': ('resnet/resnet18_8xb32_in1k', 1000, RESNET18),
}
SIGMOID_HEADS = ('MultiLabelClsHead', 'CSRAClsHead')
BATCH = 4
CROSS_ENTROPY = dict(gamma_pos=0., gamma_neg=0., clip=0.)


def build(head, **loss):
    """The stock model in training mode, with the asymmetric loss of these parameters if any are given."""
    model = build_once(head, tuple(loss.items()))
    model.zero_grad()
    return model.train()


@cache
def build_once(head, loss):
    path, _, options = HEADS[head]
    cfg = get_config(f'mmpretrain::{path}.py')
    cfg.merge_from_dict(options)
    if loss:
        loss = dict(_delete_=True, type='mmasl.AsymmetricLoss', use_sigmoid=True) | dict(loss)
        cfg.merge_from_dict({'model.head.loss': loss})
    # As the Runner does.
    cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    assert type(model.head).__name__ == head
    return model


def samples(head, form):
    """Annotations of a batch: lists of labels, or one score a class."""
    num_classes = HEADS[head][1]
    if form == 'labels':
        labels = (3, 0, 7, num_classes - 1) if head == 'LinearClsHead' else ([3], [0, 7], [2, 5, num_classes - 1], [])
        return [DataSample().set_gt_label(label) for label in labels]
    rng = torch.Generator().manual_seed(0)
    if form == 'soft':
        scores = torch.rand(BATCH, num_classes, generator=rng)
    else:
        low = dict(scores=0, ignored=-1)[form]
        scores = torch.randint(low, 2, (BATCH, num_classes), generator=rng)
    return [DataSample().set_gt_score(score) for score in scores]


def batch(model, data_samples, augment=True):
    rng = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 64, 64), generator=rng, dtype=torch.uint8) for _ in data_samples]
    return model.data_preprocessor(dict(inputs=images, data_samples=data_samples), training=augment)


def step(model, data_samples, augment=True):
    """One forward and backward pass; returns the loss, and what the loss module got as pred and target."""
    calls = []

    def record(module, args):
        args[0].retain_grad()
        calls.append(args)

    hook = model.head.loss_module.register_forward_pre_hook(record)
    torch.manual_seed(1)
    loss, _ = model.parse_losses(model(**batch(model, data_samples, augment), mode='loss'))
    loss.backward()
    hook.remove()
    (pred, target), = calls
    return loss, pred, target


def dense(pred, target):
    return target if target.dim() == 2 else F.one_hot(target, pred.shape[-1])


@pytest.mark.parametrize('head, form', [(head, form) for head in HEADS for form in ('labels', 'scores', 'soft')])
def test_training_step(head, form):
    """The official sum over the elements, divided by the batch size that heads give as ``avg_factor``."""
    model = build(head, gamma_pos=0., gamma_neg=4., clip=0.05)
    assert isinstance(model.head.loss_module, AsymmetricLoss)
    loss, pred, target = step(model, samples(head, form))
    expected = reference.asymmetric_loss(pred, dense(pred, target), gamma_pos=0., gamma_neg=4., clip=0.05).sum() / BATCH
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=0)
    assert pred.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('head', HEADS)
def test_ignored_labels(head):
    model = build(head, gamma_pos=0., gamma_neg=4., clip=0.05, ignore_index=-1)
    # Labels cannot be both ignored and mixed: the stock config of MultiLabelLinearClsHead has Mixup.
    loss, pred, target = step(model, samples(head, 'ignored'), augment=False)
    known = target != -1
    expected = reference.asymmetric_loss(pred, target.clamp(min=0), gamma_pos=0., gamma_neg=4., clip=0.05)
    expected = expected[known].sum() / BATCH
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=0)
    assert not pred.grad[~known].any() and pred.grad[known].any()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('head', HEADS)
def test_unknown_labels_need_ignore_index(head):
    model = build(head, gamma_pos=0., gamma_neg=4., clip=0.05)
    with pytest.raises(ValueError, match='target -1.* is out of range.*ignore_index'):
        step(model, samples(head, 'ignored'), augment=False)


@pytest.mark.parametrize('head', HEADS)
def test_sum_is_official(head):
    loss, pred, target = step(build(head, gamma_pos=0., reduction='sum'), samples(head, 'scores'))
    expected = reference.asymmetric_loss(pred, target, gamma_pos=0., gamma_neg=4., clip=0.05).sum()
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=0)


@pytest.mark.parametrize('form', ['labels', 'scores', 'soft'])
@pytest.mark.parametrize('head', HEADS)
def test_without_focusing_is_cross_entropy(head, form):
    loss, pred, target = step(build(head, **CROSS_ENTROPY), samples(head, form))
    logits = pred.detach().double().requires_grad_()
    expected = F.binary_cross_entropy_with_logits(logits, dense(pred, target).double(), reduction='sum') / BATCH
    expected.backward()
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=0)
    # Where p is close to a soft y, p - y has the rounding of p.
    torch.testing.assert_close(pred.grad, logits.grad, check_dtype=False, rtol=1e-5, atol=2**-24 / BATCH)


@pytest.mark.parametrize('head', SIGMOID_HEADS)
def test_equals_stock_loss(head):
    stock, model = build(head), build(head, **CROSS_ENTROPY)
    model.load_state_dict(stock.state_dict(), strict=True)
    expected, expected_pred, _ = step(stock, samples(head, 'labels'))
    loss, pred, _ = step(model, samples(head, 'labels'))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pred.grad, expected_pred.grad, rtol=1e-5, atol=1e-8)


def test_integer_labels_equal_one_hot_scores():
    """Single-label classification: LinearClsHead hands labels over as (B,) integers, or as scores after Mixup."""
    head = 'LinearClsHead'
    model = build(head, gamma_pos=0., gamma_neg=4., clip=0.05)
    labels = samples(head, 'labels')
    one_hot = [DataSample().set_gt_score(F.one_hot(sample.gt_label[0], HEADS[head][1]).float()) for sample in labels]
    loss, pred, target = step(model, labels)
    expected, expected_pred, expected_target = step(model, one_hot)
    assert target.dim() == 1 and expected_target.dim() == 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pred.grad, expected_pred.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('head', HEADS)
def test_stock_checkpoints_load_and_predict_the_same(head):
    stock, model = build(head).eval(), build(head, gamma_neg=4.).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    with torch.no_grad():
        expected = stock(**batch(stock, samples(head, 'labels'), augment=False), mode='predict')
        actual = model(**batch(model, samples(head, 'labels'), augment=False), mode='predict')
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.pred_score, b.pred_score, rtol=0, atol=0)
        torch.testing.assert_close(a.pred_label, b.pred_label)


@pytest.mark.parametrize('head', HEADS)
def test_softmax_is_refused(head):
    with pytest.raises(ValueError, match='use_sigmoid=False'):
        build(head, use_sigmoid=False)


def test_bare_name_is_not_ours():
    """MMPretrain has a class of the same name, and takes it without a warning."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert type(MODELS.build(dict(type='mmasl.AsymmetricLoss'))) is AsymmetricLoss
        assert type(MODELS.build(dict(type='AsymmetricLoss'))) is MMPretrainAsymmetricLoss
