"""MMPretrain's multi-label heads with calibrated predictions, as mmasl.MultiLabelLinearClsHead and so on."""
from typing import Any

import torch
from mmpretrain.models import heads
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmasl.losses import AsymmetricLoss, as_divisor
from mmasl.ops import posterior, posterior_cap
from mmasl.ops.linear_asymmetric_loss import linear_asymmetric_loss
from mmasl.registry import MODELS


def calibration_settings(loss: nn.Module) -> dict[str, Any]:
    """The arguments that :func:`mmasl.ops.posterior` and its kin need from the loss that a model was trained with.

    Raises:
        TypeError: The loss is no :class:`mmasl.AsymmetricLoss`.
        ValueError: Its labels without annotation have a focusing parameter of their own.
    """
    if not isinstance(loss, AsymmetricLoss):
        raise TypeError(f'{type(loss).__module__}.{type(loss).__name__} has no posterior in closed form: train with '
                        "loss=dict(type='mmasl.AsymmetricLoss', ...), or use MMPretrain's own head")
    if loss.gamma_unannotated is not None:
        raise ValueError(f'gamma_unannotated={loss.gamma_unannotated.tolist()} leaves no posterior in closed form: it '
                         'would take to know how many labels of an image are annotated. Leave it at None, which is '
                         "gamma_neg, or use MMPretrain's own head")
    return {name: getattr(loss, name) for name in ('gamma_neg', 'clip', 'detach_focusing', 'gamma_pos', 'alpha')}


class CalibratedPredictions:
    """Adds ``calibrated_score`` to the predictions of a multi-label head, and decides by it.

    ``pred_score``, the sigmoid, is left as it is, and is what to rank by: below the margin the calibrated score is 0.
    ``calibrated_score``, float32 (C,), is the probability that a label is positive, :func:`mmasl.ops.posterior` by the
    current parameters of the head's loss. ``pred_label`` holds the labels whose calibrated score exceeds ``thr``, by
    default 1/2; with ``topk`` alone, the k best as ever. Parameters and checkpoints are those of MMPretrain's head.

    Test-time augmentation by MMPretrain averages ``pred_score`` only; :class:`mmasl.MultiLabelTTAModel` does the rest.

    Raises:
        TypeError: The head's loss is no :class:`mmasl.AsymmetricLoss`.
        ValueError: The calibrated score of a class cannot exceed ``thr``.
    """
    loss_module: Any
    thr: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cap = posterior_cap(**calibration_settings(self.loss_module)).min().item()
        if self.thr is not None and cap <= self.thr:
            raise ValueError(f'thr={self.thr} is never exceeded: with clip={self.loss_module.clip.tolist()} and '
                             f'gamma_pos=0 the calibrated score stays below {cap:.3g}; lower clip or thr')

    def _get_predictions(self, cls_score: Tensor, data_samples: list[DataSample] | None) -> list[DataSample]:
        data_samples = super()._get_predictions(cls_score, data_samples)  # type: ignore[misc]  # the head's
        scores = posterior(cls_score, **calibration_settings(self.loss_module))
        for data_sample, score in zip(data_samples, scores):
            data_sample.set_field(score, 'calibrated_score')
            if self.thr is not None:
                data_sample.set_pred_label(torch.where(score > self.thr)[0])
        return data_samples


@MODELS.register_module()
class MultiLabelClsHead(CalibratedPredictions, heads.MultiLabelClsHead):
    """MMPretrain's MultiLabelClsHead with :class:`CalibratedPredictions`."""


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
        track = loss.track_probabilities and loss.training and torch.is_grad_enabled()
        value = linear_asymmetric_loss(
            features, self.fc.weight, self.fc.bias, self._target(data_samples, features.device),
            ignore_index=loss.ignore_index, scale=loss.loss_weight / divisor, chunk_size=self.chunk_size,
            return_sums=track, implementation=loss.implementation, **calibration_settings(loss))
        if isinstance(value, tuple):
            value, sums = value
            loss.probability_sums = sums if loss.probability_sums is None else loss.probability_sums + sums
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


@MODELS.register_module()
class CSRAClsHead(CalibratedPredictions, heads.CSRAClsHead):
    """MMPretrain's CSRAClsHead with :class:`CalibratedPredictions`."""
