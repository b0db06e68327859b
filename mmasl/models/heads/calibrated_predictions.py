"""Calibrated predictions for multi-label heads that were trained with the asymmetric loss."""
import logging
from typing import Any

import torch
from mmengine.logging import print_log
from mmpretrain.structures import DataSample
from torch import Tensor

from mmasl.errors import ConfigError
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior, posterior_upper_bound


class StoredThresholds:
    """Mixin of a multi-label head that predicts by thresholds in the checkpoint, which tools/calibrate.py writes.

    ``thresholds``, float32 (C,), are thresholds of ``pred_score``; a label at its threshold is predicted. They are in
    the state dict under this name if there are any, so that stock checkpoints load strictly. They hold for the weights
    of the checkpoint only, so a training starts without them.
    """
    thresholds: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer('thresholds', None)  # type: ignore[attr-defined]  # the head's

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        found = state_dict.get(f'{prefix}thresholds')
        if found is not None:
            device = next(self.parameters(), found).device  # type: ignore[attr-defined]  # some have no parameters
            found = found.to(device, copy=True)
        self.thresholds = found
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """Set the training mode, which drops the thresholds."""
        if mode and self.thresholds is not None:
            print_log('the thresholds of the checkpoint are dropped: they do not hold for other weights. Calibrate '
                      'again after the training', 'current', logging.WARNING)
            self.thresholds = None
        return super().train(mode)  # type: ignore[misc]

    def _get_predictions(self, cls_score: Tensor, data_samples: list[DataSample] | None) -> list[DataSample]:
        data_samples = super()._get_predictions(cls_score, data_samples)  # type: ignore[misc]
        if self.thresholds is not None:
            for data_sample in data_samples:
                data_sample.set_pred_label(torch.where(data_sample.pred_score >= self.thresholds)[0])
        return data_samples


class CalibratedPredictions(StoredThresholds):
    """Mixin that adds ``calibrated_score`` to the predictions of a multi-label head.

    - ``calibrated_score``, float32 (C,), is the probability of a positive label, :func:`mmasl.ops.posterior` with the
      current parameters of the head's loss.
    - ``pred_score`` remains the sigmoid. Rank by it: all calibrated scores below the margin are 0.
    - ``pred_label`` holds the labels whose calibrated score exceeds ``thr``, by default 1/2. With only ``topk``, it
      holds the k highest scores, as in MMPretrain. Thresholds of the checkpoint come before both, see
      :class:`StoredThresholds`.

    Parameters and checkpoints are those of MMPretrain's head. For test-time augmentation, use
    :class:`mmasl.MultiLabelTTAModel`; MMPretrain's model averages ``pred_score`` only.

    Raises:
        ConfigError: The loss has no posterior in closed form, see
            :func:`mmasl.models.losses.utils.calibration_settings`, or the calibrated score of a class cannot exceed
            ``thr``.
    """
    loss_module: Any
    thr: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if problem := self.unreachable_threshold():
            raise ConfigError(f'{problem}. Lower clip or thr.')

    def unreachable_threshold(self) -> str:
        """Say why ``thr`` cannot be exceeded with the present parameters of the loss; '' if it can.

        :class:`mmasl.AdaptiveAsymmetryHook` may move them after the head is built.
        """
        bound = posterior_upper_bound(**calibration_settings(self.loss_module)).min().item()
        if self.thr is None or bound > self.thr:
            return ''
        return (f'thr={self.thr} is never exceeded: with clip={self.loss_module.clip.tolist()} and gamma_pos=0 the '
                f'calibrated score stays below {bound:.3g}')

    def _get_predictions(self, cls_score: Tensor, data_samples: list[DataSample] | None) -> list[DataSample]:
        data_samples = super()._get_predictions(cls_score, data_samples)
        scores = posterior(cls_score, **calibration_settings(self.loss_module))
        for data_sample, score in zip(data_samples, scores):
            data_sample.set_field(score, 'calibrated_score')
            if self.thr is not None and self.thresholds is None:
                data_sample.set_pred_label(torch.where(score > self.thr)[0])
        return data_samples
