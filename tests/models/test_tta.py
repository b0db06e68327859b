"""Test-time augmentation of multi-label heads: means and decisions by hand, and a run of tools/test.py --tta."""
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

import mmasl.models.tta  # noqa: F401
from mmasl.errors import ConfigError
from mmasl.ops import posterior
from tools import test as tool

ROOT = Path(__file__).parents[2]
ASL = dict(type='mmasl.AsymmetricLoss', gamma_pos=0., gamma_neg=4., clip=0.05)
BCE = dict(type='CrossEntropyLoss', use_sigmoid=True)
# (view, image, class): views that agree, that differ, and that are decided otherwise by the posterior than by p.
LOGITS = torch.tensor([[[3., -1.], [0.8, 2.], [-9., 0.]], [[3., -1.], [-8., 0.5], [-9., 0.7]]])


@pytest.fixture(autouse=True)
def scope() -> None:
    init_default_scope('mmpretrain')


class Identity(nn.Module):
    """A backbone that gives its input."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x, )


def tta_model(head: str, loss: dict, kind: str = 'mmasl.MultiLabelTTAModel', **settings) -> nn.Module:
    classifier = dict(type='ImageClassifier', backbone=Identity(), head=dict(type=head, loss=loss, **settings))
    return MODELS.build(dict(type=kind, module=classifier)).eval()


def predict(model: nn.Module) -> list[DataSample]:
    """Of the logits above, as a data loader gives augmented images."""
    samples = [[DataSample().set_gt_label([0]) for _ in range(3)] for _ in range(2)]
    return model.test_step(dict(inputs=list(LOGITS), data_samples=samples))


def labels(samples: list[DataSample]) -> list[list[int]]:
    return [sample.pred_label.tolist() for sample in samples]


def test_means_of_the_views():
    samples = predict(tta_model('mmasl.MultiLabelClsHead', ASL))
    torch.testing.assert_close(torch.stack([sample.pred_score for sample in samples]), LOGITS.sigmoid().mean(0))
    calibrated = torch.stack([sample.calibrated_score for sample in samples])
    torch.testing.assert_close(calibrated, posterior(LOGITS).mean(0))
    assert labels(samples) == [[0], [1], []] and (calibrated[1, 0] < 0.5) and (calibrated[2, 1] < 0.5)
    # The posterior is 1/2 at p = 0.68: p alone would decide otherwise.
    assert samples[2].pred_score[1] > 0.5 and samples[0].gt_label.tolist() == [0]


def test_stock_leaves_labels_and_posterior_of_the_first_view():
    """Why this model exists."""
    samples = predict(tta_model('mmasl.MultiLabelClsHead', ASL, 'AverageClsScoreTTA'))
    assert labels(samples) == [[0], [0, 1], []]
    torch.testing.assert_close(samples[1].calibrated_score, posterior(LOGITS[0, 1]))


@pytest.mark.parametrize('head, loss', [('mmasl.MultiLabelClsHead', ASL), ('MultiLabelClsHead', BCE)])
def test_views_that_are_the_same_change_nothing(head, loss):
    model = tta_model(head, loss)
    data = dict(inputs=LOGITS[0], data_samples=[DataSample() for _ in range(3)])
    alone = model.module.test_step(data)
    twice = model.test_step(dict(inputs=[LOGITS[0]] * 2, data_samples=[[DataSample() for _ in range(3)]] * 2))
    assert labels(twice) == labels(alone)
    for one, two in zip(alone, twice):
        assert torch.equal(one.pred_score, two.pred_score)
        assert ('calibrated_score' in two) == (loss is ASL) and torch.equal(
            one.get('calibrated_score', torch.zeros(0)), two.get('calibrated_score', torch.zeros(0)))


@pytest.mark.parametrize('loss', [ASL, BCE], ids=['asl', 'bce'])
def test_the_k_best_are_those_of_the_mean(loss):
    head = 'mmasl.MultiLabelClsHead' if loss is ASL else 'MultiLabelClsHead'
    assert labels(predict(tta_model(head, loss, topk=1))) == [[0], [1], [1]]


def test_a_stock_head_includes_its_threshold():
    model = tta_model('MultiLabelClsHead', BCE, thr=0.5)
    (sample, ) = model.test_step(dict(inputs=[torch.tensor([[0., -0.1]])] * 2, data_samples=[[DataSample()]] * 2))
    assert sample.pred_label.tolist() == [0]


def test_a_head_of_one_label_is_refused():
    with pytest.raises(ConfigError, match='ClsHead is not a multi-label head; set tta_model.type to Average'):
        tta_model('ClsHead', dict(type='CrossEntropyLoss'))


def test_tool(tmp_path, monkeypatch):
    from mmasl.datasets.digits import DigitScenes
    monkeypatch.chdir(tmp_path)
    DigitScenes(train=4, val=6, colors=1).write('digits')
    Path('tiny.py').write_text(f"""
_base_ = {str(ROOT / 'configs/digits/resnet_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), head=dict(type='mmasl.MultiLabelLinearClsHead', num_classes=10))
data_preprocessor = dict(num_classes=10)
test_dataloader = dict(batch_size=4, dataset=dict(data_root='digits'))
test_evaluator = dict(type='mmasl.MultiLabelMetric', calibrated=True)
tta_model = dict(type='mmasl.MultiLabelTTAModel')
""")
    rng = torch.Generator().manual_seed(0)
    cfg = Config.fromfile('tiny.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        state = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict={**state, 'head.fc.weight': 5 * torch.randn(10, 128, generator=rng)}), 'w.pth')
    tool.main('tiny.py w.pth --tta --work-dir w --out out.pkl'.split())
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert len(predictions) == 6
    for prediction in predictions:
        assert prediction['pred_label'].tolist() == np.flatnonzero(prediction['calibrated_score'] > 0.5).tolist()
    # No mean of posteriors is the posterior of the mean.
    p, mean = (torch.stack([prediction[key] for prediction in predictions])
               for key in ('pred_score', 'calibrated_score'))
    assert not torch.allclose(mean, posterior(p.logit()), atol=1e-3) and mean.max() > 0.01
