"""The softmax form of the asymmetric loss as a module."""
import math
from collections.abc import Sequence

from torch import Tensor

from mmasl.errors import ConfigError, DataError
from mmasl.models.losses.asymmetric_loss import REDUCTIONS, SettingsModule, as_divisor, check_number
from mmasl.ops.functional import asymmetric_softmax_loss
from mmasl.ops.torch_impl import equals


class AsymmetricSoftmaxLoss(SettingsModule):
    """Softmax loss with asymmetric focusing and label smoothing, for heads such as MMPretrain's ``LinearClsHead``.

    This is ``ASLSingleLabel`` of the official code; :func:`mmasl.asymmetric_softmax_loss` has the formula. Table 12 of
    arXiv 2009.14119 (Herbarium) was trained with the sigmoid form instead, by the author's word (issue 68 of the
    official repository): :class:`mmasl.AsymmetricLoss` with the same head and labels. ``gamma_neg`` acts on the
    smoothed part of the
    target alone: with ``smoothing=0`` it has no effect, and with ``gamma_pos=0`` as well this is cross-entropy. For
    asymmetric focusing use the sigmoid form.

    Args:
        gamma_pos: Focusing parameter of the label, >= 0.
        gamma_neg: Focusing parameter of the other classes, >= 0.
        class_weight: Weight >= 0 of each class, as MMPretrain's ``CrossEntropyLoss`` has it: a factor of the term of
            the class. None for 1. 'mean' does not divide by it.
        smoothing: Share of the target spread evenly over all classes, in [0, 1). ``eps`` in the official code.
        use_sigmoid: Must stay False. Heads read it from the config.
        reduction: 'mean', 'sum' or 'none'. 'mean' divides the sum by ``avg_factor``, or by the number of samples that
            are not ignored. 'sum' does not use ``avg_factor``.
        loss_weight: Factor of the result.
        ignore_index: Label of samples to leave out.
        alpha, pos_weight: Must stay None, since a softmax has no weight of negatives.

    Raises:
        ConfigError: A parameter is out of its range; the message names it.
    """

    class_weight: Tensor | None

    def __init__(self,
                 gamma_pos: float = 0.,
                 gamma_neg: float = 4.,
                 class_weight: float | Sequence[float] | None = None,
                 smoothing: float = 0.1,
                 use_sigmoid: bool = False,
                 reduction: str = 'mean',
                 loss_weight: float = 1.,
                 ignore_index: int | None = None,
                 alpha: None = None,
                 pos_weight: None = None) -> None:
        super().__init__()
        for name, value in (('alpha', alpha), ('pos_weight', pos_weight)):
            if value is not None:
                raise ConfigError(f'{name}={value} must be None: in a softmax a positive of one class is a negative of '
                                  'the others. Use class_weight, or mmasl.AsymmetricLoss')
        if use_sigmoid is not False:
            raise ConfigError(f'use_sigmoid={use_sigmoid}: AsymmetricSoftmaxLoss is defined on a softmax; set '
                              'use_sigmoid=False, or use mmasl.AsymmetricLoss')
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction={reduction!r} must be one of {REDUCTIONS}')
        check_number('gamma_pos', gamma_pos, 0)
        check_number('gamma_neg', gamma_neg, 0)
        check_number('smoothing', smoothing, 0, 1)
        check_number('loss_weight', loss_weight)
        self.register_setting('class_weight', class_weight, math.inf, False)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.smoothing = smoothing
        self.use_sigmoid = use_sigmoid
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index

    def forward(self,
                pred: Tensor,
                target: Tensor,
                weight: Tensor | None = None,
                avg_factor: float | Tensor | None = None,
                reduction_override: str | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            pred: (..., C) logits, of any floating dtype.
            target: (...) integer labels, 0 ... C - 1.
            weight: One weight per sample, in the shape of ``target``.
            avg_factor: Divisor of 'mean', a number or a tensor of one element.
            reduction_override: Replaces ``reduction`` in this call.

        Returns:
            The reduced loss, of shape (); for 'none', the shape of ``target``. float32, or float64 for float64.

        Raises:
            ConfigError: ``reduction_override`` is unknown.
            DataError: A shape does not fit, or a label is out of range.
        """
        reduction = reduction_override or self.reduction
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction_override={reduction!r} must be one of {REDUCTIONS}')
        loss = asymmetric_softmax_loss(pred, target, gamma_pos=self.gamma_pos, gamma_neg=self.gamma_neg,
                                       class_weight=self.class_weight, smoothing=self.smoothing,
                                       ignore_index=self.ignore_index)
        if weight is not None:
            if weight.shape != loss.shape:
                raise DataError(f'weight of shape {tuple(weight.shape)} does not fit labels of shape '
                                 f'{tuple(target.shape)}: give one per sample')
            loss = loss * weight
        if reduction != 'none':
            loss = loss.sum()
        if reduction == 'mean':
            loss = loss / self._divisor(target, avg_factor)
        return self.loss_weight * loss

    def _divisor(self, target: Tensor, avg_factor: float | Tensor | None) -> float | Tensor:
        """``avg_factor``, or the number of samples that count; above 0, so an empty batch has loss 0."""
        if avg_factor is not None:
            return as_divisor(avg_factor)
        if self.ignore_index is None:
            return max(target.numel(), 1)
        return (~equals(target, self.ignore_index)).sum().clamp(min=1)

    def extra_repr(self) -> str:
        shown = [super().extra_repr()] if self._initial else []
        return ', '.join(shown + [f'{name}={getattr(self, name)}' for name in
                                  ('gamma_pos', 'gamma_neg', 'smoothing', 'reduction', 'loss_weight', 'ignore_index')])
