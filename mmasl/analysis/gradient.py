"""The gradient of negatives over their probability: regimes, stationary point p* and jump (Sec. 2.5, arXiv 2009.14119).

The curves are computed by the loss itself, in float64. The properties follow from the closed forms of docs/analysis.md;
p* with focusing is the root of one equation.
"""
import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from mmasl.errors import ConfigError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import asymmetric_loss

LARGEST_LOGIT = 36.  # from about 37 on, p rounds to 1 in float64


@dataclass(frozen=True)
class Setting:
    """One setting of :class:`mmasl.AsymmetricLoss`, the same for all classes.

    Args:
        gamma_pos: Focusing parameter of positives, >= 0.
        gamma_neg: Focusing parameter of negatives, >= 0.
        clip: Probability margin, in [0, 1).
        alpha: Weight of positives, in [0, 1]; negatives have 1 - alpha. None weights neither.
        detach_focusing: Whether the focusing weight is constant in the gradient.

    Raises:
        ConfigError: A parameter is out of its range, or is given per class.
    """
    gamma_pos: float = 0.
    gamma_neg: float = 4.
    clip: float = 0.05
    alpha: float | None = None
    detach_focusing: bool = False

    def __post_init__(self) -> None:
        for name in ('gamma_pos', 'gamma_neg', 'clip'):
            if not isinstance(value := getattr(self, name), (int, float)):
                raise ConfigError(f'{name}={value} has one value per class: analyse one value at a time')
        try:
            AsymmetricLoss(**asdict(self))
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def __str__(self) -> str:
        return f'({self.gamma_pos:g}, {self.gamma_neg:g}, {self.clip:g})'

    @property
    def name(self) -> str:
        """Name in the paper: CE (cross-entropy), focal, AF (asymmetric focusing), +PS (probability shifting), ASL."""
        if self.gamma_pos != self.gamma_neg:
            return 'ASL' if self.clip else 'AF'
        return ('focal' if self.gamma_neg else 'CE') + ('+PS' if self.clip else '')


@dataclass(frozen=True)
class GradientProperties:
    """Properties of f(p) = dL/dz of a negative, as in Table 1 of the paper.

    Args:
        threshold: f is 0 for every p below this value.
        order: Exponent with which f / p, the gradient relative to cross-entropy, vanishes at ``threshold``.
        p_star: f decreases from here up to p = 1; None if f increases up to p = 1.
        peak: Largest value of f, or its supremum.
        remaining: Limit of f / peak for p -> 1.
        jump: Discontinuity of f at ``threshold``, relative to ``peak``.
    """
    threshold: float
    order: float
    p_star: float | None
    peak: float
    remaining: float
    jump: float

    @property
    def hard_threshold(self) -> bool:
        """Whether the easiest negatives have no gradient."""
        return self.threshold > 0

    @property
    def soft_threshold(self) -> bool:
        """Whether the gradient of easy negatives, relative to cross-entropy, tends to 0."""
        return self.order > 0

    @property
    def discards_mislabelled(self) -> bool:
        """Whether the gradient tends to 0 for p -> 1."""
        return self.remaining == 0

    @property
    def continuous(self) -> bool:
        """Whether the gradient has no jump."""
        return self.jump == 0

    @property
    def regimes(self) -> dict[str, tuple[float, float]]:
        """The three regimes of Sec. 2.5 as intervals of p, without empty ones."""
        last = 1. if self.p_star is None else self.p_star
        intervals = {'hard threshold': (0., self.threshold), 'soft threshold': (self.threshold, last),
                     'mislabelled': (last, 1.)}
        return {name: (low, high) for name, (low, high) in intervals.items() if low < high}


def loss_and_gradient(p: Tensor, setting: Setting, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Compute the loss of one label, and its derivative by the logit, as functions of the probability.

    Args:
        p: Probabilities in (0, 1), of any shape.
        setting: Parameters of the loss.
        positive: Whether the label is positive (-L+ of Eq. 7) or negative (-L-).

    Returns:
        Loss and dL/dz, float64, of the shape of ``p``.

    Raises:
        ValueError: A probability is outside (0, 1).
    """
    p = p.double()
    if not ((p > 0) & (p < 1)).all():
        raise ValueError(f'p must be in (0, 1), got {p.min().item():g} to {p.max().item():g}')
    with torch.enable_grad():
        logits = p.logit().detach().requires_grad_()
        loss: Any = asymmetric_loss(logits, torch.full_like(logits, float(positive)), **asdict(setting))
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@functools.cache
def analyse_gradient(setting: Setting) -> GradientProperties:
    """Find the properties of the gradient of negatives.

    Raises:
        ConfigError: The gradient is 0 everywhere.
    """
    weight = 1. if setting.alpha is None else 1 - setting.alpha
    margin = setting.clip
    jump = weight * margin * (1 - margin) if setting.gamma_neg == 0 else 0.
    end = weight if margin == 0 else 0.
    p_star = _p_star(setting)
    at_p_star = torch.tensor(0.5 if p_star is None else p_star, dtype=torch.float64)
    peak = max(jump, end, 0. if p_star is None else loss_and_gradient(at_p_star, setting)[1].item())
    if peak == 0:
        raise ConfigError(f'{setting} has no gradient at any negative: lower gamma_neg, clip or alpha')
    return GradientProperties(threshold=margin, order=setting.gamma_neg, p_star=p_star, peak=peak,
                              remaining=end / peak, jump=jump / peak)


def _p_star(setting: Setting) -> float | None:
    """Probability from which the gradient decreases; None if there is none below 1 in float64."""
    gamma, m = setting.gamma_neg, setting.clip
    if gamma == 0:
        return max(m, 1 + m - math.sqrt(m * (1 + m))) if m else None

    def slope(z: float) -> float:
        """(p - m) d log f / dp, arranged so that nothing cancels for p -> 1."""
        p, q = 1 / (1 + math.exp(-z)), 1 / (1 + math.exp(z))
        w, r = p - m, q + m
        if w <= 0:
            return gamma
        value = gamma + w / p - w * m / (r * q)
        if not setting.detach_focusing:
            value += gamma * (w + math.log(r)) / (w - gamma * r * math.log(r))
        return value

    low = math.log(m) - math.log1p(-m) if m else -LARGEST_LOGIT
    if slope(LARGEST_LOGIT) > 0:
        return None
    return 1 / (1 + math.exp(-brentq(slope, low, LARGEST_LOGIT)))
