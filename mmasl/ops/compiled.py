"""The loss, its gradient and the probability sums as one C++ loop by torch.compile, for large logits on the CPU.

Eager operations take longer there, even over blocks that fit the cache (docs/speed.md).
"""
from collections.abc import Callable
from functools import lru_cache

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmasl.ops import eager

LARGE = 2**20  # elements, from where a compilation of half a minute soon pays


@torch.compiler.assume_constant_result
@lru_cache
def obstacle() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        import torch._dynamo
        from torch._inductor.cpp_builder import get_cpp_compiler
        with torch._dynamo.config.patch(recompile_limit=64):  # as below; from torch 2.6 on
            get_cpp_compiler()
    except Exception as error:  # it has had several classes
        return f'torch.compile, or a C++ compiler for it, is missing ({error})'
    return ''


def run(logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None, gamma_pos: Tensor,
        gamma_neg: Tensor, clip: Tensor, scale: Tensor, alpha: float | None, detach_focusing: bool,
        ignore_index: int | None, reduction: str, need_loss: bool, need_grad: bool, need_sums: bool,
        upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`mmasl.ops.eager.run`."""
    arguments = (logits, target, quality, weight, gamma_pos, gamma_neg, clip, scale, alpha, detach_focusing,
                 ignore_index, reduction, need_loss, need_grad, need_sums, upstream)
    if not logits.numel():
        return eager.run(*arguments)
    z = logits.detach().reshape(-1, logits.shape[-1])
    rows, dense = len(z), quality is None and target.shape == logits.shape
    y = target.reshape(z.shape) if dense else target.reshape(rows, 1)
    # A guess by the first row; hard targets are computed faster.
    soft = quality is not None or (dense and target.is_floating_point() and bool(y[0].frac().any()))
    if weight is not None:
        weight = weight.expand(logits.shape).reshape(z.shape)
    if upstream is not None and upstream.dim():
        upstream = upstream.reshape(z.shape if reduction == 'none' else (rows, 1))
    for may_be_soft in (soft, True):
        # One function for all forms of a loss: 8 variants, PyTorch's limit, are too few.
        with torch._dynamo.config.patch(recompile_limit=64):
            loss, grad, sums = _compile(may_be_soft, dense)(
                z, y, None if quality is None else quality.reshape(rows, 1), weight, gamma_pos, gamma_neg, clip, scale,
                alpha, detach_focusing, ignore_index, reduction, need_loss, need_grad, need_sums, upstream,
                may_be_soft, dense)
        if not (loss if need_loss else grad).isnan().any():
            break
        if may_be_soft or not dense or not target.is_floating_point():
            return eager.run(*arguments)  # which names a target out of range
    if loss is not None:
        loss = loss.reshape({'none': logits.shape, 'rows': logits.shape[:-1], 'sum': ()}[reduction])
    return loss, None if grad is None else grad.reshape(logits.shape), sums


@lru_cache
def _compile(soft: bool, dense: bool) -> Callable:
    print_log(f'the loss is compiled for {"soft" if soft else "hard"} {"dense targets" if dense else "labels"} on the '
              "CPU, once: half a minute (implementation='eager' does without)", 'current')
    return torch.compile(_formula, dynamic=True)


def _formula(z: Tensor, y: Tensor, quality: Tensor | None, weight: Tensor | None, gamma_pos: Tensor, gamma_neg: Tensor,
             clip: Tensor, scale: Tensor, alpha: float | None, detach_focusing: bool, ignore_index: int | None,
             reduction: str, need_loss: bool, need_grad: bool, need_sums: bool, upstream: Tensor | None, soft: bool,
             dense: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Elementwise throughout, so that it becomes one loop.

    A target out of range, or soft where none is expected, becomes NaN.
    """
    out_dtype, classes = z.dtype, z.shape[-1]
    z = z.to(gamma_neg.dtype)
    used = None if ignore_index is None else y != ignore_index
    if dense:
        known = (y >= 0) & (y <= 1) if soft else (y == 0) | (y == 1)
        y = y.to(z.dtype)
    else:
        known = (y >= 0) & (y <= classes)
        y = (y == torch.arange(classes, device=z.device)).to(z.dtype)
        if quality is not None:
            known = known & (quality >= 0) & (quality <= 1)
            y = y * quality
    alpha_pos, alpha_neg = (1., 1.) if alpha is None else (alpha, 1 - alpha)
    if soft:
        neg_loss, neg_grad, p, q = _negative_part(z, gamma_neg, clip, detach_focusing)
        pos_loss, pos_grad, _, _ = _negative_part(-z, gamma_pos, torch.zeros_like(clip), detach_focusing)
        loss = alpha_neg * (1 - y) * neg_loss + alpha_pos * y * pos_loss
        grad = alpha_neg * (1 - y) * neg_grad - alpha_pos * y * pos_grad
    else:
        # A hard positive is a negative of -z without a margin, so that one evaluation does for each element.
        hard = y == 1
        loss, grad, p, q = _negative_part(torch.where(hard, -z, z), torch.where(hard, gamma_pos, gamma_neg),
                                          torch.where(hard, 0., clip), detach_focusing)
        p, q = torch.where(hard, q, p), torch.where(hard, p, q)
        # Of two numbers alone torch.where makes float32.
        loss = torch.where(hard, alpha_pos * loss, alpha_neg * loss)
        grad = torch.where(hard, -alpha_pos * grad, alpha_neg * grad)
    counted = torch.ones_like(z) if used is None else used.to(z.dtype).expand_as(z)
    if weight is not None:
        counted = counted * (weight != 0)
        loss, grad = loss * weight, grad * weight
    loss, grad = torch.where(known, loss, torch.nan), torch.where(known, grad, torch.nan)
    if used is not None:
        loss, grad = torch.where(used, loss, 0.), torch.where(used, grad, 0.)

    if need_loss:
        loss = scale * (loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.sum(1))
    if need_grad:
        grad = eager.saturate(grad * scale if upstream is None else grad * (scale * upstream.to(z.dtype)), out_dtype)
    sums = None
    if need_sums:
        y = torch.where(counted > 0, y, 0.)
        sums = torch.stack([(y * p).sum(0), y.sum(0), ((counted - y) * q).sum(0), (counted - y).sum(0)])
    return loss if need_loss else None, grad if need_grad else None, sums


def _negative_part(z: Tensor, gamma: Tensor, clip: Tensor, detach_focusing: bool) -> tuple[Tensor, ...]:
    """-L-, its derivative by z, p and q = 1 - p, for z of any size, as in :mod:`mmasl.ops.eager`."""
    e = (-z.abs()).exp()
    r = 1 / (1 + e)
    p, q = torch.where(z >= 0, r, e * r), torch.where(z >= 0, e * r, r)
    p_m, rest = (p - clip).clamp(min=0), q + clip
    # -log(1 - p_m), by one logarithm: for small p_m that of the rounded 1 - p_m, corrected for the rounding, else of
    # q + m, or z, which it is to rounding long before q underflows.
    small = p_m < 0.5
    whole = torch.where(small, 1 - p_m, rest)
    rounded = torch.where(small, 1 - whole, 1.)
    log_term = -whole.log() * torch.where(small & (rounded > 0), p_m / rounded, 1.)
    log_term = torch.where(small & (rounded == 0), p_m, log_term)
    log_term = torch.where((z > 40) & (clip == 0), z, log_term)
    # With p_m^(gamma - 1) nothing is divided by p_m; kept above 0, its powers are finite.
    p_m = p_m.clamp(min=torch.finfo(z.dtype).tiny)
    power = ((gamma - 1) * p_m.log()).exp()
    slope = p_m * torch.where(clip == 0, 1., q / rest)
    if not detach_focusing:
        slope = slope + gamma * (q * log_term)
    # At p = m the side p > m counts: gamma = 0 without a margin is cross-entropy everywhere.
    # The power first: it is large where the other factors' product would underflow.
    return p_m * power * log_term, torch.where(p < clip, 0., slope * power * p), p, q
