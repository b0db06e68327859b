"""The asymmetric loss of arXiv 2009.14119 as one differentiable operator with an analytic gradient.

With p = sigmoid(z), q = 1 - p, p_m = max(p - m, 0), g+ and g- the focusing parameters:

    -L+ = q^g+ * -log p                   d(-L+)/dz = -q^g+ * (q + g+ * p * -log p)
    -L- = p_m^g- * -log(1 - p_m)          d(-L-)/dz =  p_m^g- * p * q * (1 / (1 - p_m) + g- * -log(1 - p_m) / p_m)

The terms with g+ and g- as factors are the gradient through the focusing weight; they vanish when it is held constant.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Parameter = float | Tensor


def asymmetric_loss(logits: Tensor,
                    target: Tensor | tuple[Tensor, Tensor],
                    gamma_pos: Parameter = 0.,
                    gamma_neg: Parameter = 4.,
                    clip: Parameter = 0.05,
                    alpha: float | None = None,
                    detach_focusing: bool = False,
                    ignore_index: int | None = None,
                    weight: Tensor | None = None,
                    return_sums: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Asymmetric loss of every element, Eq. 7 with Eq. 2 and 5 (gradient: Eq. 8).

    The arithmetic is float32 for half-precision logits and float64 for float64. One tensor of the logits' size is kept
    for the backward pass; there is no second derivative.

    Args:
        logits: (..., C), floating point, any finite value.
        target: One of three forms, told apart by rank and dtype.

            - dense, the shape of ``logits``: 0 or 1, or a soft label between them, of any dtype. A soft label y mixes
              the two parts of the loss, y of the positive and 1 - y of the negative (Eq. 2).
            - labels, integers of shape ``logits.shape[:-1]``: the one positive class of each row, or C for none
              (background).
            - a pair (labels, quality): labels as above, and the soft label, in [0, 1], of the labelled class.
        gamma_pos: Focusing parameter g+ >= 0 of positives: a number, or a tensor of shape () or (C,).
        gamma_neg: Focusing parameter g- >= 0 of negatives, likewise.
        clip: Probability margin m in [0, 1), likewise.
        alpha: Weight of positives in [0, 1]; negatives get 1 - alpha. None weighs neither.
        detach_focusing: Hold the focusing weights constant in the gradient, as the official training script does,
            instead of Eq. 8. The value is the same.
        ignore_index: Target value (or label) whose elements (or rows) have no loss and no gradient.
        weight: Factor of the loss and the gradient, in a shape that broadcasts to that of ``logits``.
        return_sums: Also return what the probability gap (Eq. 9-10) is made of, from the probabilities that the loss
            computes anyway.

    Returns:
        Loss of the logits' shape, in float64 for float64 logits and in float32 otherwise. With ``return_sums`` also
        four sums for each class, (4, C) in that dtype: over the positives of p and of 1, over the negatives of 1 - p
        and of 1. Soft labels count as y positives and 1 - y negatives; elements that are ignored or have weight 0 do
        not count, the others count alike.

    Raises:
        ValueError: Shapes do not fit, or a target is out of range. Looking at the values would make the host wait for
            an accelerator (and break a compiled graph), so there an out-of-range target gives NaN instead.
        TypeError: Integer logits, or labels that are not integers.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    target, quality = target if isinstance(target, (tuple, list)) else (target, None)
    if any(isinstance(x, Tensor) and x.requires_grad for x in (gamma_pos, gamma_neg, clip, weight)):
        raise ValueError('gamma_pos, gamma_neg, clip and weight get no gradient: detach them')

    if target.shape == logits.shape and quality is None:
        column = None
        ignored = None if ignore_index is None else target == ignore_index
        y = target if ignored is None else target.masked_fill(ignored, 0)
        y = _in_range(y, 1, 'target', 'a hard or soft label between 0 and 1')
    elif logits.dim() and target.shape == logits.shape[:-1]:
        column, ignored, y = _read_labels(target, quality, logits, ignore_index)
    else:
        raise ValueError(f'target of shape {tuple(target.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                         'give dense targets of the same shape, or one integer label a row')
    if weight is not None and (weight.dim() > logits.dim() or any(
            size not in (1, wanted) for size, wanted in zip(weight.shape[::-1], logits.shape[::-1]))):
        raise ValueError(f'weight of shape {tuple(weight.shape)} does not broadcast to logits of shape '
                         f'{tuple(logits.shape)}')
    loss, sums = _AsymmetricLoss.apply(
        logits, y, column, ignored, weight, _parameter(gamma_pos, logits, 'gamma_pos'),
        _parameter(gamma_neg, logits, 'gamma_neg'), _parameter(clip, logits, 'clip'), alpha, detach_focusing,
        return_sums)
    return (loss, sums) if return_sums else loss


class _AsymmetricLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass and scales it in the backward pass."""

    @staticmethod
    def forward(ctx, logits, y, column, ignored, weight, gamma_pos, gamma_neg, clip, alpha, detach_focusing,
                return_sums):
        need_grad = ctx.needs_input_grad[0]
        z = logits.to(gamma_neg.dtype)
        y = y.to(z.dtype)
        p = z.sigmoid()
        sums = _probability_sums(p, y, column, ignored, weight) if return_sums else None
        loss, grad = _negative(z, p, gamma_neg, clip, detach_focusing, need_grad)
        if column is None:
            pos_loss, pos_grad = _positive(z, gamma_pos, detach_focusing, need_grad)
        else:
            if gamma_pos.dim():
                gamma_pos = gamma_pos.expand_as(z).gather(-1, column)
            pos_loss, pos_grad = _positive(z.gather(-1, column), gamma_pos, detach_focusing, need_grad)

        ctx.logits_dtype = logits.dtype
        loss = _mix(loss, pos_loss, y, column, ignored, weight, alpha)
        if need_grad:
            ctx.save_for_backward(_mix(grad, pos_grad, y, column, ignored, weight, alpha))
        if return_sums:
            ctx.mark_non_differentiable(sums)
        # torch 2.11 compiles a wrong gradient where forward returns what it changed in place (pytorch issue 180642).
        return loss.clone() if torch.compiler.is_compiling() else loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad, = ctx.saved_tensors
        return _cast(grad_loss * grad, ctx.logits_dtype), *[None] * 10


def _probability_sums(p: Tensor, y: Tensor, column: Tensor | None, ignored: Tensor | None,
                      weight: Tensor | None) -> Tensor:
    """(4, C) sums of y p, y, (1 - y)(1 - p) and 1 - y over the elements that count."""
    counted = torch.ones_like(p[..., :1]) if weight is None else (weight != 0).to(p.dtype)
    counted = (counted if ignored is None else counted.masked_fill(ignored, 0)).expand_as(p)
    elements, p_sum = _sum_rows(counted), _sum_rows(counted * p)
    if column is None:
        y = y * counted
        positives, p_positives = _sum_rows(y), _sum_rows(y * p)
    else:
        y = y * counted.gather(-1, column)
        zeros = torch.zeros_like(elements)
        positives = zeros.index_add(0, column.flatten(), y.flatten())
        p_positives = zeros.index_add(0, column.flatten(), (y * p.gather(-1, column)).flatten())
    negatives = elements - positives
    return torch.stack([p_positives, positives, negatives - (p_sum - p_positives), negatives])


def _sum_rows(x: Tensor) -> Tensor:
    return x.sum_to_size(x.shape[-1])


def _negative(z: Tensor, p: Tensor, gamma: Tensor, clip: Tensor, detach_focusing: bool, need_grad: bool):
    """-L- and its derivative by z, for finite z of any size and p = sigmoid(z)."""
    q = (-z).sigmoid()
    p_m = (p - clip).clamp_(min=0)
    # -log(1 - p_m), where 1 - p_m = q + m: log1p loses digits near p_m = 1, the logarithm near 0, and both where m = 0.
    log_term = torch.where(p_m < 0.5, p_m.neg().log1p_(), (q + clip).log_())
    log_term = torch.where(clip > 0, log_term, F.logsigmoid(-z)).neg_()
    focus = p_m**gamma
    loss = focus * log_term
    if not need_grad:
        return loss, None

    # 0/0 in the first line is m = 0 and q = 0, in the second p_m = 0; both limits are 1.
    slope = torch.where(clip > 0, q / (q + clip), 1.).mul_(p)
    if not detach_focusing:
        ratio = torch.where(p_m > 0, log_term / p_m, 1.)
        # From the left: q may be 0 where log_term is as large as z.
        slope += gamma * p * q * ratio
    # At p = m the side p > m counts: gamma = 0 without a margin is cross-entropy everywhere.
    return loss, slope.mul_(focus).masked_fill_(p < clip, 0)


def _positive(z: Tensor, gamma: Tensor, detach_focusing: bool, need_grad: bool):
    """-L+ and its derivative by z, for finite z of any size."""
    q = (-z).sigmoid()
    log_term = F.logsigmoid(z).neg_()
    focus = q**gamma
    loss = focus * log_term
    if not need_grad:
        return loss, None
    slope = q if detach_focusing else q + gamma * z.sigmoid() * log_term
    return loss, slope.mul_(focus).neg_()


def _mix(neg: Tensor, pos: Tensor, y: Tensor, column: Tensor | None, ignored: Tensor | None, weight: Tensor | None,
         alpha: float | None) -> Tensor:
    """weight * (y * pos + (1 - y) * neg) (Eq. 2); with labels, only ``column`` of each row has a positive part."""
    if alpha is not None:
        neg, pos = neg.mul_(1 - alpha), pos.mul_(alpha)
    if column is None:
        out = torch.lerp(neg, pos, y)
    else:
        out = neg.scatter_(-1, column, torch.lerp(neg.gather(-1, column), pos, y))
    out = out if weight is None else out.mul_(weight)
    return out if ignored is None else out.masked_fill_(ignored, 0)


def _read_labels(labels: Tensor, quality: Tensor | None, logits: Tensor, ignore_index: int | None):
    """Labels as the labelled column of each row, which rows are ignored, and the soft label in that column."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f'labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)} must be '
                        f'integers, got {labels.dtype}; dense targets have the shape of the logits')
    num_classes = logits.shape[-1]
    if num_classes == 0:
        raise ValueError(f'logits of shape {tuple(logits.shape)} have no class')
    if quality is not None and quality.shape != labels.shape:
        raise ValueError(f'quality of shape {tuple(quality.shape)} does not fit labels of shape {tuple(labels.shape)}')
    labels = labels.long().unsqueeze(-1)
    ignored = None if ignore_index is None else labels == ignore_index
    if ignored is not None:
        labels = labels.masked_fill(ignored, num_classes)

    if quality is None:
        y = torch.ones_like(labels, dtype=logits.dtype)
    else:
        y = _in_range(quality.detach().unsqueeze(-1), 1, 'quality', 'a soft label between 0 and 1')
    known = _in_range(labels, num_classes, 'label',
                      f'0 to {num_classes - 1} for a class, {num_classes} for background'
                      f'{"" if ignore_index is None else f", {ignore_index} to ignore"}')
    # Background has no positive part; an unchecked label out of range carries its NaN into the row.
    y = torch.where(labels == num_classes, 0., y + 0. * known)
    return labels.clamp(0, num_classes - 1), ignored, y


def _in_range(x: Tensor, high: int, name: str, allowed: str) -> Tensor:
    """``x`` where it lies in [0, high], else an error, or NaN where looking at it would cost a wait or a graph."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return x if x.dtype == torch.bool else torch.where((x >= 0) & (x <= high), x, torch.nan)
    if x.numel() and x.dtype != torch.bool:
        low, top = x.aminmax()
        if not (low >= 0 and top <= high):
            bad = (~((x >= 0) & (x <= high))).nonzero()[0]
            raise ValueError(f'{name} {x[tuple(bad)].item()} at {bad.tolist()} is out of range, which is {allowed}; '
                             'set ignore_index if it marks an entry to leave out')
    return x


def _parameter(value: Parameter, logits: Tensor, name: str) -> Tensor:
    """A tensor in the arithmetic's dtype, made without a copy from the host."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=logits.device)
    if value.dim() > 1 or value.dim() == 1 and (not logits.dim() or len(value) != logits.shape[-1]):
        raise ValueError(f'{name} of shape {tuple(value.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                         'give a number or one value per class')
    return value.to(dtype)


def _cast(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the logits' dtype.

    float16 ends at 65504, so that a loss scale of 65536 would turn a gradient of 1 into inf. Up to twice its end it
    saturates instead; beyond, it overflows and GradScaler sees it.
    """
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        grad = torch.where(grad.abs() <= 2 * top, grad.clamp(-top, top), grad)
    return grad.to(dtype)
