"""MMPretrain's MultiLabelLinearClsHead with calibrated predictions and a loss in chunks of classes."""
from typing import Any

import torch
from mmpretrain.models import heads
from mmpretrain.structures import DataSample
from torch import Tensor

from mmasl.errors import ConfigError
from mmasl.models.losses.asymmetric_loss import as_divisor
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import linear_asymmetric_loss
from mmasl.registry import MODELS

from .calibrated_predictions import CalibratedPredictions


@MODELS.register_module()
class MultiLabelLinearClsHead(CalibratedPredictions, heads.MultiLabelLinearClsHead):
    """MMPretrain's MultiLabelLinearClsHead with :class:`CalibratedPredictions` and an optional loss in chunks.

    With ``chunk_size``, :func:`mmasl.ops.linear_asymmetric_loss` computes the layer ``fc`` and the loss together. Loss
    and gradients are the same up to rounding. Logits of all classes are never stored, nor are targets if the samples
    have ``gt_label`` and no ``gt_score``. Predictions and checkpoints are the same. Training reads the parameters of
    ``fc`` without calling it, so do not wrap ``fc`` by itself (FSDP) or replace it (LoRA).

    Args:
        chunk_size: Number of classes the loss computes at a time, >= 1; None: all, from logits.

    Raises:
        ConfigError: ``chunk_size`` is out of its range, or the loss has ``reduction='none'``, ``activated=True`` or a
            weight of unannotated labels.
    """

    def __init__(self, *args: Any, chunk_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if chunk_size is not None:
            if chunk_size < 1:
                raise ConfigError(f'chunk_size={chunk_size} is out of range; set a number of classes >= 1, or None.')
            if self.loss_module.reduction == 'none' or self.loss_module.activated:
                raise ConfigError(f"chunk_size={chunk_size} excludes reduction='none' and activated=True; change the "
                                  'loss.')
            if self.loss_module.weight_unannotated:
                raise ConfigError(f'chunk_size={chunk_size} excludes weight_unannotated='
                                  f'{self.loss_module.weight_unannotated}; remove one of them.')
        self.chunk_size = chunk_size

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        """Compute the loss of a batch, in chunks of classes if ``chunk_size`` is set."""
        if self.chunk_size is None:
            return super().loss(feats, data_samples, **kwargs)
        if kwargs:
            raise TypeError(f'With chunk_size={self.chunk_size} the loss does not accept {", ".join(kwargs)}.')
        loss, features = self.loss_module, self.pre_logits(feats)
        divisor = as_divisor(len(data_samples)) if loss.reduction == 'mean' else 1
        scale = (loss.loss_weight or 1.) / divisor
        # The condition of AsymmetricLoss.forward.
        track = loss.probability_sums.enabled and loss.training and torch.is_grad_enabled()
        value = linear_asymmetric_loss(
            features, self.fc.weight, self.fc.bias, self._target(data_samples, features.device),
            ignore_index=loss.ignore_index, scale=scale, chunk_size=self.chunk_size,
            class_weight=loss.class_weight, return_sums=track, **calibration_settings(loss))
        if isinstance(value, tuple):
            value, sums = value
            loss.probability_sums.add(sums, value.detach() / scale)
        return dict(loss=value if loss.loss_weight else 0. * value)

    def _target(self, data_samples: list[DataSample], device: torch.device) -> Tensor:
        """Targets (N, C), dense from ``gt_score`` or sparse from ``gt_label``."""
        if 'gt_score' in data_samples[0]:
            return torch.stack([sample.gt_score for sample in data_samples])
        labels = [sample.gt_label.to(device) for sample in data_samples]
        rows = torch.cat([torch.full_like(label, row) for row, label in enumerate(labels)])
        columns = torch.cat(labels)
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), torch.ones_like(columns, dtype=torch.float32),
                                       (len(labels), self.num_classes), check_invariants=False)
