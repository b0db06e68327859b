"""Watches the classification losses of a model and sums the gradient that they give to positives and negatives."""
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmasl.analysis.gradient import Setting
from mmasl.errors import ConfigError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss, as_element_weight
from mmasl.ops.torch_impl import equals

LOSS_NAMES = ('loss_cls', 'initial_loss_cls', 'loss_module')  # attributes of MMDetection's and MMPretrain's heads


@dataclass
class GradientSums:
    """Sums of |dL/dz| over the watched entries.

    Args:
        positive: Sum over positive entries.
        negative: Sum over negative entries.
        silent: Number of negatives without gradient, counted as in :class:`LossSite`.
    """
    positive: float = 0.
    negative: float = 0.
    silent: float = 0.

    @property
    def total(self) -> float:
        """Sum over all entries."""
        return self.positive + self.negative

    @property
    def share(self) -> float:
        """Share of the positives in the gradient, in [0, 1]; NaN if the gradient is 0."""
        return self.positive / self.total if self.total else float('nan')

    def add(self, grad: Tensor, positive: Tensor, negative: Tensor) -> None:
        """Add a batch.

        Args:
            grad: dL/dz of each entry.
            positive: Whether the entry is positive.
            negative: Number of negatives that the entry counts as.
        """
        grad = grad.abs().double()
        self.positive += grad[positive].sum().item()
        self.negative += grad[negative > 0].sum().item()
        self.silent += negative[grad == 0].sum().item()


@dataclass
class LossSite:
    """A classification loss of a model, with statistics of its calls.

    An entry is the logit of one class. It is positive if its target is above 0. Ignored entries and entries of weight 0
    do not count. An entry marked by ``ignore_index`` counts as ``weight_unannotated`` negatives if the loss has that
    setting.

    Args:
        key: Key of the loss in the config.
        module: The loss.
        positives: Number of positive entries.
        negatives: Number of negative entries.
        own: Gradient of the module itself; None if it does not return one value per entry.
        settings: Gradient of :class:`mmasl.AsymmetricLoss` by setting. Its weights of labels, detach_focusing,
            soft_label, loss_weight and treatment of unannotated labels are those of the module.
        divisor: Largest ``avg_factor`` of the calls; None without one.
        form: 'dense', 'labels' or 'pair', see :func:`mmasl.ops.asymmetric_loss`; None before the first call.
        channels: Size of the last axis of the logits.
    """
    key: str
    module: nn.Module
    positives: int = 0
    negatives: float = 0.
    own: GradientSums | None = field(default_factory=GradientSums)
    settings: dict[Setting, GradientSums] = field(default_factory=dict)
    divisor: float | None = None
    form: str | None = None
    channels: int = 0
    _sample: list[Tensor] = field(default_factory=list)

    @property
    def prior(self) -> float:
        """Median probability of the negatives; NaN without negatives."""
        return torch.cat(self._sample).median().sigmoid().item() if self._sample else float('nan')

    @property
    def softmax(self) -> bool:
        """Whether the loss applies a softmax."""
        return getattr(self.module, 'use_sigmoid', None) is False

    @property
    def alpha(self) -> float | None:
        """``alpha`` of an asymmetric or focal loss; the mean of one per class."""
        alpha = getattr(self.module, 'alpha', None) if class_names(self.module) & {
            'AsymmetricLoss', 'FocalLoss'} else None
        return round(alpha.mean().item(), 6) if isinstance(alpha, Tensor) else alpha

    @property
    def weight_unannotated(self) -> float:
        """Number of negatives that an entry without annotation counts as."""
        return getattr(self.module, 'weight_unannotated', 0.)

    @property
    def setting(self) -> Setting | None:
        """Setting (gamma_pos, gamma_neg, clip) that is equivalent to the module; None if there is none."""
        names, loss = class_names(self.module), cast(Any, self.module)
        if self.softmax:
            return None
        if 'AsymmetricLoss' in names:
            return Setting(largest(loss.gamma_pos), largest(loss.gamma_neg), largest(loss.clip))
        if 'FocalLoss' in names:
            return Setting(loss.gamma, loss.gamma, 0.)
        plain = all(getattr(loss, key, None) is None for key in ('class_weight', 'pos_weight'))
        return Setting(0., 0., 0.) if 'CrossEntropyLoss' in names and plain else None

    def add(self, call: inspect.BoundArguments, settings: Sequence[Setting]) -> None:
        """Add a call of the module, with the gradient of the module and of each setting."""
        pred, target, *_ = call.arguments.values()
        weight, avg_factor = call.arguments.get('weight'), call.arguments.get('avg_factor')
        if avg_factor is not None:
            self.divisor = max(self.divisor or 0., float(avg_factor))
        self.channels = pred.shape[-1]
        self.form, y, counts = expand_target(pred, target, getattr(self.module, 'ignore_index', None),
                                             self.weight_unannotated)
        if weight is not None:
            weight = as_element_weight(weight, y).expand_as(y)
            counts = counts * (weight != 0)
        positive, negative = (counts > 0) & (y > 0), counts.where(y <= 0, 0.)
        self.positives += int(positive.sum())
        self.negatives += negative.sum().item()

        z = pred.detach().float()
        if getattr(self.module, 'activated', False):
            z = z.logit(eps=torch.finfo(z.dtype).eps)
        at_negatives = z[negative > 0]
        self._sample.append(at_negatives[::max(1, at_negatives.numel() // 100_000)])
        if self.own is not None:
            grad = _own_gradient(self.module, call, z)
            if grad is None:
                self.own = None
            else:
                self.own.add(grad, positive, negative)
        for setting in settings:
            grad = self._gradient(z, y, weight, setting)
            self.settings.setdefault(setting, GradientSums()).add(grad, positive, negative)

    def _gradient(self, z: Tensor, y: Tensor, weight: Tensor | None, setting: Setting) -> Tensor:
        kept: Any = {key: getattr(self.module, key) for key in (
            'detach_focusing', 'loss_weight', 'weight_unannotated', 'gamma_unannotated') if hasattr(self.module, key)}
        kept |= {key: value for key, value in quality_settings(self.module).items() if key != 'gamma_pos'}
        weights = {key: getattr(self.module, key) for key in ('alpha', 'class_weight', 'pos_weight')} if isinstance(
            self.module, AsymmetricLoss) else dict(alpha=self.alpha)
        kept = weights | kept
        loss = AsymmetricLoss(gamma_pos=setting.gamma_pos, gamma_neg=setting.gamma_neg, clip=setting.clip,
                              reduction='sum', ignore_index=-1, **kept)
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            return torch.autograd.grad(loss.to(z.device)(z, y, weight), z)[0]


def quality_settings(loss: Any) -> dict[str, Any]:
    """Arguments of :class:`mmasl.AsymmetricLoss` with which labelled entries keep the loss of their quality.

    Args:
        loss: A classification loss.

    Returns:
        ``soft_label``, ``gamma_pos`` and the weights; nothing if soft labels are mixtures.
    """
    kind, names = getattr(loss, 'soft_label', None), class_names(loss)
    if kind:
        return {} if kind == 'mixture' else dict(soft_label=kind, gamma_pos=largest(loss.gamma_pos))
    if 'QualityFocalLoss' in names:
        return dict(soft_label='qfl', gamma_pos=float(loss.beta))
    if 'VarifocalLoss' in names and loss.alpha:
        return dict(soft_label='vfl', gamma_pos=float(loss.iou_weighted), class_weight=loss.alpha,
                    pos_weight=1 / loss.alpha)
    return {}


def class_names(loss: object) -> set[str]:
    """Names of the classes of a loss. MMPretrain and MMDetection have classes of the same names and meaning."""
    return {base.__name__ for base in type(loss).__mro__}


def largest(value: float | Tensor | None) -> float:
    """Largest value of a parameter, rounded to 6 decimals because float32 stores 0.05 as 0.0500000007; None is 0."""
    return round(float(torch.as_tensor(0. if value is None else value).max()), 6)


def expand_target(pred: Tensor, target: Tensor | tuple[Tensor, Tensor], ignore_index: int | None,
                  weight_unannotated: float = 0.) -> tuple[str, Tensor, Tensor]:
    """Expand the target of a loss to one value per entry.

    Args:
        pred: Predictions, (..., C).
        target: Dense targets, labels, or a pair (labels, quality).
        ignore_index: Target of entries, or label of rows, without annotation.
        weight_unannotated: Number of negatives that such an entry counts as.

    Returns:
        The form as in :class:`LossSite`; the targets in [0, 1], or -1 without annotation, (..., C); and the number of
        labels that each entry counts as, (..., C).

    Raises:
        ConfigError: The target has another shape.
    """
    labels, quality = target if isinstance(target, (tuple, list)) else (target, None)
    marked = equals(labels, ignore_index)
    annotated = (labels >= 0) & ~marked
    counts = annotated + weight_unannotated * marked.double()
    if labels.shape == pred.shape:
        return 'dense', labels.float().where(annotated, -1.), counts
    if labels.shape != pred.shape[:-1]:
        raise ConfigError(f'a classification loss gets targets of shape {tuple(labels.shape)} for predictions of shape '
                          f'{tuple(pred.shape)}: advice supports dense targets and one label per row')
    y = (labels.unsqueeze(-1) == torch.arange(pred.shape[-1], device=pred.device)).float()
    if quality is not None:
        y *= quality.unsqueeze(-1)
    return ('labels' if quality is None else 'pair', y.where(annotated.unsqueeze(-1), -1.),
            counts.unsqueeze(-1).expand_as(pred))


def find_loss_sites(model: nn.Module) -> list[LossSite]:
    """Find the classification losses of a model of MMPretrain or MMDetection: by attribute name, and all of mmasl."""
    sites = []
    for name, module in model.named_modules():
        *path, last = name.split('.')
        if last in LOSS_NAMES or isinstance(module, AsymmetricLoss):
            sites.append(LossSite('.'.join(['model', *path, 'loss' if last == 'loss_module' else last]), module))
    return sites


@contextmanager
def watch_losses(sites: Sequence[LossSite], settings: Sequence[Setting]) -> Iterator[None]:
    """Add every call of the losses in this block to their sites, when the block ends.

    Run the model with gradients enabled: calls under ``torch.no_grad()`` are not part of the objective. The parameters
    need no gradient. Use one block per batch to limit the memory.

    Args:
        sites: The losses.
        settings: Settings whose gradient is computed too.
    """
    calls = []

    def remember(site: LossSite) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if torch.is_grad_enabled():  # PAA also calls its loss for the assignment, without gradient
                calls.append((site, inspect.signature(module.forward).bind(*args, **kwargs)))

        return hook

    handles = [site.module.register_forward_pre_hook(remember(site), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for site, call in calls:
        site.add(call, settings)


def _own_gradient(module: nn.Module, call: inspect.BoundArguments, z: Tensor) -> Tensor | None:
    """dL/dz of each entry before the reduction; None if the module has no ``reduction_override``."""
    arguments = dict(call.arguments)
    if 'reduction_override' not in inspect.signature(module.forward).parameters:
        return None
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        arguments[next(iter(arguments))] = z.sigmoid() if getattr(module, 'activated', False) else z
        arguments |= dict(avg_factor=None, reduction_override='none')
        extra = arguments.pop('kwargs', {})
        return torch.autograd.grad(module(**arguments, **extra).sum(), z)[0]
