from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image, ImageDraw

from mmasl.datasets.transforms import Cutout, OmitLabels
from mmasl.errors import ConfigError

ROOT = Path(__file__).parents[2]


def image(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet'])
def test_from_a_config(scope):
    with DefaultScope.overwrite_default_scope(scope):
        transform = TRANSFORMS.build(dict(type='mmasl.Cutout'))
    assert repr(transform) == 'Cutout(size=0.5)'
    before = image()
    results = transform(dict(img=before, gt_label=[3]))
    assert results['gt_label'] == [3] and (results['img'] != before).any()
    np.testing.assert_array_equal(before, image())


@pytest.mark.parametrize('row', [0, 1, 17, 39])
@pytest.mark.parametrize('column', [0, 30, 59])
@pytest.mark.parametrize('size', [0.03, 0.5, 0.55, 1.])
def test_is_the_rectangle_that_pillow_draws(row, column, size):
    color = (5, 150, 255)
    expected = Image.fromarray(image())
    half_height, half_width = int(size * 40 + 0.5) // 2, int(size * 60 + 0.5) // 2
    ImageDraw.Draw(expected).rectangle([max(column - half_width, 0), max(row - half_height, 0),
                                        min(column + half_width, 60), min(row + half_height, 40)], fill=color)
    transform = Cutout(size)
    transform.draw = lambda height, width: (row, column, np.array(color))
    found = transform(dict(img=image()))['img']
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_every_place_and_colour_is_as_likely():
    np.random.seed(0)
    transform = Cutout()
    drawn = [transform.draw(4, 5) for _ in range(4000)]
    places = np.zeros((4, 5))
    for row, column, _ in drawn:
        places[row, column] += 1
    assert np.abs(places - 200).max() < 5 * 200**0.5
    colors = np.stack([color for *_, color in drawn])
    assert colors.min() == 0 and colors.max() == 255
    # The standard error of a mean is 256 / 12^0.5 / 4000^0.5 = 1.2.
    assert np.abs(colors.mean(0) - 127.5).max() < 5
    assert np.abs(np.corrcoef(colors.T)[np.triu_indices(3, 1)]).max() < 0.1


@pytest.mark.parametrize('size', [0, -0.5, 1.01, float('nan')])
def test_wrong_size(size):
    with pytest.raises(ConfigError, match=f'size={size} is out of range'):
        Cutout(size)


# --- RandAugment of the official train.py

# randaugment 1.0.2: the function of mmcv that does the same, what its argument is without any effect, and the ten
# levels, of which the first is never drawn.
LEVELS = dict(
    Rotate=('imrotate', 0, np.linspace(0, 30, 10)),
    Posterize=('posterize', 0, np.round(np.linspace(8, 4, 10))),
    Solarize=('solarize', 0, np.linspace(256, 0, 10)),
    ColorTransform=('adjust_color', 1, np.linspace(0, 0.9, 10)),
    Contrast=('adjust_contrast', 1, np.linspace(0, 0.9, 10)),
    Brightness=('adjust_brightness', 1, np.linspace(0, 0.9, 10)),
    Sharpness=('adjust_sharpness', 1, np.linspace(0, 0.9, 10)),
    Shear=('imshear', 0, np.linspace(0, 0.3, 10)),
    Translate=('imtranslate', 0, np.linspace(0, 150 / 331, 10)),
    Cutout=('cutout', 0, np.round(np.linspace(0, 20, 10))))


@pytest.fixture(scope='module')
def operations() -> list:
    """The operations of the official pipeline's RandAugment that have a magnitude."""
    pipeline = Config.fromfile(ROOT / 'configs/_base_/datasets/official_pipeline.py').official_train_pipeline
    (config, ) = (step for step in pipeline if step.type == 'RandAugment')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return [operation for operation in TRANSFORMS.build(config) if operation.magnitude_range]


def applied(operation: object, function: str, monkeypatch, draws: int = 4000) -> np.ndarray:
    """What a transform of MMPretrain hands to mmcv, rounded and signed, on an image of one pixel."""
    seen = []

    def record(img: np.ndarray, *args, **kwargs) -> np.ndarray:
        seen.append([*args, *kwargs.values()][0])
        return img

    monkeypatch.setattr(f'mmcv.{function}', record)
    monkeypatch.setattr(operation, 'prob', 1)
    np.random.seed(0)
    for _ in range(draws):
        operation.transform(dict(img=np.zeros((1, 1, 3), np.uint8)))
    return np.array(seen)


def test_magnitudes_are_spread_as_those_of_the_official_script(operations, monkeypatch):
    assert {type(operation).__name__ for operation in operations} == set(LEVELS) and len(operations) == 12
    for operation in operations:
        name = type(operation).__name__
        function, neutral, levels = LEVELS[name]
        levels = levels[1:]
        found = applied(operation, function, monkeypatch) - neutral
        # Both directions as often; the package rotates by positive angles, which are counterclockwise in Pillow alone.
        negative = dict(Rotate=1, Posterize=0, Solarize=0, Cutout=0).get(name, 0.5)
        assert (found < 0).mean() == pytest.approx(negative, abs=0.04 if negative == 0.5 else 0), name
        found, near = np.abs(found), 0.02 * np.ptp(levels)
        assert [found.min(), found.max()] == pytest.approx([levels.min(), levels.max()], abs=near), name
        assert found.mean() == pytest.approx(levels.mean(), abs=near), name


def test_bits_are_as_frequent_as_in_the_official_script(operations, monkeypatch):
    (posterize, ) = (operation for operation in operations if type(operation).__name__ == 'Posterize')
    found, levels = applied(posterize, 'posterize', monkeypatch), LEVELS['Posterize'][2][1:]
    for bits in range(9):
        assert (found == bits).mean() == pytest.approx((levels == bits).mean(), abs=0.03 * (4 <= bits <= 8))


def omit(share: float, seed: int = 0) -> dict[str, list[int]]:
    """Labels that remain, by image."""
    transform = OmitLabels(share, seed)
    return {name: transform(dict(img_path=f'folder/{name}.jpg', gt_label=list(range(20))))['gt_label']
            for name in map(str, range(500))}


def test_labels_are_omitted_by_name_and_seed():
    kept = {share: omit(share) for share in (0., 0.3, 0.6)}
    counts = {share: sum(map(len, labels.values())) for share, labels in kept.items()}
    assert counts[0.] == 10_000 and kept == {share: omit(share) for share in kept} and kept[0.3] != omit(0.3, seed=1)
    assert all(set(kept[0.6][name]) <= set(kept[0.3][name]) for name in kept[0.])
    for share in (0.3, 0.6):  # 5 standard deviations of 10,000 draws
        assert counts[share] == pytest.approx(10_000 * (1 - share), abs=5 * (10_000 * share * (1 - share))**0.5)
    # Independent of each other: an image keeps a binomial number of its labels.
    assert np.var([len(labels) for labels in kept[0.6].values()]) == pytest.approx(20 * 0.6 * 0.4, rel=0.3)


def test_scores_lose_the_same_labels():
    score = np.array([1, 0, -1] * 7, np.float32)
    before = score.copy()
    found = OmitLabels(0.5)(dict(img_path='7.jpg', gt_score=score))['gt_score']
    labels = OmitLabels(0.5)(dict(img_path='7.jpg', gt_label=list(range(0, 21, 3))))['gt_label']
    np.testing.assert_array_equal(score, before)
    assert np.flatnonzero(found == 1).tolist() == labels and 0 < len(labels) < 7
    np.testing.assert_array_equal(found == -1, before == -1)


@pytest.mark.parametrize('share', [-0.1, 1])
def test_share_out_of_range(share):
    with pytest.raises(ConfigError, match='share of the labels'):
        OmitLabels(share)
