"""True probabilities from the logits of a model trained with the asymmetric loss, in closed form.

The expected loss of a label that is positive with probability pi is stationary where pi a G+ = (1 - pi)(1 - a) G-. G+
and G- are the gradient magnitudes of :mod:`mmasl.ops.torch_impl`. In log space:

    log pi / (1 - pi) = g- log p_m + log p - log(1 - p_m) - g+ log(1 - p) + log (1 - a) / a
                        + log(1 + g- B(-log(1 - p_m))) - log(1 + g+ B(-log p)),    B(x) = x / (e^x - 1)

The second line is 0 where the focusing weight is held constant. The log odds increase strictly in p > m, for all
parameters: G+ and G- are p (1 - p) times functions that rise with 1 - p and p_m, since w^g * -log(1 - w) is a power
series of positive coefficients.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmasl.errors import ConfigError
from mmasl.ops.functional import Parameter, as_parameter

# Bisection starts at these logits, and 80 halvings end at neighbouring numbers in float64. It stays in torch, since
# scipy.optimize.brentq takes one class at a time and would add a dependency.
BOUND, HALVINGS = 2.**20, 80


@torch.no_grad()
def posterior(logits: Tensor,
              *,
              gamma_pos: Parameter = 0.,
              gamma_neg: Parameter = 4.,
              clip: Parameter = 0.05,
              alpha: float | None = None,
              detach_focusing: bool = False) -> Tensor:
    """Probability that a label is positive, for the logits of a model that minimises the asymmetric loss.

    It rises with the logit, is 0 for p < m, and stays below :func:`posterior_upper_bound`. Rank on the logits, because
    all labels below the margin tie at 0. For focal loss it is the transformation of Charoenphakdee et al. (CVPR 2021,
    arXiv 2011.09172).

    Args:
        logits: (..., C), floating point, any finite value.
        gamma_pos: Focusing parameter g+ >= 0 of positives: a number, or a tensor of shape () or (C,).
        gamma_neg: Focusing parameter g- >= 0 of negatives, likewise.
        clip: Probability margin m in [0, 1), likewise.
        alpha: Weight of positives, above 0 and below 1; negatives had 1 - alpha. None for no weights.
        detach_focusing: Whether the loss held its focusing weights constant in the gradient.

    Returns:
        Probabilities of the logits' shape, in float64 for float64 logits and in float32 otherwise; no gradient.

    Raises:
        ValueError: ``alpha`` is 0 or 1, or a shape does not fit.
        TypeError: Integer logits.
    """
    return posterior_log_odds(logits, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, alpha=alpha,
                              detach_focusing=detach_focusing).sigmoid()


@torch.no_grad()
def posterior_log_odds(logits: Tensor,
                       *,
                       gamma_pos: Parameter = 0.,
                       gamma_neg: Parameter = 4.,
                       clip: Parameter = 0.05,
                       alpha: float | None = None,
                       detach_focusing: bool = False) -> Tensor:
    """Logarithm of the odds of :func:`posterior`, exact where the posterior rounds to 0 or 1; -inf for p < m.

    Args:
        logits, gamma_pos, gamma_neg, clip, alpha, detach_focusing: See :func:`posterior`.

    Returns:
        Log odds of the logits' shape, in float64 for float64 logits and in float32 otherwise; no gradient.

    Raises:
        ValueError, TypeError: As :func:`posterior`.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    gamma_pos, gamma_neg, clip = (as_parameter(value, logits, name) for name, value in (
        ('gamma_pos', gamma_pos), ('gamma_neg', gamma_neg), ('clip', clip)))
    z = logits.to(clip.dtype)
    p, log_p, log_q = z.sigmoid(), F.logsigmoid(z), F.logsigmoid(-z)
    log_not_p_m = torch.where(clip > 0, ((-z).sigmoid() + clip).log(), log_q)
    # At p = m the power of gamma 0 is 1, as xlogy has it.
    log_focus = torch.where(clip > 0, torch.xlogy(gamma_neg, (p - clip).clamp(min=0)), gamma_neg * log_p)
    log_odds = log_focus + log_p - log_not_p_m - gamma_pos * log_q + _log_weight_ratio(alpha)
    if not detach_focusing:
        log_odds += (gamma_neg * _bernoulli(-log_not_p_m)).log1p() - (gamma_pos * _bernoulli(-log_p)).log1p()
    return log_odds.masked_fill(p < clip, -torch.inf)


@torch.no_grad()
def posterior_upper_bound(*,
                          gamma_pos: Parameter = 0.,
                          gamma_neg: Parameter = 4.,
                          clip: Parameter = 0.05,
                          alpha: float | None = None,
                          detach_focusing: bool = False) -> Tensor:
    """The bound that :func:`posterior` approaches as p -> 1.

    It is below 1 only for ``clip`` > 0 and ``gamma_pos`` = 0. Its odds are then (1 - m)^g- / m, times
    1 + g- m / (1 - m) * -log m if the gradient passes through the focusing weight, times (1 - a) / a.

    Args:
        gamma_pos, gamma_neg, clip, alpha, detach_focusing: See :func:`posterior`.

    Returns:
        float64, of shape () or (C,).

    Raises:
        ValueError: ``alpha`` is 0 or 1.
    """
    gamma_pos, gamma_neg, clip = (torch.as_tensor(value, dtype=torch.float64) for value in (gamma_pos, gamma_neg, clip))
    log_odds = gamma_neg * (-clip).log1p() - clip.log() + _log_weight_ratio(alpha)
    if not detach_focusing:
        log_odds += (gamma_neg * _bernoulli(-clip.log())).log1p()
    return torch.where((clip > 0) & (gamma_pos == 0), log_odds.sigmoid(), 1.)


@torch.no_grad()
def posterior_threshold(value: float | Tensor = 0.5,
                        *,
                        gamma_pos: Parameter = 0.,
                        gamma_neg: Parameter = 4.,
                        clip: Parameter = 0.05,
                        alpha: float | None = None,
                        detach_focusing: bool = False) -> Tensor:
    """The smallest logit whose :func:`posterior` is at least ``value``; 1/2 gives the threshold of the best decision.

    With ``gamma_neg`` = 0 the posterior jumps at p = m, and all values inside the jump have the logit of m.

    Args:
        value: Probabilities in [0, 1]: a number, or a tensor that broadcasts with the parameters.
        gamma_pos, gamma_neg, clip, alpha, detach_focusing: See :func:`posterior`.

    Returns:
        float64 logits of the broadcast shape, () or (C,) for a single ``value``; inf for values that no logit reaches
        (at or above :func:`posterior_upper_bound`), and -inf for 0. Their sigmoid is the threshold of p.

    Raises:
        ValueError: ``value`` is outside [0, 1], or ``alpha`` is 0 or 1.
    """
    value, *parameters = (torch.as_tensor(x, dtype=torch.float64) for x in (value, gamma_pos, gamma_neg, clip))
    if not ((value >= 0) & (value <= 1)).all():
        raise ConfigError(f'value={value.tolist()} must be a probability, in [0, 1]')
    gamma_pos, gamma_neg, clip = parameters
    target = torch.broadcast_tensors(value.logit(), *parameters)[0]

    def reached(logit: Tensor) -> Tensor:
        return posterior_log_odds(logit, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, alpha=alpha,
                                  detach_focusing=detach_focusing) >= target

    low, high = torch.full_like(target, -BOUND), torch.full_like(target, BOUND)
    always, never = reached(low), ~reached(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = reached(middle)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.masked_fill(never, torch.inf).masked_fill(always, -torch.inf)


def _bernoulli(x: Tensor) -> Tensor:
    """x / (e^x - 1), which is 1 at 0."""
    return torch.where(x == 0, 1., x / x.expm1())


def _log_weight_ratio(alpha: float | None) -> float:
    """log (1 - a) / a."""
    if alpha is None:
        return 0.
    if not 0 < alpha < 1:
        raise ConfigError(f'alpha={alpha} leaves one kind of label without weight: the posterior needs 0 < alpha < 1')
    return math.log1p(-alpha) - math.log(alpha)
