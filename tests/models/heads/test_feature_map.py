"""What the heads on a feature map have in common, each built from a config: MMPretrain's conventions, losses with and
without a posterior, training, export, label embeddings, and errors."""
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.structures import DataSample
from torch import nn
from torch.testing import assert_close

from mmasl.errors import ConfigError, DataError
from mmasl.models.heads.feature_map_head import GroupLinear, attention_layer
from mmasl.models.heads.label_embeddings import load_label_embeddings
from mmasl.ops import posterior

SMALL = dict(embed_dims=16, feedforward_channels=32, num_heads=4)
CONFIGS = Path(__file__).parents[3] / 'configs'
WORDS = np.random.default_rng(0).normal(size=(6, 5)).tolist()
HEADS = dict(
    groups=dict(type='mmasl.MLDecoderHead', num_groups=4, **SMALL),
    learnable=dict(type='mmasl.MLDecoderHead', learnable_queries=True, **SMALL),
    zero_shot=dict(type='mmasl.MLDecoderHead', label_embeddings=WORDS, **SMALL),
    query2label=dict(type='mmasl.Query2LabelHead', **SMALL),
    self_attention=dict(type='mmasl.Query2LabelHead', self_attention=True, **SMALL),
    label_graph=dict(type='mmasl.LabelGraphHead', graph='graph.npz', hidden_channels=16))
every_head = pytest.mark.parametrize('name', HEADS)
# The others share their code, and are slow.
one_head_of_each_class = pytest.mark.parametrize('name', [
    name if name in ('groups', 'query2label', 'label_graph') else pytest.param(name, marks=pytest.mark.slow)
    for name in HEADS])
ASL = dict(type='mmasl.AsymmetricLoss', gamma_pos=0., gamma_neg=4., clip=0.05)
STOCK = dict(bce=dict(type='CrossEntropyLoss', use_sigmoid=True), focal=dict(type='FocalLoss'),
             stock_asl=dict(type='AsymmetricLoss'))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = (torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) < 0.5).long().numpy()
    np.savez('graph.npz', classes=np.array(list('abcdef')), cooccurrence=labels.T @ labels)
    return tmp_path


def build(name, **kwargs):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(num_classes=6, in_channels=8) | HEADS[name] | kwargs)


def features(batch=5, height=3, width=4):
    return 2 * torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(1))


def samples():
    return [DataSample(metainfo=dict(img_path=f'{n}.jpg')).set_gt_label([n]) for n in range(5)]


@every_head
def test_conventions(name):
    head = build(name).eval()
    assert isinstance(head, MultiLabelClsHead) and (head.num_classes, head.in_channels, head.thr) == (6, 8, 0.5)
    stages = (torch.full((5, 3, 9, 9), torch.nan), features())  # only the last counts
    logits = head(stages)
    assert logits.shape == (5, 6) and logits.isfinite().all()
    queries = head.pre_logits(stages)
    assert queries.shape == dict(groups=(5, 4, 16), label_graph=(5, 8)).get(name, (5, 6, 16))
    # A sample's logits do not depend on the others.
    assert_close(head((features()[2:3], )), logits[2:3], rtol=1e-5, atol=1e-5)

    given = samples()
    predicted = head.predict(stages, given)
    assert all(a is b for a, b in zip(predicted, given, strict=True)) and predicted[3].img_path == '3.jpg'
    for sample, row in zip(predicted, logits.sigmoid()):
        assert_close(sample.pred_score, row, rtol=0, atol=0)
        assert sample.pred_label.tolist() == (row >= 0.5).nonzero()[:, 0].tolist()
    for sample, row in zip(build(name, topk=2).eval().predict(stages), logits):
        assert sample.pred_label.tolist() == row.topk(2).indices.tolist()


@every_head
@pytest.mark.parametrize('loss', STOCK.values(), ids=list(STOCK))
def test_stock_losses(name, loss):
    """The value is that of the stock head on the same logits; nothing is calibrated."""
    head, feats = build(name, loss=loss).eval(), (features(), )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        stock = MODELS.build(dict(type='MultiLabelClsHead', loss=loss))
    assert_close(head.loss(feats, samples()), stock.loss((head(feats), ), samples()), rtol=0, atol=0)
    assert 'calibrated_score' not in head.predict(feats)[0]


@every_head
@torch.no_grad()
def test_asl_is_calibrated(name):
    head = build(name, loss=ASL, thr=0.3).eval()
    logits = head((features(), ))
    for sample, row, expected in zip(head.predict((features(), )), logits.sigmoid(),
                                     posterior(logits, gamma_neg=4., clip=0.05)):
        assert_close(sample.pred_score, row, rtol=0, atol=0)
        assert_close(sample.calibrated_score, expected, rtol=0, atol=0)
        assert sample.pred_label.tolist() == (expected > 0.3).nonzero()[:, 0].tolist()
    with pytest.raises(ConfigError, match='thr=0.97 is never exceeded'):
        build(name, loss=ASL, thr=0.97)


@every_head
def test_soft_labels_reach_the_loss(name):
    head, soft = build(name, loss=ASL).eval(), torch.linspace(0, 1, 30).view(5, 6)
    given = [DataSample().set_gt_score(row) for row in soft]
    expected = head.loss_module(head((features(), )), soft, avg_factor=5)
    assert_close(head.loss((features(), ), given)['loss'], expected, rtol=0, atol=0)


@every_head
def test_every_parameter_learns(name):
    """All but the fixed queries get a gradient that is not zero; the map does too."""
    head, x = build(name, loss=ASL), features().requires_grad_()
    head.loss((x, ), samples())['loss'].backward()
    fixed = {'queries'} if name == 'groups' else set()
    assert {key for key, value in head.named_parameters() if value.grad is None or not value.grad.any()} == fixed
    assert x.grad.any()


@one_head_of_each_class
def test_learns_a_task(name):
    """Label i of an image is whether channel i is high somewhere in its map."""
    head = build(name, loss=ASL, **({} if name == 'label_graph' else dict(dropout=0.)))
    rng = torch.Generator().manual_seed(0)
    labels = torch.rand(64, 6, generator=rng) < 0.3
    x = 0.1 * torch.randn(64, 8, 3, 3, generator=rng)
    x[:, :6, 1, 2] += 2. * labels
    x[:, 6] += 1.
    given = [DataSample().set_gt_score(row.float()) for row in labels]
    optimizer = torch.optim.Adam([value for value in head.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(head.loss((x, ), given)['loss'])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@one_head_of_each_class
@torch.no_grad()
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_exports_with_dynamic_batch(name):
    class Exported(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head((x, ))

    model = Exported(build(name, loss=ASL).eval())
    other = features(batch=9)
    candidates = [torch.jit.trace(model, features(), check_trace=False)]
    if name not in ('learnable', 'self_attention'):  # seconds each, and their operations are in the others
        exported = torch.export.export(model, (features(), ), dynamic_shapes=dict(x={0: torch.export.Dim('batch')}))
        candidates.append(exported.module())
    for candidate in candidates:
        assert_close(candidate(other), model(other), rtol=1e-5, atol=1e-5)


@every_head
def test_checkpoint_round_trip_and_dtype(name):
    head = build(name, loss=ASL).eval()
    other = build(name, loss=ASL).eval()
    for value in other.parameters():
        nn.init.zeros_(value)
    other.load_state_dict(head.state_dict(), strict=True)
    assert_close(other((features(), )), head((features(), )), rtol=0, atol=0)
    sample = head.bfloat16().predict((features().bfloat16(), ))[0]
    assert (sample.pred_score.dtype, sample.calibrated_score.dtype) == (torch.bfloat16, torch.float32)


@every_head
def test_bias_of_the_last_layer_by_init_cfg(name):
    """As configs set it to the prior of the labels."""
    if name in ('label_graph', 'zero_shot'):
        pytest.skip('no GroupLinear at the end')
    head = build(name, init_cfg=dict(type='Normal', layer='GroupLinear', std=0.01, bias=-2.7))
    head.init_weights()
    assert (head.fc.bias == -2.7).all() and head.fc.weight.std() < 0.02
    head.eval()
    assert (head((features(), )) + 2.7).abs().max() < 0.5


@every_head
def test_inside_a_classifier(name):
    """From a config that inherits MMPretrain's ResNet."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(
            type='ImageClassifier', backbone=dict(type='ResNet', depth=18, stem_channels=8, base_channels=8), neck=None,
            head=dict(num_classes=6, in_channels=64, loss=ASL) | HEADS[name]))
    images, given = torch.randn(2, 3, 64, 64), samples()[:2]
    assert set(model(images, given, mode='loss')) == {'loss'}
    assert 'calibrated_score' in model.eval()(images, given, mode='predict')[0]
    assert model(images, mode='tensor') is not None


# --- configs

@pytest.mark.parametrize('data', ['coco', 'digits'])
@pytest.mark.parametrize('head', ['ml_decoder', 'query2label', 'label_graph'])
def test_configs(head, data):
    """Each differs from its base in the head and what goes with it, keeps its loss, and builds and runs."""
    model, folder, bases = ('resnet101', 'heads', '.') if data == 'coco' else ('resnet', 'digits', 'digits')
    cfg = Config.fromfile(CONFIGS / folder / f'{model}_{head}_asl_{data}.py')
    base = Config.fromfile(CONFIGS / bases / f'{model}_asl_{data}.py')
    kept = {key: value for key, value in cfg.to_dict().items() if key not in ('model', 'param_scheduler')}
    assert kept == {key: base.to_dict()[key] for key in kept}
    assert cfg.model.head.loss == base.model.head.loss and cfg.model.neck is None
    assert {key for key in cfg.model if cfg.model[key] != base.model[key]} <= {'neck', 'head', 'backbone'}
    assert {key for key in cfg.model.backbone if cfg.model.backbone[key] != base.model.backbone[key]} <= {'strides'}

    classes = cfg.model.head.num_classes
    if 'graph' in cfg.model.head:
        np.savez('graph.npz', classes=np.arange(classes), cooccurrence=np.eye(classes, dtype=int))
        cfg.model.head.graph = 'graph.npz'
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if data == 'coco':
            with torch.device('meta'):  # where ASL has no values to check
                MODELS.build(dict(cfg.model.head, loss=STOCK['bce']))
            return
        model = MODELS.build(cfg.model)
    model.init_weights()
    images = torch.randn(2, 3, 64, 64)
    model(images, samples()[:2], mode='loss')['loss'].backward()
    # The last layer starts at the labels' prior, where it has a bias.
    mean = torch.stack([sample.pred_score for sample in model.eval()(images, mode='predict')]).mean()
    assert head == 'label_graph' or 0.04 < mean < 0.1


# --- errors

@every_head
@pytest.mark.parametrize('shape', [(5, 7, 3, 4), (5, 8), (5, 12, 8)], ids=['channels', 'pooled', 'tokens'])
def test_other_features_are_refused(name, shape):
    with pytest.raises(ConfigError, match=rf'{re.escape(str(shape))}, expected \(B, 8, H, W\). Set '
                                          r'model.head.in_channels .* model.neck=None'):
        build(name)((torch.zeros(shape), ))


@every_head
def test_no_class_is_refused(name):
    with pytest.raises(ConfigError, match='num_classes=0 must be at least 1'):
        build(name, num_classes=0)


def test_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match='embed_dims=16 must be a multiple of num_heads=5'):
        build('groups', num_heads=5)


# --- parts

@pytest.mark.parametrize('groups, classes', [(1, 5), (3, 7), (4, 4), (5, 12), (5, 11), (2000, 2001)],
                         ids=str)
def test_group_linear(groups, classes):
    """Class i reads place i mod g of query i div g, in a loop."""
    layer = GroupLinear(groups, 3, classes)
    nn.init.normal_(layer.bias)
    queries = torch.randn(2, groups, 3)
    size = -(-classes // groups)
    assert layer.weight.shape == (groups, 3, size)
    expected = torch.empty(2, classes)
    for i in range(classes):
        expected[:, i] = queries[:, i // size] @ layer.weight[i // size, :, i % size] + layer.bias[i]
    assert_close(layer(queries), expected, rtol=1e-5, atol=1e-6)


def test_attention_layer_against_torch():
    """MMCV's layer is torch's decoder layer, with self-attention."""
    torch.manual_seed(0)
    ours = attention_layer('self_attn', 'norm', 'cross_attn', 'norm', 'ffn', 'norm', embed_dims=8, num_heads=2,
                           feedforward_channels=12, dropout=0.1).eval()
    peer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True).eval()
    peer.self_attn.load_state_dict(ours.attentions[0].attn.state_dict())
    peer.multihead_attn.load_state_dict(ours.attentions[1].attn.state_dict())
    peer.linear1.load_state_dict(ours.ffns[0].layers[0][0].state_dict())
    peer.linear2.load_state_dict(ours.ffns[0].layers[1].state_dict())
    queries, memory = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    assert_close(ours(queries, memory, memory), peer(queries, memory), rtol=1e-5, atol=1e-6)
    # Dropout acts on the attention, on both updates and within the feed-forward network, and nowhere else.
    assert sorted(module.p for module in ours.modules() if isinstance(module, nn.Dropout) and module.p) == [0.1] * 4
    assert [layer.attn.dropout for layer in ours.attentions] == [0.1, 0.1]


def test_label_embeddings_from_anywhere(folder):
    vectors = torch.randn(6, 3)
    np.save('v.npy', vectors.numpy().astype(np.float64))
    np.savez('v.npz', embeddings=vectors.numpy())
    torch.save(vectors, 'v.pth')
    for source in ('v.npy', 'v.npz', 'v.pth', str(folder / 'v.npy'), vectors, vectors.numpy(), vectors.tolist()):
        loaded = load_label_embeddings(source, 6)
        assert loaded.dtype == torch.float32
        assert_close(loaded, vectors, rtol=0, atol=1e-7)


class Hostile:
    def __reduce__(self):
        return open, ('pwned', 'w')


def test_label_embeddings_that_are_none(folder):
    with pytest.raises(DataError, match='no file of label embeddings gone.npy. Set model.head.label_emb'):
        load_label_embeddings('gone.npy', 6)
    with pytest.raises(DataError, match='There is no file gone.npz. .*--glove'):
        load_label_embeddings('gone.npz', 6)
    with pytest.raises(DataError, match=r"graph.npz is not an .npz file with the arrays \['embeddings'\] .*--glove"):
        load_label_embeddings('graph.npz', 6)
    (folder / 'text.npy').write_text('a 1 2')
    (folder / 'text.pth').write_text('a 1 2')
    (folder / 'empty.npz').write_text('')
    torch.save(Hostile(), 'hostile.pth')
    np.save('hostile.npy', np.array([Hostile()], object))
    torch.save(dict(a=torch.zeros(6, 2)), 'dict.pth')
    for path in ('text.npy', 'text.pth', 'empty.npz', 'hostile.pth', 'hostile.npy', 'dict.pth'):
        with pytest.raises(DataError, match=path):
            load_label_embeddings(path, 6)
    assert not (folder / 'pwned').exists()
    for source, message in ((np.zeros((7, 3)), r'shape \(7, 3\), but num_classes=6 requires \(6, d\)'),
                            (np.zeros(6), r'shape \(6,\)'), ([[1.], [2., 3.]], 'not an array of numbers'),
                            (np.diag([1, 1, np.nan, 1, 1, 1]), 'not finite for class 2')):
        with pytest.raises(DataError, match=f'label_embeddings .*{message}'):
            load_label_embeddings(source, 6)


def test_nothing_is_warned_of(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in HEADS:
            build(name, loss=ASL).eval().predict((features(), ))
