"""The asymmetric losses as differentiable functions: arguments, checks, autograd, choice of an implementation."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmasl.errors import ConfigError, DataError, UnavailableError
from mmasl.ops import torch_impl
from mmasl.ops.torch_impl import Problem

try:
    from mmasl.ops import triton_impl
    _no_triton = ''
except ImportError as error:
    triton_impl = None  # type: ignore[assignment]
    _no_triton = 'Triton is not installed' if error.name == 'triton' else str(error)

Parameter = float | Tensor | Sequence[float]
REDUCTIONS = ('none', 'sum')
IMPLEMENTATIONS = ('triton', 'inductor', 'eager')
_asked: dict[str, str | None] = {'implementation': None}  # by use_implementation
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Run the losses with one implementation inside a ``with`` block, instead of the fastest available one.

    Args:
        name: 'triton' (one kernel; GPUs, not float64), 'inductor' (torch.compile; CPU), or 'eager'.

    Raises:
        ConfigError: ``name`` is unknown.
        UnavailableError: A loss inside the block cannot run with it.
    """
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f'implementation {name!r} is unknown. Use one of {", ".join(IMPLEMENTATIONS)}')
    before, _asked['implementation'] = _asked['implementation'], name
    try:
        yield
    finally:
        _asked['implementation'] = before


def pick_implementation(logits: Tensor, soft_label: str = 'mixture') -> str:
    """The fastest implementation available for these logits, or the one of :func:`use_implementation`.

    Raises:
        UnavailableError: The implementation asked for cannot run; the message says why.
    """
    on_cpu = logits.device.type == 'cpu'
    asked = _asked['implementation']
    if asked is None:
        if logits.is_cuda and not _kernel_unavailable(logits, soft_label):
            return 'triton'
        large = on_cpu and logits.numel() >= torch_impl.LARGE
        return 'inductor' if large and not torch_impl.unavailable_reason() else 'eager'
    reason = ''
    if asked == 'triton':
        reason = _kernel_unavailable(logits, soft_label)
    elif asked == 'inductor':
        reason = (torch_impl.unavailable_reason() if on_cpu else
                  f'it is for the CPU, and the logits are on {logits.device}')
    if reason:
        raise UnavailableError(f'use_implementation({asked!r}) is not possible: {reason}')
    return asked


def _kernel_unavailable(logits: Tensor, soft_label: str = 'mixture') -> str:
    return _no_triton if triton_impl is None else triton_impl.unavailable_reason(logits, soft_label)


def refuse_second_derivative() -> None:
    """Raise, in a backward pass that would need to be differentiable itself."""
    raise UnavailableError('the asymmetric losses have no second derivative: call backward() or torch.autograd.grad() '
                           'without create_graph=True')


class _Gradient(torch.autograd.Function):
    """A gradient as a function of the logits, whose derivative is refused. torch.func always asks for its graph."""
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, logits: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        refuse_second_derivative()


class _Differentiable:
    """A differentiable function of logits in the three forms that PyTorch has.

    A custom operator is one node of a compiled graph. A Function with ``setup_context`` works under torch.func, and one
    without costs 50 microseconds less per call.

    Args:
        name: Of the operator, in the namespace ``mmasl``.
        forward, setup_context, backward: As :class:`torch.autograd.Function` has them. With a fourth argument True,
            ``setup_context`` saves the logits first, which a kept gradient does without.
    """

    def __init__(self, name: str, forward: Callable, setup_context: Callable, backward: Callable) -> None:
        def forward_with_context(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def first_order(ctx: Any, *upstream: Any) -> Any:
            if torch.is_grad_enabled():  # with create_graph=True
                refuse_second_derivative()
            return backward(ctx, *upstream)

        def setup_transformed(ctx: Any, inputs: Any, output: Any) -> None:
            setup_context(ctx, inputs, output, True)

        def of_transform(ctx: Any, *upstream: Any) -> Any:
            grad, *others = backward(ctx, *upstream)
            return None if grad is None else _Gradient.apply(grad, ctx.saved_tensors[0]), *others

        self.operator = torch.library.custom_op(f'mmasl::{name}', forward, mutates_args=())
        self.operator.register_autograd(backward, setup_context=setup_context)  # graphs refuse second derivatives
        self.plain: Any
        self.transformable: Any
        self.plain, self.transformable = (
            type(name, (torch.autograd.Function, ), {key: staticmethod(value) for key, value in functions.items()})
            for functions in (dict(forward=forward_with_context, backward=first_order),
                              dict(forward=forward, setup_context=setup_transformed, backward=of_transform)))
        self.transformable.generate_vmap_rule = True

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.operator(*inputs)
        return (self.transformable if torch_impl.transformed() else self.plain).apply(*inputs)


def asymmetric_loss(logits: Tensor,
                    target: Tensor | tuple[Tensor, Tensor],
                    *,
                    gamma_pos: Parameter = 0.,
                    gamma_neg: Parameter = 4.,
                    clip: Parameter = 0.05,
                    alpha: Parameter | None = None,
                    class_weight: Parameter | None = None,
                    pos_weight: Parameter | None = None,
                    detach_focusing: bool = False,
                    soft_label: str = 'mixture',
                    ignore_index: int | None = None,
                    weight: Tensor | None = None,
                    scale: Parameter = 1.,
                    reduction: str = 'none',
                    return_sums: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Asymmetric loss, Eq. 7 of arXiv 2009.14119 with Eq. 2 and 5; the gradient is Eq. 8.

    The arithmetic is float32 for half-precision logits and float64 for float64. With ``reduction='sum'`` the forward
    pass computes the gradient and keeps that one tensor, in the logits' shape and dtype. Elementwise and float16 losses
    compute the gradient in the backward pass. A second derivative (``create_graph=True``) raises an error.

    Args:
        logits: (..., C), floating point, any finite value. The Triton kernel reads a permuted channels-first map in
            place.
        target: One of three forms.

            - dense, the shape of ``logits``: labels in [0, 1], of any dtype. A soft label y counts as y positives and
              1 - y negatives (Eq. 2). It gets no gradient.
            - labels, integers of shape ``logits.shape[:-1]``: the positive class of each row, or C for none
                (background).
            - a pair (labels, quality): labels as above, and the soft label, in [0, 1], of the labelled class.
        gamma_pos: Focusing parameter g+ >= 0 of positives: a number, or one per class, (C,).
        gamma_neg: Focusing parameter g- >= 0 of negatives, likewise.
        clip: Probability margin m in [0, 1), likewise.
        alpha: Weight of positives in [0, 1], likewise; negatives get 1 - alpha. None for no weights.
        class_weight: Factor >= 0 of all labels of a class, likewise. None for 1.
        pos_weight: Further factor >= 0 of positives, likewise. None for 1.
        detach_focusing: Hold the focusing weights constant in the gradient, as the official training script does,
            instead of Eq. 8. The value is the same.
        soft_label: What a soft label t in [0, 1] of a labelled entry means. Labelled are the entries that labels name,
            whatever their quality, and those above 0 of a dense target. With p = sigmoid(logits) and the binary
            cross-entropy BCE(p, t) = -t log p - (1 - t) log(1 - p), the loss of a labelled entry is

            - 'mixture': t positives and 1 - t negatives, each as in Eq. 7 (Eq. 2).
            - 'qfl': ``|t - p|^g+ BCE(p, t)``, quality focal loss (arXiv 2006.04388, Eq. 2).
            - 'vfl': ``t^g+ BCE(p, t)``, varifocal loss (arXiv 2008.13367, Eq. 2) for g+ = 1.
            - 'mal': ``BCE(p, t^g+)``, matchability-aware loss (arXiv 2412.04234).

            For the last three, g+ has this meaning alone, a labelled entry has the weight of a positive, and all other
            entries are negatives of Eq. 7 with their g- and margin.
        ignore_index: Target value (or label) whose elements (or rows) have no loss and no gradient.
        weight: Factor of loss and gradient, of as many dimensions as ``logits`` and a shape that broadcasts to
            theirs: (N, 1) for one per row. For one per class use ``class_weight``.
        scale: Factor of the result, a number or a tensor of shape (). A factor of the result afterwards would cost one
            more pass over the gradient.
        reduction: 'none' or 'sum'. The order of summation is fixed, so results are deterministic.
        return_sums: Also return the sums behind the probability gap (Eq. 9-10), a by-product of the loss.

    Returns:
        Loss of the logits' shape ('none') or of shape () ('sum'), in float64 for float64 logits and in float32
        otherwise. With ``return_sums`` also four sums per class, (4, C) in that dtype: over the positives of p and of
        1, over the negatives of 1 - p and of 1. Elements that are ignored or have weight 0 do not count; other weights
        do not matter.

    Raises:
        ValueError: A shape does not fit, or a target is out of range. On an accelerator, in a compiled graph of the
            kernel, and under torch.func transforms the values are not checked, and an out-of-range target gives NaN.
        TypeError: Integer logits, or labels that are not integers.
        UnavailableError: The implementation of :func:`use_implementation` cannot run.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    if reduction not in REDUCTIONS:
        raise ConfigError(f'reduction={reduction!r} must be one of {REDUCTIONS}')
    if soft_label not in torch_impl.SOFT_LABELS:
        raise ConfigError(f'soft_label={soft_label!r} must be one of {torch_impl.SOFT_LABELS}')
    target, quality = target if isinstance(target, (tuple, list)) else (target, None)
    for x in (target, gamma_pos, gamma_neg, clip, alpha, class_weight, pos_weight, weight, scale):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ConfigError('target, parameters, weights and scale of the loss get no gradient: detach them')
    if quality is not None or target.shape != logits.shape:
        _check_labels(target, quality, logits)
    target = torch_impl.widen(target, labels=target.dim() < logits.dim())
    if weight is not None and (weight.dim() != logits.dim() or any(
            size not in (1, wanted) for size, wanted in zip(weight.shape, logits.shape))):
        raise DataError(f'weight of shape {tuple(weight.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                        'give one per element, or (..., 1) for one per row. class_weight has one per class')
    if isinstance(scale, Tensor) and scale.dim():
        raise DataError(f'scale of shape {tuple(scale.shape)} must be a number, or a tensor of shape ()')
    loss, _, sums = _asymmetric_loss(
        logits, target, None if quality is None else quality.detach(), weight,
        as_parameter(gamma_pos, logits, 'gamma_pos'), as_parameter(gamma_neg, logits, 'gamma_neg'),
        as_parameter(clip, logits, 'clip'), as_optional(alpha, logits, 'alpha'),
        as_optional(class_weight, logits, 'class_weight'), as_optional(pos_weight, logits, 'pos_weight'),
        None if not isinstance(scale, Tensor) and scale == 1 else as_parameter(scale, logits, 'scale'),
        detach_focusing, ignore_index, reduction, soft_label,
        'eager' if torch_impl.transformed() else pick_implementation(logits, soft_label),
        torch.is_grad_enabled() and logits.requires_grad and not torch_impl.transformed(), return_sums)
    return (loss, sums) if return_sums else loss


def as_parameter(value: Parameter, logits: Tensor, name: str) -> Tensor:
    """A parameter as a tensor of the dtype of the arithmetic; a number is not copied from the host."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        if not isinstance(value, (Sequence, np.ndarray)):
            return torch.full((), value, dtype=dtype, device=logits.device)
        value = torch.as_tensor(value, dtype=dtype)
    if value.dim() > 1 or (value.dim() == 1 and (not logits.dim() or len(value) != logits.shape[-1])):
        raise DataError(f'{name} of shape {tuple(value.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                        'give a number or one value per class')
    return value.to(logits.device, dtype)


def as_optional(value: Parameter | None, logits: Tensor, name: str) -> Tensor | None:
    """As :func:`as_parameter`; None stays None."""
    return None if value is None else as_parameter(value, logits, name)


def _check_labels(labels: Tensor, quality: Tensor | None, logits: Tensor) -> None:
    if not logits.dim() or labels.shape != logits.shape[:-1]:
        raise DataError(f'target of shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}: '
                        'give dense targets of the same shape, or one integer label a row')
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f'labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)} must be '
                        f'integers, got {labels.dtype}')
    if quality is not None and quality.shape != labels.shape:
        raise DataError(f'quality of shape {tuple(quality.shape)} does not fit labels of shape {tuple(labels.shape)}')
    if logits.shape[-1] == 0:
        raise DataError(f'logits of shape {tuple(logits.shape)} have no class that labels could name')


def _run(implementation: str, problem: Problem, *args: Any) -> torch_impl.Result:
    if implementation == 'triton':
        return triton_impl.run(problem, *args)
    return (torch_impl.run_compiled if implementation == 'inductor' else torch_impl.run)(problem, *args)


def _keeps_gradient(logits: Tensor, reduction: str) -> bool:
    """Whether the forward pass computes the gradient. float16 could not hold it before the loss scale is on it."""
    return reduction == 'sum' and logits.dtype != torch.float16


def _forward(logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None, gamma_pos: Tensor,
             gamma_neg: Tensor, clip: Tensor, alpha: Tensor | None, class_weight: Tensor | None,
             pos_weight: Tensor | None, scale: Tensor | None, detach_focusing: bool, ignore_index: int | None,
             reduction: str, soft_label: str, implementation: str, need_grad: bool,
             need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient if it is to be kept, and the probability sums; empty tensors for what is not needed."""
    problem = Problem(logits, target, quality, weight, gamma_pos, gamma_neg, clip, alpha, class_weight, pos_weight,
                      scale, detach_focusing, ignore_index, reduction, soft_label)
    results = _run(implementation, problem, True, need_grad and _keeps_gradient(logits, reduction), need_sums)
    loss, grad, sums = (logits.new_empty(0) if x is None else x for x in results)
    return loss, grad, sums


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor], save_logits: bool = False) -> None:
    _, grad, sums = output
    ctx.mark_non_differentiable(grad, sums)
    ctx.set_materialize_grads(False)
    tensors, ctx.settings, ctx.implementation = inputs[:11], inputs[11:15], inputs[15]
    ctx.kept = _keeps_gradient(inputs[0], inputs[13]) and not save_logits
    ctx.save_for_backward(*([grad] if ctx.kept else tensors))


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None, ) * 18
    if ctx.kept:
        return scale_gradient(ctx.saved_tensors[0], upstream), *(None, ) * 17
    implementation = 'eager' if torch_impl.transformed(upstream) else ctx.implementation
    arguments = *ctx.saved_tensors, *ctx.settings, implementation
    traced = torch.compiler.is_compiling() or type(upstream) is not Tensor
    return (torch.ops.mmasl.asymmetric_loss_backward if traced else _gradient)(upstream, *arguments), *(None, ) * 17


def _gradient(upstream: Tensor, logits: Tensor, target: Tensor, quality: Tensor | None, weight: Tensor | None,
              gamma_pos: Tensor, gamma_neg: Tensor, clip: Tensor, alpha: Tensor | None, class_weight: Tensor | None,
              pos_weight: Tensor | None, scale: Tensor | None, detach_focusing: bool, ignore_index: int | None,
              reduction: str, soft_label: str, implementation: str) -> Tensor:
    """Gradient by the logits times ``upstream``, before it is rounded to the logits' dtype."""
    problem = Problem(logits, target, quality, weight, gamma_pos, gamma_neg, clip, alpha, class_weight, pos_weight,
                      scale, detach_focusing, ignore_index, reduction, soft_label)
    grad = _run(implementation, problem, False, True, False, upstream)[1]
    assert grad is not None
    return grad


_asymmetric_loss = _Differentiable('asymmetric_loss', _forward, _setup_context, _backward)
_backward_operator = torch.library.custom_op('mmasl::asymmetric_loss_backward', _gradient, mutates_args=())


def _like(logits: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    return (triton_impl.like(logits, dtype) if implementation == 'triton' else
            logits.new_empty(logits.shape, dtype=dtype))


@_asymmetric_loss.operator.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gamma_neg, reduction, _, implementation, need_grad, need_sums = arguments[4], *arguments[-5:]
    return (_like(logits, gamma_neg.dtype, implementation) if reduction == 'none' else gamma_neg.new_empty(()),
            _like(logits, logits.dtype, implementation) if need_grad and _keeps_gradient(logits, reduction) else
            logits.new_empty(0), gamma_neg.new_empty((4, logits.shape[-1]) if need_sums else 0))


@_backward_operator.register_fake
def _(upstream: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return _like(logits, logits.dtype, arguments[-1])


def scale_gradient(grad: Tensor, upstream: Tensor) -> Tensor:
    """A kept gradient times the upstream gradient, in place unless the graph is kept."""
    if (torch.compiler.is_compiling() or type(grad) is not Tensor or torch_impl.transformed(upstream)
            or _graph_is_kept()):
        return grad * upstream.to(grad.dtype)
    grad = grad.detach()
    if grad.device.type == 'cpu' and not upstream.dim() and upstream.item() == 1:
        return grad
    asked = _asked['implementation']
    by_kernel = grad.is_cuda if asked is None else asked == 'triton'
    if by_kernel and not upstream.dim() and not _kernel_unavailable(grad):
        return triton_impl.scale_(grad, upstream)
    return grad.mul_(upstream)


def asymmetric_softmax_loss(logits: Tensor,
                            labels: Tensor,
                            *,
                            gamma_pos: float = 0.,
                            gamma_neg: float = 4.,
                            class_weight: Parameter | None = None,
                            smoothing: float = 0.1,
                            ignore_index: int | None = None) -> Tensor:
    """Softmax cross-entropy with label smoothing s, focused unequally on the label y and the other classes.

    With p = softmax(z) over C classes, as ``ASLSingleLabel`` of the official code has it, which smooths after focusing:

        L = -w_y (1 - s + s / C) (1 - p_y)^g+ log p_y - (s / C) sum over c != y of w_c p_c^g- log p_c

    The class weights w are a factor of each class's term, as in ``torch.nn.functional.cross_entropy``.
    For s = 0 ``gamma_neg`` has no effect, and with g+ = 0 the loss is cross-entropy. For g+ = g- = 0 it is
    cross-entropy with label smoothing. For g- > 0 the smoothing lowers p_c where p_c < exp(-1 / g-), 0.78 for g- = 4,
    since the gradient passes through the focusing weights. :func:`asymmetric_loss` differs: there classes do not
    compete, a negative has log(1 - p_c), and there is a margin.

    Args:
        logits: (..., C), floating point, C >= 2, any finite value.
        labels: (...), integers in [0, C - 1].
        gamma_pos: Focusing parameter g+ >= 0 of the label.
        gamma_neg: Focusing parameter g- >= 0 of the other classes.
        class_weight: Weight w >= 0 of each class, (C,), or a number; None for 1.
        smoothing: Share s in [0, 1) of the target that is spread evenly over all classes.
        ignore_index: Label of samples that have no loss and no gradient.

    Returns:
        Loss (...), in float64 for float64 logits and in float32 otherwise. The forward pass computes the gradient and
        keeps it in the logits' dtype, or in float32 for float16. A second derivative (``create_graph=True``) raises an
        error.

    Raises:
        ValueError: A shape does not fit, or a label is out of range; as in :func:`asymmetric_loss`, the latter gives
            NaN on an accelerator.
        TypeError: Integer logits, or labels that are not integers.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    if not logits.dim() or labels.shape != logits.shape[:-1]:
        raise DataError(f'labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: give '
                        'one integer label a row, and no Mixup, CutMix or one-hot targets')
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f'labels must be integers, got {labels.dtype}')
    if logits.shape[-1] < 2:
        raise DataError(f'logits of shape {tuple(logits.shape)} have {logits.shape[-1]} class: a softmax needs two or '
                        'more. Use mmasl.AsymmetricLoss for a single logit')
    labels = torch_impl.widen(labels, labels=True)
    compile = logits.device.type == 'cpu' and pick_implementation(logits) == 'inductor'
    if isinstance(class_weight, Tensor) and class_weight.requires_grad:
        raise ConfigError('class_weight gets no gradient: detach it')
    return _asymmetric_softmax_loss(logits, labels, float(gamma_pos), float(gamma_neg),
                                    as_optional(class_weight, logits, 'class_weight'), float(smoothing), ignore_index,
                                    compile, torch.is_grad_enabled() and logits.requires_grad)[0]


def _softmax_forward(logits: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, class_weight: Tensor | None,
                     smoothing: float, ignore_index: int | None, compile: bool,
                     need_grad: bool) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the gradient of their sum or an empty tensor."""
    loss, grad = torch_impl.run_softmax(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), gamma_pos, gamma_neg, class_weight, smoothing,
        ignore_index, need_grad, _kept_dtype(logits), compile)
    return loss.reshape(labels.shape), logits.new_empty(0) if grad is None else grad.reshape(logits.shape)


def _kept_dtype(logits: Tensor) -> torch.dtype:
    """float16 cannot hold the probabilities of thousands of classes."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _softmax_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor], save_logits: bool = False) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0] if save_logits else None, output[1])
    ctx.dtype = inputs[0].dtype


def _softmax_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad = None if upstream is None else torch_impl.saturate(
        scale_gradient(ctx.saved_tensors[1], upstream.unsqueeze(-1)), ctx.dtype)
    return grad, *(None, ) * 8


_asymmetric_softmax_loss = _Differentiable('asymmetric_softmax_loss', _softmax_forward, _softmax_setup_context,
                                           _softmax_backward)


@_asymmetric_softmax_loss.operator.register_fake
def _(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, logits.new_empty(logits.shape, dtype=_kept_dtype(logits)) if arguments[-1] else logits.new_empty(0)
