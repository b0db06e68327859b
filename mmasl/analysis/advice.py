"""What can be said of a config before it trains: its labels, the gradient its loss starts with, a setting, mistakes.

Data goes one way: :func:`count_labels` and :func:`watch_losses` look, :func:`suggest` and :func:`find_mistakes` judge
what was seen. tools/advise.py prints it.
"""
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp, log, log1p
from typing import Any, cast

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from mmasl.models.losses.asymmetric_loss import AsymmetricLoss, _as_element_weight

Setting = tuple[float, float, float]  # gamma_neg, gamma_pos, clip

# The author's order for new data (issue 22 of the official repository).
LADDER = {
    'cross-entropy': (0, 0, 0),
    'focal loss': (2, 2, 0),
    'asymmetric': (2, 1, 0),
    'more asymmetric': (4, 1, 0),
    'with a margin': (4, 1, 0.05)}
# What `suggest` may say of a classifier; of a detector it says the third rung.
STARTS = ((2, 0, 0), (4, 0, 0.05), (4, 0, 0), (7, 0, 0.05), (7, 0, 0))
# Negatives per positive; chosen here, above COCO's 27. Of Open Images' labels about one in a thousand is annotated:
# where the others weigh 0.1, they are 100 negatives per annotated label, and more per positive.
EXTREME = 100
MILD = 5  # negatives per positive; VOC's 13 are the fewest in the paper
COUPLED = ('Adam', 'Adamax', 'NAdam', 'RAdam', 'Adagrad', 'RMSprop')  # torch's: weight_decay is added to the gradient
OFFICIAL_BATCH = 128  # images over which the official script sums the loss


# --- labels

@dataclass(frozen=True)
class LabelStats:
    """Labels of a training set.

    Args:
        classes: Names of the C classes.
        counts: (C,) images (classification) or objects (detection) of each class.
        per_image: (N,) labels or objects of each image.
        ignored: Labels marked as not annotated or to be left out: -1 in a multi-label set, crowds in detection.
        kind: 'multi-label', 'single-label' or 'detection'.
    """
    classes: tuple[str, ...]
    counts: np.ndarray
    per_image: np.ndarray
    ignored: int
    kind: str

    @property
    def images(self) -> int:
        return len(self.per_image)

    def negatives_per_positive(self, weight_unannotated: float = 0.) -> float:
        """Of classification; in detection it is a matter of the head, see :class:`LossSite`.

        Args:
            weight_unannotated: Negatives that an ignored label counts as, that of the loss.
        """
        positives = self.counts.sum()
        negatives = self.images * len(self.classes) - self.ignored - positives
        return (negatives + weight_unannotated * self.ignored) / positives

    @property
    def order(self) -> np.ndarray:
        """Classes that occur, the commonest first."""
        order = np.argsort(-self.counts, kind='stable')
        return order[self.counts[order] > 0]

    @property
    def empty(self) -> list[str]:
        return [name for name, count in zip(self.classes, self.counts) if not count]

    @property
    def imbalance(self) -> float:
        """Commonest over rarest class, of those that occur."""
        return self.counts[self.order[0]] / self.counts[self.order[-1]]


def count_labels(dataset: Any, progress: Callable[[range], Iterable[int]] = iter) -> LabelStats:
    """Count the labels of a data set of MMPretrain or MMDetection, without loading an image.

    Args:
        dataset: Built data set; wrappers that repeat or mix images are looked through.
        progress: Wraps the range of indices, as tqdm does.

    Raises:
        ValueError: A sample has no labels, a label has no class, or the set has no label at all.
    """
    while type(dataset).__name__ in ('RepeatDataset', 'MultiImageMixDataset'):
        dataset = dataset.dataset
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    kinds, found, ignored = set(), [], 0
    for index in progress(range(len(dataset))):
        kind, labels, left_out = _read_labels(dataset.get_data_info(index))
        kinds.add(kind)
        found.append(labels)
        ignored += left_out
    everything = [label for labels in found for label in labels]
    if not everything:
        raise ValueError(f'none of the {len(found)} images has a label: is the annotation file the right one, and do '
                         'metainfo.classes name its classes?')
    classes = dataset.metainfo.get('classes') or range(max(everything) + 1)
    if not 0 <= min(everything) <= max(everything) < len(classes):
        raise ValueError(f'labels reach from {min(everything)} to {max(everything)}, but the data set names '
                         f'{len(classes)} classes: correct metainfo.classes')
    return LabelStats(tuple(map(str, classes)), np.bincount(everything, minlength=len(classes)),
                      np.array([len(labels) for labels in found]), ignored, max(kinds))


def _read_labels(info: dict) -> tuple[str, list[int], int]:
    """Kind of data, positive labels and number of ignored ones of a sample."""
    if 'instances' in info:
        labels = [x['bbox_label'] for x in info['instances'] if not x.get('ignore_flag')]
        return 'detection', labels, len(info['instances']) - len(labels)
    if 'gt_score' in info:
        score = np.asarray(info['gt_score'])
        return 'multi-label', np.flatnonzero(score > 0).tolist(), int((score < 0).sum())
    if 'gt_label' not in info:
        raise ValueError(f"{info.get('img_path', 'a sample')} has no labels (gt_label, gt_score or instances): advice "
                         'needs the annotated training set')
    label = np.asarray(info['gt_label'])
    return ('multi-label' if label.ndim else 'single-label'), label.reshape(-1).astype(int).tolist(), 0


# --- gradient of the first batches

@dataclass
class Gradient:
    """Sums of |dL/dz| over the watched entries.

    Args:
        positive, negative: The sums over positive and negative entries.
        silent: Negatives without gradient, counted as in :class:`LossSite`.
    """
    positive: float = 0.
    negative: float = 0.
    silent: float = 0.

    @property
    def total(self) -> float:
        return self.positive + self.negative

    @property
    def share(self) -> float:
        """The positives' share of the gradient, in [0, 1]; NaN where there is no gradient."""
        return self.positive / self.total if self.total else float('nan')

    def add(self, grad: Tensor, positive: Tensor, negative: Tensor) -> None:
        """Add dL/dz of entries; ``positive`` says which are positives, ``negative`` how many negatives each is."""
        grad = grad.abs().double()
        self.positive += grad[positive].sum().item()
        self.negative += grad[negative > 0].sum().item()
        self.silent += negative[grad == 0].sum().item()


@dataclass
class LossSite:
    """A classification loss in a model, and what its calls held.

    An entry is a logit of one class; a positive has a target above 0. Ignored entries and those of weight 0 do not
    count. Where the loss has a ``weight_unannotated``, an entry marked by its ``ignore_index`` is that many negatives.

    Args:
        key: Where the loss stands in the config.
        module: The loss.
        positives, negatives: Number of entries.
        own: Gradient of the module itself; None if it has none per entry.
        settings: Gradient of :class:`mmasl.AsymmetricLoss` for settings of it, with the rest as the module has it.
        divisor: Largest ``avg_factor`` of the calls, None without one.
        form: 'dense', 'labels' or 'pair', as in :func:`mmasl.ops.asymmetric_loss`; None before any call.
        channels: Size of the last axis of the logits.
    """
    key: str
    module: nn.Module
    positives: int = 0
    negatives: float = 0.
    own: Gradient | None = field(default_factory=Gradient)
    settings: dict[Setting, Gradient] = field(default_factory=dict)
    divisor: float | None = None
    form: str | None = None
    channels: int = 0
    _sample: list[Tensor] = field(default_factory=list)

    @property
    def prior(self) -> float:
        """Median probability of a negative."""
        return torch.cat(self._sample).median().sigmoid().item() if self._sample else float('nan')

    @property
    def softmax(self) -> bool:
        return getattr(self.module, 'use_sigmoid', None) is False

    @property
    def alpha(self) -> float | None:
        return getattr(self.module, 'alpha', None) if type(self.module).__name__ in (
            'AsymmetricLoss', 'FocalLoss') else None

    @property
    def weight_unannotated(self) -> float:
        """Negatives that an entry without annotation counts as."""
        return getattr(self.module, 'weight_unannotated', 0.)

    @property
    def setting(self) -> Setting | None:
        """(gamma_neg, gamma_pos, clip) that the module amounts to, where it does."""
        name, loss = type(self.module).__name__, cast(Any, self.module)
        if self.softmax:
            return None
        if name == 'AsymmetricLoss':
            return _largest(loss.gamma_neg), _largest(loss.gamma_pos), _largest(loss.clip)
        if name == 'FocalLoss':
            return loss.gamma, loss.gamma, 0
        plain = all(getattr(loss, key, None) is None for key in ('class_weight', 'pos_weight'))
        return (0, 0, 0) if name == 'CrossEntropyLoss' and plain else None

    def add(self, call: inspect.BoundArguments, settings: Sequence[Setting]) -> None:
        """Count a call of the module, with its own gradient and that of the settings."""
        pred, target, *_ = call.arguments.values()
        weight, avg_factor = call.arguments.get('weight'), call.arguments.get('avg_factor')
        if avg_factor is not None:
            self.divisor = max(self.divisor or 0., float(avg_factor))
        self.channels = pred.shape[-1]
        self.form, y, counts = _entries(pred, target, getattr(self.module, 'ignore_index', None),
                                        self.weight_unannotated)
        if weight is not None:
            weight = _as_element_weight(weight, y).expand_as(y)
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
            self.settings.setdefault(setting, Gradient()).add(grad, positive, negative)

    def _gradient(self, z: Tensor, y: Tensor, weight: Tensor | None, setting: Setting) -> Tensor:
        gamma_neg, gamma_pos, clip = setting
        kept: Any = {key: getattr(self.module, key) for key in (
            'detach_focusing', 'loss_weight', 'weight_unannotated', 'gamma_unannotated') if hasattr(self.module, key)}
        loss = AsymmetricLoss(gamma_pos, gamma_neg, clip, self.alpha, reduction='sum', ignore_index=-1, **kept)
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            return torch.autograd.grad(loss.to(z.device)(z, y, weight), z)[0]


def _largest(value: float | Tensor | None) -> float:
    # float32 holds 0.05 as 0.0500000007.
    return round(float(torch.as_tensor(0. if value is None else value).max()), 6)


def _entries(pred: Tensor, target: Tensor | tuple[Tensor, Tensor], ignore_index: int | None,
             weight_unannotated: float = 0.) -> tuple[str, Tensor, Tensor]:
    """Form of the target, its dense labels in [0, 1] or -1 without annotation, and how many entries each counts as."""
    labels, quality = target if isinstance(target, (tuple, list)) else (target, None)
    marked = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    annotated = (labels >= 0) & ~marked
    counts = annotated + weight_unannotated * marked.double()
    if labels.shape == pred.shape:
        return 'dense', labels.float().where(annotated, -1.), counts
    if labels.shape != pred.shape[:-1]:
        raise ValueError(f'a classification loss is called with targets of shape {tuple(labels.shape)} for predictions '
                         f'of shape {tuple(pred.shape)}: its gradient is not understood here')
    y = (labels.unsqueeze(-1) == torch.arange(pred.shape[-1], device=pred.device)).float()
    if quality is not None:
        y *= quality.unsqueeze(-1)
    return ('labels' if quality is None else 'pair', y.where(annotated.unsqueeze(-1), -1.),
            counts.unsqueeze(-1).expand_as(pred))


def _own_gradient(module: nn.Module, call: inspect.BoundArguments, z: Tensor) -> Tensor | None:
    """dL/dz of every entry before the reduction; None if the module does not offer it."""
    arguments = dict(call.arguments)
    if 'reduction_override' not in inspect.signature(module.forward).parameters:
        return None
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        arguments[next(iter(arguments))] = z.sigmoid() if getattr(module, 'activated', False) else z
        arguments |= dict(avg_factor=None, reduction_override='none')
        extra = arguments.pop('kwargs', {})
        return torch.autograd.grad(module(**arguments, **extra).sum(), z)[0]


def find_losses(model: nn.Module) -> list[LossSite]:
    """The classification losses of a model of MMPretrain or MMDetection, by the names that its heads give them."""
    sites = []
    for name, module in model.named_modules():
        *path, last = name.split('.')
        if last in ('loss_cls', 'initial_loss_cls', 'loss_module') or isinstance(module, AsymmetricLoss):
            sites.append(LossSite('.'.join(['model', *path, 'loss' if last == 'loss_module' else last]), module))
    return sites


@contextmanager
def watch_losses(sites: Sequence[LossSite], settings: Sequence[Setting]) -> Iterator[None]:
    """Count, at the end of the block, every call that the losses got in it.

    The block runs the model with gradients enabled, though its parameters need none; calls under ``torch.no_grad()``
    are not part of the objective. One batch a block keeps the memory small.
    """
    calls = []

    def remember(site: LossSite) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # PAA calls its loss for the assignment too, without gradient.
            if torch.is_grad_enabled():
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


# --- a setting to start from

@dataclass(frozen=True)
class Suggestion:
    """A setting to start from, and why."""
    setting: Setting
    alpha: float | None
    reasons: tuple[str, ...]


def suggest(stats: LabelStats, site: LossSite | None) -> Suggestion:
    """The paper's setting of the data most like these.

    Args:
        stats: Labels of the training set.
        site: The loss, for the probability that negatives start at and for what a label without annotation counts as;
            None if it is not known.
    """
    if stats.kind == 'detection':
        alpha = site.alpha if site and site.alpha is not None else 0.25 if site and site.form == 'labels' else None
        reasons = [('detection: App. H of the paper, gamma_neg = 2 and gamma_pos = 1; no margin, since a dense head '
                    'starts below any useful one')]
        if alpha is not None:
            reasons.append(f'alpha = {alpha:g} of the focal loss: reproduce that first, then change the gammas alone '
                           '(the advice of the author)')
        return Suggestion((2, 1, 0), alpha, tuple(reasons))

    weight = site.weight_unannotated if site else 0.
    ratio = stats.negatives_per_positive(weight)
    if stats.kind == 'single-label' or (site and site.softmax):
        setting, reason = (4, 0, 0.05), 'App. G, one label among 32,000, on sigmoids in place of a softmax'
    elif ratio >= EXTREME:
        setting, reason = (7, 0, 0.05), f'App. F, Open Images; here, from {EXTREME} negatives per positive'
    elif ratio >= MILD:
        setting, reason = (4, 0, 0.05), 'App. B; the paper uses it from 13 (VOC) to 27 (COCO)'
    else:
        setting, reason = (2, 0, 0), f'below {MILD}, less than any data of the paper has; mild focusing is a guess'
    counted = f', a label without annotation counted as {weight:g} of them' if weight and stats.ignored else ''
    reasons = [f'{stats.kind}, {ratio:.3g} negatives per positive{counted}: {reason}',
               'gamma_pos = 0: the best of Fig. 6, and every positive keeps its whole gradient']
    if setting[2] and site and site.prior <= setting[2]:
        reasons.append(f'no margin: the median negative starts at p = {site.prior:.2g}, where a margin of '
                       f'{setting[2]:g} leaves no gradient')
        setting = (*setting[:2], 0)
    return Suggestion(setting, None, tuple(reasons))


def write_config(cfg: Config, base: str, site: LossSite, suggestion: Suggestion) -> str:
    """A config that inherits ``base`` and has the suggested loss.

    Settings of the replaced loss that are not its shape (weight, reduction, probabilities as input, what labels without
    annotation are) are kept.
    """
    place, old = site.key.split('.'), _loss_dict(cfg, site)
    gamma_neg, gamma_pos, clip = suggestion.setting
    loss = dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=float(gamma_pos), gamma_neg=float(gamma_neg),
                clip=float(clip))
    if suggestion.alpha is not None:
        loss['alpha'] = suggestion.alpha
    loss |= {key: old[key] for key in ('activated', 'loss_weight') if key in old}
    if _name(old.get('type')) == 'AsymmetricLoss':
        loss |= {key: old[key] for key in ('detach_focusing', 'reduction', 'ignore_index', 'weight_unannotated',
                                           'gamma_unannotated', 'implementation') if key in old}
    imports = list((cfg.get('custom_imports') or {}).get('imports', []))
    imports += [] if 'mmasl' in imports else ['mmasl']
    if any(key.isdigit() for key in place):
        return f'# A list is replaced as a whole: in each of its entries, as in {site.key}\n{place[-1]}=' + _call(loss)
    if old:  # MMEngine takes the key away only where there is something to delete
        loss = dict(_delete_=True) | loss
    for key in reversed(place[1:]):
        loss = {key: loss}
    return '\n'.join([f'_base_ = {base!r}', f'custom_imports = dict(imports={imports}, allow_failed_imports=False)',
                      f'{place[0]} = {_call(loss)}'])


def _call(value: object, depth: int = 1) -> str:
    """A dict as configs write it, one key a line."""
    if not isinstance(value, dict):
        return repr(value)
    lines = (f'{4 * depth * " "}{key}={_call(inner, depth + 1)}' for key, inner in value.items())
    return 'dict(\n' + ',\n'.join(lines) + ')'


# --- known mistakes

@dataclass(frozen=True)
class Mistake:
    """Something that looks like a known mistake.

    Args:
        what: What was seen.
        where: Key of the config.
        why: What it does.
        cure: What to write.
    """
    what: str
    where: str
    why: str
    cure: str


def find_mistakes(cfg: Config, stats: LabelStats, sites: Sequence[LossSite], batches_per_epoch: int) -> list[Mistake]:
    """Everything below that applies.

    Args:
        cfg: The config.
        stats: Labels of the training set.
        sites: The losses, after the first batches.
        batches_per_epoch: Iterations of an epoch, with all GPUs.
    """
    found = [empty_classes(stats), normalisation_of_tresnet(cfg), *ema_longer_than_run(cfg, batches_per_epoch)]
    for site in sites:
        found += [sigmoid_not_in_config(cfg, site), other_asymmetric_loss(cfg, site)]
        found += [alpha_left_out(site)] if stats.kind == 'detection' else [focusing_of_positives(site)]
        # A trained head has most negatives below the margin, as it should.
        found += [] if cfg.get('load_from') else [margin_above_prior(site)]
        found += [coupled_weight_decay(cfg, site)]
    return [mistake for mistake in found if mistake]


def empty_classes(stats: LabelStats) -> Mistake | None:
    """A class without any label."""
    if stats.empty:
        return Mistake(
            f'{len(stats.empty)} of {len(stats.classes)} classes have no label: {", ".join(stats.empty)}',
            'train_dataloader.dataset.metainfo.classes',
            'all that is learnt of such a class is that it is absent, and average precision is not defined for it',
            'leave the class out of metainfo.classes and num_classes, or find out why its labels are missing')
    return None


def focusing_of_positives(site: LossSite) -> Mistake | None:
    """gamma_pos > 0 in classification; equal gammas are the focal loss, and meant."""
    if type(site.module).__name__ != 'AsymmetricLoss' or site.setting is None:
        return None
    gamma_neg, gamma_pos, _ = site.setting
    if gamma_pos > 0 and gamma_pos != gamma_neg:
        return Mistake(
            f'gamma_pos = {gamma_pos:g} in classification', f'{site.key}.gamma_pos',
            f'a positive at p = 0.5 has {0.5**gamma_pos:.0%} of its loss left; the paper found 0 best (Fig. 6), while '
            'the official constructor has 1',
            'gamma_pos=0')
    return None


def margin_above_prior(site: LossSite) -> Mistake | None:
    """A margin above the probability that most negatives start at."""
    clip = _largest(getattr(site.module, 'clip', 0.))
    if clip > 0 and site.own and site.negatives and site.own.silent > site.negatives / 2:
        return Mistake(
            f'{site.own.silent:,.0f} of {site.negatives:,.0f} negatives have no gradient: the median one starts at p = '
            f'{site.prior:.2g}, below the margin of {clip:g}', f'{site.key}.clip',
            'nothing is learnt of a negative until its probability has risen to the margin, and scores settle there',
            'clip=0, as in every dense detector; or a head whose bias starts it higher (it starts at the logit '
            f'{log(site.prior) - log1p(-site.prior):.1f})')
    return None


def alpha_left_out(site: LossSite) -> Mistake | None:
    """ASL in the place of a focal loss without its alpha; heads with soft targets have none themselves."""
    if not isinstance(site.module, AsymmetricLoss) or site.alpha is not None or site.form != 'labels' or (
            site.setting is None):
        return None
    gamma_neg, gamma_pos, _ = site.setting
    if gamma_pos != gamma_neg:
        low, high = (0.25**-1 * (1 - p)**(gamma_pos - 2) for p in (0.01, 0.5))
        return Mistake(
            'alpha is None in detection', f'{site.key}.alpha',
            f'a positive weighs {low:.2g} (at p = 0.01) to {high:.2g} times (at p = 0.5) as much as in the focal loss '
            f'with gamma 2 and alpha 0.25; beside the box losses that is another balance altogether', 'alpha=0.25')
    return None


def other_asymmetric_loss(cfg: Config, site: LossSite) -> Mistake | None:
    """A bare AsymmetricLoss under MMPretrain."""
    if type(site.module).__name__ == 'AsymmetricLoss' and not isinstance(
            site.module, AsymmetricLoss) and _loss_dict(cfg, site).get('type') == 'AsymmetricLoss':
        return Mistake(
            "type='AsymmetricLoss' is MMPretrain's own class", f'{site.key}.type',
            'its soft labels (Mixup, CutMix) are wrong, labels of shape (N, 1) are taken for class indices, and '
            '0 < gamma_neg < 1 with a margin gives NaN gradients', "type='mmasl.AsymmetricLoss'")
    return None


def sigmoid_not_in_config(cfg: Config, site: LossSite) -> Mistake | None:
    """A sigmoid loss in a detector whose config does not say so."""
    loss = _loss_dict(cfg, site)
    if site.key.endswith('loss_cls') and 'type' in loss and 'use_sigmoid' not in loss and getattr(
            site.module, 'use_sigmoid', False):
        return Mistake(
            'use_sigmoid=True does not stand in the config', f'{site.key}.use_sigmoid',
            'the head reads it there before it builds the loss: without it, it takes the loss for a softmax and adds a '
            f'channel for background (predictions have {site.channels} here)', 'use_sigmoid=True in the dict')
    return None


def coupled_weight_decay(cfg: Config, site: LossSite) -> Mistake | None:
    """Adam with coupled L2 under a loss that is divided, whose scale Adam hides from everything else."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or ConfigDict()
    decay = optimizer.get('weight_decay', 0)
    if _name(optimizer.get('type')) not in COUPLED or not decay or optimizer.get('decoupled_weight_decay'):
        return None
    if getattr(site.module, 'reduction', None) != 'mean' or not site.divisor or site.divisor <= 1:
        return None
    why = (f'{_name(optimizer.type)} divides the gradient by its size, which hides the scale of the loss, but adds '
           f"weight_decay to the gradient first. This loss is divided by {site.divisor:g} (avg_factor): against "
           f"reduction='sum' the same weight_decay counts {site.divisor:g} times as much")
    cross_entropy = site.settings.get((0, 0, 0))
    if cross_entropy and site.own and site.own.total > 0 and site.setting != (0, 0, 0):
        scale = cross_entropy.total / site.own.total
        why += f', and against cross-entropy {scale:.3g} times, by the gradient of the first batches'
    cure = 'AdamW, whose decay does not depend on the loss'
    if cfg.get('default_scope') == 'mmpretrain':
        cure += (f'; to follow the official script (1e-4, loss summed over {OFFICIAL_BATCH} images) weight_decay='
                 f'{1e-4 / OFFICIAL_BATCH:.1g}')
    return Mistake(f'weight_decay = {decay:g} of {_name(optimizer.type)} is coupled to the scale of the loss',
                   'optim_wrapper.optimizer', why, cure)


def normalisation_of_tresnet(cfg: Config) -> Mistake | None:
    """TResNet with other inputs than RGB in [0, 1]."""
    backbone = cfg.model.get('backbone') or {}
    name = str(backbone.get('model_name') or _name(backbone.get('type')))
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    if 'tresnet' in name.lower() and (np.any(mean or 0) or not np.allclose(std or 1, 255)):
        return Mistake(
            f'{name} gets mean={mean}, std={std}', 'data_preprocessor',
            'TResNet was pretrained on RGB in [0, 1], and the paper trains with that (App. B)',
            'mean=[0., 0., 0.], std=[255., 255., 255.] and RGB (to_rgb=True in MMPretrain, bgr_to_rgb=True in '
            'MMDetection)')
    return None


def ema_longer_than_run(cfg: Config, batches_per_epoch: int) -> list[Mistake]:
    """Averages of weights that still hold more than 5 % of the initial ones when the run ends."""
    train, found = cfg.get('train_cfg') or {}, []
    iterations = train.get('max_iters') or (train.get('max_epochs') or 0) * batches_per_epoch
    hooks = {f'custom_hooks.{i}': hook for i, hook in enumerate(cfg.get('custom_hooks') or [])}
    hooks |= {f'default_hooks.{key}': hook for key, hook in (cfg.get('default_hooks') or {}).items()}
    for key, hook in hooks.items():
        if not hook or _name(hook.get('type')) != 'EMAHook' or not iterations:
            continue
        late = max((hook.get('begin_epoch', 0) - 1) * batches_per_epoch, hook.get('begin_iter', 0) - 1, 0)
        options = {k: v for k, v in hook.items() if k in ('ema_type', 'momentum', 'gamma', 'interval')}
        horizon = hook.get('horizon')  # mmasl.EMAHook's, which takes no momentum
        if horizon is not None:
            options['momentum'] = 1 / (1 + horizon * iterations)
        left = initial_share(iterations - late, **options)
        if left > 0.05:
            updates = max(1, (iterations - late - 1) // hook.get('interval', 1))
            momentum = -np.expm1(log(0.01) / updates)
            name, value, cure = ('momentum', hook.get('momentum', 0.0002), momentum) if horizon is None else (
                'horizon', horizon, (1 / momentum - 1) / iterations)
            found.append(Mistake(
                f'the average still holds {left:.0%} of the initial weights at the end of the run', f'{key}.{name}',
                f'{name} {value:g} over {iterations - late:,} iterations; that part of what is evaluated is not '
                'trained',
                f'{name}={cure:.2g} leaves 1 %' + ('; or train longer' if horizon is None else '')))
    return found


def initial_share(iterations: int, ema_type: str = 'ExponentialMovingAverage', momentum: float = 0.0002,
                  gamma: float | None = None, interval: int = 1) -> float:
    """Share of the weights of the first iteration in MMEngine's moving average after the last; 0 for other averages.

    Args:
        iterations: Iterations with the average, the first of which copies the weights.
        ema_type, momentum, gamma, interval: As in EMAHook, with the defaults of the averages.
    """
    step = np.arange(interval, iterations, interval)
    name = _name(ema_type)
    if name == 'ExponentialMovingAverage':
        return exp(len(step) * log1p(-momentum))
    if name == 'MomentumAnnealingEMA':
        gamma = gamma or 100
        return exp(np.log1p(-np.maximum(momentum, gamma / (gamma + step))).sum())
    if name == 'ExpMomentumEMA':
        return exp(np.log1p(-((1 - momentum) * np.exp(-(1 + step) / (gamma or 2000)) + momentum)).sum())
    return 0.


def _loss_dict(cfg: Config, site: LossSite) -> dict:
    """The dict in the config that the loss was built from; empty where a default was."""
    value = cfg
    for key in site.key.split('.'):
        if isinstance(value, (list, tuple)):
            value = value[int(key)] if key.isdigit() and int(key) < len(value) else {}
        else:
            value = value.get(key) or {} if hasattr(value, 'get') else {}
    return value if isinstance(value, dict) else {}


def _name(kind: str | type | None) -> str:
    """Name of a type in a config, without its scope."""
    return getattr(kind, '__name__', str(kind)).split('.')[-1]
