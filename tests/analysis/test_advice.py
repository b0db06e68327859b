"""mmasl.analysis.advice: labels are counted, gradients are those of the losses, and every known mistake is found."""
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, RepeatDataset
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmasl import AsymmetricLoss
from mmasl.analysis import advice
from mmasl.analysis.advice import LADDER, LabelStats, LossSite, Suggestion

ROOT = Path(__file__).parents[2]


class Data(BaseDataset):
    """A data set that is only its annotations."""

    def __init__(self, *infos: dict, classes=('a', 'b', 'c')) -> None:
        self.infos = infos
        super().__init__(metainfo=dict(classes=classes) if classes else None)

    def load_data_list(self) -> list[dict]:
        return list(self.infos)


def labelled(*labels: object) -> list[dict]:
    return [dict(gt_label=label) for label in labels]


def objects(*labels: int, ignored: tuple = ()) -> dict:
    return dict(instances=[dict(bbox_label=label, ignore_flag=int(i in ignored)) for i, label in enumerate(labels)])


# --- labels

@pytest.mark.parametrize('data, kind, counts, per_image, ignored', (
    (Data(*labelled([0, 1], [1], [])), 'multi-label', [1, 2, 0], [2, 1, 0], 0),
    (Data(dict(gt_score=np.array([1., -1, 0]), gt_label=[0]), dict(gt_score=np.array([0., 1, 0.5]))), 'multi-label',
     [1, 1, 1], [1, 2], 1),
    (Data(*labelled(2, np.int64(0), 2)), 'single-label', [1, 0, 2], [1, 1, 1], 0),
    (Data(objects(0, 0, 1, ignored=(1, )), objects()), 'detection', [1, 1, 0], [2, 0], 1)))
def test_counts(data, kind, counts, per_image, ignored):
    stats = advice.count_labels(data)
    assert (stats.kind, stats.counts.tolist(), stats.per_image.tolist(), stats.ignored) == (
        kind, counts, per_image, ignored)
    assert stats.classes == ('a', 'b', 'c') and stats.images == len(data)


def test_repeated_images_count_once():
    stats = advice.count_labels(RepeatDataset(Data(*labelled([0], [1])), times=3))
    assert stats.images == 2


def test_classes_without_names_are_numbered():
    assert advice.count_labels(Data(*labelled([0, 2]), classes=None)).classes == ('0', '1', '2')


@pytest.mark.parametrize('data, message', (
    (Data(*labelled([], [])), 'none of the 2 images has a label'),
    (Data(*labelled([0], [3])), 'labels reach from 0 to 3, but the data set names 3 classes'),
    (Data(dict(img_path='x.jpg')), 'x.jpg has no labels')))
def test_labels_that_cannot_be_counted(data, message):
    with pytest.raises(ValueError, match=message):
        advice.count_labels(data)


def stats_of(counts, images: int = 10, kind: str = 'multi-label', ignored: int = 0) -> LabelStats:
    counts = np.array(counts)
    per_image = np.full(images, counts.sum() // images)
    return LabelStats(tuple('abcdefgh'[:len(counts)]), counts, per_image, ignored, kind)


def test_imbalance():
    stats = stats_of([3, 0, 12, 5], ignored=4)
    assert stats.negatives_per_positive() == (10 * 4 - 4 - 20) / 20
    assert stats.negatives_per_positive(0.25) == (10 * 4 - 4 - 20 + 1) / 20
    assert stats.order.tolist() == [2, 3, 0] and stats.imbalance == 4 and stats.empty == ['b']


# --- gradients

def watched(module: nn.Module, *args, settings=None, key='model.head.loss', **kwargs) -> LossSite:
    site = LossSite(key, module)
    with advice.watch_losses([site], [*LADDER.values()] if settings is None else settings):
        module(*args, **kwargs)
    return site


def assert_same(a: advice.Gradient, b: advice.Gradient) -> None:
    assert (a.positive, a.negative) == pytest.approx((b.positive, b.negative), rel=1e-4)
    assert a.silent == b.silent


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator), torch.rand(50, 6, generator=generator) < 0.2


def test_shares_against_the_equations(batch):
    """Cross-entropy's |dL/dz| is |p - y|; Eq. 8 for the negatives of (2, 0, 0.1), and 1 - p for its positives."""
    z, y = batch
    p = z.double().sigmoid()
    site = watched(AsymmetricLoss(0, 0, 0), z, y, settings=[(0, 0, 0), (2, 0, 0.1)])
    assert (site.positives, site.negatives, site.form) == (y.sum(), (~y).sum(), 'dense')
    expected = advice.Gradient((1 - p[y]).sum().item(), p[~y].sum().item())
    assert_same(site.settings[0, 0, 0], expected)
    assert_same(site.own, expected)
    assert expected.share == pytest.approx(expected.positive / (expected.positive + expected.negative))

    p_m = (p[~y] - 0.1).clamp(min=0)
    slope = p_m**2 * (1 / (1 - p_m) - 2 * (1 - p_m).log() / p_m) * p[~y] * (1 - p[~y])
    slope = slope.where(p_m > 0, 0)
    assert_same(site.settings[2, 0, 0.1], advice.Gradient((1 - p[y]).sum().item(), slope.sum().item(),
                                                          int((p_m == 0).sum())))
    assert site.settings[2, 0, 0.1].silent > 0
    assert site.prior == pytest.approx(z[~y].median().sigmoid().item())


LOSSES = dict(
    mmasl=('mmdet', dict(type='mmasl.AsymmetricLoss', gamma_pos=1, gamma_neg=4, clip=0.05), (4, 1, 0.05)),
    official_form=('mmdet', dict(type='mmasl.AsymmetricLoss', gamma_pos=0, gamma_neg=4, detach_focusing=True,
                                 alpha=0.3, loss_weight=2.), (4, 0, 0.05)),
    mmpretrain=('mmpretrain', dict(type='AsymmetricLoss', gamma_pos=1., gamma_neg=4., clip=0.05), (4, 1, 0.05)),
    cross_entropy=('mmpretrain', dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5), (0, 0, 0)),
    focal=('mmpretrain', dict(type='FocalLoss', gamma=2., alpha=0.25), (2, 2, 0)),
    detection_focal=('mmdet', dict(type='FocalLoss', use_sigmoid=True, gamma=2., alpha=0.25), (2, 2, 0)),
    detection_cross_entropy=('mmdet', dict(type='CrossEntropyLoss', use_sigmoid=True), (0, 0, 0)))


# MMPretrain's labels have no background.
@pytest.mark.parametrize('name, form', [(name, form) for name, (scope, *_) in LOSSES.items()
                                        for form in ('dense', 'labels') if (scope, form) != ('mmpretrain', 'labels')])
def test_own_gradient_is_that_of_its_setting(name, form, batch):
    scope, cfg, setting = LOSSES[name]
    with DefaultScope.overwrite_default_scope(scope):
        module = MODELS.build(cfg)
    z, y = batch
    target = y.long() if form == 'dense' else torch.arange(50) % 7
    site = watched(module, z, target, avg_factor=7, settings=[setting])
    assert site.setting == setting and site.form == form and site.divisor == 7
    assert_same(site.own, site.settings[setting])
    assert site.own.positive > 0 and site.own.negative > 0
    if form == 'labels':
        assert site.positives == (target < 6).sum() and site.negatives == z.numel() - site.positives


def test_pairs_and_probabilities():
    """Labels with a quality as GFL has them, and probabilities as TOOD has them; one entry by hand."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        quality_focal = MODELS.build(dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.))
        activated = MODELS.build(dict(type='FocalLoss', use_sigmoid=True, activated=True, gamma=2., alpha=0.25))
    labels, quality = torch.tensor([1, 2, 2]), torch.tensor([0.5, 0., 0.])
    z = torch.tensor([[0.3, -1.], [0.2, -2.], [1., 0.4]])
    site = watched(quality_focal, z, (labels, quality), weight=torch.tensor([1., 1., 0.]))
    assert (site.form, site.positives, site.negatives, site.setting) == ('pair', 1, 3, None)

    def loss(x: float) -> float:
        p = 1 / (1 + np.exp(-x))
        return (0.5 - p)**2 * -(0.5 * np.log(p) + 0.5 * np.log(1 - p))

    assert site.own.positive == pytest.approx(abs(loss(-1 + 1e-5) - loss(-1 - 1e-5)) / 2e-5, rel=1e-4)

    site = watched(activated, z.sigmoid(), labels)
    assert_same(site.own, site.settings[2, 2, 0])
    assert site.form == 'labels' and site.prior == pytest.approx(0.5744, abs=1e-4)


def test_ignored_and_unweighted_entries_do_not_count():
    z, y = torch.zeros(4, 3), torch.tensor([[1, 0, -1]] * 4)
    site = watched(AsymmetricLoss(0, 0, 0, ignore_index=-1), z, y, torch.tensor([1., 2., 0., 1.]))
    assert (site.positives, site.negatives) == (3, 3)
    assert_same(site.own, advice.Gradient(2., 2.))
    assert_same(site.settings[0, 0, 0], advice.Gradient(2., 2.))


@pytest.mark.parametrize('target', (torch.tensor([[1, 0, -1]] * 4), torch.tensor([0, 1, 9, 3])),
                         ids=('dense', 'labels'))
def test_labels_without_annotation_are_negatives_by_their_weight(target):
    """Four of a quarter each, or three in a row that is marked; the others as they are."""
    z = torch.zeros(4, 3)
    index, positives, negatives, marked = (-1, 4, 4, 4) if target.dim() == 2 else (9, 2, 7, 3)
    site = watched(AsymmetricLoss(0, 0, 0, ignore_index=index, weight_unannotated=0.25), z, target,
                   settings=[(0, 0, 0), (4, 0, 0.6)])
    assert (site.positives, site.negatives) == (positives, negatives + 0.25 * marked)
    assert_same(site.own, advice.Gradient(positives / 2, (negatives + 0.25 * marked) / 2))
    assert_same(site.own, site.settings[0, 0, 0])
    assert site.settings[4, 0, 0.6].silent == site.negatives
    weighted = watched(site.module, z, target, torch.tensor([0., 1., 1., 1.]), settings=[(0, 0, 0)])
    assert (weighted.positives, weighted.negatives) == ((3, 3.75) if index == -1 else (1, 5.75))
    assert_same(weighted.own, weighted.settings[0, 0, 0])


def test_own_gradient_is_that_of_its_setting_with_a_gamma_of_the_unannotated(batch):
    z, y = batch
    target = y.float().masked_fill(torch.arange(300).reshape(50, 6) % 3 == 0, -1)
    module = AsymmetricLoss(0, 2, 0.05, ignore_index=-1, weight_unannotated=0.5, gamma_unannotated=4, loss_weight=2.)
    site = watched(module, z, target, settings=[(2, 0, 0.05), (4, 0, 0.05)])
    assert_same(site.own, site.settings[2, 0, 0.05])
    assert site.own.negative > site.settings[4, 0, 0.05].negative
    assert site.negatives == (target == 0).sum() + 50


def test_softmax_divides_its_gradient_evenly(batch):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        module = MODELS.build(dict(type='CrossEntropyLoss'))
    site = watched(module, batch[0], torch.arange(50) % 6, avg_factor=50)
    assert site.softmax and site.setting is None and site.own.share == pytest.approx(0.5)


def test_only_calls_of_the_objective_are_watched(batch):
    module = AsymmetricLoss()
    site = LossSite('model.head.loss', module)
    with advice.watch_losses([site], []):
        module(*batch)
        with torch.no_grad():
            module(*batch)
    module(*batch)
    assert site.positives == batch[1].sum()


def test_targets_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r'targets of shape \(4,\) for predictions of shape \(2, 3\)'):
        advice._entries(torch.zeros(2, 3), torch.zeros(4), None)


def test_finds_the_losses_of_heads():
    def head(**losses: nn.Module) -> nn.Module:
        return nn.ModuleDict(losses)
    model = nn.ModuleDict(dict(
        head=head(loss_module=AsymmetricLoss()), bbox_head=head(loss_cls=nn.Identity(), loss_bbox=nn.Identity()),
        roi_head=nn.ModuleDict(dict(bbox_head=nn.ModuleList([head(loss_cls=nn.Identity())]))),
        other=head(loss_mine=AsymmetricLoss())))
    assert [site.key for site in advice.find_losses(model)] == [
        'model.head.loss', 'model.bbox_head.loss_cls', 'model.roi_head.bbox_head.0.loss_cls', 'model.other.loss_mine']


# --- what to start from

def classifier(z: float, **loss) -> LossSite:
    """An AsymmetricLoss that has seen 3 positives and 27 negatives at logit z."""
    y = torch.zeros(10, 3)
    y[:3, 0] = 1
    return watched(AsymmetricLoss(**loss), torch.full((10, 3), z), y, avg_factor=10)


@pytest.mark.parametrize('images, kind, z, expected', (
    (100, 'multi-label', 0., (4, 0, 0.05)), (100, 'multi-label', -4.6, (4, 0, 0)), (10, 'multi-label', 0., (2, 0, 0)),
    (10, 'multi-label', -4.6, (2, 0, 0)),
    (330, 'multi-label', 0., (4, 0, 0.05)), (350, 'multi-label', 0., (7, 0, 0.05)),
    (5000, 'multi-label', 0., (7, 0, 0.05)), (5000, 'multi-label', -4.6, (7, 0, 0)),
    (10, 'single-label', 0., (4, 0, 0.05)), (5000, 'single-label', 0., (4, 0, 0.05))))
def test_suggestion_for_a_classifier(images, kind, z, expected):
    suggestion = advice.suggest(stats_of([4, 4, 2], images, kind), classifier(z))
    assert suggestion.setting == expected and suggestion.alpha is None
    assert suggestion.setting in [*advice.STARTS, *LADDER.values()]
    assert any('no margin' in reason for reason in suggestion.reasons) == (z < 0 and expected != (2, 0, 0))


@pytest.mark.parametrize('weight, expected', ((0., (2, 0, 0)), (0.1, (7, 0, 0.05)), (1., (7, 0, 0.05))))
def test_suggestion_for_open_images(weight, expected):
    """App. F's, if ten of an image's 9,605 labels are annotated, three of them positive, and the rest has a weight."""
    images, classes = 1000, 9605
    stats = LabelStats(tuple(map(str, range(classes))), np.bincount(np.arange(3 * images), minlength=classes),
                       np.full(images, 3), images * (classes - 10), 'multi-label')
    loss = dict(ignore_index=-1, weight_unannotated=weight) if weight else {}
    suggestion = advice.suggest(stats, classifier(0., **loss))
    assert suggestion.setting == expected
    assert (f'a label without annotation counted as {weight:g} of them' in suggestion.reasons[0]) == (weight > 0)


def test_suggestion_for_a_softmax():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        site = watched(MODELS.build(dict(type='CrossEntropyLoss')), torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert advice.suggest(stats_of([4, 4, 2]), site).setting == (4, 0, 0.05)


@pytest.mark.parametrize('loss, target, alpha', (
    (dict(alpha=0.4), torch.tensor([0, 3]), 0.4), ({}, torch.tensor([0, 3]), 0.25), ({}, torch.zeros(2, 3), None)))
def test_suggestion_for_a_detector(loss, target, alpha):
    site = watched(AsymmetricLoss(**loss), torch.zeros(2, 3), target)
    suggestion = advice.suggest(stats_of([4, 4, 2], kind='detection'), site)
    assert suggestion.setting == (2, 1, 0) in LADDER.values() and suggestion.alpha == alpha


@pytest.mark.parametrize('base, kept, absent', (
    ("head=dict(loss=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=2.))", dict(loss_weight=2.), ()),
    ("head=dict(loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=9., detach_focusing=True, reduction='sum'))",
     dict(detach_focusing=True, reduction='sum'), ()),
    (("head=dict(loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=9., ignore_index=-1, weight_unannotated=0.1, "
      "gamma_unannotated=7., implementation='eager'))"),
     dict(ignore_index=-1, weight_unannotated=0.1, gamma_unannotated=7., implementation='eager'), ()),
    ("head=dict(type='MultiLabelClsHead')", {}, ('_delete_', 'reduction'))))
def test_written_config(tmp_path, base, kept, absent):
    (tmp_path / 'base.py').write_text(f"custom_imports = dict(imports=['math'])\nmodel = dict({base})")
    site = LossSite('model.head.loss', AsymmetricLoss())
    text = advice.write_config(Config.fromfile(tmp_path / 'base.py'), './base.py', site, Suggestion((7, 0, 0), 0.3, ()))
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
    text = advice.write_config(cfg, './base.py', LossSite('model.heads.0.loss_cls', nn.Identity()),
                               Suggestion((2, 1, 0), 0.25, ()))
    assert text.startswith('#') and 'model.heads.0.loss_cls' in text and '_delete_' not in text
    assert eval(text[text.index('dict('):])['gamma_neg'] == 2


# --- known mistakes: each is found, and not where it is none

def assert_found(mistake, present: bool, where: str, *words: str) -> None:
    assert (mistake is not None) == present
    if present:
        assert mistake.where == where
        for word in words:
            assert word in f'{mistake.what} {mistake.why} {mistake.cure}'


@pytest.mark.parametrize('counts, present', (([1, 0, 2, 0], True), ([1, 2, 3, 4], False)))
def test_empty_classes(counts, present):
    assert_found(advice.empty_classes(stats_of(counts)), present, 'train_dataloader.dataset.metainfo.classes',
                 '2 of 4 classes', 'b, d')


@pytest.mark.parametrize('gammas, present', (
    ((1, 4), True), (([0, 1], 4), True), ((0.5, 0), True), ((0, 4), False), ((2, 2), False), ((0, 0), False)))
def test_focusing_of_positives(gammas, present):
    site = LossSite('model.head.loss', AsymmetricLoss(*gammas))
    assert_found(advice.focusing_of_positives(site), present, 'model.head.loss.gamma_pos', 'gamma_pos=0')


def test_focusing_of_positives_in_other_losses():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        stock = [MODELS.build(dict(type='AsymmetricLoss', gamma_pos=1., use_sigmoid=use)) for use in (True, False)]
        stock.append(MODELS.build(dict(type='CrossEntropyLoss', use_sigmoid=True)))
    found = [advice.focusing_of_positives(LossSite('model.head.loss', module)) for module in stock]
    assert [bool(mistake) for mistake in found] == [True, False, False]


@pytest.mark.parametrize('z, clip, present', (
    (-4.6, 0.05, True), (-4.6, 0.02, True), (-4.6, 0.005, False), (-4.6, 0, False), (0., 0.05, False)))
def test_margin_above_prior(z, clip, present):
    assert_found(advice.margin_above_prior(classifier(z, clip=clip)), present, 'model.head.loss.clip',
                 '27 of 27 negatives', 'p = 0.01', 'logit -4.6')


@pytest.mark.parametrize('loss, target, present', (
    (dict(gamma_pos=1, gamma_neg=2, clip=0), torch.tensor([0, 3]), True),
    (dict(gamma_pos=1, gamma_neg=2, clip=0, alpha=0.25), torch.tensor([0, 3]), False),
    (dict(gamma_pos=2, gamma_neg=2, clip=0), torch.tensor([0, 3]), False),
    (dict(gamma_pos=1, gamma_neg=2, clip=0), torch.zeros(2, 3), False)), ids=('asl', 'alpha', 'focal', 'dense'))
def test_alpha_left_out(loss, target, present):
    site = watched(AsymmetricLoss(**loss), torch.zeros(2, 3), target, key='model.bbox_head.loss_cls')
    assert_found(advice.alpha_left_out(site), present, 'model.bbox_head.loss_cls.alpha', '4 (at p = 0.01)',
                 '8 times (at p = 0.5)')


@pytest.mark.parametrize('kind, present', (
    ('AsymmetricLoss', True), ('mmpretrain.AsymmetricLoss', False), ('mmasl.AsymmetricLoss', False)))
def test_other_asymmetric_loss(kind, present):
    cfg = Config(dict(model=dict(head=dict(loss=dict(type=kind)))))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        site = LossSite('model.head.loss', MODELS.build(cfg.model.head.loss))
    assert_found(advice.other_asymmetric_loss(cfg, site), present, 'model.head.loss.type', 'mmasl.AsymmetricLoss')


@pytest.mark.parametrize('path, loss, present', (
    ('bbox_head.loss_cls', dict(type='mmasl.AsymmetricLoss'), True),
    ('bbox_head.loss_cls', dict(type='mmasl.AsymmetricLoss', use_sigmoid=True), False),
    ('bbox_head.loss_cls', dict(type='mmdet.CrossEntropyLoss'), False),
    ('head.loss', dict(type='mmasl.AsymmetricLoss'), False)))
def test_sigmoid_not_in_config(path, loss, present):
    head, key = path.split('.')
    cfg = Config(dict(model={head: {key: loss}}))
    site = LossSite(f'model.{path}', MODELS.build(loss))
    assert_found(advice.sigmoid_not_in_config(cfg, site), present, 'model.bbox_head.loss_cls.use_sigmoid', 'softmax')


@pytest.mark.parametrize('optimizer, loss, present', (
    (dict(type='Adam', weight_decay=1e-4), {}, True),
    (dict(type='torch.optim.RMSprop', weight_decay=1e-4), {}, True),
    (dict(type=torch.optim.Adam, weight_decay=1e-4), {}, True),
    (dict(type='Adam', weight_decay=1e-4), dict(reduction='sum'), False),
    (dict(type='Adam', weight_decay=1e-4, decoupled_weight_decay=True), {}, False),
    (dict(type='Adam'), {}, False), (dict(type='AdamW', weight_decay=1e-4), {}, False),
    (dict(type='SGD', weight_decay=1e-4), {}, False)))
def test_coupled_weight_decay(optimizer, loss, present):
    cfg = Config(dict(default_scope='mmpretrain', optim_wrapper=dict(optimizer=optimizer)))
    site = classifier(0., **loss)
    # Positives 3 x 1/2, negatives 27 x 1/2 in cross-entropy; the gradient of (4, 0.05) at p = 1/2 by Eq. 8.
    negative = 0.45**4 * (1 / 0.55 - 4 * np.log(0.55) / 0.45) / 4
    ratio = 15 / (1.5 + 27 * negative)
    assert_found(advice.coupled_weight_decay(cfg, site), present, 'optim_wrapper.optimizer', 'divided by 10',
                 'counts 10 times', f'cross-entropy {ratio:.3g} times', 'AdamW', 'weight_decay=8e-07')


def test_coupled_weight_decay_is_what_it_says():
    """Adam's first step has the sign of gradient + weight_decay * weight: a loss divided by 1000 lets the decay win."""
    signs = {}
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        for divisor in (1, 1000):
            weight = torch.ones(1, requires_grad=True)
            (-1e-3 * weight / divisor).sum().backward()
            kind([weight], lr=0.1, weight_decay=1e-4).step()
            signs[kind, divisor] = weight.item() > 1
    assert signs[torch.optim.Adam, 1] and not signs[torch.optim.Adam, 1000]
    assert signs[torch.optim.AdamW, 1] and signs[torch.optim.AdamW, 1000]


@pytest.mark.parametrize('backbone, preprocessor, present', (
    (dict(type='TIMMBackbone', model_name='tresnet_m'), dict(mean=[123.7, 116.3, 103.5], std=[58., 57., 57.]), True),
    (dict(type='TResNet'), dict(mean=[0., 0., 0.], std=[1., 1., 1.]), True),
    (dict(type='TResNet'), {}, True),
    (dict(type='TIMMBackbone', model_name='tresnet_l'), dict(mean=[0., 0., 0.], std=[255., 255., 255.]), False),
    (dict(type='ResNet'), dict(mean=[123.675, 116.28, 103.53], std=[58., 57., 57.]), False)))
@pytest.mark.parametrize('inside', (True, False), ids=('model', 'top'))
def test_normalisation_of_tresnet(backbone, preprocessor, present, inside):
    cfg = Config(dict(model=dict(backbone=backbone)))
    (cfg.model if inside else cfg).data_preprocessor = preprocessor
    assert_found(advice.normalisation_of_tresnet(cfg), present, 'data_preprocessor', 'std=[255., 255., 255.]')


def ema_config(epochs: int, **hook) -> Config:
    return Config(dict(train_cfg=dict(by_epoch=True, max_epochs=epochs), custom_hooks=[
        dict(type='CheckpointHook'), dict(dict(type='mmpretrain.EMAHook'), **hook)]))


def test_ema_longer_than_run():
    """61 % is what the official 0.9997 leaves after its 41 epochs on VOC 2007."""
    (mistake, ) = advice.ema_longer_than_run(ema_config(41, momentum=3e-4), 40)
    assert_found(mistake, True, 'custom_hooks.1.momentum', '61%', '1,640 iterations', 'momentum=0.0028')
    for cfg in (ema_config(410, momentum=3e-4), ema_config(41, momentum=2.8e-3), Config({}),
                ema_config(41, ema_type='StochasticWeightAverage')):
        assert advice.ema_longer_than_run(cfg, 40) == []
    by_iteration = Config(dict(train_cfg=dict(by_epoch=False, max_iters=1640), default_hooks=dict(
        ema=dict(type='EMAHook', momentum=3e-4), none=None)))
    assert [mistake.where for mistake in advice.ema_longer_than_run(by_iteration, 1)] == ['default_hooks.ema.momentum']
    assert len(advice.ema_longer_than_run(ema_config(400, momentum=3e-4, begin_epoch=390), 40)) == 1


@pytest.mark.parametrize('late', (0, 200), ids=('first-step', 'late'))
def test_ema_with_a_horizon(late):
    """exp(-1 / horizon) of the initial weights is left, 14 % at 0.5; momentum is none of this hook's arguments."""
    def found(horizon: float) -> list:
        return advice.ema_longer_than_run(
            ema_config(41, type='mmasl.EMAHook', horizon=horizon, begin_iter=late + 1), 40)

    (mistake, ) = found(0.5)
    left = np.exp(-(1640 - late) / 1640 / 0.5)
    assert_found(mistake, True, 'custom_hooks.1.horizon', f'{left:.0%}', f'{1640 - late:,} iterations', 'horizon=0.')
    assert 'momentum' not in str(mistake)
    cure = float(mistake.cure.split()[0].removeprefix('horizon='))
    assert np.exp(-(1640 - late) / 1640 / cure) == pytest.approx(0.01, rel=0.2)
    assert found(cure) == []


@pytest.mark.parametrize('batches_per_epoch', (1, 40, 642))
def test_no_ema_of_the_configs_is_longer_than_its_run(batches_per_epoch):
    configs = [Config.fromfile(path) for path in sorted((ROOT / 'configs').glob('**/*_official_*.py'))]
    hooks = [hook.type for cfg in configs for hook in cfg.custom_hooks]
    assert hooks.count('mmasl.EMAHook') == len(configs) > 0
    for cfg in configs:
        assert advice.ema_longer_than_run(cfg, batches_per_epoch) == []


@pytest.mark.parametrize('options', (
    dict(momentum=0.01), dict(momentum=0.01, interval=3), dict(ema_type='MomentumAnnealingEMA', gamma=2),
    dict(ema_type='MomentumAnnealingEMA', momentum=0.1, gamma=2, interval=2),
    dict(ema_type='mmdet.ExpMomentumEMA', gamma=5), dict(ema_type='StochasticWeightAverage')),
    ids=lambda options: '-'.join(map(str, options.values())))
@pytest.mark.parametrize('iterations', (1, 2, 30))
def test_initial_share_is_that_of_the_average(options, iterations):
    source = nn.Linear(1, 1, bias=False)
    kind = options.get('ema_type', 'ExponentialMovingAverage')
    average = MODELS.build(dict({key: value for key, value in options.items() if key != 'ema_type'}, type=kind,
                                model=source))
    nn.init.ones_(source.weight)
    for _ in range(iterations):
        average.update_parameters(source)
        nn.init.zeros_(source.weight)
    left = average.module.weight.item()
    if kind == 'StochasticWeightAverage':
        assert advice.initial_share(iterations, **options) == 0
    else:
        assert advice.initial_share(iterations, **options) == pytest.approx(left, rel=1e-4, abs=1e-7)


def test_all_mistakes_at_once_and_none():
    bad = Config(dict(
        default_scope='mmpretrain', optim_wrapper=dict(optimizer=dict(type='Adam', weight_decay=0.1)),
        model=dict(backbone=dict(type='TResNet'), head=dict(loss=dict(type='mmasl.AsymmetricLoss'))),
        train_cfg=dict(max_epochs=1), custom_hooks=[dict(type='EMAHook')]))
    site = classifier(-4.6, gamma_pos=1.)
    found = advice.find_mistakes(bad, stats_of([1, 0]), [site], 10)
    assert len(found) == 6
    bad.load_from = 'trained.pth'
    assert len(advice.find_mistakes(bad, stats_of([1, 0]), [site], 10)) == 5
    good = Config(dict(model=dict(head=dict(loss=dict(type='mmasl.AsymmetricLoss')))))
    assert advice.find_mistakes(good, stats_of([1, 1]), [classifier(0.)], 10) == []
