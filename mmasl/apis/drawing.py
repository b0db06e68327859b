"""Draws the predicted labels of an image."""
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
