"""A linear classifier and its asymmetric loss in one, a chunk of classes at a time, for more classes than fit.

The loss is a sum over classes, and so is the gradient of the features. Each chunk computes its logits, their gradient
and the products with it, and is freed: no tensor of N rows and C columns exists. The forward pass makes all gradients;
the backward pass scales them.
"""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmasl.errors import ConfigError, DataError
from mmasl.ops.functional import (
    Parameter,
    _forward,
    as_optional,
    pick_implementation,
    refuse_second_derivative,
    scale_gradient,
)
from mmasl.ops.torch_impl import widen

UNKNOWN = -2  # row or class of a sparse target that is out of range


@torch.compiler.disable
def linear_asymmetric_loss(features: Tensor,
                           weight: Tensor,
                           bias: Tensor | None,
                           target: Tensor,
                           *,
                           gamma_pos: Parameter = 0.,
                           gamma_neg: Parameter = 4.,
                           clip: Parameter = 0.05,
                           alpha: Parameter | None = None,
                           class_weight: Parameter | None = None,
                           pos_weight: Parameter | None = None,
                           detach_focusing: bool = False,
                           ignore_index: int | None = None,
                           scale: Parameter = 1.,
                           chunk_size: int = 4096,
                           return_sums: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """``scale * asymmetric_loss(F.linear(features, weight, bias), target, ...).sum()`` without the (N, C) logits.

    Value and gradients differ by rounding only. Beside the gradients of the parameters the function needs memory for
    one chunk and one gradient of the features. docs/speed.md has time and memory for 100,000 classes.

    Under autocast the products are in its dtype, as those of ``F.linear``. The gradient of the features is summed in
    float32 (float64 for float64), and small float16 gradients do not underflow before the loss scale reaches them.
    Float16 parameters keep their gradient in float16 and have no such protection: keep the parameters in float32. A
    compiled graph breaks here. A second derivative (``create_graph=True``) raises an error.

    Args:
        features: (N, D), floating point.
        weight: (C, D) of the classifier.
        bias: (C,), or None.
        target: (N, C), dense of any dtype, or sparse: ``torch.sparse_coo_tensor(indices (2, P), values (P,), (N, C))``
            or another sparse layout. Sparse values are hard or soft labels (or ``ignore_index``), each entry appears
            once, and all other labels are 0.
        gamma_pos, gamma_neg, clip, alpha, class_weight, pos_weight: A number, or one per class, (C,); see
            :func:`mmasl.ops.asymmetric_loss`.
        detach_focusing, ignore_index: See :func:`mmasl.ops.asymmetric_loss`.
        scale: Factor of the loss, a number or a tensor of shape ().
        chunk_size: Classes at a time, >= 1.
        return_sums: Also return the four sums of the probability gap for each class.

    Returns:
        Loss of shape (), in float64 for float64 and in float32 otherwise. With ``return_sums`` also the sums, (4, C).

    Raises:
        ValueError: A shape does not fit, or a target is out of range; on an accelerator the latter gives NaN.
    """
    parameters: dict[str, Any] = dict(gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, alpha=alpha,
                                      class_weight=class_weight, pos_weight=pos_weight, scale=scale)
    for name, value in parameters.items():
        if isinstance(value, (Sequence, np.ndarray)):
            parameters[name] = torch.as_tensor(value, dtype=torch.float64)
    _check(features, weight, bias, target, parameters, chunk_size)
    target_of = _read_target(target)

    def loss_of(logits: Tensor, classes: slice, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient by the logits and probability sums of some classes."""
        tensors: Any = {
            name: as_optional(value[classes] if isinstance(value, Tensor) and value.dim() else value, logits, name)
            for name, value in parameters.items()}
        try:
            return _forward(logits, target_of(classes), None, None, **tensors, detach_focusing=detach_focusing,
                            ignore_index=ignore_index, reduction='sum', soft_label='mixture',
                            implementation=pick_implementation(logits), need_grad=need_grad, need_sums=return_sums)
        except DataError as error:
            raise DataError(f'{error} (column 0 here is class {classes.start})') from None

    if not torch.is_grad_enabled():
        features, weight = features.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss, sums = _LinearLoss.apply(features, weight, bias, loss_of, chunk_size)
    return (loss, sums) if return_sums else loss


class _LinearLoss(torch.autograd.Function):
    """A loss that is a sum over classes, of the logits of a linear classifier."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, loss_of: Callable,
                chunk_size: int) -> tuple[Tensor, Tensor]:
        of_features, of_weight, of_bias = ctx.needs_input_grad[:3]
        # The dtype of F.linear, which is autocast's where autocast is on.
        dtype = F.linear(features[:0], weight[:0], None if bias is None else bias[:0]).dtype
        x = features.to(dtype)
        grad_features = torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) if of_features else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.empty_like(bias) if bias is not None and of_bias else None
        losses, all_sums = [], []
        for start in range(0, len(weight), chunk_size):
            classes = slice(start, min(start + chunk_size, len(weight)))
            of_chunk = [None if whole is None else whole[classes] for whole in (bias, grad_weight, grad_bias)]
            chunk_weight = weight[classes].to(dtype)
            logits = F.linear(x, chunk_weight, None if of_chunk[0] is None else of_chunk[0].to(dtype))
            loss, grad, sums = loss_of(logits.to(torch.promote_types(dtype, torch.float32)), classes,
                                       any(ctx.needs_input_grad[:3]))
            _add_gradients(x, chunk_weight, grad, grad_features, *of_chunk[1:])
            losses.append(loss)
            all_sums.append(sums)
        ctx.features_dtype = features.dtype
        ctx.save_for_backward(grad_features, grad_weight, grad_bias)
        sums = torch.cat(all_sums, -1)
        ctx.mark_non_differentiable(sums)
        return torch.stack(losses).sum(), sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            refuse_second_derivative()
        of_features, *of_parameters = (None if grad is None else scale_gradient(grad, upstream)
                                       for grad in ctx.saved_tensors)
        return None if of_features is None else of_features.to(ctx.features_dtype), *of_parameters, None, None


def _add_gradients(x: Tensor, weight: Tensor, grad: Tensor, grad_features: Tensor | None, grad_weight: Tensor | None,
                   grad_bias: Tensor | None) -> None:
    """Add to the gradient of the features and fill those of a chunk of the weight and the bias."""
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0))
    if x.dtype == grad.dtype:
        if grad_features is not None:
            grad_features.addmm_(grad, weight)
        if grad_weight is not None:
            torch.mm(grad.T, x, out=grad_weight)
        return
    # The loss scale comes in the backward pass. Until then float16 holds the gradient relative to its largest element,
    # a (1, 1) tensor, since a product with a scalar tensor would stay float16.
    unit: Tensor | float = 1.
    if x.dtype == torch.float16 and grad.numel():
        unit = grad.abs().amax((0, 1), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        grad = grad / unit
    grad = grad.to(x.dtype)
    if grad_features is not None:
        grad_features += (grad @ weight) * unit
    if grad_weight is not None:
        grad_weight.copy_((grad.T @ x) * unit)


def _check(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, parameters: dict[str, Any],
           chunk_size: int) -> None:
    """Slices of a tensor of another size would fit without an error."""
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1] or not len(weight):
        raise DataError(f'features of shape {tuple(features.shape)} and weight of shape {tuple(weight.shape)} must be '
                        '(N, D) and (C, D), C >= 1')
    shape = num_rows, num_classes = len(features), len(weight)
    if not isinstance(target, Tensor) or target.shape != shape:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise DataError(f'target {given} does not fit {num_rows} rows and {num_classes} classes: give a dense or '
                        f'sparse tensor {shape}')
    for name, value in dict(bias=bias, **parameters).items():
        allowed = [()] if name == 'scale' else [(num_classes, )] if name == 'bias' else [(), (num_classes, )]
        if isinstance(value, Tensor) and value.shape not in allowed:
            raise DataError(f'{name} of shape {tuple(value.shape)} does not fit {num_classes} classes: give '
                            f'{" or ".join(map(str, allowed))}')
        if name != 'bias' and isinstance(value, Tensor) and value.requires_grad:
            raise ConfigError(f'{name} gets no gradient: detach it')
    if chunk_size < 1:
        raise ConfigError(f'chunk_size={chunk_size} must be 1 class or more')


def _read_target(target: Tensor) -> Callable[[slice], Tensor]:
    """A function that gives the dense target of some classes."""
    if target.layout == torch.strided:
        target = widen(target, labels=False)
        return lambda classes: target[:, classes]
    num_rows, num_classes = target.shape
    target = target.detach().to_sparse_coo()
    rows = _in_range(target._indices()[0], num_rows - 1, 'row')
    columns = _in_range(target._indices()[1], num_classes - 1, 'class')
    known = (rows >= 0) & (columns >= 0)
    values = torch.where(known, target._values().to(torch.promote_types(target.dtype, torch.float32)), torch.nan)
    rows, columns = rows.clamp(min=0), columns.clamp(min=0)

    def cut(classes: slice) -> Tensor:
        size = classes.stop - classes.start
        inside = (columns >= classes.start) & (columns < classes.stop)
        place = torch.where(inside, rows * size + columns - classes.start, 0)
        return values.new_zeros(num_rows * size).scatter_add_(0, place, torch.where(inside, values, 0)).view(-1, size)

    return cut


def _in_range(index: Tensor, high: int, name: str) -> Tensor:
    """``index`` where it lies in 0 to ``high``; else an error, or UNKNOWN where checking would need a host sync."""
    known = (index >= 0) & (index <= high)
    if index.device.type == 'cpu' and not known.all():
        place = int((~known).nonzero()[0])
        raise DataError(f'{name} {index[place].item()} at [{place}] is out of range, which is 0 to {high}')
    return torch.where(known, index, UNKNOWN)
