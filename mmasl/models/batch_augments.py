"""MMPretrain's mixup and cutmix for data sets with ignored labels; without any, MMPretrain's own are right.

Their mixed label is lam y + (1 - lam) y', and the loss is linear in the label (Eq. 2 of arXiv 2009.14119), so that of
the mixed image is lam L(y) + (1 - lam) L(y'). But they also mix the number that marks an ignored label.

MMPretrain looks batch augmentations up in a registry of its own, where the type is the path of the class:
``type='mmasl.models.batch_augments.MultiLabelMixup'``.
"""
from typing import Any

import torch
from mmpretrain.models.utils import batch_augments
from torch import Tensor


class IgnoredLabels:
    """A batch augmentation whose mixed label is ignored where either image's is, if that image has a share at all.

    Half of a label is unknown, and nothing is known of the sum. An image of share 0, as where the cut patch is empty,
    takes no label away. A loss that takes ignored labels for negatives (``weight_unannotated``) would make negatives of
    positives that meet one: for it, let the data set say negative instead.

    Args:
        ignore_index: Value of ``gt_score`` that marks ignored labels, as the loss has it.
    """

    def __init__(self, *args: Any, ignore_index: float = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ignore_index = ignore_index

    def __call__(self, batch_inputs: Tensor, batch_score: Tensor) -> tuple[Tensor, Tensor]:
        ignored = batch_score == self.ignore_index
        # Mixed like a label, the mark becomes the share of the images that it comes from.
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
