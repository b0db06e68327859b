"""TODO."""
from typing import Any

import torch
from mmpretrain.models import heads
from mmpretrain.structures import DataSample
from torch import Tensor

from mmasl.models.heads.calibrated_predictions import CalibratedPredictions, calibration_settings
from mmasl.models.losses.asymmetric_loss import as_divisor
from mmasl.ops.linear_asymmetric_loss import linear_asymmetric_loss
from mmasl.registry import MODELS


@MODELS.register_module()
class MultiLabelLinearClsHead(CalibratedPredictions, heads.MultiLabelLinearClsHead):
    """MMPretrain's MultiLabelLinearClsHead with :class:`CalibratedPredictions`, and a loss without logits.

    With ``chunk_size`` the loss and its gradients are those of the same head without, to rounding, from the layer
    ``fc`` and the loss in one: :func:`mmasl.ops.linear_asymmetric_loss`. Neither logits nor targets of all classes are
    made, if the samples have ``gt_label`` and not ``gt_score``. Predictions and checkpoints are the same. ``fc`` is not
    called in training, only its parameters are read: do not wrap it on its own (FSDP), or replace it (LoRA).

    Args:
        chunk_size: Classes at a time in the loss; None for all at once, through the logits.

    Raises:
        ValueError: ``chunk_size`` is no number of classes, or the loss has ``reduction='none'``, ``activated=True``, or
            a weight of labels without annotation.
    """

    def __init__(self, *args: Any, chunk_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if chunk_size is not None:
            if chunk_size < 1:
                raise ValueError(f'chunk_size={chunk_size} must be 1 class or more, or None for all at once')
            if self.loss_module.reduction == 'none' or self.loss_module.activated:
                raise ValueError(f'chunk_size={chunk_size} needs a loss of logits that is added up as it is made: set '
                                 "reduction='mean' or 'sum' in the loss, and not activated=True")
            if self.loss_module.weight_unannotated:
                raise ValueError(f'chunk_size={chunk_size} does not know labels without annotation: leave out '
                                 f'chunk_size, or weight_unannotated={self.loss_module.weight_unannotated} in the loss')
        self.chunk_size = chunk_size

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        if self.chunk_size is None:
            return super().loss(feats, data_samples, **kwargs)
        if kwargs:
            raise TypeError(f'with chunk_size={self.chunk_size} the loss takes no {", ".join(kwargs)}')
        loss, features = self.loss_module, self.pre_logits(feats)
        divisor = as_divisor(len(data_samples)) if loss.reduction == 'mean' else 1
        # As AsymmetricLoss.forward tracks.
        track = loss.probability_sums.enabled and loss.training and torch.is_grad_enabled()
        value = linear_asymmetric_loss(
            features, self.fc.weight, self.fc.bias, self._target(data_samples, features.device),
            ignore_index=loss.ignore_index, scale=loss.loss_weight / divisor, chunk_size=self.chunk_size,
            return_sums=track, implementation=loss.implementation, **calibration_settings(loss))
        if isinstance(value, tuple):
            value, sums = value
            loss.probability_sums.add(sums)
        return dict(loss=value)

    def _target(self, data_samples: list[DataSample], device: torch.device) -> Tensor:
        """Dense targets from ``gt_score``, or sparse ones from ``gt_label``, (N, C)."""
        if 'gt_score' in data_samples[0]:
            return torch.stack([sample.gt_score for sample in data_samples])
        labels = [sample.gt_label.to(device) for sample in data_samples]
        rows = torch.cat([torch.full_like(label, row) for row, label in enumerate(labels)])
        columns = torch.cat(labels)
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), torch.ones_like(columns, dtype=torch.float32),
                                       (len(labels), self.num_classes), check_invariants=False)
