"""Thresholds of classes, as the metric, the heads and the inferencer take them."""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmasl.errors import ConfigError

STORED = 'head.thresholds'  # key of the thresholds in a state dict, see mmasl.models.heads.calibrated_predictions
NAMED_CLASSES = 10  # in an error message


def expand_thresholds(thr: float | Sequence[float] | Mapping[str, float], classes: Sequence[str],
                      default: float, name: str = 'thr') -> Tensor:
    """Expand thresholds to one per class.

    Args:
        thr: One number, one number per class, or numbers by class name; all in [0, 1].
        classes: Names of the C classes.
        default: Threshold of classes that a dict does not name.
        name: Name of the argument, for the message.

    Returns:
        float32 (C,).

    Raises:
        ConfigError: A threshold is outside [0, 1], a name is unknown, or the number of thresholds is not C.
    """
    if isinstance(thr, Mapping):
        if unknown := [key for key in thr if key not in classes]:
            more = ', ...' if len(classes) > NAMED_CLASSES else ''
            raise ConfigError(f'{name} has unknown classes {unknown}: the {len(classes)} classes are '
                              f'{", ".join(map(str, classes[:NAMED_CLASSES]))}{more}')
        thr = [thr.get(key, default) for key in classes]
    try:
        values = torch.as_tensor(thr, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f'{name}={thr!r}: give one number, one per class, or a dict by class name') from None
    if values.dim() > 1 or (values.dim() == 1 and len(values) != len(classes)):
        raise ConfigError(f'{name} has {values.numel()} values for {len(classes)} classes: give one number, one per '
                          'class, or a dict by class name')
    values = values.expand(len(classes))
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ConfigError(f'{name}={values[place]:g} of {classes[place]!r} must be in [0, 1]')
    return values
