"""The asymmetric loss of arXiv 2009.14119 as one differentiable operator with an analytic gradient.

With p = sigmoid(z), q = 1 - p, p_m = max(p - m, 0), g+ and g- the focusing parameters:

    -L+ = q^g+ * -log p                   d(-L+)/dz = -q^g+ * (q + g+ * p * -log p)
    -L- = p_m^g- * -log(1 - p_m)          d(-L-)/dz =  p_m^g- * p * q * (1 / (1 - p_m) + g- * -log(1 - p_m) / p_m)

The terms with g+ and g- as factors are the gradient through the focusing weight; they vanish when it is held constant.
Here are the arguments, their checks and autograd; the arithmetic is in :mod:`mmasl.ops.eager`, and for speed again in
:mod:`mmasl.ops.fused` (GPU) and :mod:`mmasl.ops.compiled` (CPU).
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmasl.ops import compiled, eager

try:
    from mmasl.ops import fused
except ImportError:  # no Triton, which comes with torch's CUDA builds
    fused = None  # type: ignore[assignment]

Parameter = float | Tensor
# Not in torch 2.4 and 2.5: there the gradient is never scaled in place.
_graph_is_kept = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', lambda: True)
REDUCTIONS = ('none', 'rows', 'sum')
IMPLEMENTATIONS = ('triton', 'inductor', 'eager')


def asymmetric_loss(logits: Tensor,
                    target: Tensor | tuple[Tensor, Tensor],
                    gamma_pos: Parameter = 0.,
                    gamma_neg: Parameter = 4.,
                    clip: Parameter = 0.05,
                    alpha: float | None = None,
                    detach_focusing: bool = False,
                    ignore_index: int | None = None,
                    weight: Tensor | None = None,
                    return_sums: bool = False,
                    reduction: str = 'none',
                    scale: Parameter = 1.,
                    implementation: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Asymmetric loss of every element, Eq. 7 with Eq. 2 and 5 (gradient: Eq. 8).

    The arithmetic is float32 for half-precision logits and float64 for float64. A reduced loss computes its gradient
    in the forward pass and keeps that one tensor, of the logits' shape and dtype, for the backward pass. Elementwise
    and float16 losses compute it in the backward pass, where what it is multiplied by is known. There is no second
    derivative.

    Args:
        logits: (..., C), floating point, any finite value. A channels-first map, permuted, is read in place.
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
        reduction: 'none', 'rows' (the sum over the classes) or 'sum'. The order of summation is fixed: loss and
            gradient are the same in each run.
        scale: Factor of the result, a number or a tensor of shape (). A factor given here costs nothing, one that
            multiplies the result afterwards costs a pass over the gradient.
        implementation: 'triton' (one kernel; CUDA, not float64), 'inductor' (compiled; CPU), 'eager', or None for the
            fastest that can run: 'inductor' only for a million logits or more.

    Returns:
        Loss of the logits' shape, of that without C ('rows') or of shape () ('sum'), in float64 for float64 logits and
        in float32 otherwise. With ``return_sums`` also four sums for each class, (4, C) in that dtype: over the
        positives of p and of 1, over the negatives of 1 - p and of 1. Soft labels count as y positives and 1 - y
        negatives; elements that are ignored or have weight 0 do not count, the others count alike.

    Raises:
        ValueError: Shapes do not fit, or a target is out of range. Looking at the values would make the host wait for
            an accelerator, so there an out-of-range target gives NaN instead.
        TypeError: Integer logits, or labels that are not integers.
        RuntimeError: The implementation that was asked for cannot run; the message says why.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction={reduction!r} must be one of {REDUCTIONS}')
    target, quality = target if isinstance(target, (tuple, list)) else (target, None)
    if any(isinstance(x, Tensor) and x.requires_grad for x in (gamma_pos, gamma_neg, clip, weight, scale)):
        raise ValueError('gamma_pos, gamma_neg, clip, weight and scale get no gradient: detach them')
    if target.shape != logits.shape or quality is not None:
        _check_labels(target, quality, logits)
    if weight is not None and (weight.dim() > logits.dim() or any(
            size not in (1, wanted) for size, wanted in zip(weight.shape[::-1], logits.shape[::-1]))):
        raise ValueError(f'weight of shape {tuple(weight.shape)} does not broadcast to logits of shape '
                         f'{tuple(logits.shape)}')
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError(f'scale of shape {tuple(scale.shape)} must be a number, or a tensor of shape ()')
    loss, _, sums = torch.ops.mmasl.asymmetric_loss(
        logits, target, None if quality is None else quality.detach(), weight,
        _parameter(gamma_pos, logits, 'gamma_pos'), _parameter(gamma_neg, logits, 'gamma_neg'),
        _parameter(clip, logits, 'clip'), _parameter(scale, logits, 'scale'), alpha, detach_focusing, ignore_index,
        reduction, _pick(implementation, logits), torch.is_grad_enabled() and logits.requires_grad, return_sums)
    return (loss, sums) if return_sums else loss


def _pick(implementation: str | None, logits: Tensor) -> str:
    """The implementation to run, which is the fastest that can unless another is asked for."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f'implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None')
    on_cpu = logits.device.type == 'cpu'
    if implementation is None:
        if logits.is_cuda and fused is not None and not fused.obstacle(logits):
            return 'triton'
        return 'inductor' if on_cpu and logits.numel() >= compiled.LARGE and not compiled.obstacle() else 'eager'
    obstacle = ''
    if implementation == 'triton':
        obstacle = 'it takes Triton, which is not installed' if fused is None else fused.obstacle(logits)
    elif implementation == 'inductor':
        obstacle = compiled.obstacle() if on_cpu else f'it is for the CPU, and the logits are on {logits.device}'
    if obstacle:
        raise RuntimeError(f'implementation={implementation!r} cannot run: {obstacle}. Leave it at None to have one '
                           'chosen that can')
    return implementation


def _run(implementation: str) -> Callable[..., tuple[Any, Any, Any]]:
    return {'triton': fused, 'inductor': compiled, 'eager': eager}[implementation].run


@torch.library.custom_op('mmasl::asymmetric_loss', mutates_args=())
def _forward(logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None, gamma_pos: Tensor,
             gamma_neg: Tensor, clip: Tensor, scale: Tensor, alpha: float | None, detach_focusing: bool,
             ignore_index: int | None, reduction: str, implementation: str, need_grad: bool,
             need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient if it is to be kept, and the probability sums; empty tensors for what is not needed."""
    loss, grad, sums = (logits.new_empty(0) if x is None else x for x in _run(implementation)(
        logits, target, quality, weight, gamma_pos, gamma_neg, clip, scale, alpha, detach_focusing, ignore_index,
        reduction, need_loss=True, need_grad=need_grad and _keeps_gradient(logits, reduction), need_sums=need_sums,
        upstream=None))
    return loss, grad, sums


@_forward.register_fake
def _(logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None, gamma_pos: Tensor,
      gamma_neg: Tensor, clip: Tensor, scale: Tensor, alpha: float | None, detach_focusing: bool,
      ignore_index: int | None, reduction: str, implementation: str, need_grad: bool,
      need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    like = _like(implementation)
    loss = (like(logits, gamma_neg.dtype) if reduction == 'none' else
            gamma_neg.new_empty(logits.shape[:-1] if reduction == 'rows' else ()))
    grad = like(logits, logits.dtype) if need_grad and _keeps_gradient(logits, reduction) else logits.new_empty(0)
    return loss, grad, gamma_neg.new_empty((4, logits.shape[-1]) if need_sums else 0)


@torch.library.custom_op('mmasl::asymmetric_loss_backward', mutates_args=())
def _gradient(upstream: Tensor, logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None,
              gamma_pos: Tensor, gamma_neg: Tensor, clip: Tensor, scale: Tensor, alpha: float | None,
              detach_focusing: bool, ignore_index: int | None, reduction: str, implementation: str) -> Tensor:
    """Gradient by the logits, multiplied by the loss's ``upstream`` before it is rounded to the logits' dtype."""
    _, grad, _ = _run(implementation)(
        logits, target, quality, weight, gamma_pos, gamma_neg, clip, scale, alpha, detach_focusing, ignore_index,
        reduction, need_loss=False, need_grad=True, need_sums=False, upstream=upstream)
    return grad


@_gradient.register_fake
def _(upstream: Tensor, logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None,
      gamma_pos: Tensor, gamma_neg: Tensor, clip: Tensor, scale: Tensor, alpha: float | None, detach_focusing: bool,
      ignore_index: int | None, reduction: str, implementation: str) -> Tensor:
    return _like(implementation)(logits, logits.dtype)


def _like(implementation: str) -> Callable[[Tensor, torch.dtype], Tensor]:
    return fused.like if implementation == 'triton' else lambda x, dtype: x.new_empty(x.shape, dtype=dtype)


def _keeps_gradient(logits: Tensor, reduction: str) -> bool:
    """Whether the forward pass computes the gradient: float16 could not hold it before the loss scale is on it."""
    return reduction != 'none' and logits.dtype != torch.float16


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad, sums = output
    ctx.mark_non_differentiable(grad, sums)
    ctx.set_materialize_grads(False)
    *tensors, ctx.alpha, ctx.detach_focusing, ctx.ignore_index, ctx.reduction, ctx.implementation, _, _ = inputs
    ctx.kept = _keeps_gradient(inputs[0], ctx.reduction)
    ctx.save_for_backward(*([grad] if ctx.kept else tensors))


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    none = [None] * 14
    if upstream is None:
        return None, *none
    if ctx.kept:
        return _scaled(ctx.saved_tensors[0], upstream), *none
    return torch.ops.mmasl.asymmetric_loss_backward(
        upstream, *ctx.saved_tensors, ctx.alpha, ctx.detach_focusing, ctx.ignore_index, ctx.reduction,
        ctx.implementation), *none


_forward.register_autograd(_backward, setup_context=_setup_context)


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """The kept gradient times that of the reduced loss; in place unless it is needed again."""
    upstream = upstream.unsqueeze(-1) if upstream.dim() else upstream
    traced = torch.compiler.is_compiling() or type(grad) is not Tensor
    if traced or _graph_is_kept():
        return grad * upstream.to(grad.dtype)
    grad = grad.detach()
    if fused is not None and grad.is_cuda and grad.dtype != torch.float64 and not upstream.dim():
        return fused.scale_(grad, upstream)
    if grad.device.type == 'cpu' and not upstream.dim() and upstream == 1:
        return grad
    return grad.mul_(upstream)


def _check_labels(labels: Tensor, quality: Tensor | None, logits: Tensor) -> None:
    if not logits.dim() or labels.shape != logits.shape[:-1]:
        raise ValueError(f'target of shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                         'give dense targets of the same shape, or one integer label a row')
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f'labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)} must be '
                        f'integers, got {labels.dtype}; dense targets have the shape of the logits')
    if logits.shape[-1] == 0:
        raise ValueError(f'logits of shape {tuple(logits.shape)} have no class')
    if quality is not None and quality.shape != labels.shape:
        raise ValueError(f'quality of shape {tuple(quality.shape)} does not fit labels of shape {tuple(labels.shape)}')


def _parameter(value: Parameter, logits: Tensor, name: str) -> Tensor:
    """A tensor in the arithmetic's dtype, made without a copy from the host."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=logits.device)
    if value.dim() > 1 or (value.dim() == 1 and (not logits.dim() or len(value) != logits.shape[-1])):
        raise ValueError(f'{name} of shape {tuple(value.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                         'give a number or one value per class')
    return value.to(logits.device, dtype)
