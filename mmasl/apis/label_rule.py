"""Decides which labels an image has, by thresholds and the number of labels."""
from collections.abc import Sequence
from typing import NamedTuple

from mmengine.structures import BaseDataElement
from torch import Tensor

from mmasl.errors import ConfigError


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
