"""A linear classifier and its asymmetric loss in one, a chunk of classes at a time: for more classes than fit.

The loss is a sum over classes, and so is the gradient of the features; a row of the weight belongs to one class. Each
chunk therefore computes its logits, their gradient and what follows from it, and is forgotten: no tensor of N rows and
C columns exists. All gradients are made in the forward pass; backward scales them.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmasl.ops.asymmetric_loss import Parameter, _parameter, _pick, _scaled

IGNORED, UNKNOWN = -1, -2  # labels of a chunk


@torch.compiler.disable
def linear_asymmetric_loss(features: Tensor,
                           weight: Tensor,
                           bias: Tensor | None,
                           target: Tensor,
                           gamma_pos: Parameter = 0.,
                           gamma_neg: Parameter = 4.,
                           clip: Parameter = 0.05,
                           alpha: float | None = None,
                           detach_focusing: bool = False,
                           ignore_index: int | None = None,
                           element_weight: Tensor | None = None,
                           scale: float | Tensor = 1.,
                           chunk_size: int = 4096,
                           return_sums: bool = False,
                           implementation: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """``scale * asymmetric_loss(F.linear(features, weight, bias), target, ...).sum()`` without the (N, C) logits.

    Value and gradients differ by rounding only. Beside the gradients of the parameters, of which the weight's has the
    weight's size whoever computes it, it needs memory for one chunk and one gradient of the features. Without gradient
    (``torch.no_grad()``, frozen inputs) none is computed. There is no second derivative.

    Under autocast the products are in its dtype, as those of ``F.linear``; the gradient of the features is added up in
    float32 (float64 for float64), and float16 cannot make a small gradient 0 before a loss scale reaches it. Float16
    parameters, which keep their gradient in float16, have no such protection: keep the parameters in float32.

    A compiled graph breaks here.

    Args:
        features: (N, D), floating point.
        weight: (C, D) of the classifier.
        bias: (C,), or None.
        target: One of three forms, told apart by layout and rank.

            - sparse, ``torch.sparse_coo_tensor(indices (2, P), values (P,), (N, C))`` or another sparse layout: the
              values are hard or soft labels (or ``ignore_index``), and each entry appears once; all others are 0.
            - dense, (N, C), of any dtype.
            - labels, integers (N,), C for none (background).
        gamma_pos, gamma_neg, clip: A number, or a tensor of shape () or (C,); see
            :func:`mmasl.ops.asymmetric_loss`, also for the following three.
        alpha: Weight of positives in [0, 1]; negatives get 1 - alpha. None weighs neither.
        detach_focusing: Hold the focusing weights constant in the gradient.
        ignore_index: Target value (or label) whose elements (or rows) have no loss and no gradient.
        element_weight: Factor of the loss of each element, in a shape that broadcasts to (N, C).
        scale: Factor of the loss, a number or a tensor of shape (). It goes into the gradients as they are made,
            where a factor of the result costs a pass over the gradient of the weight.
        chunk_size: Classes at a time, >= 1.
        return_sums: Also return the four sums of the probability gap for each class.
        implementation: Of the loss, 'triton', 'eager' or None for the faster one that can run.

    Returns:
        Loss of shape (), in float64 for float64 and in float32 otherwise. With ``return_sums`` also the sums, (4, C).

    Raises:
        ValueError: A shape does not fit, or a target is out of range; as in :func:`mmasl.ops.asymmetric_loss`, the
            latter gives NaN on an accelerator.
        TypeError: Labels that are not integers.
    """
    parameters = dict(gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, scale=scale)
    shape = _check_shapes(features, weight, bias, target, element_weight, parameters)
    if chunk_size < 1:
        raise ValueError(f'chunk_size={chunk_size} must be 1 class or more')
    if any(isinstance(x, Tensor) and x.requires_grad for x in (*parameters.values(), element_weight)):
        raise ValueError('gamma_pos, gamma_neg, clip, element_weight and scale get no gradient: detach them')
    target_of, ignore_index = _read_target(target, shape, ignore_index)
    if element_weight is not None:
        element_weight = element_weight.expand(shape)

    def loss_of(logits: Tensor, classes: slice, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient by the logits and probability sums of some classes."""
        try:
            return torch.ops.mmasl.asymmetric_loss(
                logits, target_of(classes), None, None if element_weight is None else element_weight[:, classes],
                *(_parameter(_cut(value, classes), logits, name) for name, value in parameters.items()), alpha,
                detach_focusing, ignore_index, 'sum', _pick(implementation, logits), need_grad, return_sums)
        except ValueError as error:
            raise ValueError(f'{error} (column 0 here is class {classes.start})') from None

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
        # That of F.linear: autocast's where it is on.
        dtype = F.linear(features[:0], weight[:0], None if bias is None else bias[:0]).dtype
        x = features.to(dtype)
        grad_features = torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) if of_features else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.empty_like(bias) if bias is not None and of_bias else None
        losses, all_sums = [], []
        for start in range(0, len(weight), chunk_size):
            classes = slice(start, min(start + chunk_size, len(weight)))
            of_chunk = [None if whole is None else whole[classes] for whole in (bias, grad_weight, grad_bias)]
            chunk_loss, chunk_sums = _chunk(
                x, weight[classes], of_chunk[0], partial(loss_of, classes=classes), grad_features, *of_chunk[1:])
            losses.append(chunk_loss)
            all_sums.append(chunk_sums)
        loss, sums = torch.stack(losses).sum(), torch.cat(all_sums, -1)
        ctx.features_dtype = features.dtype
        ctx.save_for_backward(grad_features, grad_weight, grad_bias)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        of_features, *of_parameters = (None if grad is None else _scaled(grad, upstream) for grad in ctx.saved_tensors)
        of_features = None if of_features is None else of_features.to(ctx.features_dtype)
        return of_features, *of_parameters, None, None


def _chunk(x: Tensor, weight: Tensor, bias: Tensor | None, loss_of: Callable, grad_features: Tensor | None,
           grad_weight: Tensor | None, grad_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and sums of a chunk; adds to the gradient of the features, and fills the chunk's of weight and bias."""
    need_grad = not (grad_features is None and grad_weight is None and grad_bias is None)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(x.dtype)
    logits = F.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(wide)
    loss, grad, sums = loss_of(logits, need_grad=need_grad)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0))
    if x.dtype == wide:
        if grad_features is not None:
            grad_features.addmm_(grad, weight)
        if grad_weight is not None:
            torch.mm(grad.T, x, out=grad_weight)
        return loss, sums
    # The loss scale comes in backward: until then float16 holds the gradient relative to its largest element, which is
    # kept as a (1, 1) tensor, since a product with a scalar one would stay float16.
    unit = None
    if need_grad and x.dtype == torch.float16 and len(x):
        unit = grad.abs().amax((0, 1), keepdim=True).clamp(min=torch.finfo(wide).tiny)
        grad = grad / unit
    grad = grad.to(x.dtype)
    if grad_features is not None:
        product = grad @ weight
        grad_features += product if unit is None else product * unit
    if grad_weight is not None:
        product = grad.T @ x
        grad_weight.copy_(product if unit is None else product * unit)
    return loss, sums


def _check_shapes(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, element_weight: Tensor | None,
                  parameters: dict[str, Parameter]) -> tuple[int, int]:
    """(N, C); slices of what has another size would fit without an error."""
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(f'features of shape {tuple(features.shape)} and weight of shape {tuple(weight.shape)} must be '
                         '(N, D) and (C, D), C >= 1')
    shape = num_rows, num_classes = len(features), len(weight)
    if not isinstance(target, Tensor) or target.shape not in ((num_rows, num_classes), (num_rows, )):
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f'target {given} does not fit {num_rows} rows and {num_classes} classes: give a dense or '
                         f'sparse tensor {shape}, or one integer label a row')
    for name, value in dict(bias=bias, **parameters).items():
        allowed = [()] if name == 'scale' else [(num_classes, )] if name == 'bias' else [(), (num_classes, )]
        if isinstance(value, Tensor) and value.shape not in allowed:
            raise ValueError(f'{name} of shape {tuple(value.shape)} does not fit {num_classes} classes: give '
                             f'{" or ".join(map(str, allowed))}')
    if element_weight is not None and (element_weight.dim() > 2 or any(
            size not in (1, wanted) for size, wanted in zip(element_weight.shape[::-1], shape[::-1]))):
        raise ValueError(f'element_weight of shape {tuple(element_weight.shape)} does not broadcast to {shape}')
    return shape


def _cut(parameter: Parameter, classes: slice) -> Parameter:
    return parameter[classes] if isinstance(parameter, Tensor) and parameter.dim() else parameter


def _read_target(target: Tensor, shape: tuple[int, int],
                 ignore_index: int | None) -> tuple[Callable[[slice], Tensor], int | None]:
    """A function that gives the target of some classes, dense or as labels, and the ``ignore_index`` of that."""
    num_rows, num_classes = shape
    if target.layout != torch.strided:
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
            dense = values.new_zeros(num_rows * size)
            return dense.scatter_add_(0, place, torch.where(inside, values, 0)).view(num_rows, size)

        return cut, ignore_index

    if target.dim() == 2:
        return lambda classes: target[:, classes], ignore_index

    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f'labels of shape {tuple(target.shape)} must be integers, got {target.dtype}')
    labels = target.long()
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    labels = _in_range(labels.masked_fill(ignored, num_classes), num_classes, 'label',
                       '' if ignore_index is None else f', {ignore_index} to ignore').masked_fill(ignored, IGNORED)

    def cut_labels(classes: slice) -> Tensor:
        inside = (labels >= classes.start) & (labels < classes.stop)
        local = torch.where(inside, labels - classes.start, classes.stop - classes.start)
        return torch.where(labels < 0, labels, local)

    return cut_labels, IGNORED


def _in_range(index: Tensor, high: int, name: str, allowed: str = '') -> Tensor:
    """``index`` where it lies in 0 to ``high``, else an error, or UNKNOWN where looking at it would cost a wait."""
    known = (index >= 0) & (index <= high)
    if index.device.type == 'cpu' and not known.all():
        place = int((~known).nonzero()[0])
        raise ValueError(f'{name} {index[place].item()} at [{place}] is out of range, which is 0 to {high}{allowed}')
    return torch.where(known, index, UNKNOWN)
