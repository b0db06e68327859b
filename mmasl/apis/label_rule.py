"""Decides which labels an image has, by thresholds and the number of labels."""
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmasl.errors import ConfigError

NAMED_CLASSES = 10  # in an error message


class LabelRule(NamedTuple):
    """Rule that decides which labels an image has: those of the ``topk`` highest scores that pass ``thr``.

    Attributes:
        thr: Threshold of each class, float32 (C,), or None. As in the heads, p passes from its threshold on, and a
            calibrated score above it.
        topk: Number of labels, or None for all.
        calibrated: Whether the score is ``calibrated_score`` or ``pred_score``.
    """
    thr: Tensor | None
    topk: int | None
    calibrated: bool

    def score(self, sample: BaseDataElement) -> Tensor:
        """The scores of a sample, (C,)."""
        return sample.calibrated_score if self.calibrated else sample.pred_score

    def rank(self, sample: BaseDataElement) -> Tensor:
        """All labels in descending order of their scores. Calibrated scores of 0 are ranked by p."""
        order = sample.pred_score.argsort(descending=True, stable=True)
        return order[self.score(sample)[order].argsort(descending=True, stable=True)]

    def labels(self, sample: BaseDataElement) -> Tensor:
        """The labels of a sample in descending order of their scores, int64."""
        best, score = self.rank(sample)[:self.topk], self.score(sample)
        if self.thr is None:
            return best
        return best[(score > self.thr if self.calibrated else score >= self.thr)[best]]


def expand_thresholds(thr: float | Sequence[float] | Mapping[str, float], classes: Sequence[str],
                      default: float) -> Tensor:
    """Expand thresholds to one per class.

    Args:
        thr: One number, one number per class, or numbers by class name; all in [0, 1].
        classes: Names of the C classes.
        default: Threshold of classes that a dict does not name.

    Returns:
        float32 (C,).

    Raises:
        ConfigError: A threshold is outside [0, 1], a name is unknown, or the number of thresholds is not C.
    """
    if isinstance(thr, Mapping):
        if unknown := [name for name in thr if name not in classes]:
            more = ', ...' if len(classes) > NAMED_CLASSES else ''
            raise ConfigError(f'thr has unknown classes {unknown}: the {len(classes)} classes are '
                              f'{", ".join(map(str, classes[:NAMED_CLASSES]))}{more}')
        thr = [thr.get(name, default) for name in classes]
    values = torch.as_tensor(thr, dtype=torch.float32)
    if values.dim() > 1 or (values.dim() == 1 and len(values) != len(classes)):
        raise ConfigError(f'thr has {values.numel()} values for {len(classes)} classes: give one number, one per '
                          'class, or a dict by class name')
    values = values.expand(len(classes))
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ConfigError(f'thr={values[place]:g} of {classes[place]!r} must be in [0, 1]')
    return values


def parse_thresholds(values: Sequence[str]) -> float | dict[str, float] | None:
    """Parse the values of ``--thr``: nothing, one 'NUMBER', or any number of 'CLASS=NUMBER'.

    Raises:
        ConfigError: A value is neither, or the two forms are mixed.
    """
    parts = [value.rpartition('=') for value in values]
    try:
        named = {name: float(number) for name, equals, number in parts if equals}
        numbers = [float(number) for _, equals, number in parts if not equals]
    except ValueError:
        raise ConfigError(f'--thr {values}: give NUMBER or CLASS=NUMBER') from None
    if len(numbers) > 1 or (numbers and named):
        raise ConfigError(f'--thr {values}: give one NUMBER, or CLASS=NUMBER for each class')
    return numbers[0] if numbers else named or None
