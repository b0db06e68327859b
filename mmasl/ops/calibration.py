"""True probabilities from the logits of a model trained with the asymmetric loss, in closed form.

The expected loss of a label that is positive with probability pi is stationary where pi w+ G+ = (1 - pi) w- G-. G+
and G- are the gradient magnitudes of :mod:`mmasl.ops.torch_impl`, and w+ = alpha * pos_weight and w- = 1 - alpha the
weights of positives and negatives. A weight of the class is a factor of both sides. In log space:

    log pi / (1 - pi) = g- log p_m + log p - log(1 - p_m) - g+ log(1 - p) + log w- / w+
                        + log(1 + g- B(-log(1 - p_m))) - log(1 + g+ B(-log p)),    B(x) = x / (e^x - 1)

The second line is 0 where the focusing weight is held constant. The log odds increase strictly in p > m, for all
parameters: G+ and G- are p (1 - p) times functions that rise with 1 - p and p_m, since w^g * -log(1 - w) is a power
series of positive coefficients.
"""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmasl.errors import ConfigError
from mmasl.ops.functional import Parameter, as_optional, as_parameter

# Bisection starts at these logits, and 80 halvings end at neighbouring numbers in float64. It stays in torch, since
# scipy.optimize.brentq takes one class at a time and would add a dependency.
BOUND, HALVINGS = 2.**20, 80


@torch.no_grad()
def posterior(logits: Tensor,
              *,
              gamma_pos: Parameter = 0.,
              gamma_neg: Parameter = 4.,
              clip: Parameter = 0.05,
              alpha: Parameter | None = None,
              pos_weight: Parameter | None = None,
              detach_focusing: bool = False) -> Tensor:
    """Probability that a label is positive, for the logits of a model that minimises the asymmetric loss.

    It rises with the logit, is 0 for p < m, and stays below :func:`posterior_upper_bound`. Rank on the logits, because
    all labels below the margin tie at 0. For focal loss it is the transformation of Charoenphakdee et al. (CVPR 2021,
    arXiv 2011.09172).

    Args:
        logits: (..., C), floating point, any finite value.
        gamma_pos: Focusing parameter g+ >= 0 of positives: a number, or one per class, (C,).
        gamma_neg: Focusing parameter g- >= 0 of negatives, likewise.
        clip: Probability margin m in [0, 1), likewise.
        alpha: Weight of positives, above 0 and below 1, likewise; negatives had 1 - alpha. None for no weights.
        pos_weight: Further factor > 0 of positives, likewise. None for 1. ``class_weight`` of the loss weights both
            kinds of labels and does not matter.
        detach_focusing: Whether the loss held its focusing weights constant in the gradient.

    Returns:
        Probabilities of the logits' shape, in float64 for float64 logits and in float32 otherwise; no gradient.

    Raises:
        ValueError: ``alpha`` is 0 or 1, ``pos_weight`` is 0, or a shape does not fit.
        TypeError: Integer logits.
    """
    return posterior_log_odds(logits, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, alpha=alpha,
                              pos_weight=pos_weight, detach_focusing=detach_focusing).sigmoid()


@torch.no_grad()
def posterior_log_odds(logits: Tensor,
                       *,
                       gamma_pos: Parameter = 0.,
                       gamma_neg: Parameter = 4.,
                       clip: Parameter = 0.05,
                       alpha: Parameter | None = None,
                       pos_weight: Parameter | None = None,
                       detach_focusing: bool = False) -> Tensor:
    """Logarithm of the odds of :func:`posterior`, exact where the posterior rounds to 0 or 1; -inf for p < m.

    Args:
        logits, gamma_pos, gamma_neg, clip, alpha, pos_weight, detach_focusing: See :func:`posterior`.

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
    log_odds = log_focus + log_p - log_not_p_m - gamma_pos * log_q
    if (log_ratio := _log_weight_ratio(as_optional(alpha, logits, 'alpha'),
                                       as_optional(pos_weight, logits, 'pos_weight'))) is not None:
        log_odds += log_ratio
    if not detach_focusing:
        log_odds += (gamma_neg * _bernoulli(-log_not_p_m)).log1p() - (gamma_pos * _bernoulli(-log_p)).log1p()
    return log_odds.masked_fill(p < clip, -torch.inf)


@torch.no_grad()
def posterior_upper_bound(*,
                          gamma_pos: Parameter = 0.,
                          gamma_neg: Parameter = 4.,
                          clip: Parameter = 0.05,
                          alpha: Parameter | None = None,
                          pos_weight: Parameter | None = None,
                          detach_focusing: bool = False) -> Tensor:
    """The bound that :func:`posterior` approaches as p -> 1.

    It is below 1 only for ``clip`` > 0 and ``gamma_pos`` = 0. Its odds are then (1 - m)^g- / m, times
    1 + g- m / (1 - m) * -log m if the gradient passes through the focusing weight, times w- / w+.

    Args:
        gamma_pos, gamma_neg, clip, alpha, pos_weight, detach_focusing: See :func:`posterior`.

    Returns:
        float64, of shape () or (C,).

    Raises:
        ValueError: ``alpha`` is 0 or 1, or ``pos_weight`` is 0.
    """
    g_pos, g_neg, m, *weights = _in_float64(gamma_pos, gamma_neg, clip, alpha, pos_weight)
    log_odds = g_neg * (-m).log1p() - m.log()
    if (log_ratio := _log_weight_ratio(*weights)) is not None:
        log_odds = log_odds + log_ratio
    if not detach_focusing:
        log_odds = log_odds + (g_neg * _bernoulli(-m.log())).log1p()
    return torch.where((m > 0) & (g_pos == 0), log_odds.sigmoid(), 1.)


@torch.no_grad()
def posterior_threshold(value: float | Tensor = 0.5,
                        *,
                        gamma_pos: Parameter = 0.,
                        gamma_neg: Parameter = 4.,
                        clip: Parameter = 0.05,
                        alpha: Parameter | None = None,
                        pos_weight: Parameter | None = None,
                        detach_focusing: bool = False) -> Tensor:
    """The smallest logit whose :func:`posterior` is at least ``value``; 1/2 gives the threshold of the best decision.

    With ``gamma_neg`` = 0 the posterior jumps at p = m, and all values inside the jump have the logit of m.

    Args:
        value: Probabilities in [0, 1]: a number, or a tensor that broadcasts with the parameters.
        gamma_pos, gamma_neg, clip, alpha, pos_weight, detach_focusing: See :func:`posterior`.

    Returns:
        float64 logits of the broadcast shape, () or (C,) for a single ``value``; inf for values that no logit reaches
        (at or above :func:`posterior_upper_bound`), and -inf for 0. Their sigmoid is the threshold of p.

    Raises:
        ValueError: ``value`` is outside [0, 1], ``alpha`` is 0 or 1, or ``pos_weight`` is 0.
    """
    wanted, *parameters = _in_float64(value, gamma_pos, gamma_neg, clip, alpha, pos_weight)
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise ConfigError(f'value={wanted.tolist()} must be a probability, in [0, 1]')
    target = torch.broadcast_tensors(wanted.logit(), *(x for x in parameters if x is not None))[0]
    names = 'gamma_pos', 'gamma_neg', 'clip', 'alpha', 'pos_weight'

    def reached(logit: Tensor) -> Tensor:
        return posterior_log_odds(logit, **dict(zip(names, parameters)), detach_focusing=detach_focusing) >= target

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


def _in_float64(*values: Any) -> Iterator[Any]:
    return (None if value is None else torch.as_tensor(value, dtype=torch.float64) for value in values)


def _log_weight_ratio(alpha: Tensor | None, pos_weight: Tensor | None) -> Tensor | None:
    """log w- / w+ of the weights of negatives and positives; None for no weights.

    Values on an accelerator, where checking would need a host sync, and in a compiled graph are not checked.
    """
    ratio = None
    for name, weight, high, allowed in (('alpha', alpha, 1., '0 < alpha < 1'),
                                        ('pos_weight', pos_weight, torch.inf, 'pos_weight > 0')):
        if weight is None:
            continue
        look = weight.device.type == 'cpu' and not torch.compiler.is_compiling()
        if look and not ((weight > 0) & (weight < high)).all():
            raise ConfigError(f'{name}={weight.tolist()} leaves one kind of label without weight: the posterior needs '
                              f'{allowed}')
        log_ratio = -weight.log() if name == 'pos_weight' else (-weight).log1p() - weight.log()
        ratio = log_ratio if ratio is None else ratio + log_ratio
    return ratio
