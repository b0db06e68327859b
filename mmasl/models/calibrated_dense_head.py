"""Calibrated scores for the dense heads of MMDetection."""
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmasl.errors import ConfigError
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior_log_odds, posterior_upper_bound
from mmasl.registry import MODELS
from mmasl.utils.config import resolve_type

OWN_LOSS = ('AutoAssignHead', 'FreeAnchorRetinaHead')  # their likelihood of bags of locations is no sum over labels


@MODELS.register_module()
class CalibratedDenseHead:
    """Makes a dense head of MMDetection that predicts calibrated scores.

    In training, and in its parameters and checkpoints, it is the head of ``head_type``, of which it is an instance.
    In prediction it replaces each logit by the log odds of :func:`mmasl.ops.posterior`, with the current parameters of
    ``loss_cls``; the stock head then takes the sigmoid. The scores are probabilities that the assigner of the training
    gives the class to the location, or to the query. A centerness, IoU or objectness that the head multiplies them with
    is not changed.

    - ``score_thr`` of ``test_cfg`` applies to the calibrated score. Most are far below p: lower it with them.
    - The order of the scores of all classes does not change, unless the loss has parameters per class or a margin.
    - With a quality (IoU) as soft label of :class:`mmasl.AsymmetricLoss`, the score is the expected quality.

    Args:
        head_type: Type of the head, such as 'FCOSHead': its name in MMDetection's registry, or the class. Its
            ``predict_by_feat`` takes the logits first: maps (N, A * C, H, W) of A anchors, or (..., C).
        kwargs: Arguments of the head. ``loss_cls`` is :class:`mmasl.AsymmetricLoss` or MMDetection's FocalLoss.

    Raises:
        ConfigError: The head or its loss has no posterior in closed form.
    """
    loss_cls: nn.Module
    cls_out_channels: int

    def __new__(cls, head_type: Any = None, **kwargs: Any) -> Any:
        if cls is not CalibratedDenseHead:  # a copy
            return super().__new__(cls)
        return super().__new__(_calibrated(_find_head(head_type)))

    def __reduce__(self) -> tuple:
        """How to copy and pickle a head: its class is not an attribute of a module."""
        return _empty_head, (type(self).__mro__[2], ), self.__dict__

    def __init__(self, head_type: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        posterior_upper_bound(**_settings(self.loss_cls))  # checks the weights
        if not getattr(self, 'use_sigmoid_cls', True):
            raise ConfigError(f'{type(self).__name__} takes a softmax, which has no posterior in closed form: set '
                              'use_sigmoid=True in loss_cls, and use a head that reads it')

    def predict_by_feat(self, cls_scores: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as the stock head does, with calibrated logits."""
        return super().predict_by_feat(self.calibrate(cls_scores), *args, **kwargs)  # type: ignore[misc]  # the head's

    @torch.no_grad()
    def calibrate(self, cls_scores: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Log odds of the posterior.

        Args:
            cls_scores: Logits: maps (N, A * C, H, W) of each level, or (..., C).

        Returns:
            Log odds of the same shapes, -inf below a margin. They are float32 for half precision, in which the sigmoids
            of confident ones would tie at 1.
        """
        settings = _settings(self.loss_cls)
        if isinstance(cls_scores, Tensor):
            return posterior_log_odds(cls_scores, **settings)
        found = []
        for logits in cls_scores:
            classes_last = logits.unflatten(1, (-1, self.cls_out_channels)).movedim(2, -1)
            found.append(posterior_log_odds(classes_last, **settings).movedim(-1, 2).flatten(1, 2))
        return found


@lru_cache
def _calibrated(stock: type) -> type:
    return type(f'Calibrated{stock.__name__}', (CalibratedDenseHead, stock), dict(__module__=__name__))


def _empty_head(stock: type) -> Any:
    """A head of the class for a stock head, before its state is set."""
    head: Any = _calibrated(stock)
    return head.__new__(head)


def _find_head(head_type: Any) -> type:
    """The class of a head, checked."""
    current = DefaultScope.get_current_instance()
    found = resolve_type(head_type, MMENGINE_MODELS, current.scope_name if current else 'mmdet')
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"head_type={head_type!r} is not a head of MMDetection: give its type, such as 'FCOSHead'")
    predict: Any = getattr(found, 'predict_by_feat', None)
    first = [*inspect.signature(predict).parameters][1:2] if predict else []
    if not first or not first[0].endswith('cls_scores'):
        raise ConfigError(f'head_type={found.__name__}: its predict_by_feat does not take class logits first. Keep the '
                          'stock head')
    if own := {base.__name__ for base in found.__mro__} & set(OWN_LOSS):
        raise ConfigError(f'head_type={found.__name__}: {own.pop()} has a loss of its own, without a posterior in '
                          'closed form. Keep the stock head')
    return found


def _settings(loss: nn.Module) -> dict[str, Any]:
    """Arguments of the posterior of a dense head's loss."""
    from mmdet.models import FocalLoss

    if getattr(loss, 'activated', False):
        raise ConfigError(f'{type(loss).__name__}(activated=True): the head predicts probabilities, and calibration '
                          'needs logits. Keep the stock head')
    if type(loss) is FocalLoss:
        return dict(gamma_pos=loss.gamma, gamma_neg=loss.gamma, clip=0., alpha=loss.alpha)
    return calibration_settings(loss)
