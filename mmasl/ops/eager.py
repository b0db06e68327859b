"""The loss and its gradient in eager PyTorch, for the CPU, for float64, and for accelerators without Triton.

On the CPU it goes over blocks of rows, small enough that what is computed in between stays in the cache. Elsewhere
there is one block, and nothing waits for a value.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**17  # elements


def run(logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None, gamma_pos: Tensor,
        gamma_neg: Tensor, clip: Tensor, scale: Tensor, alpha: float | None, detach_focusing: bool,
        ignore_index: int | None, reduction: str, need_loss: bool, need_grad: bool, need_sums: bool,
        upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Loss, gradient and probability sums, each None where it is not needed.

    The arguments are those of the operators in :mod:`mmasl.ops.asymmetric_loss`, which have been checked there.
    """
    dtype, classes, on_cpu = gamma_neg.dtype, logits.shape[-1] if logits.dim() else 1, logits.device.type == 'cpu'
    dense = quality is None and target.shape == logits.shape
    z = logits.detach().reshape(-1, classes) if logits.numel() else logits.new_empty(0, max(classes, 1))
    rows = len(z)
    target = target.reshape(z.shape) if dense else target.reshape(rows, 1)
    quality = None if quality is None else quality.reshape(rows, 1)
    weight = None if weight is None else weight.expand(logits.shape).reshape(z.shape)
    factor = scale if upstream is None else scale * upstream.to(dtype).reshape(
        {'none': z.shape, 'rows': (rows, 1), 'sum': ()}[reduction])
    # On the CPU known numbers allow for shorter formulas.
    g_pos, g_neg, m, times = (x.item() if on_cpu and not x.dim() else x for x in (gamma_pos, gamma_neg, clip, factor))

    grad = z.new_empty(z.shape if need_grad else 0)

    def run_block(block: slice) -> tuple[Tensor | None, Tensor | None]:
        z_b = z[block].to(dtype).contiguous()
        out = grad[block] if need_grad and grad.dtype == dtype else None
        neg_loss, neg_grad, p = negative_part(z_b, g_neg, m, detach_focusing, need_grad, out)
        labels = _Dense(target[block], ignore_index, block.start, dtype) if dense else _Labels(
            target[block], None if quality is None else quality[block], classes, ignore_index, block.start, dtype)
        pos_loss, pos_grad, _ = negative_part(-labels.positives(z_b), labels.parameter(g_pos), 0., detach_focusing,
                                              need_grad)
        w = None if weight is None else weight[block]
        if neg_grad is not None and pos_grad is not None:
            block_grad = labels.mix(neg_grad, pos_grad.neg_(), alpha, w)
            if isinstance(times, Tensor) or times != 1:
                block_grad *= times[block] if isinstance(times, Tensor) and times.dim() else times
            if block_grad is not out:
                grad[block] = saturate(block_grad, logits.dtype)
        sums = _probability_sums(p, labels, w) if need_sums else None
        if not need_loss:
            return None, sums
        loss = labels.mix(neg_loss, pos_loss, alpha, w)
        return loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.sum(1), sums

    losses, sums = [], torch.zeros(4, classes if need_sums else 0, dtype=dtype, device=z.device)
    for block_loss, block_sums in map(run_block, blocks(rows, classes, on_cpu)):
        if block_loss is not None:
            losses.append(block_loss)
        if block_sums is not None:
            sums += block_sums
    if need_loss:
        if reduction == 'sum':
            loss = torch.stack(losses).sum() if losses else torch.zeros((), dtype=dtype, device=z.device)
        else:
            loss = torch.cat(losses) if losses else z.new_empty(0, dtype=dtype)
            loss = loss.reshape(logits.shape[:-1] if reduction == 'rows' else logits.shape)
        loss *= scale
    return (loss if need_loss else None, grad.reshape(logits.shape) if need_grad else None,
            sums if need_sums else None)


def blocks(rows: int, classes: int, on_cpu: bool) -> list[slice]:
    """Blocks of rows; all at once where a cache is none of ours."""
    step = max(BLOCK // max(classes, 1) if on_cpu else rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def negative_part(z: Tensor, gamma: float | Tensor, clip: float | Tensor, detach_focusing: bool, need_grad: bool,
                  out: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """-L-, its derivative by z (in ``out``, if given), and p = sigmoid(z), for z of any size.

    Parameters that are numbers make it faster than tensors do. The positive part is the negative part of -z without a
    margin, its derivative the negated one.
    """
    p, q = z.sigmoid(), z.neg().sigmoid_()
    p_m = p if isinstance(clip, float) and clip == 0 else (p - clip).clamp_(min=0)
    log_term = _log_term(z, p_m, q, clip)
    grad = None
    if isinstance(clip, float) and isinstance(gamma, float) and (gamma == 0 or gamma >= 1):
        # With p_m^(gamma - 1) nothing is divided by p_m.
        power = None if gamma <= 1 else p_m**(gamma - 1)
        if need_grad and clip == 0:
            through = 0. if detach_focusing else gamma
            grad = torch.addcmul(p, q, log_term, value=through, out=out) if through else (
                p.clone() if out is None else out.copy_(p))
        elif need_grad:
            # 1 / (q + clip) may be infinite where clip is denormal and q is 0.
            grad = torch.div(q, q + clip, out=out).mul_(p_m if gamma else p >= clip)
            grad = grad if detach_focusing else grad.addcmul_(q, log_term, value=gamma)
        if grad is not None and (gamma or clip):
            grad = grad.mul_(p) if power is None else grad.mul_(p).mul_(power)
        loss = log_term.mul_(p_m) if gamma else log_term
        return loss if power is None else loss.mul_(power), grad, p

    focus = p_m**gamma
    if need_grad:
        # 0/0 in the first line is m = 0 and q = 0, in the second p_m = 0; both limits are 1.
        grad = q.div(q + clip).masked_fill_(torch.as_tensor(clip == 0, device=z.device), 1).mul_(p)
        if not detach_focusing:
            ratio = torch.where(p_m > 0, log_term / p_m, 1.)
            # From the left: q may be 0 where log_term is as large as z.
            grad += gamma * p * q * ratio
        # At p = m the side p > m counts: gamma = 0 without a margin is cross-entropy everywhere.
        grad = grad.mul_(focus).masked_fill_(p < clip, 0)
    return focus.mul_(log_term), grad, p


def _log_term(z: Tensor, p_m: Tensor, q: Tensor, clip: float | Tensor) -> Tensor:
    """-log(1 - p_m), where 1 - p_m = q + m."""
    if isinstance(clip, float):
        if clip == 0:
            return F.logsigmoid(-z).neg_()
        if clip >= 0.01:
            return p_m.neg().log1p_().neg_()
    # log1p loses digits near p_m = 1, the logarithm near 0, and both where m = 0.
    log_term = torch.where(p_m < 0.5, p_m.neg().log1p_(), (q + clip).log_())
    zero = torch.as_tensor(clip == 0, device=z.device)
    return torch.where(zero, F.logsigmoid(-z), log_term).neg_()


class _Dense:
    """A block of dense targets. On the CPU the positive part is computed for the positives alone, which are few."""

    def __init__(self, target: Tensor, ignore_index: int | None, start: int, dtype: torch.dtype) -> None:
        self.ignored = None if ignore_index is None else target == ignore_index
        y = target if self.ignored is None else target.masked_fill(self.ignored, 0)
        self.y = in_range(y, 1, 'target', 'a hard or soft label between 0 and 1', start).to(dtype)
        self.where = self.y.reshape(-1).nonzero().squeeze(1) if target.device.type == 'cpu' else None
        self.y_positives = self.positives(self.y)

    def positives(self, x: Tensor) -> Tensor:
        """What of ``x`` has a positive part."""
        return x if self.where is None else x.reshape(-1).index_select(0, self.where)

    def parameter(self, gamma: float | Tensor) -> float | Tensor:
        """The parameter of each of the positives."""
        if self.where is None or isinstance(gamma, float):
            return gamma
        return gamma[self.where % len(gamma)]

    def mix(self, neg: Tensor, pos: Tensor, alpha: float | None, weight: Tensor | None) -> Tensor:
        """weight * (y * pos + (1 - y) * neg) (Eq. 2), in the memory of ``neg``."""
        if alpha is not None:
            neg, pos = neg.mul_(1 - alpha), pos.mul_(alpha)
        self.blend(neg, pos)
        neg = neg if weight is None else neg.mul_(weight)
        return neg if self.ignored is None else neg.masked_fill_(self.ignored, 0)

    def blend(self, neg: Tensor, pos: Tensor) -> None:
        """y * pos + (1 - y) * neg in ``neg``."""
        if self.where is None:
            neg.lerp_(pos, self.y)
        else:
            neg.view(-1).index_copy_(0, self.where, torch.lerp(self.positives(neg), pos, self.y_positives))

    def positive_sums(self, p: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of y and y p over the rows of each class."""
        y = self.y * counted
        return y.sum(0), (y * p).sum(0)


class _Labels(_Dense):
    """A block of labels: only one column of each row has a positive part."""

    def __init__(self, labels: Tensor, quality: Tensor | None, classes: int, ignore_index: int | None, start: int,
                 dtype: torch.dtype) -> None:
        self.ignored = None if ignore_index is None else labels == ignore_index
        labels = labels.long() if self.ignored is None else labels.long().masked_fill(self.ignored, classes)
        if quality is not None and self.ignored is not None:
            quality = quality.masked_fill(self.ignored, 0)
        known = in_range(labels, classes, 'label', f'0 to {classes - 1} for a class, {classes} for background'
                         f'{"" if ignore_index is None else f", {ignore_index} to ignore"}', start)
        y = torch.ones_like(labels, dtype=dtype) if quality is None else in_range(
            quality, 1, 'quality', 'a soft label between 0 and 1', start).to(dtype)
        # Background has no positive part; an unchecked label out of range carries its NaN into the row.
        self.y = torch.where(labels == classes, 0., y + 0. * known)
        self.column = labels.clamp(0, classes - 1)

    def positives(self, x: Tensor) -> Tensor:
        return x.gather(-1, self.column)

    def parameter(self, gamma: float | Tensor) -> float | Tensor:
        return gamma[self.column] if isinstance(gamma, Tensor) and gamma.dim() else gamma

    def blend(self, neg: Tensor, pos: Tensor) -> None:
        neg.scatter_(-1, self.column, torch.lerp(neg.gather(-1, self.column), pos, self.y))

    def positive_sums(self, p: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        y = self.y * counted.gather(-1, self.column)
        zeros = p.new_zeros(p.shape[-1])
        return (zeros.index_add(0, self.column.flatten(), y.flatten()),
                zeros.index_add(0, self.column.flatten(), (y * self.positives(p)).flatten()))


def _probability_sums(p: Tensor, labels: _Dense, weight: Tensor | None) -> Tensor:
    """(4, C) sums of y p, y, (1 - y)(1 - p) and 1 - y over the elements that count."""
    counted = torch.ones_like(p) if weight is None else (weight != 0).to(p.dtype)
    counted = counted if labels.ignored is None else counted.masked_fill(labels.ignored, 0)
    elements, p_sum = counted.sum(0), (counted * p).sum(0)
    positives, p_positives = labels.positive_sums(p, counted)
    negatives = elements - positives
    return torch.stack([p_positives, positives, negatives - (p_sum - p_positives), negatives])


def in_range(x: Tensor, high: int, name: str, allowed: str, start: int = 0) -> Tensor:
    """``x`` where it lies in [0, high], else an error, or NaN where looking at it would cost a wait."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return x if x.dtype == torch.bool else torch.where((x >= 0) & (x <= high), x, torch.nan)
    if x.numel() and x.dtype != torch.bool:
        low, top = x.aminmax()
        if not (low >= 0 and top <= high):
            row, *rest = place = (~((x >= 0) & (x <= high))).nonzero()[0].tolist()
            raise ValueError(f'{name} {x[tuple(place)].item()} at {[start + row, *rest]} is out of range, which is '
                             f'{allowed}; set ignore_index if it marks an entry to leave out')
    return x


def saturate(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the logits' dtype.

    float16 ends at 65504, so that a loss scale of 65536 would turn a gradient of 1 into inf. Up to twice its end it
    saturates instead; beyond, it overflows and GradScaler sees it.
    """
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        grad = torch.where(grad.abs() <= 2 * top, grad.clamp(-top, top), grad)
    return grad.to(dtype)
