"""Gradients of watched losses, against the equations and the losses of MMPretrain and MMDetection."""
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmasl import AsymmetricLoss
from mmasl.analysis.gradient import Setting
from mmasl.analysis.loss_sites import (
    GradientSums,
    LossSite,
    expand_target,
    find_loss_sites,
    quality_settings,
    watch_losses,
)
from mmasl.analysis.suggestion import LADDER
from mmasl.errors import ConfigError

CE = Setting(0, 0, 0)


def watched(module: nn.Module, *args, settings=None, key='model.head.loss', **kwargs) -> LossSite:
    site = LossSite(key, module)
    with watch_losses([site], [*LADDER.values()] if settings is None else settings):
        module(*args, **kwargs)
    return site


def assert_same(a: GradientSums, b: GradientSums) -> None:
    assert (a.positive, a.negative) == pytest.approx((b.positive, b.negative), rel=1e-4)
    assert a.silent == b.silent


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator), torch.rand(50, 6, generator=generator) < 0.2


def test_shares_against_the_equations(batch):
    """|dL/dz| is |p - y| for cross-entropy. With gamma_neg 2 and margin 0.1 negatives follow Eq. 8."""
    z, y = batch
    p = z.double().sigmoid()
    site = watched(AsymmetricLoss(0, 0, 0), z, y, settings=[CE, Setting(0, 2, 0.1)])
    assert (site.positives, site.negatives, site.form) == (y.sum(), (~y).sum(), 'dense')
    expected = GradientSums((1 - p[y]).sum().item(), p[~y].sum().item())
    assert_same(site.settings[CE], expected)
    assert_same(site.own, expected)
    assert expected.share == pytest.approx(expected.positive / (expected.positive + expected.negative))

    p_m = (p[~y] - 0.1).clamp(min=0)
    slope = p_m**2 * (1 / (1 - p_m) - 2 * (1 - p_m).log() / p_m) * p[~y] * (1 - p[~y])
    slope = slope.where(p_m > 0, 0)
    assert_same(site.settings[Setting(0, 2, 0.1)], GradientSums((1 - p[y]).sum().item(), slope.sum().item(),
                                                          int((p_m == 0).sum())))
    assert site.settings[Setting(0, 2, 0.1)].silent > 0
    assert site.prior == pytest.approx(z[~y].median().sigmoid().item())


LOSSES = dict(
    mmasl=('mmdet', dict(type='mmasl.AsymmetricLoss', gamma_pos=1, gamma_neg=4, clip=0.05), Setting(1, 4, 0.05)),
    official_form=('mmdet', dict(type='mmasl.AsymmetricLoss', gamma_pos=0, gamma_neg=4, detach_focusing=True,
                                 alpha=0.3, loss_weight=2.), Setting(0, 4, 0.05)),
    quality=('mmdet', dict(type='mmasl.AsymmetricLoss', gamma_pos=1, gamma_neg=2, clip=0, soft_label='mal'),
             Setting(1, 2, 0)),
    mmpretrain=('mmpretrain', dict(type='AsymmetricLoss', gamma_pos=1., gamma_neg=4., clip=0.05), Setting(1, 4, 0.05)),
    cross_entropy=('mmpretrain', dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5), Setting(0, 0, 0)),
    focal=('mmpretrain', dict(type='FocalLoss', gamma=2., alpha=0.25), Setting(2, 2, 0)),
    detection_focal=('mmdet', dict(type='FocalLoss', use_sigmoid=True, gamma=2., alpha=0.25), Setting(2, 2, 0)),
    detection_cross_entropy=('mmdet', dict(type='CrossEntropyLoss', use_sigmoid=True), Setting(0, 0, 0)))


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


def test_subclasses_count_as_their_class():
    from mmdet.models import FocalLoss, QualityFocalLoss

    focal = type('Mine', (FocalLoss, ), {})(gamma=3., alpha=0.4)
    quality = type('Mine', (QualityFocalLoss, ), {})(beta=1.5)
    both = type('Both', (AsymmetricLoss, QualityFocalLoss), {})(gamma_pos=1, gamma_neg=4, soft_label='mal')
    assert (LossSite('', focal).setting, LossSite('', focal).alpha) == (Setting(3, 3, 0), 0.4)
    assert quality_settings(quality) == dict(soft_label='qfl', gamma_pos=1.5)
    assert quality_settings(both) == dict(soft_label='mal', gamma_pos=1)
    assert LossSite('', both).setting == Setting(1, 4, 0.05)


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

    site = watched(quality_focal, z, (labels, quality), torch.tensor([1., 1., 0.]), settings=[Setting(2, 2, 0)])
    assert_same(site.own, site.settings[Setting(2, 2, 0)])
    assert site.own.positive == pytest.approx(abs(loss(-1 + 1e-5) - loss(-1 - 1e-5)) / 2e-5, rel=1e-4)

    site = watched(activated, z.sigmoid(), labels)
    assert_same(site.own, site.settings[Setting(2, 2, 0)])
    assert site.form == 'labels' and site.prior == pytest.approx(0.5744, abs=1e-4)


def test_ignored_and_unweighted_entries_do_not_count():
    z, y = torch.zeros(4, 3), torch.tensor([[1, 0, -1]] * 4)
    site = watched(AsymmetricLoss(0, 0, 0, ignore_index=-1), z, y, torch.tensor([1., 2., 0., 1.]))
    assert (site.positives, site.negatives) == (3, 3)
    assert_same(site.own, GradientSums(2., 2.))
    assert_same(site.settings[CE], GradientSums(2., 2.))


@pytest.mark.parametrize('target', (torch.tensor([[1, 0, -1]] * 4), torch.tensor([0, 1, 9, 3])),
                         ids=('dense', 'labels'))
def test_labels_without_annotation_are_negatives_by_their_weight(target):
    """Four of a quarter each, or three in a row that is marked; the others as they are."""
    z = torch.zeros(4, 3)
    index, positives, negatives, marked = (-1, 4, 4, 4) if target.dim() == 2 else (9, 2, 7, 3)
    site = watched(AsymmetricLoss(0, 0, 0, ignore_index=index, weight_unannotated=0.25), z, target,
                   settings=[CE, Setting(0, 4, 0.6)])
    assert (site.positives, site.negatives) == (positives, negatives + 0.25 * marked)
    assert_same(site.own, GradientSums(positives / 2, (negatives + 0.25 * marked) / 2))
    assert_same(site.own, site.settings[CE])
    assert site.settings[Setting(0, 4, 0.6)].silent == site.negatives
    weighted = watched(site.module, z, target, torch.tensor([0., 1., 1., 1.]), settings=[CE])
    assert (weighted.positives, weighted.negatives) == ((3, 3.75) if index == -1 else (1, 5.75))
    assert_same(weighted.own, weighted.settings[CE])


def test_own_gradient_is_that_of_its_setting_with_a_gamma_of_the_unannotated(batch):
    z, y = batch
    target = y.float().masked_fill(torch.arange(300).reshape(50, 6) % 3 == 0, -1)
    module = AsymmetricLoss(0, 2, 0.05, ignore_index=-1, weight_unannotated=0.5, gamma_unannotated=4, loss_weight=2.)
    site = watched(module, z, target, settings=[Setting(0, 2, 0.05), Setting(0, 4, 0.05)])
    assert_same(site.own, site.settings[Setting(0, 2, 0.05)])
    assert site.own.negative > site.settings[Setting(0, 4, 0.05)].negative
    assert site.negatives == (target == 0).sum() + 50


def test_softmax_divides_its_gradient_evenly(batch):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        module = MODELS.build(dict(type='CrossEntropyLoss'))
    site = watched(module, batch[0], torch.arange(50) % 6, avg_factor=50)
    assert site.softmax and site.setting is None and site.own.share == pytest.approx(0.5)


def test_only_calls_of_the_objective_are_watched(batch):
    module = AsymmetricLoss()
    site = LossSite('model.head.loss', module)
    with watch_losses([site], []):
        module(*batch)
        with torch.no_grad():
            module(*batch)
    module(*batch)
    assert site.positives == batch[1].sum()


def test_targets_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match=r'targets of shape \(4,\) for predictions of shape \(2, 3\)'):
        expand_target(torch.zeros(2, 3), torch.zeros(4), None)


def test_finds_the_losses_of_heads():
    def head(**losses: nn.Module) -> nn.Module:
        return nn.ModuleDict(losses)
    model = nn.ModuleDict(dict(
        head=head(loss_module=AsymmetricLoss()), bbox_head=head(loss_cls=nn.Identity(), loss_bbox=nn.Identity()),
        roi_head=nn.ModuleDict(dict(bbox_head=nn.ModuleList([head(loss_cls=nn.Identity())]))),
        other=head(loss_mine=AsymmetricLoss())))
    assert [site.key for site in find_loss_sites(model)] == [
        'model.head.loss', 'model.bbox_head.loss_cls', 'model.roi_head.bbox_head.0.loss_cls', 'model.other.loss_mine']
