"""The asymmetric loss as a module, with the call signature of the losses of MMDetection and MMPretrain."""
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmasl.errors import ConfigError, DataError
from mmasl.models.losses.probability_sums import ProbabilitySums
from mmasl.ops.functional import asymmetric_loss
from mmasl.ops.torch_impl import SOFT_LABELS, equals, transformed

REDUCTIONS = ('none', 'mean', 'sum')
NOTICED = 10  # training calls whose logits are compared with [0, 1]


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ConfigError if a parameter is not one finite number in [low, high)."""
    try:
        inside = math.isfinite(value) and low <= value < high
    except (TypeError, ValueError, RuntimeError):  # a text, a list, or a tensor of several numbers
        inside = False
    if not inside:
        what = f'in [{low:g}, {high:g})' if math.isfinite(low) else 'that is finite'
        raise ConfigError(f'{name}={value} must be a number {what}')


class SettingsModule(nn.Module):
    """A module with settings that are float32 tensors outside its state dict, one number or one per class."""

    def __init__(self) -> None:
        super().__init__()
        self._initial: dict[str, Tensor] = {}

    def register_setting(self, name: str, value: float | Sequence[float] | None, high: float, closed: bool) -> None:
        """Check and store a setting.

        Args:
            name: Name of the attribute.
            value: One number >= 0, or one per class; None stays None.
            high: End of the range.
            closed: Whether ``high`` is in the range.

        Raises:
            ConfigError: ``value`` is out of the range.
        """
        if value is None:
            self.register_buffer(name, None, persistent=False)
            return
        try:
            values = torch.as_tensor(value, dtype=torch.float32, device='cpu')
        except (TypeError, ValueError, RuntimeError):  # texts, or lists of several lengths
            values = torch.empty(0)
        inside = (values >= 0) & ((values <= high) if closed else (values < high))
        if values.dim() > 1 or not values.numel() or not inside.all():
            raise ConfigError(f'{name}={value} must be a number in [0, {high:g}{"]" if closed else ")"}, or one such '
                              'number per class')
        self._initial[name] = values.clone()
        self.register_buffer(name, values.clone(), persistent=False)

    def reset_parameters(self) -> None:
        """Reset the settings to the values and shapes given at construction; FSDP calls it after ``to_empty``."""
        for name, value in self._initial.items():
            setattr(self, name, value.to(getattr(self, name).device, copy=True))

    def _apply(self, fn: Callable, recurse: bool = True) -> 'SettingsModule':
        """Move the module but keep its settings in float32: half precision would round small steps to 0."""
        kept = {name: getattr(self, name) for name in self._initial}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        def plain(x: Tensor) -> Any:
            if x.is_meta:
                return 'meta'
            return [plain(value) for value in x] if x.dim() else round(x.item(), 6)

        return ', '.join(f'{name}={plain(getattr(self, name))}' for name in self._initial)


class AsymmetricLoss(SettingsModule):
    """Asymmetric loss (ASL) for multi-label classification and dense detection, Eq. 7 of arXiv 2009.14119.

    The other losses of the paper are settings of this one:

    ============================  =========  =========  ====
    loss                          gamma_pos  gamma_neg  clip
    ============================  =========  =========  ====
    binary cross-entropy          0          0          0
    focal loss (alpha optional)   2          2          0
    asymmetric focusing           0          4          0
    probability margin            2          2          0.3
    ASL, classification           0          4          0.05
    ASL, detection (alpha 0.25)   1          2          0
    ============================  =========  =========  ====

    ``gamma_pos``, ``gamma_neg``, ``clip`` and, where they are given, ``alpha``, ``class_weight`` and ``pos_weight`` are
    float32 tensors on the module, outside its state dict. Change them in place (``loss.gamma_neg.fill_(3)``) at any
    step; a compiled model is not recompiled.

    ``probability_sums`` is a :class:`mmasl.models.losses.ProbabilitySums`. While its ``enabled`` is True, the loss adds
    what the probability gap (Eq. 9-10) needs in each training call. :class:`mmasl.ProbabilityGapHook` reads it.

    ``soft_label`` chooses the loss of labelled entries whose label is a quality, such as the IoU of a box. All other
    entries are negatives of ASL. docs/loss.md has configs. The published losses are settings:

    =========================================  ==========  =========  =========  ====  ==============================
    loss                                       soft_label  gamma_pos  gamma_neg  clip  further
    =========================================  ==========  =========  =========  ====  ==============================
    MMDetection's QualityFocalLoss             'qfl'       2          2          0
    MMDetection's VarifocalLoss                'vfl'       1          2          0     class_weight 3/4, pos_weight 4/3
    the same with iou_weighted=False           'vfl'       0          2          0     class_weight 3/4, pos_weight 4/3
    matchability-aware loss                    'mal'       1.5        1.5        0     detach_focusing
    =========================================  ==========  =========  =========  ====  ==============================

    By default ``ignore_index`` marks labels to leave out. With ``weight_unannotated`` above 0 it marks labels that
    nobody annotated: each counts as ``weight_unannotated`` negatives in the loss, its gradient, the divisor of 'mean'
    and the probability gap. ``gamma_unannotated`` is their own focusing parameter; margin and alpha are those of
    negatives. The two are ``alpha_unann`` and ``gamma_unann`` of the loss for partial annotations (Ben-Baruch et al.,
    CVPR 2022, arXiv 2110.10955). The selection of labels by likelihood and prior of that paper is not implemented.

    - The closed-form posterior (:func:`mmasl.posterior`) is then the share of positives in which a label without
      annotation counts as ``weight_unannotated`` negatives. With ``gamma_unannotated`` there is no closed form.
    - :class:`mmasl.AdaptiveAsymmetryHook` moves ``gamma_neg`` alone.
    - Do not mix batches: a mix of a positive and a label without annotation would become a negative.

    Args:
        gamma_pos: Focusing parameter of positives, >= 0: one number, or one per class. The paper uses 0 in
            classification and 1 in detection.
        gamma_neg: Focusing parameter of negatives, likewise.
        clip: Probability margin m in [0, 1), likewise. Negatives below it have no loss and no gradient. Use 0 (or None)
            for detection: dense heads start at p = 0.01, and negatives below the margin get no gradient.
        alpha: Weight of positives in [0, 1], likewise; negatives get 1 - alpha, as in focal loss. None for no weights.
        class_weight: Factor >= 0 of all labels of a class, likewise, as MMPretrain's ``CrossEntropyLoss`` has it. None
            for 1. The ``class_weight`` of MMDetection's ``CrossEntropyLoss(use_sigmoid=True)`` is ``pos_weight`` here.
        pos_weight: Further factor >= 0 of the positives of a class, likewise. None for 1.
        detach_focusing: False for the gradient of Eq. 8. True holds the focusing weight constant, as the official
            training script does. The loss value is the same.
        soft_label: Meaning of a soft label of a labelled entry: 'mixture', the paper's, or 'qfl', 'vfl' or 'mal'; see
            :func:`mmasl.asymmetric_loss`.
        use_sigmoid: Must stay True, since the loss is defined on independent sigmoids. Heads read it from the config.
        reduction: 'mean', 'sum' or 'none'. 'mean' divides the sum by ``avg_factor``, or by the number of elements that
            are not ignored. 'sum', the official implementation's, does not use ``avg_factor``.
        loss_weight: Factor of the result.
        ignore_index: Target value of elements, or label of rows, to leave out or to treat as not annotated.
        weight_unannotated: Weight, >= 0, of elements marked by ``ignore_index`` as negatives; a row marked by its label
            is background. 0 leaves them out.
        gamma_unannotated: Their focusing parameter, as ``gamma_neg``; None for the current one of negatives.
        activated: The predictions are probabilities, as from TOOD, and not logits.

    Raises:
        ConfigError: A parameter is out of its range; the message names it.
    """
    gamma_pos: Tensor
    gamma_neg: Tensor
    clip: Tensor
    alpha: Tensor | None
    class_weight: Tensor | None
    pos_weight: Tensor | None
    gamma_unannotated: Tensor | None

    def __init__(self,
                 gamma_pos: float | Sequence[float] = 0.,
                 gamma_neg: float | Sequence[float] = 4.,
                 clip: float | Sequence[float] | None = 0.05,
                 alpha: float | Sequence[float] | None = None,
                 class_weight: float | Sequence[float] | None = None,
                 pos_weight: float | Sequence[float] | None = None,
                 detach_focusing: bool = False,
                 soft_label: str = 'mixture',
                 use_sigmoid: bool = True,
                 reduction: str = 'mean',
                 loss_weight: float = 1.,
                 ignore_index: int | None = None,
                 weight_unannotated: float = 0.,
                 gamma_unannotated: float | Sequence[float] | None = None,
                 activated: bool = False) -> None:
        super().__init__()
        if use_sigmoid is not True:
            raise ConfigError(f'use_sigmoid={use_sigmoid}: AsymmetricLoss is defined on sigmoids, set use_sigmoid=True')
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction={reduction!r} must be one of {REDUCTIONS}')
        if soft_label not in SOFT_LABELS:
            raise ConfigError(f'soft_label={soft_label!r} must be one of {SOFT_LABELS}')
        if gamma_pos is None or gamma_neg is None:
            raise ConfigError(f'gamma_pos={gamma_pos}, gamma_neg={gamma_neg}: give numbers, 0 for no focusing')
        check_number('loss_weight', loss_weight)
        check_number('weight_unannotated', weight_unannotated, 0)
        if weight_unannotated and ignore_index is None:
            raise ConfigError(f'weight_unannotated={weight_unannotated} is that of labels marked by ignore_index: set '
                              'that too, to -1 for mmasl.OpenImages')
        if gamma_unannotated is not None and not weight_unannotated:
            raise ConfigError(f'gamma_unannotated={gamma_unannotated} has no effect on labels that are left out: set '
                             'weight_unannotated too, to 1 for the weight of other negatives')
        for name, value, high, closed in (
                ('gamma_pos', gamma_pos, math.inf, False), ('gamma_neg', gamma_neg, math.inf, False),
                ('clip', 0. if clip is None else clip, 1, False), ('alpha', alpha, 1, True),
                ('class_weight', class_weight, math.inf, False),
                ('pos_weight', pos_weight, math.inf, False), ('gamma_unannotated', gamma_unannotated, math.inf, False)):
            self.register_setting(name, value, high, closed)
        self.detach_focusing = detach_focusing
        self.soft_label = soft_label
        self.use_sigmoid = use_sigmoid
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.weight_unannotated = weight_unannotated
        self.activated = activated
        self.probability_sums = ProbabilitySums()
        self._calls = 0
        self._range: Tensor | None = None

    def forward(self,
                pred: Tensor,
                target: Tensor | tuple[Tensor, Tensor],
                weight: Tensor | None = None,
                avg_factor: float | Tensor | None = None,
                reduction_override: str | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            pred: (..., C) logits (probabilities with ``activated``), of any floating dtype.
            target: Dense targets, labels with background C, or a pair (labels, quality); see
                :func:`mmasl.asymmetric_loss`.
            weight: One weight per row (the shape of ``pred`` without C), per element (the shape of ``pred``, or as many
                dimensions and what broadcasts to it), or flat per element. Never one per class: see ``class_weight``.
            avg_factor: Divisor of 'mean', a number or a tensor of one element, such as the number of positives.
            reduction_override: Replaces ``reduction`` in this call.

        Returns:
            The reduced loss, of shape (); for 'none', the shape of ``pred``. float32, or float64 for float64.

        Raises:
            ConfigError: ``reduction_override`` is unknown.
            DataError: A shape does not fit, or a target is out of range.
        """
        reduction = reduction_override or self.reduction
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction_override={reduction!r} must be one of {REDUCTIONS}')
        if self._calls < 2 * NOTICED and self.training and not (
                self.activated or torch.compiler.is_compiling() or transformed()):
            self._notice_probabilities(pred)
        if self.activated:
            pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
            pred = pred.logit(eps=torch.finfo(pred.dtype).eps)
        if weight is not None:
            weight = as_element_weight(weight, pred)
        # PAA also calls its loss for the assignment, without a gradient.
        track = self.probability_sums.enabled and self.training and torch.is_grad_enabled()
        scale: Any = self.loss_weight or 1.  # the sums need the loss of a weight of 0, too
        if reduction == 'mean':
            divisor = self._divisor(pred, target, avg_factor)
            if isinstance(divisor, Tensor):  # of integers or half precision, whose dtype scale would take
                divisor = divisor.to(torch.promote_types(pred.dtype, torch.float32))
            scale = scale / divisor
        # Labels without annotation need a second operator call: one extra gradient tensor, no weight tensor.
        parts = [(target, self.gamma_neg, self.ignore_index, 1.)]
        if self.weight_unannotated:
            gamma = self.gamma_neg if self.gamma_unannotated is None else self.gamma_unannotated
            parts.append((self._unannotated(pred, target), gamma, -1, self.weight_unannotated))
        losses = []
        for part, gamma_neg, ignore_index, share in parts:
            loss = asymmetric_loss(pred, part, gamma_pos=self.gamma_pos, gamma_neg=gamma_neg, clip=self.clip,
                                   alpha=self.alpha, class_weight=self.class_weight, pos_weight=self.pos_weight,
                                   detach_focusing=self.detach_focusing, soft_label=self.soft_label,
                                   ignore_index=ignore_index, weight=weight, scale=share * scale,
                                   reduction='none' if reduction == 'none' else 'sum', return_sums=track)
            if isinstance(loss, tuple):
                loss, sums = loss
                self.probability_sums.add(share * sums, loss.detach().sum() / scale)
            losses.append(loss)
        total = sum(losses[1:], losses[0])
        return total if self.loss_weight else 0. * total

    def _notice_probabilities(self, pred: Tensor) -> None:
        """Warn once if the logits of the first training calls look like probabilities, without a host sync."""
        self._calls += 1
        if self._calls <= NOTICED and pred.numel():
            low, high = pred.detach().float().aminmax()
            found = torch.stack([low, -high])
            self._range = found if self._range is None else torch.minimum(self._range, found)
        elif self._calls == NOTICED + 1 and self._range is not None:
            self._range = self._range.to('cpu', non_blocking=True)
        elif self._calls == 2 * NOTICED and self._range is not None:  # the copy is done by now
            low, high = self._range.tolist()
            if 0 <= low < -high <= 1:
                warnings.warn(f'all logits of the first {NOTICED} training calls are from {low:.3g} to {-high:.3g}: '
                              'AsymmetricLoss applies the sigmoid itself. Remove the sigmoid of the model, or set '
                              'activated=True', stacklevel=3)

    def _unannotated(self, pred: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Target of the labels without annotation: negatives, or background; -1 marks all others."""
        labels = target[0] if isinstance(target, (tuple, list)) else target
        marked: Any = equals(labels, self.ignore_index)
        return marked.float() - 1 if labels.shape == pred.shape else torch.where(marked, pred.shape[-1], -1)

    def _divisor(self, pred: Tensor, target: Tensor | tuple[Tensor, Tensor],
                 avg_factor: float | Tensor | None) -> float | Tensor:
        """``avg_factor``, or the weighted number of elements that count; above 0, so an empty batch has loss 0."""
        if avg_factor is not None:
            return as_divisor(avg_factor)
        if self.ignore_index is None:
            return max(pred.numel(), 1)
        labels = target[0] if isinstance(target, (tuple, list)) else target
        elements_per_target = pred.numel() // max(labels.numel(), 1)
        annotated = (~equals(labels, self.ignore_index)).sum()
        count = annotated + self.weight_unannotated * (labels.numel() - annotated)
        return as_divisor(count * elements_per_target)

    def extra_repr(self) -> str:
        return super().extra_repr() + (
            f', detach_focusing={self.detach_focusing}, soft_label={self.soft_label}, reduction={self.reduction}, '
            f'loss_weight={self.loss_weight}, ignore_index={self.ignore_index}, '
            f'weight_unannotated={self.weight_unannotated}')


def as_divisor(avg_factor: float | Tensor) -> float | Tensor:
    """``avg_factor``, kept above 0 without a host sync."""
    if not isinstance(avg_factor, Tensor):
        return max(avg_factor, torch.finfo(torch.float32).eps)
    if avg_factor.numel() != 1:
        raise DataError(f'avg_factor of shape {tuple(avg_factor.shape)} must have one element')
    return avg_factor.reshape(()).clamp(min=torch.finfo(torch.float32).eps)


def as_element_weight(weight: Tensor, pred: Tensor) -> Tensor:
    """``weight`` in a shape that multiplies the loss of ``pred``."""
    if weight.shape == pred.shape:
        return weight
    if weight.shape == pred.shape[:-1]:
        return weight.unsqueeze(-1)
    if weight.dim() == 1 and weight.numel() == pred.numel():
        return weight.view_as(pred)
    if weight.dim() == pred.dim() and all(w in (1, n) for w, n in zip(weight.shape, pred.shape)):
        return weight
    raise DataError(f'weight of shape {tuple(weight.shape)} does not fit predictions of shape {tuple(pred.shape)}: '
                    'give one per row, one per element, or one flat list of all elements. class_weight of the loss has '
                    'one per class')
