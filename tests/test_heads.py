"""MMPretrain's multi-label heads with calibrated predictions, built from configs beside the stock ones."""
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import heads as stock_heads
from mmpretrain.structures import DataSample
from torch.testing import assert_close

from mmasl.heads.multi_label import calibration_settings
from mmasl.ops import inverse_posterior, posterior

LINEAR = dict(num_classes=6, in_channels=8)
HEADS = {
    'MultiLabelClsHead': {}, 'MultiLabelLinearClsHead': LINEAR, 'CSRAClsHead': dict(num_heads=2, lam=0.1, **LINEAR)}
every_head = pytest.mark.parametrize('name', HEADS)
ASL = dict(type='mmasl.AsymmetricLoss', gamma_pos=0., gamma_neg=4., clip=0.05)


def build(name, scope='mmasl.', loss=ASL, **kwargs):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        head = MODELS.build(dict(type=f'{scope}{name}', loss=loss, **HEADS[name], **kwargs))
    head.init_weights()
    return head


def features(name):
    """Of 5 images; the head without parameters takes logits."""
    shape = dict(MultiLabelClsHead=(5, 6), MultiLabelLinearClsHead=(5, 8), CSRAClsHead=(5, 8, 3, 3))[name]
    return (5 * torch.randn(shape, generator=torch.Generator().manual_seed(1)), )


@every_head
@torch.no_grad()
def test_raw_scores_are_stock_and_decisions_calibrated(name):
    head, stock = build(name), build(name, '')
    assert type(stock) is getattr(stock_heads, name) and isinstance(head, type(stock))
    stock.load_state_dict(head.state_dict(), strict=True)
    logits = 5 * torch.randn(5, 6)
    for actual, expected, z in zip(head._get_predictions(logits, None), stock._get_predictions(logits, None), logits):
        assert_close(actual.pred_score, expected.pred_score, rtol=0, atol=0)
        assert_close(actual.calibrated_score, posterior(z, 4., 0.05), rtol=0, atol=0)
        # The derived threshold of p: posterior 1/2 is at p = 0.684.
        assert actual.pred_label.tolist() == (z > inverse_posterior(0.5, 4., 0.05)).nonzero()[:, 0].tolist()
    for actual, expected in zip(head.predict(features(name)), stock.predict(features(name))):
        assert_close(actual.pred_score, expected.pred_score, rtol=0, atol=0)
        assert actual.calibrated_score.shape == (6, )


def test_between_the_two_thresholds():
    """0.6 is positive for the stock head, and less likely than not."""
    logits = torch.tensor([[0.6, 0.7, 0.04]]).logit()
    labels = {scope: build('MultiLabelClsHead', scope)._get_predictions(logits, None)[0].pred_label.tolist()
              for scope in ('', 'mmasl.')}
    assert labels == {'': [0, 1], 'mmasl.': [1]}


@every_head
def test_given_samples_are_filled(name):
    samples = [DataSample(metainfo=dict(img_path=f'{n}.jpg')).set_gt_label([n]) for n in range(5)]
    predicted = build(name).predict(features(name), samples)
    assert all(a is b for a, b in zip(predicted, samples, strict=True))
    assert predicted[3].img_path == '3.jpg' and predicted[3].gt_label.tolist() == [3]
    assert set(predicted[3].to_dict()) >= {'pred_score', 'calibrated_score', 'pred_label', 'gt_label'}


def test_follows_the_loss_as_it_changes():
    """As adaptive asymmetry changes it; and by class, weight and gradient form."""
    logits = torch.linspace(-3, 3, 12).view(2, 6)
    head = build('MultiLabelClsHead', loss=ASL | dict(alpha=0.3, detach_focusing=True, gamma_pos=0.5))
    for gamma_neg in (4., 1.):
        head.loss_module.gamma_neg.fill_(gamma_neg)
        expected = posterior(logits, gamma_neg, 0.05, True, 0.5, 0.3)
        for sample, row in zip(head._get_predictions(logits, None), expected):
            assert_close(sample.calibrated_score, row, rtol=0, atol=0)
    head = build('MultiLabelClsHead', loss=ASL | dict(gamma_neg=[0., 1., 2., 3., 4., 5.]))
    got = torch.stack([sample.calibrated_score for sample in head._get_predictions(logits, None)])
    assert_close(got, torch.stack([posterior(z, float(g), 0.05) for g, z in enumerate(logits.T)], 1), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    head = build('MultiLabelLinearClsHead').to(dtype)
    sample = head.predict((features('MultiLabelLinearClsHead')[0].to(dtype), ))[0]
    assert (sample.pred_score.dtype, sample.calibrated_score.dtype) == (dtype, torch.float32)
    logits = head((features('MultiLabelLinearClsHead')[0].to(dtype), ))[0]
    assert_close(sample.calibrated_score, posterior(logits.float(), 4., 0.05), rtol=0, atol=0)


@torch.no_grad()
def test_thr_is_of_the_posterior_and_topk_as_stock():
    logits = torch.randn(4, 6)
    for sample, z in zip(build('MultiLabelClsHead', thr=0.2)._get_predictions(logits, None), logits):
        assert sample.pred_label.tolist() == (posterior(z, 4., 0.05) > 0.2).nonzero()[:, 0].tolist()
    for sample, z in zip(build('MultiLabelClsHead', topk=2)._get_predictions(logits, None), logits):
        assert sample.pred_label.tolist() == z.topk(2).indices.tolist()


@every_head
def test_trains_as_stock(name):
    samples = [DataSample().set_gt_label([n]) for n in range(5)]
    ours, stock = (build(name, scope).loss(features(name), samples) for scope in ('mmasl.', ''))
    assert_close(ours, stock, rtol=0, atol=0)


@every_head
@pytest.mark.parametrize('loss', [dict(type='CrossEntropyLoss', use_sigmoid=True), dict(type='AsymmetricLoss')],
                         ids=lambda loss: loss['type'])
def test_other_losses_are_refused(name, loss):
    with pytest.raises(TypeError, match=f"mmpretrain.*{loss['type']} has no posterior .*type='mmasl.AsymmetricLoss'"):
        build(name, loss=loss)


def test_thresholds_out_of_reach_are_refused():
    with pytest.raises(ValueError, match=r'thr=0.97 is never exceeded: with clip=0.05\d* .* stays below 0.964'):
        build('MultiLabelClsHead', thr=0.97)
    with pytest.raises(ValueError, match='alpha=1.0 leaves one kind of label without weight'):
        build('MultiLabelClsHead', loss=ASL | dict(alpha=1.))
    build('MultiLabelClsHead', thr=0.97, loss=ASL | dict(clip=0.))


def test_settings_are_the_loss_own():
    loss = build('MultiLabelClsHead').loss_module
    settings = calibration_settings(loss)
    assert settings['gamma_neg'] is loss.gamma_neg and settings['detach_focusing'] is False
