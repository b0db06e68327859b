"""Draws the predicted labels of an image."""
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain, count
from pathlib import Path
from string import ascii_letters, digits
from urllib.parse import urlparse

import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement

from mmasl.apis.label_rule import LabelRule

MAX_BARS, MIN_BARS = 20, 5  # labels that are not predicted fill the picture up to the minimum


def choose_name(image: str | None, taken: dict[str, str]) -> str:
    """Choose a unique file name, without suffix, for the picture of an image.

    Args:
        image: Path or URL; None for an array.
        taken: The image of each name so far. The new name is added.
    """
    path = urlparse(image).path if image and '://' in image else image
    stem = Path(path).stem or 'image' if path is not None else f'array_{len(taken)}'
    image = image or stem
    name = next(name for name in chain([stem], (f'{stem}_{i}' for i in count(1))) if taken.get(name, image) == image)
    taken[name] = image
    return name


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Convert an image, as a loader gives it, for drawing.

    Args:
        image: (H, W) or (H, W, C) of grey, grey with alpha, BGR or BGR with alpha. Values above 255, of 16 bits, are
            scaled by the maximum.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., 2::-1] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    most = image.max(initial=0)
    return (image * (255 / most) if most > 255 else image).astype(np.uint8)


@cache
def find_font(texts: tuple[str, ...]) -> str | None:
    """Find a font for texts that matplotlib's own font cannot draw, such as class names in Chinese.

    Returns:
        Name of an installed font that has all characters of the texts; None if the default font has them, or if no font
        does. A warning then says what to install.
    """
    characters = {ord(x) for x in ''.join(texts) + ascii_letters + digits if x.isprintable()}

    def lacks(path: str) -> set[int]:
        try:
            return characters - FT2Font(path).get_charmap().keys()
        except (OSError, RuntimeError):  # FreeType cannot open it
            return characters

    if not (missing := lacks(font_manager.findfont(font_manager.FontProperties()))):
        return None
    fonts = {font.fname: font.name for font in font_manager.fontManager.ttflist
             if not font.name.startswith('Last Resort')}  # matplotlib's: it has a box for every character
    if found := next((name for path, name in fonts.items() if not lacks(path)), None):
        return found
    print_log(f'No installed font has the characters {"".join(map(chr, sorted(missing)[:5]))} of the class names, so '
              'they are drawn as boxes. Install one (Debian: fonts-noto-cjk), or set font.sans-serif in matplotlibrc',
              'current', logging.WARNING)
    return None


@contextmanager
def use_font(texts: Iterable[str]) -> Iterator[None]:
    """Draw texts within this context in a font that has their characters, see :func:`find_font`."""
    with rc_context(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from', UserWarning)  # find_font says it once
        if font := find_font(tuple(map(str, texts))):
            rcParams['font.sans-serif'] = [font, *rcParams['font.sans-serif']]
        yield


def draw_labels(image: np.ndarray, sample: BaseDataElement, classes: Sequence[str], rule: LabelRule) -> np.ndarray:
    """Draw an image beside bars for its labels, with their scores and thresholds.

    Args:
        image: (H, W, 3) uint8, RGB.
        sample: Sample with ``pred_score``, ``pred_label`` and, if the rule needs it, ``calibrated_score``.
        classes: Names of the classes.
        rule: Rule that decided on the labels.

    Returns:
        The picture, (H', W', 3) uint8, RGB. Labels that are not predicted are grey.
    """
    predicted = set(sample.pred_label.tolist())
    # Predicted labels first: with a threshold per class, a label with a higher score may not be predicted.
    shown = sorted(rule.rank(sample).tolist(), key=lambda label: label not in predicted)
    shown = shown[:min(max(len(predicted), MIN_BARS), MAX_BARS)]
    scores = rule.score(sample)[shown].tolist()
    height = max(3.2, 0.3 * len(shown) + 1)
    figure = Figure(figsize=(9, height), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.axis('off')
    places = range(len(shown))
    right.barh(places, scores, color=['C0' if label in predicted else 'lightgrey' for label in shown])
    for place, label, score in zip(places, shown, scores):
        right.text(1.02, place, f'{score:.2f}', va='center', weight='bold' if label in predicted else 'normal')
    if rule.thr is not None:
        right.scatter(rule.thr[shown], places, marker='|', s=200, color='C3')
    names = (classes[label] for label in shown)
    right.set_yticks(places, [name if len(name) <= 28 else f'{name[:27]}…' for name in names], parse_math=False)
    hidden = max(len(predicted) - len(shown), 0)
    axis = ['calibrated score' if rule.calibrated else 'p']
    axis += ['thresholds in red'] if rule.thr is not None else []
    axis += [f'{hidden} more labels'] if hidden else []
    right.set(xlim=(0, 1), ylim=(max(len(shown), MIN_BARS) - 0.4, -0.6), xlabel=', '.join(axis))
    right.spines[['top', 'right']].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
