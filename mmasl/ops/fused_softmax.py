"""The softmax form in two Triton kernels: sums over the classes other than the label's, then loss and gradient.

A row is split between programs, so that few rows of many classes occupy a whole GPU; the parts are added up in a fixed
order. With l = log p = z - log sum exp, the smoothed part needs sum p^g and sum p^g l, which follow from the sums of
exp(g z) and exp(g z) z, and so are gathered before the denominator of p is known.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # classes of a program


def run(z: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float, ignore_index: int | None,
        need_grad: bool, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(N, C) logits and (N,) labels: the losses (N,), and the gradient of their sum."""
    rows, classes = z.shape
    z, labels = z.contiguous(), labels.contiguous()
    parts = triton.cdiv(classes, BLOCK)
    loss = torch.empty(rows, dtype=torch.float32, device=z.device)
    grad = torch.empty(z.shape, dtype=grad_dtype, device=z.device) if need_grad else None
    sums = torch.empty(4, rows, parts, dtype=torch.float32, device=z.device)
    if rows:
        with torch.cuda.device_of(z):
            _sum_kernel[(rows * parts, )](z, labels, sums, classes, parts, rows, float(gamma_neg), BLOCK=BLOCK)
            _loss_kernel[(rows * parts, )](
                z, labels, sums, loss, grad, classes, parts, rows, float(gamma_pos), float(gamma_neg),
                smoothing / classes, 1 - smoothing + smoothing / classes, ignore_index, SMOOTHING=smoothing > 0,
                PARTS=triton.next_power_of_2(parts), BLOCK=BLOCK)
    return loss, grad


@triton.jit
def _sum_kernel(z_ptr, label_ptr, sums_ptr, classes, parts, rows, gamma, BLOCK: tl.constexpr):
    """Maximum of a part of the row, and relative to it the sums of exp(z), exp(g z) and exp(g z) z."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    c = part * BLOCK + tl.arange(0, BLOCK)
    others = (c < classes) & (c != tl.load(label_ptr + row))
    z = tl.load(z_ptr + row * classes + c, mask=others, other=float('-inf')).to(tl.float32)
    top = tl.maximum(tl.max(z, 0), -3.4e38)  # the last part may hold the label alone
    z = tl.maximum(z - top, -3.4e38)
    power = tl.where(others, tl.exp(gamma * z), 0.)
    sums = sums_ptr + row * parts + part
    tl.store(sums, top)
    tl.store(sums + rows * parts, tl.sum(tl.where(others, tl.exp(z), 0.), 0))
    tl.store(sums + 2 * rows * parts, tl.sum(power, 0))
    tl.store(sums + 3 * rows * parts, tl.sum(power * z, 0))


@triton.jit
def _loss_kernel(z_ptr, label_ptr, sums_ptr, loss_ptr, grad_ptr, classes, parts, rows, gamma_pos, gamma, share, weight,
                 ignore_index, SMOOTHING: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    label = tl.load(label_ptr + row)
    used = True
    if ignore_index is not None:
        used = label != ignore_index
    known = (label >= 0) & (label < classes)
    weight = tl.where(known, weight, float('nan'))

    i = tl.arange(0, PARTS)
    sums = sums_ptr + row * parts + i
    tops = tl.load(sums, mask=i < parts, other=-3.4e38)
    top = tl.max(tops, 0)
    tops = tl.maximum(tops - top, -3.4e38)
    log_sum = tl.log(tl.sum(tl.exp(tops) * tl.load(sums + rows * parts, mask=i < parts, other=0.), 0))

    # The label's part, of its lead over all others together.
    z_y = tl.load(z_ptr + row * classes + tl.where(known, label, 0)).to(tl.float32)
    lead = tl.minimum(tl.maximum(z_y - top, -3.4e38), 3.4e38) - log_sum
    e = tl.exp(-tl.abs(lead))
    p_y = tl.where(lead >= 0, 1., e) / (1 + e)
    rest = tl.where(lead >= 0, e, 1.) / (1 + e)
    # softplus, where log(1 + e) would lose the digits of a small e
    log_1p = tl.where(e < 0.01, e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25))), tl.log(1 + e))
    log_term = tl.maximum(-lead, 0.) + log_1p
    log_rest = -tl.maximum(lead, 0.) - log_1p
    focus = tl.exp(gamma_pos * log_rest)
    loss = weight * focus * log_term
    slope = -weight * focus * (rest + gamma_pos * p_y * log_term)  # by the lead

    log_sum_all = log_sum - log_rest
    total = 0.
    if SMOOTHING:
        powers = tl.load(sums + 2 * rows * parts, mask=i < parts, other=0.)
        moments = tl.load(sums + 3 * rows * parts, mask=i < parts, other=0.)
        scale = tl.exp(gamma * (tops - log_sum_all))
        by_part = scale * (moments + powers * (tops - log_sum_all))  # sum of p^g log p
        by_part = tl.where((i < parts) & (scale > 0), by_part, 0.)
        powers = tl.where(i < parts, scale * powers, 0.)
        loss -= share * tl.sum(by_part, 0)
        total = -share * (gamma * tl.sum(by_part, 0) + tl.sum(powers, 0))
    if part == 0:
        tl.store(loss_ptr + row, tl.where(used, loss, 0.))
    if grad_ptr is not None:
        c = part * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * classes + c, mask=c < classes, other=0.).to(tl.float32)
        shifted = tl.maximum(z - top, -3.4e38)
        grad = tl.exp(shifted - log_sum) * (-slope - rest * total)
        if SMOOTHING:
            log_p = shifted - log_sum_all
            power = tl.exp(gamma * log_p)
            grad -= share * tl.where(power > 0, power * (1 + gamma * log_p), 0.)
        grad = tl.where(c == label, slope - p_y * total, grad)
        grad = tl.where(used, tl.where(known, grad, float('nan')), 0.)
        tl.store(grad_ptr + row * classes + c, grad.to(grad_ptr.dtype.element_ty), mask=c < classes)
