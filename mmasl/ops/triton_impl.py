"""The loss, its gradient and the probability sums in one Triton kernel, which reads the logits once.

A program handles a tile of rows and classes. A reduction writes one number per tile or class, and a second, short sum
adds them in a fixed order: without atomics results are deterministic. The kernel reads all parameters from memory, so
changing one does not recompile it.
"""
import logging
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mmasl.ops import torch_impl
from mmasl.ops.torch_impl import LARGE, Problem, Result
from mmasl.ops.triton_tiles import DEFAULT, TILES

try:
    from triton import knobs
    from triton.language.extra import libdevice
except ImportError:
    raise ImportError(f'the kernel needs Triton 3.4 or newer, and Triton {triton.__version__} is installed') from None

SCALE_TILE = 2048  # elements of a program of scale_
INTERPRETED = knobs.runtime.interpret  # by TRITON_INTERPRET=1, which runs the kernel on the CPU
FAST = tl.constexpr(not INTERPRETED)
HIP = tl.constexpr(torch.version.hip is not None)
MODES = {'none': 1, 'sum': 2}  # what the kernel writes as the loss
_checked: dict[tuple[torch.device, torch.dtype, str], str] = {}  # what check returned, once per process


def unavailable_reason(logits: Tensor, soft_label: str = 'mixture') -> str:
    """Why the kernel cannot run on these logits; empty if it can. The first call on a device runs :func:`check`."""
    return _unavailable_reason(logits.device, logits.dtype, soft_label)


@torch.compiler.assume_constant_result
def _unavailable_reason(device: torch.device, dtype: torch.dtype, soft_label: str) -> str:
    reason = _checked.get((device, dtype, soft_label))
    if reason is not None:
        return reason
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'the kernel computes in float32, and the logits are {dtype}'
    if device.type != 'cuda' and not (INTERPRETED and device.type == 'cpu'):
        return f'the kernel needs a GPU of NVIDIA or AMD, and the logits are on {device}'
    if device.type == 'cuda' and not torch.cuda.is_available():
        return 'PyTorch finds no GPU'
    if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        return 'its first call compares it with PyTorch, which the capture of a CUDA graph forbids: call a loss first'
    with _disable_current_modes():  # of torch.compile and torch.export, which have no values
        reason = check(device, dtype, soft_label)
    if reason:
        logging.getLogger('mmasl').warning('The Triton kernel is not used on %s for %s and soft_label=%r: %s', device,
                                           dtype, soft_label, reason)
    _checked[device, dtype, soft_label] = reason
    return reason


def check(device: torch.device, dtype: torch.dtype, soft_label: str = 'mixture') -> str:
    """Compare the kernel with the PyTorch formula in float64 on a small input, for the first call on a device.

    Each meaning of a soft label is a kernel of its own.

    A GPU or a version of Triton that nobody has tried then costs speed and no training. Takes a host sync, and as long
    as a compilation of the kernel, which Triton keeps on disk.

    Returns:
        What is wrong; empty if value, gradient and probability sums agree.
    """
    def problem(device: torch.device | str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> Problem:
        # 37 x 11, which fills no tile, and logits that bfloat16 holds. With g+ > 0 and a margin no term drops out.
        place = torch.arange(407, device='cpu').view(37, 11)
        hard_and_soft = torch.where(place % 3 == 0, 0.25, (place % 2).double())
        gamma_pos, gamma_neg, clip = (torch.full((), value, dtype=parameter_dtype, device=device)
                                      for value in (1., 4., 0.05))
        return Problem((place % 161 / 2 - 40).to(device, dtype), hard_and_soft.to(device, parameter_dtype), None, None,
                       gamma_pos, gamma_neg, clip, None, None, None, None, False, None, 'sum', soft_label)

    try:
        found = run(problem(device, dtype, torch.float32), need_sums=True)
        expected = torch_impl.run(problem('cpu', torch.float64, torch.float64), need_sums=True)
        for name, x, y in zip(('loss', 'gradient', 'probability sums'), found, expected):
            assert x is not None and y is not None
            error = ((x.cpu().double() - y).abs() / y.abs().clamp_min(1e-4)).max().item()
            if not error < max(1e-3, 4 * torch.finfo(x.dtype).eps):
                return f"its {name} differs from the PyTorch formula's by {error:.1%}"
    except Exception as error:  # Triton's and the driver's classes of errors are many
        return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[-1]}'
    return ''


def layout(logits: Tensor) -> tuple[int, int, int, int] | None:
    """How the kernel reads the logits in place: (outer, inner, stride of a row, stride of a class).

    Rows are numbered ``outer * inner``. Either classes lie side by side, or a permuted map has the rows of each of
    ``outer`` images side by side; None: neither, the logits must be copied.
    """
    classes = logits.shape[-1] if logits.dim() else 1
    if logits.is_contiguous():
        return 1, logits.numel() // max(classes, 1), classes, 1
    for at in range(logits.dim() - 1):
        if logits.movedim(-1, at).is_contiguous():
            inner = prod(logits.shape[at:-1])
            return prod(logits.shape[:at]), inner, 1, inner
    return None


def like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the logits' shape, in the memory layout that :func:`run` gives its results."""
    if layout(logits):
        return torch.empty_like(logits, dtype=dtype)
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


@lru_cache
def architecture(device: torch.device) -> str:
    """'sm_90' of an H100, 'gfx942' of an MI300; empty for the interpreter."""
    if device.type != 'cuda':
        return ''
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.partition(':')[0] if HIP.value else f'sm_{properties.major}{properties.minor}'


class Plan(NamedTuple):
    """How the logits are read and cut into tiles: see :func:`layout`."""
    outer: int
    inner: int
    stride_row: int
    stride_class: int
    block_r: int
    block_c: int
    tiles_r: int
    tiles_c: int
    warps: int


@lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], read: tuple[int, int, int, int], tile: tuple[int, int]) -> Plan:
    _, inner, _, stride_class = read
    classes, (elements, warps) = shape[-1] if shape else 1, tile
    block_c = _class_block(max(classes, 1), stride_class)
    block_r = min(max(elements // block_c, 1), triton.next_power_of_2(max(inner, 1)))
    return Plan(*read, block_r, block_c, triton.cdiv(inner, block_r), triton.cdiv(classes, block_c), warps)


def run(problem: Problem, need_loss: bool = True, need_grad: bool = True, need_sums: bool = False,
        upstream: Tensor | None = None, tile: tuple[int, int] | None = None) -> Result:
    """As :func:`mmasl.ops.torch_impl.run`; elementwise results have the memory layout of the logits.

    Args:
        problem, need_loss, need_grad, need_sums, upstream: As there.
        tile: Elements (a power of two) and warps of a program; None for those of mmasl/ops/triton_tiles.py.
    """
    (logits, target, quality, weight, gamma_pos, gamma_neg, clip, alpha, class_weight, pos_weight, scale,
     detach_focusing, ignore_index, reduction, soft_label) = problem
    size = logits.numel()
    classes, empty = logits.shape[-1] if logits.dim() else 1, size == 0
    has_labels = quality is not None or target.shape != logits.shape
    z, read = logits, layout(logits)
    if read is None:
        z = logits.contiguous()
        read = 1, size // max(classes, 1), classes, 1
    if tile is None:
        tile = TILES.get((architecture(logits.device), 'large' if size >= LARGE else 'small'), DEFAULT)
    outer, inner, stride_row, stride_class, block_r, block_c, tiles_r, tiles_c, warps = _plan(logits.shape, read, tile)
    tiles = outer * tiles_r * tiles_c

    make = torch.zeros if empty else torch.empty
    loss = grad = sums = None
    if need_loss:
        loss = like(z, torch.float32) if reduction == 'none' else make(tiles, dtype=torch.float32, device=z.device)
    if need_grad:
        grad = like(z, z.dtype)
    if need_sums:
        sums = make(outer * tiles_r, 4, classes, dtype=torch.float32, device=z.device)

    if not empty:
        def strides(x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
            """The tensor and its strides by image, row and class."""
            if x is None:
                return None, 0, 0, 0
            x = x if x.shape == logits.shape else x.expand(logits.shape)
            if x.dim() == 2:  # a single image; on small batches each view counts
                return x, 0, x.stride(0), x.stride(1)
            x = x.reshape(outer, inner, classes)
            return x, x.stride(0), x.stride(1), x.stride(2)

        target = target.view(torch.uint8) if target.dtype == torch.bool else target
        target, *target_strides = (target.reshape(-1), inner, 1, 0) if has_labels else strides(target)
        weight, *weight_strides = strides(weight)
        upstream, *upstream_strides = strides(upstream)
        with torch.cuda.device_of(logits):
            _kernel[(tiles, )](
                z, target, None if quality is None else quality.reshape(-1), weight, gamma_pos, gamma_neg, clip, alpha,
                class_weight, pos_weight, scale, upstream, loss, grad, sums, classes, inner, tiles_r, tiles_c,
                stride_row, stride_class,
                *target_strides, *weight_strides, *upstream_strides,
                ignore_index, HAS_LABELS=has_labels,
                MAY_BE_SOFT=quality is not None or (not has_labels and target.is_floating_point()),
                PER_CLASS_POS=gamma_pos.dim() == 1, PER_CLASS_NEG=gamma_neg.dim() == 1, PER_CLASS_CLIP=clip.dim() == 1,
                **{f'PER_CLASS_{name}': x is not None and x.dim() == 1 for name, x in (
                    ('ALPHA', alpha), ('WEIGHT', class_weight), ('POS_WEIGHT', pos_weight))},
                DETACH=detach_focusing, SOFT_LABEL=soft_label, LOSS=MODES[reduction] if need_loss else 0,
                BLOCK_R=block_r, BLOCK_C=block_c, num_warps=warps)
    if need_loss and reduction != 'none':
        loss = loss.sum(0)
    return loss, grad, sums.sum(0) if need_sums else None


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad`` times a tensor of shape (), in place; nothing is read or written where the factor is 1."""
    if grad.numel():
        with torch.cuda.device_of(grad):
            _scale_kernel[(-(-grad.numel() // SCALE_TILE), )](grad, factor, grad.numel(), BLOCK=SCALE_TILE)
    return grad


def _class_block(classes: int, stride_class: int) -> int:
    """Classes of a tile, a power of two that leaves few of its places empty."""
    least = triton.next_power_of_2(classes)
    sizes = [size for size in ((16, 32, 64, 128) if stride_class == 1 else (1, 2, 4, 8)) if size <= least] or [least]
    return min(sizes, key=lambda size: (round(triton.cdiv(classes, size) * size / classes, 1), -size))


@triton.jit
def _kernel(z_ptr, target_ptr, quality_ptr, weight_ptr, gamma_pos_ptr, gamma_neg_ptr, clip_ptr, alpha_ptr,
            class_weight_ptr, pos_weight_ptr, scale_ptr, upstream_ptr, loss_ptr, grad_ptr, sums_ptr, classes, inner,
            tiles_r, tiles_c, stride_row, stride_class, target_outer, target_row, target_class, weight_outer,
            weight_row, weight_class, upstream_outer, upstream_row, upstream_class, ignore_index,
            HAS_LABELS: tl.constexpr, MAY_BE_SOFT: tl.constexpr, PER_CLASS_POS: tl.constexpr,
            PER_CLASS_NEG: tl.constexpr, PER_CLASS_CLIP: tl.constexpr, PER_CLASS_ALPHA: tl.constexpr,
            PER_CLASS_WEIGHT: tl.constexpr, PER_CLASS_POS_WEIGHT: tl.constexpr, DETACH: tl.constexpr,
            SOFT_LABEL: tl.constexpr, LOSS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    tile = tl.program_id(0)
    tile_c = tile % tiles_c
    tile_r = tile // tiles_c
    image = (tile_r // tiles_r).to(tl.int64)
    first_row = (tile_r % tiles_r).to(tl.int64) * BLOCK_R
    first_class = tile_c.to(tl.int64) * BLOCK_C
    # Within a tile int32 does for the logits, whose rows or classes lie side by side; for the others see _load.
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    row_mask = r < tl.minimum(inner - first_row, BLOCK_R).to(tl.int32)
    class_mask = c < tl.minimum(classes - first_class, BLOCK_C).to(tl.int32)
    mask = row_mask[:, None] & class_mask[None, :]
    rows = image * inner + first_row  # the first of the tile, over all images

    start = image * inner * classes + first_row * stride_row + first_class * stride_class
    offsets = r[:, None] * stride_row + c[None, :] * stride_class
    z = tl.load(z_ptr + start + offsets, mask=mask, other=0.).to(tl.float32)

    # The target as a soft label, what is used, and what is out of range.
    used = mask
    if HAS_LABELS:
        label = tl.load(target_ptr + rows + r, mask=row_mask, other=0)
        bad = (label < 0) | (label > classes)
        if ignore_index is not None:
            bad = bad & (label != ignore_index)
            used = mask & (label != ignore_index)[:, None]
        # The class within the tile, or one that is not in it.
        column = label - first_class
        column = tl.where((column >= 0) & (column < BLOCK_C), column, -1).to(tl.int32)
        y = (column[:, None] == c[None, :]).to(tl.float32)
        if quality_ptr is not None:
            quality = tl.load(quality_ptr + rows + r, mask=row_mask, other=0.).to(tl.float32)
            bad = bad | ((quality >= 0) & (quality <= 1) == 0)
            y = y * quality[:, None]
        bad = bad[:, None]
    else:
        y = _load(target_ptr, image, first_row, first_class, r, c, target_outer, target_row, target_class, mask)
        if ignore_index is not None:
            used = mask & (y != ignore_index)
        y = y.to(tl.float32)
        bad = (y >= 0) & (y <= 1) == 0

    gamma_pos = _parameter(gamma_pos_ptr, first_class, c, class_mask, PER_CLASS_POS)
    gamma_neg = _parameter(gamma_neg_ptr, first_class, c, class_mask, PER_CLASS_NEG)
    clip = _parameter(clip_ptr, first_class, c, class_mask, PER_CLASS_CLIP)
    scale = 1.
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    of_pos, of_neg = 1., 1.  # see mmasl.ops.torch_impl.weights_by_label
    if alpha_ptr is not None:
        of_pos = _parameter(alpha_ptr, first_class, c, class_mask, PER_CLASS_ALPHA)
        of_neg = 1 - of_pos
    if class_weight_ptr is not None:
        class_weight = _parameter(class_weight_ptr, first_class, c, class_mask, PER_CLASS_WEIGHT)
        of_pos *= class_weight
        of_neg *= class_weight
    if pos_weight_ptr is not None:
        of_pos *= _parameter(pos_weight_ptr, first_class, c, class_mask, PER_CLASS_POS_WEIGHT)
    factor_neg = tl.where(bad, float('nan'), of_neg)

    if SOFT_LABEL == 'mixture':
        # A hard positive is a negative of -z without a margin, so that one evaluation does for each element.
        hard = y == 1
        loss, slope, p, q = _negative_part(tl.where(hard, -z, z), tl.where(hard, gamma_pos, gamma_neg),
                                           tl.where(hard, 0., clip), DETACH)
        p, q = tl.where(hard, q, p), tl.where(hard, p, q)
        loss *= tl.where(hard, of_pos, factor_neg)
        slope *= tl.where(hard, -of_pos * scale, factor_neg * scale)
        if MAY_BE_SOFT:
            soft = (y > 0) & (y < 1)
            if tl.max(tl.max(soft.to(tl.int32), 1), 0) > 0:
                pos_loss, pos_slope, _, _ = _negative_part(-z, gamma_pos + tl.zeros_like(z), tl.zeros_like(z), DETACH)
                loss = tl.where(soft, (1 - y) * loss + y * (of_pos * pos_loss), loss)
                slope = tl.where(soft, (1 - y) * slope - y * (of_pos * scale * pos_slope), slope)
    else:
        loss, slope, p, q = _negative_part(z, gamma_neg + tl.zeros_like(z), clip + tl.zeros_like(z), DETACH)
        loss *= factor_neg
        slope *= factor_neg * scale
        labelled = column[:, None] == c[None, :] if HAS_LABELS else y > 0
        if tl.max(tl.max(labelled.to(tl.int32), 1), 0) > 0:
            pos_loss, pos_slope = _labelled_part(z, y, gamma_pos, SOFT_LABEL, DETACH)
            factor_pos = tl.where(bad, float('nan'), of_pos)
            loss = tl.where(labelled, factor_pos * pos_loss, loss)
            slope = tl.where(labelled, factor_pos * scale * pos_slope, slope)
    counted = used
    if weight_ptr is not None:
        weight = _load(weight_ptr, image, first_row, first_class, r, c, weight_outer, weight_row, weight_class,
                       mask).to(tl.float32)
        counted = used & (weight != 0.)
        loss *= weight
        slope *= weight

    if LOSS:
        loss = tl.where(used, loss, 0.)
        if LOSS == 1:
            tl.store(loss_ptr + start + offsets, loss * scale, mask=mask)
        if LOSS == 2:
            tl.store(loss_ptr + tile, tl.sum(tl.sum(loss, 1), 0) * scale)
    if grad_ptr is not None:
        if upstream_ptr is not None:
            slope *= _load(upstream_ptr, image, first_row, first_class, r, c, upstream_outer, upstream_row,
                           upstream_class, mask).to(tl.float32)
        if ignore_index is not None:
            slope = tl.where(used, slope, 0.)
        if grad_ptr.dtype.element_ty == tl.float16:
            # See mmasl.ops.torch_impl.saturate.
            slope = tl.where(tl.abs(slope) <= 131008., tl.minimum(tl.maximum(slope, -65504.), 65504.), slope)
        tl.store(grad_ptr + start + offsets, slope.to(grad_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        y = tl.where(counted, y, 0.)
        rest = tl.where(counted, 1 - y, 0.)
        sums = sums_ptr + tile_r.to(tl.int64) * 4 * classes + first_class + c
        tl.store(sums, tl.sum(y * p, 0), mask=class_mask)
        tl.store(sums + classes, tl.sum(y, 0), mask=class_mask)
        tl.store(sums + 2 * classes, tl.sum(rest * q, 0), mask=class_mask)
        tl.store(sums + 3 * classes, tl.sum(rest, 0), mask=class_mask)


@triton.jit
def _load(ptr, image, first_row, first_class, r, c, stride_outer, stride_row, stride_class, mask):
    # In a tensor that is transposed a single tile may span more than int32.
    start = image * stride_outer + first_row * stride_row + first_class * stride_class
    offsets = r[:, None].to(tl.int64) * stride_row + c[None, :].to(tl.int64) * stride_class
    return tl.load(ptr + start + offsets, mask=mask, other=0)


@triton.jit
def _parameter(ptr, first_class, c, class_mask, PER_CLASS: tl.constexpr):
    if PER_CLASS:
        return tl.load(ptr + first_class + c, mask=class_mask, other=0.)[None, :]
    else:
        return tl.load(ptr)


@triton.jit
def _negative_part(z, gamma, clip, DETACH: tl.constexpr):
    """-L-, its derivative by z, p and q = 1 - p, for z of any size. Every operation counts: see docs/speed.md."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    r = _divide(1., 1 + e)
    p = tl.where(z >= 0, r, e * r)
    q = tl.where(z >= 0, e * r, r)
    p_m = tl.maximum(p - clip, 0.)
    rest = q + clip  # 1 - p_m
    # log_term = -log(1 - p_m), relative to p_m: near 0 the logarithm loses digits, and there six terms of its series,
    # sum of p_m^k / (k + 1), are exact to float32. It is never above z, from where q underflows, it is z.
    series = 1 + p_m * (1 / 2 + p_m * (1 / 3 + p_m * (1 / 4 + p_m * (1 / 5 + p_m * (1 / 6)))))
    log_term = tl.where(p_m < 0.0625, p_m * series, _log2(rest) * -0.6931471805599453)
    log_term = tl.minimum(log_term, tl.maximum(z, 17.))
    # With p_m^(gamma - 1) nothing is divided by p_m; kept above 0, its powers are finite.
    p_m = tl.maximum(p_m, 1.2e-38)
    log_p_m = _log2(p_m)
    power = tl.exp2(gamma * log_p_m - log_p_m)
    slope = p_m * tl.where(clip == 0, 1., _divide(q, rest))
    if not DETACH:
        slope += gamma * (q * log_term)
    # At p = m the side p > m counts: gamma = 0 without a margin is cross-entropy everywhere.
    # The power first: it is large where the other factors' product would underflow.
    return p_m * power * log_term, tl.where(p < clip, 0., slope * power * p), p, q


@triton.jit
def _labelled_part(z, t, gamma, SOFT_LABEL: tl.constexpr, DETACH: tl.constexpr):
    """See mmasl.ops.torch_impl.labelled_part."""
    zero = tl.zeros_like(z)
    log_term, _, small, large = _negative_part(-tl.abs(z), zero, zero, True)
    p, q = tl.where(z > 0, large, small), tl.where(z > 0, small, large)
    log_power = gamma * tl.log(tl.maximum(t, 1.2e-38))
    at_zero = tl.where(gamma == 0, 1., zero)  # 0^gamma
    power = tl.where(t > 0, tl.exp(log_power), at_zero)
    rest = 1 - t
    if SOFT_LABEL == 'mal':
        # 1 - t^gamma, relative to log_power near 0.
        series = 1 + log_power * (1 / 2 + log_power * (1 / 6 + log_power * (1 / 24 + log_power * (1 / 120))))
        rest = tl.where(log_power > -0.0625, -log_power * series, 1 - power)
        t, rest = power, tl.where(t > 0, rest, 1 - at_zero)
    loss = log_term + t * tl.maximum(-z, 0.) + rest * tl.maximum(z, 0.)
    slope = tl.where(z > 0, rest - q, p - t)
    if SOFT_LABEL == 'vfl':
        loss, slope = loss * power, slope * power
    if SOFT_LABEL == 'qfl':
        size = tl.abs(slope)
        focus = tl.where(size > 0, tl.exp2(gamma * _log2(tl.maximum(size, 1.2e-38))), at_zero)
        if not DETACH:
            slope += p * q / tl.where(slope == 0, 1., slope) * gamma * loss
        loss, slope = loss * focus, slope * focus
    return loss, slope


# The hardware's approximations, 2 ulp and without subnormal numbers: 2e-5 relative in all, see
# tests/ops/test_triton_impl.py. Triton's interpreter does not know libdevice.
@triton.jit
def _log2(x):
    if FAST and not HIP:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _divide(x, y):
    if FAST:
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@triton.jit
def _scale_kernel(grad_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + offsets, mask=offsets < size).to(tl.float32)
        tl.store(grad_ptr + offsets, (grad * factor).to(grad_ptr.dtype.element_ty), mask=offsets < size)
