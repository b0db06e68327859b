"""MMPretrain's multi-label heads with calibrated predictions, as mmasl.MultiLabelLinearClsHead and so on."""
from typing import Any

import torch
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import posterior, posterior_cap


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
