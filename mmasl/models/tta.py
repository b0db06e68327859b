"""Test-time augmentation for multi-label heads."""
from typing import Any

from mmpretrain.models import AverageClsScoreTTA
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.structures import DataSample

from mmasl.errors import ConfigError
from mmasl.registry import MODELS


@MODELS.register_module()
class MultiLabelTTAModel(AverageClsScoreTTA):
    """Averages the predictions of all views of an image, for multi-label heads.

    MMPretrain's AverageClsScoreTTA averages ``pred_score`` only, and keeps the other fields of the first view. This
    class also averages ``calibrated_score``, if the head predicts it, and derives ``pred_label`` from the means by the
    thresholds of the checkpoint, or ``thr`` or ``topk`` of the head.

    Args:
        module: The classifier, or its config.

    Raises:
        ConfigError: The head of the classifier is not multi-label.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = getattr(self.module, 'head', None)
        if not isinstance(head, MultiLabelClsHead):
            raise ConfigError(f'{type(head).__name__} is not a multi-label head; set tta_model.type to '
                              'AverageClsScoreTTA.')

    def _merge_single_sample(self, data_samples: list[DataSample]) -> DataSample:
        merged, head = super()._merge_single_sample(data_samples), self.module.head
        calibrated = 'calibrated_score' in merged
        if calibrated:
            mean = sum(sample.calibrated_score for sample in data_samples) / len(data_samples)
            merged.set_field(mean, 'calibrated_score')
        if (thresholds := getattr(head, 'thresholds', None)) is not None:
            return merged.set_pred_label((merged.pred_score >= thresholds).nonzero()[:, 0])
        if head.thr is None:
            return merged.set_pred_label(merged.pred_score.topk(head.topk).indices)
        # MMPretrain's heads predict scores equal to the threshold too.
        chosen = merged.calibrated_score > head.thr if calibrated else merged.pred_score >= head.thr
        return merged.set_pred_label(chosen.nonzero()[:, 0])
