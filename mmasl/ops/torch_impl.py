"""The asymmetric loss and its gradient in PyTorch: one formula, run eagerly or compiled.

With z the logit, p = sigmoid(z), q = 1 - p, p_m = max(p - m, 0), and g+ and g- the focusing parameters:

    -L+ = q^g+ * -log p                   d(-L+)/dz = -q^g+ * (q + g+ * p * -log p)
    -L- = p_m^g- * -log(1 - p_m)          d(-L-)/dz =  p_m^g- * p * q * (1 / (1 - p_m) + g- * -log(1 - p_m) / p_m)

The terms with g+ and g- as factors are the gradient through the focusing weight; ``detach_focusing`` drops them. -L+ is
-L- of -z with m = 0, so :func:`negative_part` computes both.
"""
import logging
from collections.abc import Callable
from functools import lru_cache
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmasl.errors import DataError

SOFT_LABELS = ('mixture', 'qfl', 'vfl', 'mal')
LARGE = 2**20  # elements; from here on a compilation of half a minute pays
# Elements of a block at least, and less than twice as many; on the CPU its temporaries stay in the cache.
BLOCK = {'cpu': 2**16}
ACCELERATOR_BLOCK = 2**25
# Constants as tensors, since PyTorch converts a Python number at each call, for twice the time of the operation.
ONE = {dtype: torch.ones((), dtype=dtype, device='cpu') for dtype in (torch.float32, torch.float64)}
BELOW_ONE = {dtype: torch.full((), 1 - torch.finfo(dtype).eps / 2, dtype=dtype, device='cpu') for dtype in ONE}
Result = tuple[Tensor | None, Tensor | None, Tensor | None]


class Problem(NamedTuple):
    """A call of the loss, with parameters as tensors in the dtype of the arithmetic.

    Attributes:
        logits: (..., C); (N, C) for :func:`formula`.
        target: Dense, in the shape of the logits, or labels without the last dimension.
        quality: Soft label of the labelled class, in the shape of the labels.
        weight: Factor of loss and gradient that broadcasts to the logits.
        gamma_pos, gamma_neg, clip: Parameters of shape () or (C,).
        alpha, class_weight, pos_weight: Parameters of shape () or (C,), or None.
        scale: Factor of the result, (); None for 1.
        detach_focusing, ignore_index, reduction, soft_label: See :func:`mmasl.ops.asymmetric_loss`.
    """
    logits: Tensor
    target: Tensor
    quality: Tensor | None
    weight: Tensor | None
    gamma_pos: Tensor
    gamma_neg: Tensor
    clip: Tensor
    alpha: Tensor | None
    class_weight: Tensor | None
    pos_weight: Tensor | None
    scale: Tensor | None
    detach_focusing: bool
    ignore_index: int | None
    reduction: str
    soft_label: str = 'mixture'


def negative_part(x: Tensor, gamma: Tensor, clip: Tensor | float,
                  detach: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-L- and its derivative by the logit ``x``, for any finite ``x``, with p and q = 1 - p.

    At 128 x 80 call overhead dominates, so every operation counts, and comparisons most.
    """
    tiny = torch.finfo(x.dtype).tiny
    if torch.compiler.is_compiling():
        # One exponential for both saves an eighth of the time of the loop. It is bounded, since inf * 0 is NaN.
        ratio = x.neg().exp().clamp_max(1 / tiny)
        p = (ratio + 1).reciprocal()
        q = ratio * p
    else:
        p, q = x.sigmoid(), x.neg().sigmoid_()
    p_m = (p - clip).clamp_min_(0)
    # -log(1 - p_m) = log(1 + p_m / (1 - p_m)), accurate for small and for large p_m; 1 - p_m = q + m. Without a margin
    # q underflows for large x, where -log q is x to rounding.
    odds = p_m / (q + clip)
    log_term = odds.log1p().clamp_max_(x.clamp_min(40))
    # Above 0, p_m has a finite logarithm. The gradient is (odds + gamma log_term) / p_m * p_m^gamma * p * q, and where
    # q underflows the product of its first and last factor is 1.
    p_m = p_m.clamp_min_(tiny)
    q.clamp_min_(tiny)
    focus = p_m.log().mul_(gamma).exp_()
    odds = odds if detach else torch.addcmul(odds, gamma, log_term)
    grad = odds.clamp_max_(1 / tiny).div_(p_m).mul_(focus).mul_(p).mul_(q)
    return log_term.mul_(focus), grad, p, q


def labelled_part(z: Tensor, quality: Tensor, gamma: Tensor, soft_label: str, detach: bool) -> tuple[Tensor, Tensor]:
    """Loss of labelled entries with a quality t, and its derivative by the logit, for any finite ``z``.

        'qfl': |t - p|^g+ BCE(p, t)    'vfl': t^g+ BCE(p, t)    'mal': BCE(p, t^g+)

    BCE(p, t) = -t log p - (1 - t) log(1 - p) has the derivative p - t.
    """
    log_power, rest = torch.xlogy(gamma, quality), 1 - quality  # 0^0 = 1
    if soft_label == 'mal':
        quality, rest = log_power.exp(), log_power.expm1().neg()
    p, q = z.sigmoid(), z.neg().sigmoid()
    loss = z.abs().neg().exp().log1p() + quality * z.neg().clamp_min(0) + rest * z.clamp_min(0)
    # The smaller of p and 1 - p has more digits.
    grad = torch.where(z > 0, rest - q, p - quality)
    if soft_label == 'vfl':
        focus = log_power.exp()
        return loss * focus, grad * focus
    if soft_label == 'qfl':
        focus = grad.abs().pow(gamma)
        if not detach:
            # p q / |t - p| first: the products of the other factors would underflow.
            through = p * q / grad.masked_fill(grad == 0, 1) * gamma * loss
            return loss * focus, (grad + through) * focus
        return loss * focus, grad * focus
    return loss, grad


def formula(problem: Problem, need_loss: bool, need_grad: bool, need_sums: bool, upstream: Tensor | None = None,
            soft: bool | None = None, first_row: int = 0) -> Result:
    """Loss, gradient and probability sums of rows, each None where it is not needed.

    Args:
        problem: Logits (N, C), target (N, C) or (N,), quality (N,), weight (N, C).
        need_loss, need_grad, need_sums: What to compute.
        upstream: Factor of the gradient, () or (N, C).
        soft: Whether targets may lie between 0 and 1. A target out of range, or a soft one where hard ones are
            promised, gives NaN. None: look at the values, and raise for one out of range.
        first_row: Number of the first row in error messages.
    """
    z = problem.logits.to(problem.gamma_neg.dtype)
    if not torch.compiler.is_compiling() and transformed():
        # What is written in place must be batched wherever a parameter is.
        parameters = (problem.gamma_pos, problem.gamma_neg, problem.clip, problem.alpha, problem.class_weight,
                      problem.pos_weight)
        z = z + sum(0 * x for x in parameters if x is not None)
    y, positive, ignored, soft = _read_target(problem, soft, first_row)
    not_y, weight = ONE[z.dtype] - y, problem.weight
    # The next number below: p_m is 0 below the margin and not at it, where the gradient is that of the side p > m.
    clip = problem.clip * BELOW_ONE[z.dtype]
    label_weights = weights_by_label(problem.alpha, problem.class_weight, problem.pos_weight)
    if soft or problem.soft_label != 'mixture':
        loss, grad, p, q = negative_part(z, problem.gamma_neg, clip, problem.detach_focusing)
        if problem.soft_label == 'mixture':
            pos_loss, pos_grad, _, _ = negative_part(-z, problem.gamma_pos, 0., problem.detach_focusing)
            pos_grad.neg_()
        else:
            pos_loss, pos_grad = labelled_part(z, y, problem.gamma_pos, problem.soft_label, problem.detach_focusing)
        if label_weights is not None:
            of_pos, of_neg = label_weights
            loss, grad, pos_loss, pos_grad = loss * of_neg, grad * of_neg, pos_loss * of_pos, pos_grad * of_pos
        loss, grad = torch.lerp(loss, pos_loss, positive), torch.lerp(grad, pos_grad, positive)
        p_pos, p_neg = p, q
    else:
        # One evaluation an element: a hard positive is a negative of -z without a margin.
        sign = not_y - y
        loss, grad, _, p_pos = negative_part(z * sign, torch.addcmul(not_y * problem.gamma_neg, y, problem.gamma_pos),
                                             not_y * clip, problem.detach_focusing)
        grad, p_neg = grad.mul_(sign), p_pos
        if label_weights is not None:
            of_pos, of_neg = label_weights
            factors = torch.lerp(of_neg, of_pos, y)
            loss, grad = loss.mul_(factors), grad.mul_(factors)
    if weight is not None:
        loss, grad = loss * weight, grad * weight
    if ignored is not None:
        loss, grad = loss.masked_fill(ignored, 0), grad.masked_fill(ignored, 0)
    if problem.reduction == 'sum':
        # Inductor fuses a sum that has the loops of the elements: with labels these go over rows and classes.
        loss = loss.sum() if problem.target.dim() == 2 else loss.sum(-1).sum()
    for factor in (problem.scale, upstream):
        grad = grad if factor is None else grad * factor.to(grad.dtype)
    loss = loss if problem.scale is None else loss * problem.scale
    sums = _probability_sums(y, not_y, p_pos, p_neg, weight, ignored) if need_sums else None
    return loss if need_loss else None, saturate(grad, problem.logits.dtype) if need_grad else None, sums


def weights_by_label(alpha: Tensor | None, class_weight: Tensor | None,
                     pos_weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Weights of positives and of negatives, each () or (C,); None for no weights."""
    given = [x for x in (alpha, class_weight, pos_weight) if x is not None]
    if not given:
        return None
    positive = torch.ones_like(given[0]) if alpha is None else alpha
    negative = positive if alpha is None else 1 - alpha
    if class_weight is not None:
        positive, negative = positive * class_weight, negative * class_weight
    return positive if pos_weight is None else positive * pos_weight, negative


def _read_target(problem: Problem, soft: bool | None,
                 first_row: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The target as (N, C) labels between 0 and 1.

    Also the share of the positive part in each entry, what is ignored, and whether labels may be soft.
    """
    y, dtype, classes = problem.target, problem.gamma_neg.dtype, problem.logits.shape[-1]
    ignored = None if problem.ignore_index is None else equals(y, problem.ignore_index)
    look, mixture = soft is None, problem.soft_label == 'mixture'
    if y.dim() == 2:
        y = (y if ignored is None else y.masked_fill(ignored, 0)).to(dtype)
        if look:
            soft = problem.target.dtype != torch.bool and not torch.equal(y * y, y)
            if soft:
                check_range(problem.target, ignored, 1, 'target', 'a hard or soft label between 0 and 1', first_row)
        else:
            known = (y >= 0) & (y <= 1) if soft else (y == 0) | (y == 1)
            y = torch.where(known, y, torch.nan)
        return y, y if mixture else (y != 0).to(dtype), ignored, bool(soft)
    if look:
        check_range(y, ignored, classes, 'label', f'0 to {classes - 1} for a class, {classes} for background',
                    first_row)
    known = (y >= 0) & (y <= classes)
    y = labelled = (y.unsqueeze(-1) == torch.arange(classes, device=y.device)).to(dtype)
    if (quality := problem.quality) is not None:
        if ignored is not None:
            quality = quality.masked_fill(ignored, 0)
        if look:
            check_range(quality, None, 1, 'quality', 'a soft label between 0 and 1', first_row)
        known = known & (quality >= 0) & (quality <= 1)
        y = y * quality.unsqueeze(-1)
    if not look:
        known = (known if ignored is None else known | ignored).unsqueeze(-1)
        y = torch.where(known, y, torch.nan)
        labelled = labelled if mixture else torch.where(known, labelled, torch.nan)
    return (y, y if mixture else labelled, None if ignored is None else ignored.unsqueeze(-1),
            problem.quality is not None)


def check_range(x: Tensor, ignored: Tensor | None, high: int, name: str, allowed: str, first_row: int) -> None:
    """Raise :class:`DataError` with value and place of the first element outside [0, high] that is not ignored."""
    good = (x >= 0) & (x <= high)
    good = good if ignored is None else good | ignored
    if not good.all():
        row, *column = place = (~good).nonzero()[0].tolist()
        raise DataError(f'{name} {x[tuple(place)].item()} at {[first_row + row, *column]} is out of range, which is '
                        f'{allowed}. Set ignore_index if it marks an entry to leave out')


def _probability_sums(y: Tensor, not_y: Tensor, p_pos: Tensor, p_neg: Tensor, weight: Tensor | None,
                      ignored: Tensor | None) -> Tensor:
    """(4, C) sums of y p, y, (1 - y) q and 1 - y over the rows, of elements that count."""
    skipped = ignored if weight is None else weight == 0 if ignored is None else ignored | (weight == 0)
    if skipped is not None:
        y, not_y = y.masked_fill(skipped, 0), not_y.masked_fill(skipped, 0)
    return torch.stack([(y * p_pos).sum(0), y.sum(0), (not_y * p_neg).sum(0), not_y.sum(0)])


def saturate(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the logits' dtype.

    float16 ends at 65504, so a loss scale of 65536 would turn a gradient of 1 into inf. Up to twice its end it
    saturates instead; a larger one overflows, and GradScaler sees it.
    """
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        grad = torch.where(grad.abs() <= 2 * top, grad.clamp(-top, top), grad)
    return grad.to(dtype)


def transformed(upstream: Tensor | None = None) -> bool:
    """Whether a transform of torch.func is active, under which values cannot be looked at.

    Also whether the upstream gradient is a batch of them, as ``torch.autograd.grad(..., is_grads_batched=True)`` has
    it.
    """
    return torch._C._are_functorch_transforms_active() or (
        upstream is not None and torch._C._functorch.is_legacy_batchedtensor(upstream))


def widen(target: Tensor, labels: bool) -> Tensor:
    """A target that can be computed with. Narrow labels would wrap the number of classes and ``ignore_index``."""
    narrow = labels and target.dtype in (torch.uint8, torch.int8, torch.int16)
    return target.long() if narrow or target.dtype in (torch.uint16, torch.uint32, torch.uint64) else target


def equals(target: Tensor, value: int | None) -> Tensor:
    """Where a target has a value. A number that a narrow integer cannot hold would wrap in a comparison."""
    if value is None:
        return torch.zeros_like(target, dtype=torch.bool)
    if not target.is_floating_point() and target.dtype != torch.bool:
        info = torch.iinfo(target.dtype)
        if not info.min <= value <= info.max:
            return torch.zeros_like(target, dtype=torch.bool)
    return target == value


def _as_rows(problem: Problem, upstream: Tensor | None) -> tuple[Problem, Tensor | None]:
    """The problem and the upstream gradient with all leading dimensions in one, and contiguous logits.

    The results have the strides of the logits, and a compiled graph counts on contiguous ones.
    """
    logits, target, quality, weight = problem[:4]
    if logits.dim() == 2:
        return problem._replace(logits=logits.contiguous(),
                                weight=None if weight is None else weight.expand(logits.shape)), upstream
    classes = logits.shape[-1] if logits.dim() else 1
    rows = logits.numel() // max(classes, 1)
    labels = target.dim() < logits.dim()
    return problem._replace(
        logits=logits.reshape(rows, classes).contiguous(),
        target=target.reshape((rows, ) if labels else (rows, classes)),
        quality=None if quality is None else quality.reshape(rows),
        weight=None if weight is None else weight.expand(logits.shape).reshape(rows, classes)), (
            upstream.reshape(rows, classes) if upstream is not None and upstream.dim() else upstream)


def run(problem: Problem, need_loss: bool = True, need_grad: bool = True, need_sums: bool = False,
        upstream: Tensor | None = None) -> Result:
    """The formula over blocks of rows, which bound the memory of its temporaries."""
    shape = problem.logits.shape
    rows, upstream = _as_rows(problem, upstream)
    transform = transformed(upstream)
    look = rows.logits.device.type == 'cpu' and not transform
    soft = None if look else rows.quality is not None or rows.target.is_floating_point()
    parts = blocks(rows.logits)
    if len(parts) == 1 or transform:  # which cannot write blocks into a tensor
        loss, grad, sums = formula(rows, need_loss, need_grad, need_sums, upstream, soft)
        if len(shape) == 2:
            return loss, grad, sums
    else:
        grad = torch.empty_like(rows.logits, memory_format=torch.contiguous_format) if need_grad else None
        losses: list[Any] = []
        all_sums: list[Any] = []
        for part in parts:
            block_grad: Any
            loss, block_grad, sums = formula(_block(rows, part), need_loss, need_grad, need_sums,
                                             _cut(upstream, part), soft, part.start)
            losses.append(loss)
            all_sums.append(sums)
            if grad is not None:
                grad[part] = block_grad
        loss = (None if not need_loss else
                torch.cat(losses) if problem.reduction == 'none' else torch.stack(losses).sum())
        sums = torch.stack(all_sums).sum(0) if need_sums else None
    if loss is not None and problem.reduction == 'none':
        loss = loss.reshape(shape)
    return loss, None if grad is None else grad.reshape(shape), sums


def _block(rows: Problem, part: slice) -> Problem:
    return rows._replace(logits=rows.logits[part], target=rows.target[part], quality=_cut(rows.quality, part),
                         weight=_cut(rows.weight, part))


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return x[part] if x is not None and x.dim() else x


def blocks(logits: Tensor) -> list[slice]:
    """Rows of (N, C) logits in blocks."""
    rows = len(logits)
    count = logits.numel() // BLOCK.get(logits.device.type, ACCELERATOR_BLOCK)
    step = max(-(-rows // max(count, 1)), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


@torch.compiler.assume_constant_result
@lru_cache
def unavailable_reason() -> str:
    """Why the formula cannot be compiled here, also logged once; empty if it can."""
    try:
        from torch._inductor.codecache import cache_dir
        from torch._inductor.cpp_builder import get_cpp_compiler
        get_cpp_compiler()
        with TemporaryFile(dir=cache_dir()):  # a folder that cannot be written, or a user without a name
            pass
    except Exception as error:  # its class differs between versions of torch
        reason = f'torch.compile, a C++ compiler or a cache folder for it, is missing ({error})'
        logging.getLogger('mmasl').warning('Large losses on the CPU take longer than they could: %s', reason)
        return reason
    return ''


@lru_cache
def _compiled(function: Callable, variant: str) -> Callable:
    logging.getLogger('mmasl').warning('Compiling the loss for %s, once: this takes up to half a minute', variant)
    return torch.compile(function, dynamic=True)


def compiled(function: Callable, variant: str) -> Callable:
    """``function``, compiled at its first call of a variant."""
    def call(*args: object) -> tuple:
        # All forms of a loss are variants of one function, and PyTorch's limit of 8 is too low for them.
        with torch._dynamo.config.patch(recompile_limit=64):
            return _compiled(function, variant)(*args)
    return call


def run_compiled(problem: Problem, need_loss: bool = True, need_grad: bool = True, need_sums: bool = False,
                 upstream: Tensor | None = None) -> Result:
    """The formula as one C++ loop, for large logits on the CPU; as :func:`run` otherwise."""
    arguments = need_loss, need_grad, need_sums
    if not problem.logits.numel():
        return run(problem, *arguments, upstream)
    problem, shape = problem._replace(logits=problem.logits.detach()), problem.logits.shape
    rows, row_upstream = _as_rows(problem, upstream)
    target, labels = rows.target, rows.target.dim() == 1
    # Guessed from the first row, since hard targets take half the time; a wrong guess gives NaN.
    soft = rows.quality is not None or (not labels and target.is_floating_point() and bool(target[0].frac().any()))
    for may_be_soft in (soft, True):
        variant = f'{"soft" if may_be_soft else "hard"} {"labels" if labels else "dense targets"}'
        loss, grad, sums = compiled(formula, variant)(rows, *arguments, row_upstream, may_be_soft)
        if not (loss if need_loss else grad).isnan().any():
            break
        if may_be_soft or labels or not target.is_floating_point():
            return run(problem, *arguments, upstream)  # which raises an error for a target out of range
    return (loss.reshape(shape) if need_loss and problem.reduction == 'none' else loss,
            None if grad is None else grad.reshape(shape), sums)


def softmax_formula(logits: Tensor, labels: Tensor, gamma_pos: Tensor, gamma_neg: Tensor, class_weight: Tensor | None,
                    smoothing: float, ignore_index: int | None, need_grad: bool,
                    grad_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The softmax form of (N, C) logits and labels (N,): losses (N,), and the gradient of their sum.

    p of the label is the sigmoid of its lead, the label's logit minus log sum exp of the others, so 1 - p stays exact
    where p rounds to 1. An unknown label gives NaN.
    """
    z, label = logits.detach().to(gamma_pos.dtype), labels.unsqueeze(-1)
    lowest, classes = torch.finfo(z.dtype).min, z.shape[-1]
    share = smoothing / classes
    is_label = torch.arange(classes, device=z.device) == label
    known = (label >= 0) & (label < classes)
    top = torch.where(is_label, -torch.inf, z).amax(-1, keepdim=True)
    others = (z - top).clamp(min=lowest)
    log_sum = torch.where(is_label, 0., others.exp()).sum(-1, keepdim=True).log()
    lead = (z.gather(-1, label.clamp(0, classes - 1).long()) - top - log_sum).clamp(lowest, -lowest)
    loss, slope, rest, p = negative_part(-lead, gamma_pos, 0., False)
    factor = torch.full_like(lead, 1 - smoothing + share).masked_fill(~known, torch.nan)
    if class_weight is not None:
        factor = factor * class_weight.expand(classes)[label.clamp(0, classes - 1).long()]
    loss, slope, total = factor * loss, -factor * slope, torch.zeros_like(loss)
    focused = torch.zeros_like(z) if need_grad else None
    if smoothing:
        log_p = (others - (log_sum - F.logsigmoid(-lead))).clamp(min=lowest)
        power = torch.where(is_label, 0., (gamma_neg * log_p).exp())
        power = power if class_weight is None else power * class_weight
        moment = power * log_p
        loss = loss - share * moment.sum(-1, keepdim=True)
        focused = share * (power + gamma_neg * moment)  # minus the derivative of the smoothed part by log p
        total = -focused.sum(-1, keepdim=True)
    used = None if ignore_index is None else label != ignore_index
    loss = loss if used is None else torch.where(used, loss, 0.)
    if focused is None or not need_grad:
        return loss.squeeze(-1), None
    grad = torch.where(is_label, slope - p * total, (others - log_sum).exp() * (-slope - rest * total) - focused)
    # A row of an unknown label is NaN as a whole.
    grad = torch.where(known, grad, torch.nan)
    return loss.squeeze(-1), (grad if used is None else torch.where(used, grad, 0.)).to(grad_dtype)


def run_softmax(logits: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, class_weight: Tensor | None,
                smoothing: float, ignore_index: int | None, need_grad: bool, grad_dtype: torch.dtype,
                compile: bool = False) -> tuple[Tensor, Tensor | None]:
    """:func:`softmax_formula` over blocks of rows, or compiled over all of them."""
    classes = logits.shape[-1]
    if labels.device.type == 'cpu' and not transformed():
        check_range(labels, None if ignore_index is None else labels == ignore_index, classes - 1, 'label',
                    f'0 to {classes - 1}', 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gammas = [torch.full((), gamma, dtype=dtype, device=logits.device) for gamma in (gamma_pos, gamma_neg)]
    settings: Any = (*gammas, class_weight, smoothing, ignore_index, need_grad, grad_dtype)
    parts = blocks(logits)
    if compile and logits.numel():
        return compiled(softmax_formula, 'softmax')(logits, labels, *settings)
    if len(parts) == 1 or transformed():
        return softmax_formula(logits, labels, *settings)
    grad: Any = torch.empty_like(logits, dtype=grad_dtype) if need_grad else None
    losses = []
    for part in parts:
        loss, block_grad = softmax_formula(logits[part], labels[part], *settings)
        losses.append(loss)
        if grad is not None:
            grad[part] = block_grad
    return torch.cat(losses), grad
