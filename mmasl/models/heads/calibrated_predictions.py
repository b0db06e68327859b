"""Calibrated predictions for multi-label heads that were trained with the asymmetric loss."""
from typing import Any

import torch
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmasl.errors import ConfigError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import posterior, posterior_upper_bound


def calibration_settings(loss: nn.Module) -> dict[str, Any]:
    """Read the arguments of :func:`mmasl.ops.posterior` from the loss that a model was trained with.

    Args:
        loss: The loss.

    Returns:
        The keyword arguments ``gamma_pos``, ``gamma_neg``, ``clip``, ``alpha`` and ``detach_focusing``.

    Raises:
        ConfigError: The loss is not an :class:`mmasl.AsymmetricLoss`, or unannotated labels have a gamma of their own.
    """
    if not isinstance(loss, AsymmetricLoss):
        raise ConfigError(f'{type(loss).__module__}.{type(loss).__name__} has no posterior in closed form. Train with '
                          "loss=dict(type='mmasl.AsymmetricLoss', ...), or use MMPretrain's head.")
    if loss.gamma_unannotated is not None:
        raise ConfigError(f'gamma_unannotated={loss.gamma_unannotated.tolist()} has no posterior in closed form, since '
                          'the number of annotated labels of an image is unknown. Set gamma_unannotated=None, or use '
                          "MMPretrain's head.")
    return {name: getattr(loss, name) for name in ('gamma_pos', 'gamma_neg', 'clip', 'alpha', 'detach_focusing')}


class CalibratedPredictions:
    """Mixin that adds ``calibrated_score`` to the predictions of a multi-label head.

    - ``calibrated_score``, float32 (C,), is the probability of a positive label, :func:`mmasl.ops.posterior` with the
      current parameters of the head's loss.
    - ``pred_score`` remains the sigmoid. Rank by it: all calibrated scores below the margin are 0.
    - ``pred_label`` holds the labels whose calibrated score exceeds ``thr``, by default 1/2. With only ``topk``, it
      holds the k highest scores, as in MMPretrain.

    Parameters and checkpoints are those of MMPretrain's head. For test-time augmentation, use
    :class:`mmasl.MultiLabelTTAModel`; MMPretrain's model averages ``pred_score`` only.

    Raises:
        ConfigError: The loss has no posterior in closed form, see :func:`calibration_settings`, or the calibrated score
            of a class cannot exceed ``thr``.
    """
    loss_module: Any
    thr: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bound = posterior_upper_bound(**calibration_settings(self.loss_module)).min().item()
        if self.thr is not None and bound <= self.thr:
            raise ConfigError(f'thr={self.thr} is never exceeded: with clip={self.loss_module.clip.tolist()} and '
                              f'gamma_pos=0 the calibrated score stays below {bound:.3g}. Lower clip or thr.')

    def _get_predictions(self, cls_score: Tensor, data_samples: list[DataSample] | None) -> list[DataSample]:
        data_samples = super()._get_predictions(cls_score, data_samples)  # type: ignore[misc]  # the head's
        scores = posterior(cls_score, **calibration_settings(self.loss_module))
        for data_sample, score in zip(data_samples, scores):
            data_sample.set_field(score, 'calibrated_score')
            if self.thr is not None:
                data_sample.set_pred_label(torch.where(score > self.thr)[0])
        return data_samples
