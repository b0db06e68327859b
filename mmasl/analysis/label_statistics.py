"""Counts the labels of a training set."""
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmengine.dataset import RepeatDataset
from torch import Tensor

from mmasl.errors import ConfigError, DataError
from mmasl.ops import effective_number_weights, inverse_frequency_weights, positive_weights
from mmasl.utils.config import metainfo_classes

WEIGHTS: dict[str, tuple[str, Callable[..., Tensor]]] = dict(  # argument of the losses, and what computes it
    inverse_frequency=('class_weight', inverse_frequency_weights),
    effective_number=('class_weight', effective_number_weights),
    positive=('pos_weight', positive_weights))


@dataclass(frozen=True)
class LabelStatistics:
    """Label counts of a training set.

    Args:
        classes: Names of the C classes.
        counts: Number of images (classification) or objects (detection) of each class, (C,).
        negatives: Number of images that lack each class, without those where its label is ignored, (C,).
        per_image: Number of labels or objects of each image, (N,).
        ignored: Number of ignored labels: -1 in a multi-label set, crowds in detection.
        kind: 'multi-label', 'single-label' or 'detection'.
    """
    classes: tuple[str, ...]
    counts: np.ndarray
    negatives: np.ndarray
    per_image: np.ndarray
    ignored: int
    kind: str

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.per_image)

    @property
    def order(self) -> np.ndarray:
        """Indices of the classes with labels, in descending order of their counts."""
        order = np.argsort(-self.counts, kind='stable')
        return order[self.counts[order] > 0]

    @property
    def empty(self) -> list[str]:
        """Names of the classes without labels."""
        return [name for name, count in zip(self.classes, self.counts) if not count]

    @property
    def imbalance(self) -> float:
        """Count of the most frequent class divided by the count of the rarest class that has labels."""
        return self.counts[self.order[0]] / self.counts[self.order[-1]]

    def negatives_per_positive(self, weight_unannotated: float = 0.) -> float:
        """Ratio of negative to positive labels of a classification set.

        In detection the ratio depends on the head: see :class:`mmasl.analysis.loss_sites.LossSite`.

        Args:
            weight_unannotated: Number of negatives that an ignored label counts as, as in the loss.
        """
        positives = self.counts.sum()
        return (self.negatives.sum() + weight_unannotated * self.ignored) / positives

    def loss_weights(self, kind: str, **options: float) -> dict[str, list[float]]:
        """Weights by class, as arguments of the losses, with 4 significant digits.

        Args:
            kind: 'inverse_frequency', 'effective_number' or 'positive': the function of :mod:`mmasl.ops` that computes
                them.
            **options: Keyword arguments of that function.

        Returns:
            The weights by the name of the argument, ``class_weight`` or ``pos_weight``.

        Raises:
            ConfigError: The kind or an option is unknown or out of its range, or the kind needs the negatives of a
                detector.
        """
        if kind not in WEIGHTS:
            raise ConfigError(f'weights {kind!r} are unknown: use one of {", ".join(WEIGHTS)}')
        name, function = WEIGHTS[kind]
        known = inspect.getfullargspec(function).kwonlyargs
        if unknown := ', '.join(sorted(options.keys() - known)):
            raise ConfigError(f'weights {kind!r} have no option {unknown}; known: {", ".join(known) or "none"}')
        if name == 'pos_weight' and self.kind == 'detection':
            raise ConfigError('the number of negatives of a detector depends on its head: use the weights '
                              'inverse_frequency or effective_number, or alpha')
        counts = (self.counts, self.negatives) if name == 'pos_weight' else (self.counts, )
        return {name: [float(f'{weight:.4g}') for weight in function(*counts, **options).tolist()]}


def count_labels(dataset: Any, progress: Callable[[Iterable, str], Iterable] = lambda items, what: items,
                 ) -> LabelStatistics:
    """Count the labels of a data set of MMPretrain or MMDetection. No image is loaded.

    Args:
        dataset: The built data set. Wrappers that repeat or mix images are unwrapped.
        progress: Wraps the indices. Its second argument describes the step.

    Raises:
        DataError: A sample has no labels, a label has no class name, or the whole set has no label.
    """
    while isinstance(dataset, RepeatDataset) or (not hasattr(dataset, 'get_data_info') and hasattr(
            dataset, 'dataset') and len(dataset) == len(dataset.dataset)):  # mixes images
        dataset = dataset.dataset
    if not hasattr(dataset, 'get_data_info'):
        raise DataError(f'{type(dataset).__name__} has no get_data_info, which gives the labels without the images')
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    kinds, found, per_image = set(), Counter[int](), []
    ignored: Any = 0  # of each class
    for index in progress(range(len(dataset)), 'labels'):
        kind, labels, left_out = read_labels(dataset.get_data_info(index))
        kinds.add(kind)
        found.update(labels)
        per_image.append(len(labels))
        ignored = ignored + left_out
    if not found:
        raise DataError(f'none of the {len(per_image)} training images has a label: check the annotation file and '
                        'metainfo.classes')
    classes = metainfo_classes(dataset.metainfo) or range(max(found) + 1)
    if not 0 <= min(found) <= max(found) < len(classes):
        raise DataError(f'the training labels range from {min(found)} to {max(found)}, but metainfo.classes '
                        f'has {len(classes)} names: correct metainfo.classes')
    if np.size(ignored) not in (1, len(classes)):
        raise DataError(f'gt_score has {len(ignored)} values, but metainfo.classes has {len(classes)} names: correct '
                        'metainfo.classes')
    counts = np.array([found[label] for label in range(len(classes))])
    kind = max(kinds)
    return LabelStatistics(
        tuple(map(str, classes)), counts, len(per_image) - counts - (0 if kind == 'detection' else ignored),
        np.array(per_image), int(np.sum(ignored)), kind)


def read_labels(info: dict) -> tuple[str, list[int], int | np.ndarray]:
    """Read the labels of one sample.

    Args:
        info: What ``get_data_info`` of a data set returns.

    Returns:
        Kind of the data as in :class:`LabelStatistics`, the positive labels, and the number of ignored labels: 0 or 1
        for each class of a multi-label set, (C,).

    Raises:
        DataError: The sample has no labels.
    """
    if 'instances' in info:
        labels = [x['bbox_label'] for x in info['instances'] if not x.get('ignore_flag')]
        return 'detection', labels, len(info['instances']) - len(labels)
    if 'gt_score' in info:
        score = np.asarray(info['gt_score'])
        return 'multi-label', np.flatnonzero(score > 0).tolist(), (score < 0).astype(int)
    if 'gt_label' not in info:
        raise DataError(f"{info.get('img_path', 'a sample')} has no gt_label, gt_score or instances: use the annotated "
                        'training set')
    if isinstance(info['gt_label'], dict):
        raise DataError(f"{info.get('img_path', 'a sample')} has labels of the tasks {list(info['gt_label'])}. Give a "
                        'config that trains one of them')
    label = np.asarray(info['gt_label'])
    return ('multi-label' if label.ndim else 'single-label'), label.reshape(-1).astype(int).tolist(), 0
