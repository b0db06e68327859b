import numpy as np
import pytest
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image, ImageDraw

from mmasl.transforms import Cutout


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
    with pytest.raises(ValueError, match=f'size={size} must be a share'):
        Cutout(size)
