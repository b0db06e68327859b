"""MMPretrain's multi-label heads with calibrated predictions, built from configs beside the stock ones."""
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import heads as stock_heads
from mmpretrain.structures import DataSample
from torch.testing import assert_close

from mmasl.errors import ConfigError
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior, posterior_threshold

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
    calibrated = posterior(logits, gamma_neg=4., clip=0.05)
    positive = logits > posterior_threshold(0.5, gamma_neg=4., clip=0.05)  # at p = 0.684
    for n, (actual, expected) in enumerate(zip(head._get_predictions(logits, None),
                                               stock._get_predictions(logits, None), strict=True)):
        assert_close(actual.pred_score, expected.pred_score, rtol=0, atol=0)
        assert_close(actual.calibrated_score, calibrated[n], rtol=0, atol=0)
        assert actual.pred_label.tolist() == positive[n].nonzero()[:, 0].tolist()
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
@torch.no_grad()
def test_thresholds_of_a_checkpoint_decide_and_a_training_drops_them(name):
    """They select by p, also below the margin, and at their value; without them the state dict is the stock one."""
    head = build(name, thr=0.3)
    before, stock = head.predict(features(name)), head.state_dict()
    assert 'thresholds' not in stock
    thresholds = before[0].pred_score * torch.tensor([1, 0.5, 1.5, 1, 0.9, 2])
    model = torch.nn.ModuleDict(dict(head=head))
    model.load_state_dict({f'head.{key}': value for key, value in (stock | dict(thresholds=thresholds)).items()})
    assert torch.equal(head.state_dict()['thresholds'], thresholds)
    for sample in head.eval().predict(features(name)):
        assert sample.pred_label.tolist() == (sample.pred_score >= thresholds).nonzero()[:, 0].tolist()
    assert [0, 1, 3, 4] == head.predict(features(name))[0].pred_label.tolist()
    head.train()
    assert head.thresholds is None and list(head.state_dict()) == list(stock)
    model.load_state_dict({f'head.{key}': value for key, value in (stock | dict(thresholds=thresholds)).items()})
    model.load_state_dict({f'head.{key}': value for key, value in stock.items()})
    assert [x.pred_label.tolist() for x in head.predict(features(name))] == [x.pred_label.tolist() for x in before]


def test_thresholds_of_a_head_with_another_loss():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        head = MODELS.build(dict(type='mmasl.Query2LabelHead', num_classes=3, in_channels=4, embed_dims=8, num_heads=2,
                                 feedforward_channels=16))
    head.load_state_dict(head.state_dict() | dict(thresholds=torch.tensor([0., 1., 0.])))
    assert [x.pred_label.tolist() for x in head.eval()._get_predictions(torch.zeros(2, 3), None)] == [[0, 2]] * 2


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
        expected = posterior(logits, gamma_pos=0.5, gamma_neg=gamma_neg, clip=0.05, alpha=0.3, detach_focusing=True)
        for sample, row in zip(head._get_predictions(logits, None), expected):
            assert_close(sample.calibrated_score, row, rtol=0, atol=0)
    head = build('MultiLabelClsHead', loss=ASL | dict(gamma_neg=[0., 1., 2., 3., 4., 5.]))
    got = torch.stack([sample.calibrated_score for sample in head._get_predictions(logits, None)])
    expected = torch.stack([posterior(z, gamma_neg=float(g), clip=0.05) for g, z in enumerate(logits.T)], 1)
    assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    head = build('MultiLabelLinearClsHead').to(dtype)
    sample = head.predict((features('MultiLabelLinearClsHead')[0].to(dtype), ))[0]
    assert (sample.pred_score.dtype, sample.calibrated_score.dtype) == (dtype, torch.float32)
    logits = head((features('MultiLabelLinearClsHead')[0].to(dtype), ))
    expected = posterior(logits.float(), gamma_neg=4., clip=0.05)[0]
    assert_close(sample.calibrated_score, expected, rtol=0, atol=0)


@torch.no_grad()
def test_thr_is_of_the_posterior_and_topk_as_stock():
    logits = torch.randn(4, 6)
    for sample, z in zip(build('MultiLabelClsHead', thr=0.2)._get_predictions(logits, None), logits):
        assert sample.pred_label.tolist() == (posterior(z, gamma_neg=4., clip=0.05) > 0.2).nonzero()[:, 0].tolist()
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
    with pytest.raises(ConfigError, match=f"mmpretrain.*{loss['type']} has no posterior .*type='mmasl.AsymmetricLoss'"):
        build(name, loss=loss)


def test_thresholds_out_of_reach_are_refused():
    with pytest.raises(ConfigError, match=r'thr=0.97 is never exceeded: with clip=0.05\d* .* stays below 0.964'):
        build('MultiLabelClsHead', thr=0.97)
    with pytest.raises(ValueError, match='alpha=1.0 leaves one kind of label without weight'):
        build('MultiLabelClsHead', loss=ASL | dict(alpha=1.))
    build('MultiLabelClsHead', thr=0.97, loss=ASL | dict(clip=0.))


def test_settings_are_the_loss_own():
    loss = build('MultiLabelClsHead').loss_module
    settings = calibration_settings(loss)
    assert settings['gamma_neg'] is loss.gamma_neg and settings['detach_focusing'] is False


def samples_of(labels):
    return [DataSample().set_gt_label(label) for label in labels]


LABELS = [[0, 5], [], [3], [1, 2, 4], [5]]
CHUNKED = {
    'sum': dict(reduction='sum'), 'mean': dict(), 'loss_weight': dict(loss_weight=0.3),
    'no weight': dict(loss_weight=0), 'alpha': dict(alpha=0.3),
    'per-class': dict(gamma_neg=[0., 1., 2., 3., 4., 5.]), 'detached': dict(detach_focusing=True)}


@pytest.mark.parametrize('setting', CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize('chunk_size', [1, 4, 100])
@pytest.mark.parametrize('labels', ['gt_label', 'gt_score'])
def test_chunked_head_trains_as_the_whole_one(setting, chunk_size, labels):
    samples = samples_of(LABELS)
    if labels == 'gt_score':
        generator = torch.Generator().manual_seed(2)
        samples = [DataSample().set_gt_score(torch.rand(6, generator=generator)) for _ in LABELS]
        samples[2].gt_score[1] = -1
        setting = setting | dict(ignore_index=-1)
    results = []
    for kwargs in (dict(), dict(chunk_size=chunk_size)):
        head = build('MultiLabelLinearClsHead', loss=ASL | setting, **kwargs).double()
        head.loss_module.probability_sums.enabled = True
        feats = features('MultiLabelLinearClsHead')[0].double().requires_grad_()
        for _ in range(2):  # calls add up
            losses = head.loss((feats, ), samples)
            losses['loss'].backward()
        results.append((losses, feats.grad, dict(head.named_parameters()), head.fc.weight.grad, head.fc.bias.grad,
                        head.loss_module.probability_sums.total))
        with torch.no_grad():
            head.loss((feats, ), samples)
        assert_close(head.loss_module.probability_sums.total, results[-1][-1], rtol=0, atol=0)
    assert_close(*results, rtol=1e-12, atol=1e-12)
    assert (results[1][0]['loss'] != 0) == bool(setting.get('loss_weight', True))


def test_chunked_head_never_calls_its_layer(monkeypatch):
    """And predicts and is saved as the whole one."""
    head, whole = build('MultiLabelLinearClsHead', chunk_size=4), build('MultiLabelLinearClsHead')
    whole.load_state_dict(head.state_dict(), strict=True)
    feats = features('MultiLabelLinearClsHead')
    for actual, expected in zip(head.predict(feats), whole.predict(feats)):
        assert_close(actual.pred_score, expected.pred_score, rtol=0, atol=0)
        assert_close(actual.calibrated_score, expected.calibrated_score, rtol=0, atol=0)
    for module in (head, whole):
        monkeypatch.setattr(module.fc, 'forward', lambda _: pytest.fail('the logits were made'))
    head.loss(feats, samples_of(LABELS))
    with pytest.raises(pytest.fail.Exception, match='the logits'):
        whole.loss(feats, samples_of(LABELS))


def test_chunked_head_follows_the_loss_as_it_changes():
    head, whole = build('MultiLabelLinearClsHead', chunk_size=4), build('MultiLabelLinearClsHead')
    for gamma_neg in (4., 1.):
        for module in (head, whole):
            module.loss_module.gamma_neg.fill_(gamma_neg)
        feats = features('MultiLabelLinearClsHead')
        assert_close(head.loss(feats, samples_of(LABELS)), whole.loss(feats, samples_of(LABELS)))


@pytest.mark.parametrize('chunk_size, loss, message', [
    (0, ASL, 'chunk_size=0 is out of range'),
    (4, ASL | dict(reduction='none'), "chunk_size=4 excludes reduction='none'"),
    (4, ASL | dict(activated=True), 'chunk_size=4 excludes .*activated=True'),
    (4, dict(type='CrossEntropyLoss', use_sigmoid=True), "CrossEntropyLoss .*type='mmasl.AsymmetricLoss'"),
    (4, ASL | dict(ignore_index=-1, weight_unannotated=0.1),
     'chunk_size=4 excludes weight_unannotated=0.1'),
    (None, ASL | dict(ignore_index=-1, weight_unannotated=1, gamma_unannotated=7),
     'gamma_unannotated=7.0 has no posterior in closed form'),
    (None, ASL | dict(soft_label='qfl'), "soft_label='qfl' has no posterior in closed form, since scores are trained"),
], ids=['size', 'none', 'activated', 'cross-entropy', 'unannotated', 'own gamma', 'quality'])
def test_what_cannot_be_chunked_is_refused(chunk_size, loss, message):
    with pytest.raises(ConfigError, match=message):
        build('MultiLabelLinearClsHead', loss=loss, chunk_size=chunk_size)


def test_chunked_head_names_bad_labels_and_arguments():
    head, feats = build('MultiLabelLinearClsHead', chunk_size=4), features('MultiLabelLinearClsHead')
    with pytest.raises(ValueError, match=r'class 6 at \[1\] is out of range, which is 0 to 5'):
        head.loss(feats, samples_of([[0], [6], [], [], []]))
    with pytest.raises(TypeError, match='With chunk_size=4 the loss does not accept weight'):
        head.loss(feats, samples_of(LABELS), weight=torch.ones(5))


def test_chunked_head_in_ddp():
    """Its gradients pass through DDP's hooks as any: here one that doubles them."""
    def hook(_, bucket):
        future = torch.futures.Future()
        future.set_result(2 * bucket.buffer())
        return future

    class Model(torch.nn.Module):

        def __init__(self, **kwargs):
            super().__init__()
            self.head = build('MultiLabelLinearClsHead', **kwargs)

        def forward(self, feats):
            return self.head.loss(feats, samples_of(LABELS))['loss']

    alone = Model()
    alone(features('MultiLabelLinearClsHead')).backward()
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Model(chunk_size=4))
        model.register_comm_hook(None, hook)
        model(features('MultiLabelLinearClsHead')).backward()
    finally:
        torch.distributed.destroy_process_group()
    for ours, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(ours.grad, 2 * expected.grad)
