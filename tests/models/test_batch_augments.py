"""Mixup and cutmix of several labels: MMPretrain's through its preprocessor and a head, ours with ignored labels."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import BATCH_AUGMENTS, MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmasl.ops.reference import asymmetric_loss

STOCK = [dict(type='Mixup', alpha=0.4), dict(type='CutMix', alpha=1.), dict(type='ResizeMix', alpha=1.)]
OURS = [dict(augment, type=f"mmasl.models.batch_augments.MultiLabel{augment['type']}") for augment in STOCK]
NAMES = [augment['type'] for augment in STOCK]
LABELS = torch.tensor([[1., 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1]])
# Image n is 1 in channel n and 0 in all others: the mean over its pixels tells what a mixed image is made of.
IMAGES = torch.eye(6)[:, :, None, None].expand(-1, -1, 8, 8)


@pytest.fixture(autouse=True)
def setting() -> None:
    init_default_scope('mmpretrain')
    np.random.seed(3)
    torch.manual_seed(3)


class Flatten(nn.Flatten):
    """A backbone that gives the pixels."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (super().forward(images), )


def classifier(augment: dict, **loss) -> nn.Module:
    """A linear classifier of pixels, whose loss is not reduced."""
    loss = dict(type='mmasl.AsymmetricLoss', gamma_pos=1., gamma_neg=4., clip=0.05, reduction='none', **loss)
    head = dict(type='mmasl.MultiLabelLinearClsHead', num_classes=4, in_channels=6 * 8 * 8, loss=loss,
                init_cfg=dict(type='Normal', layer='Linear', std=0.3))
    model = MODELS.build(dict(type='ImageClassifier', backbone=Flatten(), head=head,
                              data_preprocessor=dict(num_classes=4), train_cfg=dict(augments=augment, probs=1.)))
    model.init_weights()
    return model


def shares(images: Tensor) -> Tensor:
    """(N, N): what each mixed image has of each image."""
    return images.mean((2, 3))


def mix_until_shared(augment: dict, score: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed shares and labels of a draw in which images do share, as cutmix's first patch may be empty."""
    augment = BATCH_AUGMENTS.build(augment)
    for _ in range(20):
        images, mixed = augment(IMAGES.clone(), score)
        if ((shares(images) > 0).sum(1) > 1).any():
            return shares(images), mixed
    raise AssertionError('20 draws without a mixture')


def by_hand(share: Tensor, score: Tensor) -> Tensor:
    """The mixed labels, where an image of any share makes a label ignored that it ignores."""
    mixed = torch.empty(share.shape[0], score.shape[1])
    for row, column in np.ndindex(*mixed.shape):
        parts = [(s.item(), y.item()) for s, y in zip(share[row], score[:, column]) if s > 0]
        mixed[row, column] = -1 if any(y == -1 for _, y in parts) else sum(s * y for s, y in parts)
    return mixed


@pytest.mark.parametrize('augment', STOCK + OURS, ids=lambda augment: augment['type'])
@pytest.mark.parametrize('given', ['indices', 'scores'])
def test_loss_of_a_mixed_image_is_the_mixture_of_losses(augment, given):
    """Eq. 2 is linear in y: lam L(y) + (1 - lam) L(y'), through MMPretrain's preprocessor and a head."""
    model = classifier(augment)
    samples = [DataSample().set_gt_label(row.nonzero()[:, 0]) if given == 'indices' else DataSample().set_gt_score(row)
               for row in LABELS]
    data = model.data_preprocessor(dict(inputs=IMAGES.clone(), data_samples=samples), training=True)
    share = shares(data['inputs'])
    assert ((share > 0) & (share < 1)).any() and torch.allclose(share.sum(1), torch.ones(6))
    loss = model.loss(data['inputs'], data['data_samples'])['loss']
    logits = model(data['inputs'])
    parts = torch.stack([asymmetric_loss(logits, row.expand(6, -1), gamma_pos=1., gamma_neg=4., clip=0.05)
                         for row in LABELS], dim=1)
    torch.testing.assert_close(loss, (share[:, :, None] * parts).sum(1).float())


@pytest.mark.parametrize('augment', OURS, ids=NAMES)
def test_a_label_is_ignored_where_a_part_ignores_it(augment):
    score = LABELS.clone()
    score[1, 0] = score[2, :2] = score[3, 3] = -1
    share, mixed = mix_until_shared(augment, score)
    expected = by_hand(share, score)
    torch.testing.assert_close(mixed, expected)
    assert (expected == -1).sum() > 4 and torch.equal(mixed == -1, expected == -1)


@pytest.mark.parametrize('augment', STOCK, ids=NAMES)
def test_stock_mixes_the_mark_of_ignored_labels(augment):
    """Why ours exist: a label that is positive in one image and ignored in the other would be taken for a soft one."""
    score = LABELS.clone()
    score[::2] = -1
    share, mixed = mix_until_shared(augment, score)
    assert ((mixed > -1) & (by_hand(share, score) == -1)).any()


@pytest.mark.parametrize('number', range(3), ids=NAMES)
def test_nothing_changes_without_ignored_labels(number):
    results = []
    for augment in (STOCK[number], OURS[number]):
        np.random.seed(5)
        torch.manual_seed(5)
        results.append(BATCH_AUGMENTS.build(augment)(IMAGES.clone(), LABELS.long()))
    (images, mixed), (our_images, our_mixed) = results
    assert torch.equal(images, our_images) and torch.equal(mixed, our_mixed)


def test_an_image_without_a_share_takes_no_label_away(monkeypatch):
    """lam = 1: Beta(alpha, alpha) of a small alpha rounds to it, and the patch of cutmix is empty."""
    monkeypatch.setattr(np.random, 'beta', lambda *_: 1.)
    score = LABELS.clone()
    score[:3] = -1
    for augment in OURS[:2]:
        _, mixed = BATCH_AUGMENTS.build(augment)(IMAGES.clone(), score)
        assert torch.equal(mixed, score)


def test_another_ignore_index():
    augment = BATCH_AUGMENTS.build(dict(OURS[0], ignore_index=255))
    _, mixed = augment(IMAGES.clone(), torch.full((6, 4), 255.))
    assert (mixed == 255).all()


def test_a_mixed_label_of_ones_stays_a_label():
    """Rounding may leave lam + (1 - lam) below 1, and never above, where the loss would refuse it."""
    for config in OURS[:2]:
        augment = BATCH_AUGMENTS.build(config)
        for _ in range(300):
            _, mixed = augment(IMAGES.clone(), torch.ones(6, 4))
            assert 1 - 1e-6 < mixed.min() and mixed.max() <= 1


def test_ignored_labels_have_no_loss_and_no_gradient():
    model = classifier(OURS[0], ignore_index=-1)
    score = LABELS.clone()
    score[3] = -1
    samples = [DataSample().set_gt_score(row) for row in score]
    data = model.data_preprocessor(dict(inputs=IMAGES.clone(), data_samples=samples), training=True)
    rows = shares(data['inputs'])[:, 3] > 0
    loss = model.loss(data['inputs'], data['data_samples'])['loss']
    assert 0 < rows.sum() < 6 and (loss[rows] == 0).all() and (loss[~rows] > 0).any(1).all()


@pytest.mark.parametrize('number', [0, 1], ids=['stock', 'ignored'])
def test_configs_of_the_page(number):
    text = (Path(__file__).parents[2] / 'docs' / 'errors.md').read_text()
    config = {}
    exec(re.findall(r'```python\n(.*?)```', text, re.DOTALL)[number], config)
    head = dict(type='mmasl.MultiLabelLinearClsHead', num_classes=4, in_channels=6 * 8 * 8)
    head['loss'] = config['model'].get('head', {}).get('loss', dict(type='mmasl.AsymmetricLoss'))
    model = MODELS.build(dict(type='ImageClassifier', backbone=Flatten(), head=head,
                              data_preprocessor=dict(num_classes=4), train_cfg=config['model']['train_cfg']))
    score = LABELS.clone()
    if number:
        score[2] = -1
    kinds = set()
    for _ in range(30):
        samples = [DataSample().set_gt_score(row) for row in score]
        data = model.data_preprocessor(dict(inputs=IMAGES.clone(), data_samples=samples), training=True)
        mixed, share = torch.stack([sample.gt_score for sample in data['data_samples']]), shares(data['inputs'])
        torch.testing.assert_close(mixed, by_hand(share, score))
        assert model.loss(data['inputs'], data['data_samples'])['loss'].isfinite()
        kinds.add('cutmix' if data['inputs'].unique().numel() == 2 else 'mixup')
    assert kinds == {'mixup', 'cutmix'}
