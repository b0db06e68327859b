"""Counts the labels of a training set."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmasl.errors import DataError


@dataclass(frozen=True)
class LabelStatistics:
    """Label counts of a training set.

    Args:
        classes: Names of the C classes.
        counts: Number of images (classification) or objects (detection) of each class, (C,).
        per_image: Number of labels or objects of each image, (N,).
        ignored: Number of ignored labels: -1 in a multi-label set, crowds in detection.
        kind: 'multi-label', 'single-label' or 'detection'.
    """
    classes: tuple[str, ...]
    counts: np.ndarray
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
        negatives = self.images * len(self.classes) - self.ignored - positives
        return (negatives + weight_unannotated * self.ignored) / positives


def count_labels(dataset: Any, progress: Callable[[Iterable, str], Iterable] = lambda items, what: items,
                 ) -> LabelStatistics:
    """Count the labels of a data set of MMPretrain or MMDetection. No image is loaded.

    Args:
        dataset: The built data set. Wrappers that repeat or mix images are unwrapped.
        progress: Wraps the indices. Its second argument describes the step.

    Raises:
        DataError: A sample has no labels, a label has no class name, or the whole set has no label.
    """
    while type(dataset).__name__ in ('RepeatDataset', 'MultiImageMixDataset'):
        dataset = dataset.dataset
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    kinds, found, ignored = set(), [], 0
    for index in progress(range(len(dataset)), 'labels'):
        kind, labels, left_out = read_labels(dataset.get_data_info(index))
        kinds.add(kind)
        found.append(labels)
        ignored += left_out
    everything = [label for labels in found for label in labels]
    if not everything:
        raise DataError(f'none of the {len(found)} training images has a label: check the annotation file and '
                        'metainfo.classes')
    classes = dataset.metainfo.get('classes') or range(max(everything) + 1)
    if not 0 <= min(everything) <= max(everything) < len(classes):
        raise DataError(f'the training labels range from {min(everything)} to {max(everything)}, but metainfo.classes '
                        f'has {len(classes)} names: correct metainfo.classes')
    return LabelStatistics(tuple(map(str, classes)), np.bincount(everything, minlength=len(classes)),
                           np.array([len(labels) for labels in found]), ignored, max(kinds))


def read_labels(info: dict) -> tuple[str, list[int], int]:
    """Read the labels of one sample.

    Args:
        info: What ``get_data_info`` of a data set returns.

    Returns:
        Kind of the data as in :class:`LabelStatistics`, the positive labels, and the number of ignored labels.

    Raises:
        DataError: The sample has no labels.
    """
    if 'instances' in info:
        labels = [x['bbox_label'] for x in info['instances'] if not x.get('ignore_flag')]
        return 'detection', labels, len(info['instances']) - len(labels)
    if 'gt_score' in info:
        score = np.asarray(info['gt_score'])
        return 'multi-label', np.flatnonzero(score > 0).tolist(), int((score < 0).sum())
    if 'gt_label' not in info:
        raise DataError(f"{info.get('img_path', 'a sample')} has no gt_label, gt_score or instances: use the annotated "
                        'training set')
    label = np.asarray(info['gt_label'])
    return ('multi-label' if label.ndim else 'single-label'), label.reshape(-1).astype(int).tolist(), 0
