"""The equations of ASL (arXiv 2009.14119) as printed, in float64 and by autograd; the tests compare the operator with
them.

They are slow, and exact only for |logit| <= 30, where float64 still distinguishes 1 - p from 0.
"""
import torch
from torch import Tensor


def asymmetric_loss(logits: Tensor, target: Tensor, *, gamma_pos: float | Tensor, gamma_neg: float | Tensor,
                    clip: float | Tensor, alpha: float | Tensor | None = None,
                    class_weight: float | Tensor = 1., pos_weight: float | Tensor = 1.,
                    detach_focusing: bool = False, soft_label: str = 'mixture',
                    labelled: Tensor | None = None) -> Tensor:
    """Eq. 2 and 7, per element, float64; with another ``soft_label``, that loss on the labelled entries.

    Args:
        logits: (..., C), floating point.
        target: Hard or soft labels in [0, 1], in the shape of ``logits``.
        gamma_pos, gamma_neg, clip, alpha, class_weight, pos_weight, detach_focusing, soft_label: See
            :func:`mmasl.ops.asymmetric_loss`.
        labelled: Which entries are labelled, in the shape of ``logits``; those above 0 by default.
    """
    p = logits.double().sigmoid()
    y = target.double()
    p_m = p - clip
    # Eq. 5 by selection: below the margin nothing depends on p, and pow(0, gamma < 1) has no derivative.
    beyond = p_m >= 0
    p_m = torch.where(beyond, p_m, torch.ones_like(p_m) / 2)

    focus_pos = (1 - p)**gamma_pos
    focus_neg = p_m**gamma_neg
    if detach_focusing:
        focus_pos, focus_neg = focus_pos.detach(), focus_neg.detach()
    loss_pos = focus_pos * p.log()
    loss_neg = torch.where(beyond, focus_neg * (1 - p_m).log(), 0.)
    if soft_label != 'mixture':
        t = y**gamma_pos if soft_label == 'mal' else y
        focus = {'qfl': (t - p).abs()**gamma_pos, 'vfl': t**gamma_pos, 'mal': torch.ones_like(t)}[soft_label]
        loss_pos = (focus.detach() if detach_focusing else focus) * (t * p.log() + (1 - t) * (1 - p).log())
        y = (y > 0 if labelled is None else labelled).double()
    if alpha is not None:
        loss_pos, loss_neg = alpha * loss_pos, (1 - alpha) * loss_neg
    return class_weight * (-y * pos_weight * loss_pos - (1 - y) * loss_neg)
