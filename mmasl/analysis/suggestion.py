"""Suggests a setting of the loss for a training set: the paper's setting for the most similar data."""
import textwrap
from dataclasses import dataclass, replace

from mmengine.config import Config

from mmasl.analysis.gradient import Setting
from mmasl.analysis.label_statistics import LabelStatistics
from mmasl.analysis.loss_sites import LossSite, quality_settings

# The author's order for new data (issue 22 of the official repository).
LADDER = {
    'cross-entropy': Setting(0, 0, 0),
    'focal loss': Setting(2, 2, 0),
    'asymmetric': Setting(1, 2, 0),
    'more asymmetric': Setting(1, 4, 0),
    'with a margin': Setting(1, 4, 0.05)}
# All suggestions for a classifier. The suggestion for a detector is the third rung.
STARTS = (Setting(0, 2, 0), Setting(0, 4, 0.05), Setting(0, 4, 0), Setting(0, 7, 0.05), Setting(0, 7, 0))
# Bounds in negatives per positive, chosen here. COCO has 27. Open Images annotates about one label in a thousand. With
# a weight of 0.1 for the others, it has 100 negatives per annotated label, and more per positive.
EXTREME = 100
MILD = 5  # VOC's 13 are the fewest in the paper


@dataclass(frozen=True)
class Suggestion:
    """A suggested setting with its reasons."""
    setting: Setting
    reasons: tuple[str, ...]

    @property
    def rung(self) -> Setting:
        """The setting as the ladder and :class:`LossSite` have it: without alpha."""
        return replace(self.setting, alpha=None)


def suggest(stats: LabelStatistics, site: LossSite | None) -> Suggestion:
    """Suggest the paper's setting for the most similar data.

    Args:
        stats: Labels of the training set.
        site: The loss after some calls, for the probability that negatives start at and the weight of labels without
            annotation; None if unknown.
    """
    if stats.kind == 'detection':
        alpha = site.alpha if site and site.alpha is not None else 0.25 if site and site.form == 'labels' else None
        reasons = [('detection: App. H of the paper, gamma_pos = 1 and gamma_neg = 2; no margin, because dense heads '
                    'start below it')]
        if alpha is not None:
            reasons.append(f'alpha = {alpha:g} as in the focal loss: reproduce the focal loss first, then change only '
                           "the gammas (the author's advice)")
        quality = quality_settings(site.module) if site else {}
        if quality:
            reasons.append(f"gamma_pos = {quality['gamma_pos']:g} and soft_label = '{quality['soft_label']}': labelled "
                           'entries keep the loss of their quality. Reproduce it first, then raise gamma_neg')
        return Suggestion(Setting(quality.get('gamma_pos', 1), 2, 0, alpha), tuple(reasons))

    weight = site.weight_unannotated if site else 0.
    ratio = stats.negatives_per_positive(weight)
    if stats.kind == 'single-label' or (site and site.softmax):
        setting, reason = Setting(0, 4, 0.05), 'App. G, one label out of 32,000, with sigmoids instead of a softmax'
    elif ratio >= EXTREME:
        setting, reason = Setting(0, 7, 0.05), f'App. F, Open Images; used here from {EXTREME} negatives per positive'
    elif ratio >= MILD:
        setting, reason = Setting(0, 4, 0.05), 'App. B; the paper uses it from 13 (VOC) to 27 (COCO)'
    else:
        setting, reason = Setting(0, 2, 0), f'below {MILD}, less than any data of the paper; mild focusing is a guess'
    counted = f', where a label without annotation counts as {weight:g}' if weight and stats.ignored else ''
    reasons = [f'{stats.kind}, {ratio:.3g} negatives per positive{counted}: {reason}',
               'gamma_pos = 0: the best value in Fig. 6; positives keep their whole gradient']
    if setting.clip and site and site.prior <= setting.clip:
        reasons.append(f'no margin: the median negative starts at p = {site.prior:.2g} and would get no gradient with '
                       f'a margin of {setting.clip:g}')
        setting = replace(setting, clip=0)
    return Suggestion(setting, tuple(reasons))


def write_config(cfg: Config, base: str, site: LossSite, suggestion: Suggestion,
                 weights: dict[str, list[float]] | None = None, detach_focusing: bool | None = None) -> str:
    """Write a config that inherits from ``base`` and has the suggested loss.

    Other settings of the replaced loss are kept: its weights and reduction, probabilities as input, the treatment of
    labels without annotation, and the loss of labelled entries with a quality.

    Args:
        cfg: The config.
        base: Path of the config as the new one inherits it.
        site: The loss to replace.
        suggestion: The setting.
        weights: Weights by class, by the name of their argument. They replace those of the replaced loss.
        detach_focusing: That of the new loss. None keeps that of the replaced loss.
    """
    place, old = site.key.split('.'), loss_config(cfg, site)
    setting = suggestion.setting
    loss = dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=float(setting.gamma_pos),
                gamma_neg=float(setting.gamma_neg), clip=float(setting.clip))
    loss |= quality_settings(site.module)
    if setting.alpha is not None:
        loss['alpha'] = setting.alpha
    loss |= {key: old[key] for key in ('activated', 'loss_weight') if key in old}
    if type_name(old.get('type')) == 'AsymmetricLoss':
        loss |= {key: old[key] for key in ('class_weight', 'pos_weight', 'detach_focusing', 'reduction', 'ignore_index',
                                           'weight_unannotated', 'gamma_unannotated') if key in old}
        loss |= {key: old[key] for key in ('alpha', ) if key in loss and key in old}
    if detach_focusing is not None:
        loss['detach_focusing'] = detach_focusing
    if weights:
        loss = {key: value for key, value in loss.items() if key not in ('class_weight', 'pos_weight')} | weights
    imports = list((cfg.get('custom_imports') or {}).get('imports', []))
    imports += [] if 'mmasl' in imports else ['mmasl']
    if any(key.isdigit() for key in place):
        return (f'# Configs replace a list as a whole. Use this in each of its entries, as in {site.key}:\n'
                f'{place[-1]}={_format(loss)}')
    if old:  # MMEngine accepts _delete_ only if there is something to delete
        loss = dict(_delete_=True) | loss
    for key in reversed(place[1:]):
        loss = {key: loss}
    return '\n'.join([f'_base_ = {base!r}', f'custom_imports = dict(imports={imports}, allow_failed_imports=False)',
                      f'{place[0]} = {_format(loss)}'])


def loss_config(cfg: Config, site: LossSite) -> dict:
    """The dict of the config that the loss was built from; empty if the head's default was used."""
    value = cfg
    for key in site.key.split('.'):
        if isinstance(value, (list, tuple)):
            value = value[int(key)] if key.isdigit() and int(key) < len(value) else {}
        else:
            value = value.get(key) or {} if hasattr(value, 'get') else {}
    return value if isinstance(value, dict) else {}


def type_name(kind: str | type | None) -> str:
    """Name of a ``type`` of a config, without its scope."""
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def _format(value: object, depth: int = 1) -> str:
    """Format a dict as configs do, with one key per line, and a list in lines of at most 90 characters."""
    if isinstance(value, list):  # of numbers
        return textwrap.fill(repr(value), 90, subsequent_indent=4 * depth * ' ')
    if not isinstance(value, dict):
        return repr(value)
    lines = (f'{4 * depth * " "}{key}={_format(inner, depth + 1)}' for key, inner in value.items())
    return 'dict(\n' + ',\n'.join(lines) + ')'
