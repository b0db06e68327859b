"""Image transforms of the training recipes that mmcv and MMPretrain lack."""
import zlib
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness

from mmasl.errors import ConfigError
from mmasl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Cutout(BaseTransform):
    """Fill a rectangle around a random point of the image with a random color.

    The rectangle is cut off at the border, so its mean area is below the nominal one. The transform is ``CutoutPIL`` of
    the official train.py. MMPretrain's Cutout uses one color and moves the rectangle inside the image instead.

    Required and modified key: ``img``, uint8 (H, W, 3). The input array is not changed.

    Args:
        size: Sides of the rectangle as a share of the sides of the image, in (0, 1].

    Raises:
        ConfigError: ``size`` is out of its range.
    """

    def __init__(self, size: float = 0.5) -> None:
        if not 0 < size <= 1:
            raise ConfigError(f'size={size} is out of range; set a share of the side in (0, 1].')
        self.size = size

    def transform(self, results: dict) -> dict:
        """Apply the transform to ``results['img']``."""
        img = results['img'].copy()
        *center, color = self.draw(*img.shape[:2])
        img[tuple(map(self._extent, center, img.shape))] = color
        results['img'] = img
        return results

    @cache_randomness
    def draw(self, height: int, width: int) -> tuple[int, int, np.ndarray]:
        """Draw row and column of the center, and a color."""
        return np.random.randint(height), np.random.randint(width), np.random.randint(256, size=3)

    def _extent(self, center: int, side: int) -> slice:
        half = int(self.size * side + 0.5) // 2
        # Pillow includes the last row and column.
        return slice(max(center - half, 0), center + half + 1)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size})'


@TRANSFORMS.register_module()
class OmitLabels(BaseTransform):
    """Remove a share of the positive labels of multi-label training images, for experiments with missing labels.

    Whether a label is removed depends on the seed, the file name and the label alone: it is the same in every epoch,
    and a larger share removes the same labels and more.

    Required key: ``img_path``, and ``gt_label`` (list of int) or ``gt_score`` (array of 1, 0 and -1). Modified key:
    ``gt_label`` and ``gt_score``, whichever exists.

    Args:
        share: Probability of each label to be removed, in [0, 1).
        seed: Seed.

    Raises:
        ConfigError: ``share`` is out of its range.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise ConfigError(f'share={share} is out of range; set a share of the labels in [0, 1).')
        self.share = share
        self.seed = seed

    def transform(self, results: dict) -> dict:
        """Apply the transform to the labels."""
        name = Path(results['img_path']).name
        if 'gt_label' in results:
            results['gt_label'] = [label for label in results['gt_label'] if self._keep(name, label)]
        if 'gt_score' in results:
            score = np.array(results['gt_score'])
            score[[label for label in np.flatnonzero(score > 0) if not self._keep(name, label)]] = 0
            results['gt_score'] = score
        return results

    def _keep(self, name: str, label: int) -> bool:
        return zlib.crc32(f'{self.seed} {name} {label}'.encode()) >= self.share * 2**32

    def __repr__(self) -> str:
        return f'{type(self).__name__}(share={self.share}, seed={self.seed})'
