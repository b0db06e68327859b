"""Generated images of handwritten digits in COCO's layout, with labels and boxes and without a download.

The digits are scikit-learn's copy of the UCI optical recognition set (1,797 samples of 8x8 pixels). A class is a digit
in a color, such as 'red 3'. An image shows several digits on a textured background.
"""
import json
import math
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from mmasl.errors import ConfigError, DataError, UnavailableError

COLORS = dict(  # RGB
    red=(235, 40, 45), green=(45, 205, 70), blue=(60, 100, 255), yellow=(250, 225, 40),
    white=(245, 245, 245), pink=(255, 110, 215), cyan=(40, 225, 235), orange=(255, 140, 20))
FORMAT = 1  # increase it when the same settings give other files
SPLITS = ('train', 'val')
STAMP = 'digits.json'
MAX_OVERLAP = 0.1  # of the smaller of two boxes
PLACE_TRIES, SCENE_TRIES = 32, 200


@cache
def _samples() -> tuple[np.ndarray, np.ndarray]:
    """Bitmaps (1797, 8, 8), float32 in [0, 1], and their digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnavailableError('The handwritten digits are part of scikit-learn, which is not installed; run '
                               'pip install "mmasl[demo]".') from error
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@cache
def handwriting(split: str) -> tuple[np.ndarray, ...]:
    """Sample numbers of each digit 0-9 in a split. A fixed fifth of the samples of each digit belongs to 'val'.

    Raises:
        ConfigError: The split is unknown.
    """
    if split not in SPLITS:
        raise ConfigError(f'split={split!r} is unknown; set one of {SPLITS}.')
    target = _samples()[1]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(np.flatnonzero(target == digit)) for digit in range(10)]
    return tuple(order[len(order) // 5:] if split == 'train' else order[:len(order) // 5] for order in orders)


def _draw_ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a dull textured background, (size, size, 3) float32 RGB: gradient, blotches, strokes and grain."""
    def smooth(cells: int, spread: float) -> np.ndarray:
        return cv2.resize(rng.normal(0, spread, (cells, cells, 3)).astype(np.float32), (size, size),
                          interpolation=cv2.INTER_CUBIC)

    ground = rng.uniform(45, 95) + smooth(2, 12) + smooth(max(4, size // 10), 9)
    for _ in range(rng.integers(2, 6)):
        ends = rng.integers(0, size, 4).tolist()
        shade = (rng.uniform(30, 125) + rng.uniform(-15, 15, 3)).tolist()
        cv2.line(ground, ends[:2], ends[2:], shade, int(rng.integers(1, 3)))
    ground += rng.normal(0, 5, (size, size, 1)).astype(np.float32)
    return ground.clip(0, 140)


def _draw_glyph(rng: np.random.Generator, bitmap: np.ndarray, height: float) -> np.ndarray:
    """Draw a sample about ``height`` pixels high, slightly rotated and sheared: opacity (h, w), cropped to its ink."""
    angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
    stretch = rng.uniform(0.9, 1.2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[stretch, shear], [0, 1]]) * (height / 8)
    canvas = math.ceil(1.8 * height)
    shift = canvas / 2 - 0.5 - matrix @ [3.5, 3.5]
    opacity = cv2.warpAffine(bitmap, np.column_stack([matrix, shift]), (canvas, canvas), flags=cv2.INTER_CUBIC)
    opacity = ((opacity - 0.3) / 0.4).clip(0, 1)
    opacity[opacity < 0.1] = 0
    rows, cols = (np.flatnonzero(opacity.any(axis)) for axis in (1, 0))
    return opacity[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]


def _place(rng: np.random.Generator, shapes: list[tuple[int, int]], size: int, reach: float) -> np.ndarray | None:
    """Draw boxes (n, 4) as x1, y1, x2, y2 for shapes (h, w) that hardly overlap; None if there is no place.

    ``reach`` is the share of the free space around a centered box over which its position varies.
    """
    boxes: np.ndarray = np.empty((0, 4), int)
    for height, width in shapes:
        sides = np.array([width, height])
        room = size - sides
        corners = (room * (0.5 + reach * rng.uniform(-0.5, 0.5, (PLACE_TRIES, 2)))).round().astype(int)
        tries = np.hstack([corners, corners + sides])
        overlap = np.minimum(tries[:, None, 2:], boxes[:, 2:]) - np.maximum(tries[:, None, :2], boxes[:, :2])
        smaller = np.minimum(width * height, (boxes[:, 2:] - boxes[:, :2]).prod(1))
        free = (overlap.clip(0).prod(2) <= MAX_OVERLAP * smaller).all(1)
        if not free.any():
            return None
        boxes = np.vstack([boxes, tries[free.argmax()]])
    return boxes


@dataclass(frozen=True)
class DigitScenes:
    """Settings of a data set of colored digits. They determine every byte of it.

    Args:
        train, val: Number of images. Image i of a split does not depend on it.
        colors: Number of colors, 1 to 8, which gives 10 to 80 classes.
        size: Side of the square images in pixels.
        glyph: Smallest and largest height of a digit in pixels.
        labels_per_image: Mean number of digits in an image, >= 1. They belong to different classes.
        long_tail: Exponent a from 0 to 5. The r-th most frequent class has the weight r^-a; 0 is uniform. The seed
            determines the ranks of the classes, see ``class_weights`` and ``info`` in the files.
        missing: Share of the training annotations that are omitted, in [0, 1]. The digits remain in the images, and the
            validation annotations are complete. A larger share also omits all annotations that a smaller share omits.
        single: Draw one digit near the center of each image, for pre-training. ``labels_per_image`` must be 1.
        seed: Determines everything except the split of the handwriting, which is fixed.

    Raises:
        ConfigError: A setting is out of its range.
    """
    train: int = 12000
    val: int = 2000
    colors: int = 4
    size: int = 64
    glyph: tuple[int, int] = (14, 24)
    labels_per_image: float = 2.5
    long_tail: float = 0.
    missing: float = 0.
    single: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        smallest, largest = self.glyph
        most = self._most
        rules = (
            ('train', self.train >= 1, '>= 1'),
            ('val', self.val >= 1, '>= 1'),
            ('colors', 1 <= self.colors <= len(COLORS), f'1 to {len(COLORS)}'),
            ('glyph', 8 <= smallest <= largest <= 0.75 * self.size,
             f'two heights in pixels from 8, the smaller first, to 0.75 of the image size {self.size}'),
            ('labels_per_image', not self.single or self.labels_per_image == 1, '1 with single=True'),
            ('labels_per_image', self.labels_per_image >= 1, '>= 1'),
            ('labels_per_image', most <= 10 * self.colors and most * smallest * largest <= 0.75 * self.size**2,
             f'lower, or colors or size higher, or glyph smaller: images of up to {most} digits do not fit'),
            ('long_tail', 0 <= self.long_tail <= 5, '0 to 5'),
            ('missing', 0 <= self.missing <= 1, 'a share from 0 to 1'),
            ('seed', self.seed >= 0, '>= 0'))
        for name, holds, wanted in rules:
            if not holds:
                raise ConfigError(f'{name} is {getattr(self, name)!r}; it must be {wanted}.')

    @property
    def classes(self) -> list[str]:
        """Class names: the ten digits in the first color, then in the second, ..."""
        return [f'{color} {digit}' for color in list(COLORS)[:self.colors] for digit in range(10)]

    @property
    def _most(self) -> int:
        """Largest number of digits. 1 + Binomial(most - 1, about 1/2) has the mean ``labels_per_image``."""
        return 1 + math.ceil(2 * (self.labels_per_image - 1))

    @cached_property
    def class_weights(self) -> np.ndarray:
        """Probability with which each class is drawn, float64 (10 * colors,)."""
        ranks = 1 + np.random.default_rng(self.seed).permutation(10 * self.colors)
        weights = ranks ** -float(self.long_tail)
        return weights / weights.sum()

    def draw(self, split: str, index: int) -> tuple[np.ndarray, list[dict]]:
        """Draw one image.

        Args:
            split: 'train' or 'val'.
            index: Number of the image, from 0.

        Returns:
            The image, (size, size, 3) uint8 RGB, and one dict for each digit: ``label`` (index into ``classes``),
            ``bbox`` (x, y, w, h in pixels, tight around the ink) and ``handwriting`` (number of the sample).

        Raises:
            ConfigError: The split is unknown, or the digits do not fit into the image.
        """
        samples = handwriting(split)
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        ground = _draw_ground(rng, self.size)
        extra = self._most - 1
        count = 1 + rng.binomial(extra, (self.labels_per_image - 1) / max(extra, 1))
        labels = rng.choice(10 * self.colors, count, replace=False, p=self.class_weights)
        numbers = [int(rng.choice(samples[label % 10])) for label in labels]
        for _ in range(SCENE_TRIES):
            glyphs = [_draw_glyph(rng, _samples()[0][number], rng.uniform(*self.glyph)) for number in numbers]
            boxes = _place(rng, [glyph.shape for glyph in glyphs], self.size, 0.5 if self.single else 1)
            if boxes is not None:
                break
        else:
            raise ConfigError(f'{count} digits do not fit into image {index} of {split}. Lower labels_per_image '
                              f'({self.labels_per_image}) or increase size ({self.size}).')
        digits = []
        for label, number, glyph, (x1, y1, x2, y2) in zip(labels, numbers, glyphs, boxes.tolist()):
            ink = np.array(list(COLORS.values())[label // 10]) * rng.uniform(0.85, 1) + rng.uniform(-10, 10, 3)
            patch = ground[y1:y2, x1:x2]
            patch += glyph[..., None] * (ink.clip(0, 255) - patch)
            digits.append(dict(label=int(label), bbox=[x1, y1, x2 - x1, y2 - y1], handwriting=number))
        return ground.round().astype(np.uint8), digits

    def write(self, root: str | Path, overwrite: bool = False) -> Path:
        """Write the data set, or do nothing if ``root`` contains a data set with the same settings.

        The layout is COCO's: ``train/*.png``, ``val/*.png`` and ``annotations/instances_{train,val}.json``, with
        category ids from 1. ``digits.json`` stores the settings. ``root`` appears only when everything is written.

        Args:
            root: Folder to create.
            overwrite: Replace digits with other settings.

        Returns:
            ``root``.

        Raises:
            DataError: ``root`` contains digits with other settings, or other files.
            OSError: An image cannot be written.
        """
        root = Path(root)
        stamp = json.loads(json.dumps(dict(format=FORMAT, **asdict(self))))
        if root.exists() and any(root.iterdir()):
            if not (root / STAMP).exists():
                raise DataError(f'{root} contains other files and no {STAMP}. Give the digits a folder of their own.')
            found = json.loads((root / STAMP).read_text())
            if found == stamp:
                return root
            if not overwrite:
                differ = ', '.join(f'{name} {found.get(name)!r} (requested: {stamp[name]!r})'
                                   for name in stamp if found.get(name) != stamp[name])
                raise DataError(f'{root} contains digits with {differ}. Give another folder, or overwrite them '
                                '(--overwrite).')
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as temporary:
            partial = Path(temporary, root.name)
            (partial / 'annotations').mkdir(parents=True)
            for split in SPLITS:
                self._write_split(partial, split)
            (partial / STAMP).write_text(json.dumps(stamp, indent=2) + '\n')
            if root.exists():
                shutil.rmtree(root)
            partial.rename(root)
        return root

    def _write_split(self, root: Path, split: str) -> None:
        (root / split).mkdir()
        share = self.missing if split == 'train' else 0
        images, annotations, ann_id = [], [], 0
        for index in track(range(getattr(self, split)), f'{root.name}/{split}', console=Console(stderr=True),
                           disable=not sys.stderr.isatty()):
            image, digits = self.draw(split, index)
            name = f'{index + 1:06d}.png'
            # Without compression, reading and writing are three times as fast as with the weakest compression.
            if not cv2.imwrite(str(root / split / name), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0]):
                raise OSError(f'{root / split / name} cannot be written; check the free disk space.')
            images.append(dict(id=index + 1, file_name=name, width=self.size, height=self.size))
            # A separate random stream: the share changes neither the pixels nor the order of the omitted labels.
            omitted = np.random.default_rng([self.seed, len(SPLITS), index]).random(len(digits)) < share
            for digit, skip in zip(digits, omitted):
                ann_id += 1
                if not skip:
                    annotations.append(dict(
                        id=ann_id, image_id=index + 1, category_id=1 + digit['label'], bbox=digit['bbox'],
                        area=digit['bbox'][2] * digit['bbox'][3], iscrowd=0, segmentation=[],
                        handwriting=digit['handwriting']))
        content = dict(
            info=dict(description='coloured handwritten digits', class_weights=self.class_weights.tolist()),
            images=images, annotations=annotations,
            categories=[dict(id=1 + i, name=name, supercategory=name.split()[0])
                        for i, name in enumerate(self.classes)])
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


GLYPHS = DigitScenes(size=32, single=True, labels_per_image=1)  # pre-trains the backbone of configs/digits
