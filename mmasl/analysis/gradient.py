"""What a setting of the loss does to labels as their probability goes from 0 to 1: Sec. 2.5 of arXiv 2009.14119.

Loss and gradient are the operator's own, in float64; no formula is written a second time. Searches run over logits,
since p itself cannot tell what happens near 1.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import asymmetric_loss

# Logits of the searches; at the last one, 1 - p is 1e-304 and every limit for p -> 1 is reached.
LOW, HIGH, END = -40., 40., 700.


@dataclass(frozen=True)
class Setting:
    """One setting of the loss; see :class:`mmasl.AsymmetricLoss` for the arguments, all of them plain numbers here.

    Raises:
        ValueError: A parameter is out of its range, or is given per class.
    """
    gamma_pos: float = 0.
    gamma_neg: float = 4.
    clip: float = 0.05
    alpha: float | None = None
    detach_focusing: bool = False

    def __post_init__(self) -> None:
        for name in ('gamma_pos', 'gamma_neg', 'clip'):
            if not isinstance(value := getattr(self, name), (int, float)):
                raise ValueError(f"{name}={value} is given per class: analyse one class's number at a time")
        AsymmetricLoss(**asdict(self))

    @property
    def name(self) -> str:
        """The paper's name: CE (cross-entropy), focal, AF (asymmetric focusing), +PS (probability shifting), ASL."""
        if self.gamma_pos != self.gamma_neg:
            return 'ASL' if self.clip else 'AF'
        return ('focal' if self.gamma_neg else 'CE') + ('+PS' if self.clip else '')


@dataclass(frozen=True)
class Properties:
    """How the gradient of a negative, f(p) = d(-L-)/dz, runs over p; the rows of Table 1 follow from it.

    Args:
        threshold: f is exactly 0 for every p below this; 0 where there is no such interval. A margin so small, or a
            gamma so large, that p^(gamma + 1) is below e^-600 at the margin is not told from underflow.
        order: Exponent with which f / p, the gradient over cross-entropy's, vanishes as p falls to ``threshold``.
        p_star: f falls from here up to p = 1: the stationary point of the paper, or the jump itself where f falls
            right behind it. None if f rises up to p = 1.
        peak: Largest value of f.
        remaining: Limit of f / peak for p -> 1.
        jump: Largest discontinuity of f, relative to ``peak``; 0 if there is none.
    """
    threshold: float
    order: float
    p_star: float | None
    peak: float
    remaining: float
    jump: float

    @property
    def hard_threshold(self) -> bool:
        """Whether the easiest negatives have no gradient at all."""
        return self.threshold > 0

    @property
    def soft_threshold(self) -> bool:
        """Whether easy negatives are attenuated non-linearly: relative to cross-entropy their gradient tends to 0."""
        return self.order > 1e-4

    @property
    def discards_mislabelled(self) -> bool:
        """Whether the hardest negatives are discarded: the gradient tends to 0 for p -> 1."""
        return self.remaining < 1e-6

    @property
    def continuous(self) -> bool:
        """Whether the gradient is free of jumps."""
        return self.jump == 0

    @property
    def regimes(self) -> dict[str, tuple[float, float]]:
        """The three regimes of Sec. 2.5 as intervals of p, without those that are empty."""
        last = 1. if self.p_star is None else self.p_star
        intervals = {'hard threshold': (0., self.threshold), 'soft threshold': (self.threshold, last),
                     'mislabelled': (last, 1.)}
        return {name: (low, high) for name, (low, high) in intervals.items() if low < high}


def loss_and_gradient(p: Tensor, setting: Setting, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the logit, of negatives or positives, as functions of the probability.

    Args:
        p: Probabilities between 0 and 1, both excluded, of any shape.
        setting: Parameters of the loss.
        positive: -L+ of Eq. 7 instead of -L-.

    Returns:
        Loss and dL/dz, float64, of the shape of ``p``.
    """
    p = p.double()
    if not ((p > 0) & (p < 1)).all():
        raise ValueError(f'p must lie between 0 and 1, both excluded; got {p.min().item():g} to {p.max().item():g}')
    return _at(p.logit(), setting, positive)


@functools.cache
def analyse(setting: Setting) -> Properties:
    """Measure the gradient of negatives.

    Raises:
        ValueError: The gradient is 0 everywhere.
    """
    def gradient(z: Tensor | float) -> Tensor:
        return _at(torch.as_tensor(z, dtype=torch.float64), setting)[1]

    # Further to the left p^(gamma + 1) would be 0 for float64, which is no hard threshold.
    low = max(LOW, -600 / (setting.gamma_neg + 1))
    z = torch.linspace(low, HIGH, 8001, dtype=torch.float64)
    values = gradient(z)
    if not values.any():
        raise ValueError(f'{setting}: no negative has a gradient; lower gamma_neg, clip or alpha')
    first = int(values.nonzero()[0])
    edge = _bisect(lambda x: gradient(x) > 0, z[first - 1].item(), z[first].item()) if first else low
    threshold = _sigmoid(edge) if first else 0.

    z_star = _last_peak(gradient, edge, 1e-14 * (1 + setting.gamma_neg) * values.max().item())
    end = gradient(END).item()
    peak = max(values.max().item(), end, 0. if z_star is None else gradient(z_star).item())

    near = max(1e-5, _sigmoid(low))
    p = threshold + (1 - threshold) * torch.tensor([near, 2 * near], dtype=torch.float64)
    relative = gradient(p.logit()) / p
    return Properties(
        threshold=threshold,
        order=(relative[1] / relative[0]).log2().item(),
        p_star=None if z_star is None else _sigmoid(z_star),
        peak=peak,
        remaining=end / peak,
        jump=_largest_jump(gradient, z) / peak)


def _last_peak(gradient: Callable[[Tensor | float], Tensor], edge: float, rounding: float) -> float | None:
    """Logit from which the gradient falls for good, or None if it does not.

    It begins at ``edge``; ``rounding`` bounds its error, which a power of p grows with.
    """
    def slope(z: Tensor) -> Tensor:
        """Derivative by z, to the order h^4, in units of its rounding error."""
        h = ((z - edge) / 4).clamp(max=1e-3)
        difference = 8 * (gradient(z + h) - gradient(z - h)) - (gradient(z + 2 * h) - gradient(z - 2 * h))
        return difference / rounding

    # Dense behind the edge, where a gradient that starts with a jump or a power below 1 may turn at once.
    z = edge + torch.cat([torch.logspace(-9, -2, 500, dtype=torch.float64),
                          torch.linspace(0.01, HIGH - edge, 8000, dtype=torch.float64)])
    slopes = slope(z)
    rising = (slopes > 1).nonzero()
    last = int(rising[-1]) if len(rising) else -1
    falling = (slopes[last + 1:] < -1).nonzero()
    if not len(falling):
        return None
    if last < 0:
        return edge
    return _bisect(lambda x: slope(torch.tensor(x, dtype=torch.float64)) < 0, z[last].item(),
                   z[last + 1 + int(falling[0])].item())


def _largest_jump(gradient: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """Height of the largest jump between the first and the last of ``z``, or 0.

    Each cell of the grid is halved over and over toward its larger step: a continuous function's step shrinks with it,
    a jump stays.
    """
    low, high = z[:-1], z[1:]
    at_low, at_high = gradient(low), gradient(high)
    steps = []
    for _ in range(2):
        for _ in range(12):
            middle = (low + high) / 2
            value = gradient(middle)
            left = (value - at_low).abs() >= (at_high - value).abs()
            low, high = torch.where(left, low, middle), torch.where(left, middle, high)
            at_low, at_high = torch.where(left, at_low, value), torch.where(left, value, at_high)
        steps.append((at_high - at_low).abs())
    # Below 1e-9 of the gradient a step may be its rounding.
    stays = (steps[1] > 0.999 * steps[0]) & (steps[1] > 1e-9 * gradient(z).max())
    return torch.where(stays, steps[1], 0.).max().item()


def _bisect(beyond: Callable[[float], bool | Tensor], low: float, high: float) -> float:
    """Smallest number between ``low`` and ``high`` that is ``beyond``, as ``high`` is and ``low`` is not."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high


@torch.enable_grad()
def _at(logits: Tensor, setting: Setting, positive: bool = False) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss: Any = asymmetric_loss(logits, torch.full_like(logits, float(positive)), **asdict(setting))
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))
