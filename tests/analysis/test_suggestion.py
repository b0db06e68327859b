"""Suggested settings for data like the paper's, and the configs that have them."""
import numpy as np
import pytest
import torch
from advice_helpers import classifier, stats_of, watched
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmasl import AsymmetricLoss
from mmasl.analysis.gradient import Setting
from mmasl.analysis.label_statistics import LabelStatistics
from mmasl.analysis.loss_sites import LossSite
from mmasl.analysis.suggestion import LADDER, STARTS, Suggestion, suggest, write_config


@pytest.mark.parametrize('images, kind, z, expected', (
    (100, 'multi-label', 0., Setting(0, 4, 0.05)), (100, 'multi-label', -4.6, Setting(0, 4, 0)),
    (10, 'multi-label', 0., Setting(0, 2, 0)),
    (10, 'multi-label', -4.6, Setting(0, 2, 0)),
    (330, 'multi-label', 0., Setting(0, 4, 0.05)), (350, 'multi-label', 0., Setting(0, 7, 0.05)),
    (5000, 'multi-label', 0., Setting(0, 7, 0.05)), (5000, 'multi-label', -4.6, Setting(0, 7, 0)),
    (10, 'single-label', 0., Setting(0, 4, 0.05)), (5000, 'single-label', 0., Setting(0, 4, 0.05))))
def test_suggestion_for_a_classifier(images, kind, z, expected):
    suggestion = suggest(stats_of([4, 4, 2], images, kind), classifier(z))
    assert suggestion.setting == expected
    assert suggestion.setting in [*STARTS, *LADDER.values()]
    assert any('no margin' in reason for reason in suggestion.reasons) == (z < 0 and expected != Setting(0, 2, 0))


@pytest.mark.parametrize('weight, expected', (
    (0., Setting(0, 2, 0)), (0.1, Setting(0, 7, 0.05)), (1., Setting(0, 7, 0.05))))
def test_suggestion_for_open_images(weight, expected):
    """App. F's, if ten of an image's 9,605 labels are annotated, three of them positive, and the rest has a weight."""
    images, classes = 1000, 9605
    stats = LabelStatistics(tuple(map(str, range(classes))), np.bincount(np.arange(3 * images), minlength=classes),
                            np.full(classes, 7 * images / classes), np.full(images, 3), images * (classes - 10),
                            'multi-label')
    loss = dict(ignore_index=-1, weight_unannotated=weight) if weight else {}
    suggestion = suggest(stats, classifier(0., **loss))
    assert suggestion.setting == expected
    assert (f'a label without annotation counts as {weight:g}' in suggestion.reasons[0]) == (weight > 0)


def test_suggestion_for_a_softmax():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        site = watched(MODELS.build(dict(type='CrossEntropyLoss')), torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert suggest(stats_of([4, 4, 2]), site).setting == Setting(0, 4, 0.05)


@pytest.mark.parametrize('loss, target, alpha', (
    (dict(alpha=0.4), torch.tensor([0, 3]), 0.4), ({}, torch.tensor([0, 3]), 0.25), ({}, torch.zeros(2, 3), None)))
def test_suggestion_for_a_detector(loss, target, alpha):
    site = watched(AsymmetricLoss(**loss), torch.zeros(2, 3), target)
    suggestion = suggest(stats_of([4, 4, 2], kind='detection'), site)
    assert suggestion.setting == Setting(1, 2, 0, alpha) and suggestion.rung in LADDER.values()


@pytest.mark.parametrize('stock, gamma_pos, kept', (
    (dict(type='QualityFocalLoss', beta=1.5), 1.5, dict(soft_label='qfl')),
    (dict(type='VarifocalLoss', alpha=0.75), 1., dict(soft_label='vfl', class_weight=0.75, pos_weight=4 / 3)),
    (dict(type='mmasl.AsymmetricLoss', gamma_pos=1.5, soft_label='mal'), 1.5, dict(soft_label='mal'))))
def test_losses_of_a_quality_are_kept(stock, gamma_pos, kept):
    """A mixture of positives and negatives would be another target."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        site = watched(MODELS.build(stock), torch.zeros(2, 3), torch.tensor([[0., 0.5, 0]] * 2), key='model.loss_cls')
    suggestion = suggest(stats_of([4, 4, 2], kind='detection'), site)
    assert suggestion.setting == Setting(gamma_pos, 2, 0)
    text = write_config(Config(dict(model=dict(loss_cls=stock))), './base.py', site, suggestion)
    loss = eval(text[text.index('model = ') + 8:])['loss_cls']
    assert loss == dict(_delete_=True, type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=gamma_pos,
                        gamma_neg=2., clip=0., **kept)


@pytest.mark.parametrize('base, kept, absent', (
    ("head=dict(loss=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=2.))", dict(loss_weight=2.), ()),
    ("head=dict(loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=9., detach_focusing=True, reduction='sum'))",
     dict(detach_focusing=True, reduction='sum'), ()),
    (("head=dict(loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=9., ignore_index=-1, weight_unannotated=0.1, "
      "gamma_unannotated=7.))"),
     dict(ignore_index=-1, weight_unannotated=0.1, gamma_unannotated=7.), ()),
    ("head=dict(type='MultiLabelClsHead')", {}, ('_delete_', 'reduction'))))
def test_written_config(tmp_path, base, kept, absent):
    (tmp_path / 'base.py').write_text(f"custom_imports = dict(imports=['math'])\nmodel = dict({base})")
    site = LossSite('model.head.loss', AsymmetricLoss())
    text = write_config(Config.fromfile(tmp_path / 'base.py'), './base.py', site, Suggestion(Setting(0, 7, 0, 0.3), ()))
    (tmp_path / 'new.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'new.py')
    assert cfg.custom_imports == dict(imports=['math', 'mmasl'], allow_failed_imports=False)
    loss = cfg.model.head.loss
    assert loss == dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=0., gamma_neg=7., clip=0., alpha=0.3,
                        **kept)
    assert not set(absent) & set(loss)
    assert isinstance(MODELS.build(loss), AsymmetricLoss)
    assert max(map(len, text.splitlines())) <= 120


def test_a_loss_in_a_list_is_written_alone():
    cfg = Config(dict(model=dict(heads=[dict(loss_cls=dict(type='FocalLoss', gamma=2.))])))
    text = write_config(cfg, './base.py', LossSite('model.heads.0.loss_cls', nn.Identity()),
                        Suggestion(Setting(1, 2, 0, 0.25), ()))
    assert text.startswith('#') and 'model.heads.0.loss_cls' in text and '_delete_' not in text
    assert eval(text[text.index('dict('):])['gamma_neg'] == 2
