"""Losses of a model, and what calibration needs of them."""
from typing import Any

from torch import nn

from mmasl.errors import ConfigError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss


def find_losses(model: nn.Module) -> dict[str, AsymmetricLoss]:
    """The asymmetric losses of a model by the names of their modules, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AsymmetricLoss)}


def calibration_settings(loss: nn.Module) -> dict[str, Any]:
    """Read the arguments of :func:`mmasl.ops.posterior` from the loss that a model was trained with.

    Args:
        loss: The loss.

    Returns:
        The keyword arguments ``gamma_pos``, ``gamma_neg``, ``clip``, ``alpha``, ``pos_weight`` and ``detach_focusing``.

    Raises:
        ConfigError: The loss is not an :class:`mmasl.AsymmetricLoss`, unannotated labels have a gamma of their own, or
            soft labels are qualities.
    """
    if not isinstance(loss, AsymmetricLoss):
        raise ConfigError(f'{type(loss).__module__}.{type(loss).__name__} has no posterior in closed form. Train with '
                          "loss=dict(type='mmasl.AsymmetricLoss', ...), or use the stock head.")
    if loss.gamma_unannotated is not None:
        raise ConfigError(f'gamma_unannotated={loss.gamma_unannotated.tolist()} has no posterior in closed form, since '
                          'the number of annotated labels of an image is unknown. Set gamma_unannotated=None, or use '
                          'the stock head.')
    if loss.soft_label != 'mixture':
        raise ConfigError(f'soft_label={loss.soft_label!r} has no posterior in closed form, since scores are trained '
                          "towards qualities and not towards shares of positives. Set soft_label='mixture', or use the "
                          'stock head.')
    return {name: getattr(loss, name) for name in ('gamma_pos', 'gamma_neg', 'clip', 'alpha', 'pos_weight',
                                                   'detach_focusing')}
