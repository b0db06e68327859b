"""Test-time augmentation for multi-label heads."""
from typing import Any

from mmpretrain.models import AverageClsScoreTTA
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.structures import DataSample

from mmasl.registry import MODELS


@MODELS.register_module()
class MultiLabelTTAModel(AverageClsScoreTTA):
    """MMPretrain's AverageClsScoreTTA, which averages ``pred_score`` and leaves all else as the first view has it.

    Here ``calibrated_score``, where the head predicts it, is the mean of the views' too: each of them estimates the
    same probability. ``pred_label`` is decided anew on the means, as the head decides: with its ``thr`` or ``topk``.

    Args:
        module: The classifier, or its config.

    Raises:
        TypeError: The classifier's head is not multi-label.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = getattr(self.module, 'head', None)
        if not isinstance(head, MultiLabelClsHead):
            raise TypeError(f'{type(head).__name__} is no multi-label head: set tta_model.type to AverageClsScoreTTA')

    def _merge_single_sample(self, data_samples: list[DataSample]) -> DataSample:
        merged, head = super()._merge_single_sample(data_samples), self.module.head
        calibrated = 'calibrated_score' in merged
        if calibrated:
            mean = sum(sample.calibrated_score for sample in data_samples) / len(data_samples)
            merged.set_field(mean, 'calibrated_score')
        if head.thr is None:
            return merged.set_pred_label(merged.pred_score.topk(head.topk).indices)
        # MMPretrain's heads include the threshold.
        chosen = merged.calibrated_score > head.thr if calibrated else merged.pred_score >= head.thr
        return merged.set_pred_label(chosen.nonzero()[:, 0])
