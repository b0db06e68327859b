"""Scenes of handwritten digits in COCO's layout: real labels, boxes and images without a download.

The digits are scikit-learn's copy of the UCI optical recognition set (1,797 samples of 8x8 pixels). A class is a
digit in a colour ('red 3'), an image is a textured ground with several of them.
"""
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

COLORS = dict(  # RGB
    red=(235, 40, 45), green=(45, 205, 70), blue=(60, 100, 255), yellow=(250, 225, 40),
    white=(245, 245, 245), pink=(255, 110, 215), cyan=(40, 225, 235), orange=(255, 140, 20))
FORMAT = 1  # raise it when the same settings give other files
SPLITS = ('train', 'val')
STAMP = 'digits.json'
MAX_OVERLAP = 0.1  # of the smaller of two boxes
PLACE_TRIES, SCENE_TRIES = 32, 200


@cache
def _samples() -> tuple[np.ndarray, np.ndarray]:
    """Bitmaps (1797, 8, 8) float32 in [0, 1] and their digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('The handwritten digits come with scikit-learn, which is not installed: '
                          'pip install "mmasl[demo]"') from error
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@cache
def handwriting(split: str) -> tuple[np.ndarray, ...]:
    """Sample numbers of each digit 0-9 in a split: a fixed fifth of every digit is kept for 'val'."""
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be one of {SPLITS}')
    target = _samples()[1]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(np.flatnonzero(target == digit)) for digit in range(10)]
    return tuple(order[len(order) // 5:] if split == 'train' else order[:len(order) // 5] for order in orders)


def _draw_ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dull textured ground, (size, size, 3) float32 RGB: gradient, blotches, strokes and grain."""
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
    """A sample about ``height`` pixels high, turned and sheared a little: opacity (h, w), cropped to its ink."""
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
    """Random boxes (n, 4) as x1, y1, x2, y2 for shapes (h, w) that hardly overlap, or None if this try failed.

    ``reach`` is the share of the free room around a centred box over which its place varies.
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
    """A data set of coloured digits, determined by these settings alone.

    Args:
        train, val: Number of images. Image i of a split is the same whatever their number.
        colors: 1 to 8 colours, hence 10 to 80 classes.
        size: Side of the square images in pixels.
        glyph: Smallest and largest height of a digit in pixels.
        labels_per_image: Mean number of digits in an image, >= 1, all of different classes.
        long_tail: Exponent a from 0 to 5: the r-th most frequent class is drawn with weight r^-a; 0 is uniform. Which
            class has which rank depends on the seed; ``class_weights`` and the files' ``info`` tell.
        missing: Share in [0, 1] of the training annotations left out. The digits stay in the images, the validation
            annotations stay complete, and a larger share leaves out those of a smaller one and more.
        single: One digit in each image, near its middle: for pre-training. ``labels_per_image`` must be 1.
        seed: Decides everything but the split of the handwriting, which is always the same.

    Raises:
        ValueError: A setting is out of its range.
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
                raise ValueError(f'{name} is {getattr(self, name)!r}; it must be {wanted}')

    @property
    def classes(self) -> list[str]:
        """Names of the classes: every digit in the first colour, then in the second, ..."""
        return [f'{color} {digit}' for color in list(COLORS)[:self.colors] for digit in range(10)]

    @property
    def _most(self) -> int:
        """Digits in the fullest images: 1 + Binomial(most - 1, about a half) has the mean ``labels_per_image``."""
        return 1 + math.ceil(2 * (self.labels_per_image - 1))

    @cached_property
    def class_weights(self) -> np.ndarray:
        """Weight with which each class is drawn, (10 * colors,) float64 of sum 1."""
        ranks = 1 + np.random.default_rng(self.seed).permutation(10 * self.colors)
        weights = ranks ** -float(self.long_tail)
        return weights / weights.sum()

    def draw(self, split: str, index: int) -> tuple[np.ndarray, list[dict]]:
        """Draw image ``index`` (from 0) of a split.

        Returns:
            The image, (size, size, 3) uint8 RGB, and one dict a digit: ``label`` (index into ``classes``), ``bbox``
            (x, y, w, h in pixels, tight around the ink) and ``handwriting`` (number of scikit-learn's sample).
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
            raise RuntimeError(f'found no place for {count} digits in image {index} of {split}: lower '
                               f'labels_per_image ({self.labels_per_image}) or raise size ({self.size})')
        digits = []
        for label, number, glyph, (x1, y1, x2, y2) in zip(labels, numbers, glyphs, boxes.tolist()):
            ink = np.array(list(COLORS.values())[label // 10]) * rng.uniform(0.85, 1) + rng.uniform(-10, 10, 3)
            patch = ground[y1:y2, x1:x2]
            patch += glyph[..., None] * (ink.clip(0, 255) - patch)
            digits.append(dict(label=int(label), bbox=[x1, y1, x2 - x1, y2 - y1], handwriting=number))
        return ground.round().astype(np.uint8), digits

    def write(self, root: str | Path, overwrite: bool = False) -> Path:
        """Write the data set, or do nothing if ``root`` already holds one of the same settings.

        The layout is COCO's: ``train/*.png``, ``val/*.png`` and ``annotations/instances_{train,val}.json``, with
        category ids from 1. ``digits.json`` keeps the settings. ``root`` appears only when everything is written.

        Args:
            root: Folder to create.
            overwrite: Replace digits of other settings.

        Returns:
            ``root``.

        Raises:
            FileExistsError: ``root`` holds digits of other settings, or files that are not ours.
        """
        root = Path(root)
        stamp = json.loads(json.dumps(dict(format=FORMAT, **asdict(self))))
        if root.exists() and any(root.iterdir()):
            if not (root / STAMP).exists():
                raise FileExistsError(f'{root} holds other files (no {STAMP}): give a folder of its own to the digits')
            found = json.loads((root / STAMP).read_text())
            if found == stamp:
                return root
            if not overwrite:
                differ = ', '.join(f'{name} {found.get(name)!r} (asked: {stamp[name]!r})'
                                   for name in stamp if found.get(name) != stamp[name])
                raise FileExistsError(f'{root} holds digits with {differ}: give another folder, or overwrite '
                                      '(--overwrite)')
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
        for index in tqdm(range(getattr(self, split)), desc=f'{root.name}/{split}', unit='img'):
            image, digits = self.draw(split, index)
            name = f'{index + 1:06d}.png'
            # Uncompressed: three times as quick to decode and to write as the weakest compression.
            if not cv2.imwrite(str(root / split / name), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0]):
                raise OSError(f'could not write {root / split / name}: is the disk full?')
            images.append(dict(id=index + 1, file_name=name, width=self.size, height=self.size))
            # A stream of its own, so that the share changes neither the pixels nor the order of what is left out.
            left_out = np.random.default_rng([self.seed, len(SPLITS), index]).random(len(digits)) < share
            for digit, skip in zip(digits, left_out):
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
