"""Asymmetric focusing over a softmax, for one label a sample: in the authors' code, but not in the paper."""
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmasl.ops import eager
from mmasl.ops.asymmetric_loss import _pick, _scaled

try:
    from mmasl.ops import fused_softmax
except ImportError:  # no Triton
    fused_softmax = None  # type: ignore[assignment]


def asymmetric_softmax_loss(logits: Tensor,
                            labels: Tensor,
                            gamma_pos: float = 0.,
                            gamma_neg: float = 4.,
                            smoothing: float = 0.1,
                            ignore_index: int | None = None,
                            implementation: str | None = None) -> Tensor:
    """Softmax cross-entropy with label smoothing s, focused unequally on the label y and the other classes.

    With p = softmax(z) over C classes, g+ = ``gamma_pos`` and g- = ``gamma_neg``, as ``ASLSingleLabel`` of the official
    code has it, which smooths after focusing:

        L = -(1 - s + s / C) (1 - p_y)^g+ log p_y - (s / C) sum over c != y of p_c^g- log p_c

    Nothing else depends on g-: for s = 0 it has no effect, and with g+ = 0 the loss is cross-entropy. For g+ = g- = 0
    it is cross-entropy with label smoothing. For g- > 0 the smoothing works the other way round on every p_c below
    exp(-1 / g-) = 0.78 (g- = 4): it lowers p_c, since the gradient passes through the focusing weights, as there.

    What differs from :func:`mmasl.ops.asymmetric_loss`: classes compete for the probability; a negative has log p_c and
    not log(1 - p_c), no loss of its own beyond s / C, and no margin.

    Args:
        logits: (..., C), floating point, C >= 2, any finite value.
        labels: (...), integers in 0 ... C - 1.
        gamma_pos: Focusing parameter g+ >= 0 of the label.
        gamma_neg: Focusing parameter g- >= 0 of the other classes.
        smoothing: Share s in [0, 1) of the target that is spread evenly over all classes.
        ignore_index: Label of samples that have no loss and no gradient.
        implementation: 'triton', 'inductor', 'eager' or None, see :func:`mmasl.ops.asymmetric_loss`.

    Returns:
        Loss (...), in float64 for float64 logits and in float32 otherwise. The gradient is computed with it, and kept
        in the logits' dtype, but in float32 for float16. There is no second derivative.

    Raises:
        ValueError: Shapes do not fit, or a label is out of range; as in :func:`mmasl.ops.asymmetric_loss`, the latter
            gives NaN on an accelerator.
        TypeError: Logits that are not floating point, or labels that are not integers.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    if not logits.dim() or labels.shape != logits.shape[:-1]:
        raise ValueError(f'labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: '
                         'give one integer label a row, and no Mixup, CutMix or one-hot targets')
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f'labels must be integers, got {labels.dtype}')
    num_classes = logits.shape[-1]
    if num_classes < 2:
        raise ValueError(f'logits of shape {tuple(logits.shape)} have {num_classes} class: a softmax needs two or '
                         'more; mmasl.AsymmetricLoss takes a single logit')
    loss, _ = torch.ops.mmasl.asymmetric_softmax_loss(
        logits, labels, float(gamma_pos), float(gamma_neg), float(smoothing), ignore_index,
        _pick(implementation, logits), torch.is_grad_enabled() and logits.requires_grad)
    return loss


@torch.library.custom_op('mmasl::asymmetric_softmax_loss', mutates_args=())
def _forward(logits: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float,
             ignore_index: int | None, implementation: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the gradient of their sum or an empty tensor."""
    run = (fused_softmax.run if implementation == 'triton' else
           _run_compiled if implementation == 'inductor' else _run_eager)
    z, y = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss, grad = run(z, y, gamma_pos, gamma_neg, smoothing, ignore_index, need_grad, _kept_dtype(logits))
    return loss.reshape(labels.shape), logits.new_empty(0) if grad is None else grad.reshape(logits.shape)


@_forward.register_fake
def _(logits: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float, ignore_index: int | None,
      implementation: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, logits.new_empty(logits.shape, dtype=_kept_dtype(logits)) if need_grad else logits.new_empty(0)


def _kept_dtype(logits: Tensor) -> torch.dtype:
    """float16 ends above the probabilities of thousands of classes."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad = None if upstream is None else eager.saturate(_scaled(ctx.saved_tensors[0], upstream), ctx.dtype)
    return grad, *[None] * 7


_forward.register_autograd(_backward, setup_context=_setup_context)


def _run_eager(z: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float,
               ignore_index: int | None, need_grad: bool, grad_dtype: torch.dtype,
               compiled: bool = False) -> tuple[Tensor, Tensor | None]:
    """(N, C) logits and (N,) labels; on the CPU over blocks of rows, see :mod:`mmasl.ops.eager`."""
    z, (rows, classes) = z.detach(), z.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    sums, gradient = _compile() if compiled else (_sums, _gradient)
    share = smoothing / classes
    grad = z.new_empty(z.shape if need_grad and not compiled else 0, dtype=grad_dtype)
    losses = []
    for block in eager.blocks(rows, classes, z.device.type == 'cpu' and not compiled):
        y = labels[block].long().unsqueeze(-1)
        ignored = None if ignore_index is None else y == ignore_index
        y = y if ignored is None else y.masked_fill(ignored, 0)
        known = eager.in_range(y, classes - 1, 'label', f'0 to {classes - 1}' + (
            '' if ignore_index is None else f', {ignore_index} to ignore'), block.start)
        y, z_b = y.clamp(0, classes - 1), z[block].to(dtype)
        # An unchecked label out of range carries its NaN into the sample.
        weight = 1 - smoothing + share + 0. * known.to(dtype)

        top, *powers = sums(z_b, y, gamma_neg, smoothing > 0)
        log_sum = powers[0].log()
        # p_y is the sigmoid of the label's lead over all others: that keeps 1 - p_y exact where p_y rounds to 1.
        lead = z_b.gather(-1, y) - top - log_sum
        loss, slope, rest = eager.negative_part(-lead, gamma_pos, 0., False, True)  # rest = 1 - p_y
        loss, slope = weight * loss, -weight * slope  # type: ignore[operator]  # which is not None here
        log_all = log_sum - torch.nn.functional.logsigmoid(-lead)
        total = torch.zeros_like(loss)
        if smoothing:
            scale = (-gamma_neg * log_all).exp()
            power, moment = scale * powers[1], scale * (powers[2] - log_all * powers[1])  # sums of p^g, p^g log p
            loss = loss - share * moment
            total = -share * (gamma_neg * moment + power)
        losses.append(loss if ignored is None else loss.masked_fill_(ignored, 0))
        if need_grad:
            block_grad = gradient(z_b, y, top, log_sum, log_all, -slope - rest * total, slope - lead.sigmoid() * total,
                                  share, gamma_neg, smoothing > 0)
            block_grad = block_grad if ignored is None else block_grad.masked_fill_(ignored, 0)
            if compiled:
                grad = block_grad.to(grad_dtype)
            else:
                grad[block] = block_grad
    loss = torch.cat(losses).squeeze(-1) if losses else z.new_empty(0, dtype=dtype)
    return loss, grad if need_grad else None


def _run_compiled(z: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float,
                  ignore_index: int | None, need_grad: bool, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return _run_eager(z, labels, gamma_pos, gamma_neg, smoothing, ignore_index, need_grad, grad_dtype,
                      compiled=len(z) > 0)


@lru_cache
def _compile() -> tuple[Callable, Callable]:
    print_log("the softmax form of the loss is compiled on the CPU, once: half a minute (implementation='eager' does "
              'without)', 'current')
    return torch.compile(_sums, dynamic=True), torch.compile(_gradient, dynamic=True)


def _sums(z: Tensor, y: Tensor, gamma: float, smoothing: bool) -> tuple[Tensor, ...]:
    """Of the logits other than the label's the largest, and relative to it the sums of exp(z), exp(g z), exp(g z) z."""
    is_label = torch.arange(z.shape[-1], device=z.device) == y
    others = torch.where(is_label, -torch.inf, z)
    top = others.amax(-1, keepdim=True)
    # Finite, for the products with probabilities of 0.
    others = (others - top).clamp(min=torch.finfo(z.dtype).min)
    total = torch.where(is_label, 0., others.exp()).sum(-1, keepdim=True)
    if not smoothing:
        return top, total
    power = torch.where(is_label, 0., (gamma * others).exp())
    return top, total, power.sum(-1, keepdim=True), (power * others).sum(-1, keepdim=True)


def _gradient(z: Tensor, y: Tensor, top: Tensor, log_sum: Tensor, log_all: Tensor, of_softmax: Tensor, of_label: Tensor,
              share: float, gamma: float, smoothing: bool) -> Tensor:
    """Gradient of the label, and of the others: their softmax among themselves, and by their focused log p."""
    lowest = torch.finfo(z.dtype).min
    others = (z - top).clamp(min=lowest)
    grad = (others - log_sum).exp() * of_softmax
    if smoothing:
        log_p = (others - log_all).clamp(min=lowest)
        power = (gamma * log_p).exp()
        grad = grad - share * (power + gamma * (power * log_p))
    return torch.where(torch.arange(z.shape[-1], device=z.device) == y, of_label, grad)
