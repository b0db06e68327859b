"""MMPretrain's Mixup, CutMix and ResizeMix for data sets with ignored labels.

MMPretrain's classes mix labels to lam y + (1 - lam) y'. The loss is linear in the label (Eq. 2 of arXiv 2009.14119), so
the loss of the mixed image is lam L(y) + (1 - lam) L(y'). Without ignored labels that is right. But they also mix the
number that marks an ignored label; the classes here do not.

MMPretrain looks up batch augmentations in a registry of its own. Give the path of the class as the type:
``type='mmasl.models.batch_augments.MultiLabelMixup'``.
"""
from typing import Any

import torch
from mmpretrain.models.utils import batch_augments
from torch import Tensor


class IgnoredLabels:
    """Mixin of a batch augmentation that ignores a mixed label if either of its images ignores it.

    An image with share 0, as for an empty patch, does not count. Do not combine it with a loss that treats ignored
    labels as negatives (``weight_unannotated``): a positive mixed with an ignored label would become negative. Let the
    data set set these labels to negative instead.

    Args:
        ignore_index: Value of ``gt_score`` for ignored labels, as in the loss.
    """

    def __init__(self, *args: Any, ignore_index: float = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ignore_index = ignore_index

    def __call__(self, batch_inputs: Tensor, batch_score: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch of images (B, 3, H, W) and their labels (B, C)."""
        ignored = batch_score == self.ignore_index
        # The mask is mixed like the labels. It becomes the share of the images that ignore the label.
        marked = torch.cat([batch_score.masked_fill(ignored, 0), ignored], dim=1)
        batch_inputs, marked = super().__call__(batch_inputs, marked)  # type: ignore[misc]  # the augmentation's
        score, unknown = marked.chunk(2, dim=1)
        return batch_inputs, score.masked_fill(unknown > 0, self.ignore_index)


class MultiLabelMixup(IgnoredLabels, batch_augments.Mixup):
    """MMPretrain's Mixup with :class:`IgnoredLabels`."""


class MultiLabelCutMix(IgnoredLabels, batch_augments.CutMix):
    """MMPretrain's CutMix with :class:`IgnoredLabels`."""


class MultiLabelResizeMix(IgnoredLabels, batch_augments.ResizeMix):
    """MMPretrain's ResizeMix with :class:`IgnoredLabels`."""
