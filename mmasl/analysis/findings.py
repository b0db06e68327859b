"""Checks a config for known problems, by its text, its training labels and the first calls of its losses."""
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log1p

import numpy as np
from mmengine.config import Config, ConfigDict

from mmasl.analysis.gradient import Setting
from mmasl.analysis.label_statistics import LabelStatistics
from mmasl.analysis.loss_sites import LossSite, largest
from mmasl.analysis.suggestion import loss_config, type_name
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss

COUPLED = ('Adam', 'Adamax', 'NAdam', 'RAdam', 'Adagrad', 'RMSprop')  # torch's: weight_decay is added to the gradient
EMA_HOOKS = ('EMAHook', 'RelativeEMAHook')
OFFICIAL_BATCH = 128  # the official script sums the loss over so many images
CROSS_ENTROPY = Setting(0, 0, 0)


@dataclass(frozen=True)
class Finding:
    """A known problem that a config seems to have.

    Args:
        what: What was found, with its values.
        where: Key of the config.
        why: The consequence.
        hint: What to change.
    """
    what: str
    where: str
    why: str
    hint: str


def find_problems(cfg: Config, stats: LabelStatistics, sites: Sequence[LossSite],
                  batches_per_epoch: int) -> list[Finding]:
    """Run all checks of this module.

    Args:
        cfg: The config.
        stats: Labels of the training set.
        sites: The losses, after the first batches.
        batches_per_epoch: Iterations per epoch, with all GPUs.
    """
    found = [empty_classes(stats), normalisation_of_tresnet(cfg), *ema_longer_than_run(cfg, batches_per_epoch)]
    for site in sites:
        found += [sigmoid_not_in_config(cfg, site), other_asymmetric_loss(cfg, site)]
        found += [missing_alpha(site)] if stats.kind == 'detection' else [focusing_of_positives(site)]
        # In a trained model most negatives are below the margin, as they should be.
        found += [] if cfg.get('load_from') else [margin_above_prior(site)]
        found += [coupled_weight_decay(cfg, site)]
    return [finding for finding in found if finding]


def empty_classes(stats: LabelStatistics) -> Finding | None:
    """Find classes without labels."""
    if not stats.empty:
        return None
    return Finding(
        f'{len(stats.empty)} of {len(stats.classes)} classes have no label: {", ".join(stats.empty)}',
        'train_dataloader.dataset.metainfo.classes',
        'the model only learns that such a class is absent, and its average precision is undefined',
        'remove the class from metainfo.classes and num_classes, or find out why its labels are missing')


def focusing_of_positives(site: LossSite) -> Finding | None:
    """Find gamma_pos > 0 in classification. Equal gammas are intended: they are the focal loss."""
    if type(site.module).__name__ != 'AsymmetricLoss' or site.setting is None:
        return None
    gamma_pos = site.setting.gamma_pos
    if gamma_pos == 0 or gamma_pos == site.setting.gamma_neg:
        return None
    return Finding(
        f'gamma_pos = {gamma_pos:g} in classification', f'{site.key}.gamma_pos',
        f'a positive at p = 0.5 keeps {0.5**gamma_pos:.0%} of its loss. The paper found 0 best (Fig. 6); the default '
        'of the official code is 1',
        'gamma_pos=0')


def margin_above_prior(site: LossSite) -> Finding | None:
    """Find a margin above the probability that most negatives start at."""
    clip = largest(getattr(site.module, 'clip', 0.))
    if not (clip > 0 and site.own and site.negatives and site.own.silent > site.negatives / 2):
        return None
    return Finding(
        f'{site.own.silent:,.0f} of {site.negatives:,.0f} negatives have no gradient: their median starts at p = '
        f'{site.prior:.2g}, below the margin of {clip:g}', f'{site.key}.clip',
        'a negative contributes nothing until its probability reaches the margin, and scores settle there',
        'clip=0, as in dense detectors; or a bias of the head that starts higher (it starts at logit '
        f'{log(site.prior) - log1p(-site.prior):.1f})')


def missing_alpha(site: LossSite) -> Finding | None:
    """Find an asymmetric loss that replaces a focal loss without its alpha. Heads with soft targets have none."""
    if not isinstance(site.module, AsymmetricLoss) or site.alpha is not None or site.form != 'labels' or (
            site.setting is None):
        return None
    gamma_pos = site.setting.gamma_pos
    if gamma_pos == site.setting.gamma_neg:
        return None
    low, high = (0.25**-1 * (1 - p)**(gamma_pos - 2) for p in (0.01, 0.5))
    return Finding(
        'alpha is None in detection', f'{site.key}.alpha',
        f'a positive has {low:.2g} (at p = 0.01) to {high:.2g} times (at p = 0.5) its weight in the focal loss with '
        'gamma 2 and alpha 0.25. This changes the balance with the box losses',
        'alpha=0.25')


def other_asymmetric_loss(cfg: Config, site: LossSite) -> Finding | None:
    """Find MMPretrain's own AsymmetricLoss, used without a scope."""
    if type(site.module).__name__ != 'AsymmetricLoss' or isinstance(site.module, AsymmetricLoss) or (
            loss_config(cfg, site).get('type') != 'AsymmetricLoss'):
        return None
    return Finding(
        "type='AsymmetricLoss' is MMPretrain's own class", f'{site.key}.type',
        'it computes wrong losses for soft labels (Mixup, CutMix), reads labels of shape (N, 1) as class indices, and '
        'gives NaN gradients for 0 < gamma_neg < 1 with a margin',
        "type='mmasl.AsymmetricLoss'")


def sigmoid_not_in_config(cfg: Config, site: LossSite) -> Finding | None:
    """Find a sigmoid loss of a detector whose config lacks use_sigmoid."""
    loss = loss_config(cfg, site)
    if not site.key.endswith('loss_cls') or 'type' not in loss or 'use_sigmoid' in loss or not getattr(
            site.module, 'use_sigmoid', False):
        return None
    return Finding(
        'the config of the loss has no use_sigmoid', f'{site.key}.use_sigmoid',
        'the head reads it from the config. Without it, the head assumes a softmax and adds a background channel '
        f'(predictions have {site.channels} channels)',
        'use_sigmoid=True in the dict')


def coupled_weight_decay(cfg: Config, site: LossSite) -> Finding | None:
    """Find Adam with coupled weight decay and an averaged loss. Adam hides the loss scale except from the decay."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or ConfigDict()
    decay = optimizer.get('weight_decay', 0)
    name = type_name(optimizer.get('type'))
    if name not in COUPLED or not decay or optimizer.get('decoupled_weight_decay'):
        return None
    if getattr(site.module, 'reduction', None) != 'mean' or not site.divisor or site.divisor <= 1:
        return None
    why = (f'{name} normalises the gradient, but adds weight_decay to it first. This loss is divided by '
           f"{site.divisor:g} (avg_factor): compared to reduction='sum' the same weight_decay is {site.divisor:g} "
           'times as strong')
    cross_entropy = site.settings.get(CROSS_ENTROPY)
    if cross_entropy and site.own and site.own.total > 0 and site.setting != CROSS_ENTROPY:
        scale = cross_entropy.total / site.own.total
        why += f', and compared to cross-entropy {scale:.3g} times, by the gradient of the first batches'
    hint = 'AdamW, whose decay does not depend on the loss'
    if cfg.get('default_scope') == 'mmpretrain':
        hint += (f'; for the decay of the official script (1e-4, loss summed over {OFFICIAL_BATCH} images) '
                 f'weight_decay={1e-4 / OFFICIAL_BATCH:.1g}')
    return Finding(f'weight_decay = {decay:g} of {name} depends on the scale of the loss', 'optim_wrapper.optimizer',
                   why, hint)


def normalisation_of_tresnet(cfg: Config) -> Finding | None:
    """Find a TResNet whose inputs are not in [0, 1]."""
    backbone = cfg.model.get('backbone') or {}
    name = str(backbone.get('model_name') or type_name(backbone.get('type')))
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    if 'tresnet' not in name.lower() or (not np.any(mean or 0) and np.allclose(std or 1, 255)):
        return None
    return Finding(
        f'{name} gets mean={mean}, std={std}', 'data_preprocessor',
        'TResNet was pretrained on RGB in [0, 1], and the paper trains with it (App. B)',
        'mean=[0., 0., 0.], std=[255., 255., 255.] and RGB (to_rgb=True in MMPretrain, bgr_to_rgb=True in MMDetection)')


def ema_longer_than_run(cfg: Config, batches_per_epoch: int) -> list[Finding]:
    """Find averages of weights that contain more than 5 % of the initial weights at the end of the run."""
    train, found = cfg.get('train_cfg') or {}, []
    iterations = train.get('max_iters') or (train.get('max_epochs') or 0) * batches_per_epoch
    hooks = {f'custom_hooks.{i}': hook for i, hook in enumerate(cfg.get('custom_hooks') or [])}
    hooks |= {f'default_hooks.{key}': hook for key, hook in (cfg.get('default_hooks') or {}).items()}
    for key, hook in hooks.items():
        if not hook or type_name(hook.get('type')) not in EMA_HOOKS or not iterations:
            continue
        late = max((hook.get('begin_epoch', 0) - 1) * batches_per_epoch, hook.get('begin_iter', 0) - 1, 0)
        options = {k: v for k, v in hook.items() if k in ('ema_type', 'momentum', 'gamma', 'interval')}
        horizon = hook.get('horizon')  # of mmasl.RelativeEMAHook, which has no momentum
        if horizon is not None:
            options['momentum'] = 1 / (1 + horizon * iterations)
        left = initial_share(iterations - late, **options)
        if left <= 0.05:
            continue
        updates = max(1, (iterations - late - 1) // hook.get('interval', 1))
        momentum = -np.expm1(log(0.01) / updates)
        if horizon is None:
            name, value, better = 'momentum', hook.get('momentum', 0.0002), momentum
        else:
            name, value, better = 'horizon', horizon, (1 / momentum - 1) / iterations
        found.append(Finding(
            f'the average contains {left:.0%} of the initial weights at the end of the run', f'{key}.{name}',
            f'{name} is {value:g} for {iterations - late:,} iterations. This share of the evaluated weights is not '
            'trained',
            f'{name}={better:.2g} leaves 1 %' + ('; or train longer' if horizon is None else '')))
    return found


def initial_share(iterations: int, ema_type: str = 'ExponentialMovingAverage', momentum: float = 0.0002,
                  gamma: float | None = None, interval: int = 1) -> float:
    """Compute the share of the first weights in an average of MMEngine after the last iteration.

    Args:
        iterations: Number of iterations with the average. The first one copies the weights.
        ema_type, momentum, gamma, interval: As in EMAHook, with the defaults of the averages.

    Returns:
        The share in [0, 1]; 0 for other averages.
    """
    step = np.arange(interval, iterations, interval)
    name = type_name(ema_type)
    if name == 'ExponentialMovingAverage':
        return exp(len(step) * log1p(-momentum))
    if name == 'MomentumAnnealingEMA':
        gamma = gamma or 100
        return exp(np.log1p(-np.maximum(momentum, gamma / (gamma + step))).sum())
    if name == 'ExpMomentumEMA':
        return exp(np.log1p(-((1 - momentum) * np.exp(-(1 + step) / (gamma or 2000)) + momentum)).sum())
    return 0.
