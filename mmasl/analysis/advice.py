"""Advice on the loss for a config and its training data, as paragraphs of Markdown.

Counts the labels, runs the first batches through the model on the CPU, suggests a setting and lists known problems.
"""
import math
import os.path as osp
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from mmengine.runner import Runner, load_state_dict
from torch import nn
from torch.utils.data import DataLoader

from mmasl.analysis.findings import CROSS_ENTROPY, find_problems
from mmasl.analysis.gradient import Setting
from mmasl.analysis.label_statistics import LabelStatistics, count_labels
from mmasl.analysis.loss_sites import GradientSums, LossSite, find_loss_sites, watch_losses
from mmasl.analysis.suggestion import LADDER, STARTS, Suggestion, suggest, write_config
from mmasl.errors import ConfigError
from mmasl.utils.checkpoint import read_checkpoint
from mmasl.utils.config import is_kind
from mmasl.utils.markdown import markdown_table
from mmasl.utils.pypi_weights import PREFIX, load_from_pypi
from mmasl.utils.tools import building_data

BARS = 12  # lines of the histogram at most
BAR_WIDTH = 40  # characters of the longest bar
NAMED_CLASSES = 5  # rarest and most frequent classes to name

Progress = Callable[[Iterable, str], Iterable]


def advise(cfg: Config, config: str, batches: int = 4, gpus: int = 1, plot: str | None = None,
           weights: tuple[str, dict[str, float]] | None = None,
           progress: Progress = lambda items, what: items) -> Iterator[str]:
    """Give advice on the loss of a config.

    Args:
        cfg: The config. Its training data loader must not use worker processes.
        config: Path of the config.
        batches: Number of training batches to run through the model.
        gpus: Number of GPUs of the planned run.
        plot: File for a plot of the labels of each class, .png, .svg or .pdf.
        weights: Kind and options of ``LabelStatistics.loss_weights`` to add to the suggestion; None for none.
        progress: Wraps slow loops. Its second argument describes the step.

    Yields:
        Paragraphs of the report.

    Raises:
        ConfigError: A head has another number of classes than the training data, or there are no such weights.
        DataError: See :func:`mmasl.analysis.label_statistics.count_labels`.
    """
    torch.manual_seed(0)
    with building_data(cfg):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    stats = count_labels(loader.dataset, progress)
    by_class = stats.loss_weights(weights[0], **weights[1]) if weights else {}
    yield f'## Data\n{describe_labels(stats)}'
    if plot:
        plot_labels(stats, plot)
        yield f'Plot: {plot}'

    model, notes = build_model(cfg)
    check_num_classes(model, stats)
    starts = () if stats.kind == 'detection' else STARTS
    sites = run_batches(model, loader, batches, [*LADDER.values(), *starts], progress)
    called = [site for site in sites if site.form]
    site = main_site(called, stats)
    suggestion = suggest(stats, site)
    yield '\n'.join([
        f'## Gradient of the first {min(batches, len(loader))} batches of {cfg.train_dataloader.batch_size} images',
        'Shares of the sum of |dL/dz| over the logits, for the initial model. They change during training.',
        *(f'Note: {note}.' for note in notes)])
    if site:
        yield describe_gradient(site, suggestion)
    others = [other for other in called if other is not site]
    if others:
        yield 'Other classification losses:\n' + '\n'.join(f'- {describe_site(other)}' for other in others)

    yield '## A setting to start from'
    if site is None:
        yield ('No classification loss with sigmoids was called (loss_cls of a detector, loss of a classifier). There '
               'is none to replace.')
    else:
        yield from describe_suggestion(cfg, config, stats, site, suggestion, by_class)
        if unused := [other.key for other in sites if not other.form]:
            yield f'Not called in these batches; replace them in the same way: {", ".join(unused)}.'
        yield describe_ladder(stats)

    findings = find_problems(cfg, stats, called, math.ceil(len(loader) / gpus))
    yield f'## Findings: {len(findings)}'
    for number, finding in enumerate(findings, 1):
        yield '\n'.join([f'{number}. {finding.what}', f'   where: {finding.where}', f'   why:   {finding.why}',
                         f'   hint:  {finding.hint}'])


# --- model and batches

def build_model(cfg: Config) -> tuple[nn.Module, list[str]]:
    """Build and initialise the model of a config without downloads.

    Args:
        cfg: The config. ``load_from`` is set to None if it is not a local file.

    Returns:
        The model, and a note for each weight file that is not used.
    """
    model_cfg = deepcopy(cfg.model)
    notes = [f'{key} is not a local file and was replaced by random weights' for key in drop_downloads(model_cfg)]
    model = MODELS.build(model_cfg)
    model.init_weights()
    if cfg.get('load_from'):
        if is_local(cfg.load_from):
            packaged = cfg.load_from.startswith(PREFIX)
            checkpoint = load_from_pypi(cfg.load_from) if packaged else read_checkpoint(cfg.load_from)
            load_state_dict(model, checkpoint.get('state_dict', checkpoint))
        else:
            notes.append(f'load_from = {cfg.load_from} is not a local file and was not loaded')
            cfg.load_from = None
    return model.train().requires_grad_(False), notes  # saves the memory of a backward pass


def is_local(checkpoint: str) -> bool:
    """Whether a checkpoint is a file or in an installed package."""
    return checkpoint.startswith(PREFIX) or osp.isfile(osp.expanduser(checkpoint))


def drop_downloads(model: dict | list, key: str = 'model') -> Iterator[str]:
    """Remove weights that are not local files from a model config, and yield their keys and values."""
    for name, value in list(model.items() if isinstance(model, dict) else enumerate(model)):
        if isinstance(value, dict) and is_kind(
                value.get('type'), PretrainedInit, WEIGHT_INITIALIZERS) and not is_local(value['checkpoint']):
            yield f"{key}.{name}.checkpoint = {value['checkpoint']}"
            model[name] = None
        elif name == 'pretrained' and value and not (isinstance(value, str) and osp.isfile(value)):
            yield f'{key}.{name} = {value}'
            model[name] = False if value is True else None
        elif isinstance(value, (dict, list)):
            yield from drop_downloads(value, f'{key}.{name}')
            if isinstance(value, list) and name == 'init_cfg':
                model[name] = [entry for entry in value if entry] or None


def check_num_classes(model: nn.Module, stats: LabelStatistics) -> None:
    """Raise a ConfigError if a head has another number of classes than the training data."""
    for name, module in model.named_modules():
        found = getattr(module, 'num_classes', None)
        if name.endswith('head') and isinstance(found, int) and found not in (1, len(stats.classes)):
            raise ConfigError(f'model.{name} has num_classes={found}, but the training data has {len(stats.classes)} '
                              'classes: change num_classes or metainfo.classes')


def run_batches(model: Any, loader: DataLoader, batches: int, settings: list[Setting],
                progress: Progress) -> list[LossSite]:
    """Watch the losses of a model during the first batches. A loss that was not called has ``form`` None."""
    sites = find_loss_sites(model)
    for key in ('epoch', 'iter'):  # TOOD and YOLOX read them
        MessageHub.get_current_instance().update_info(key, 0)
    data = iter(loader)
    for _ in progress(range(min(batches, len(loader))), 'batches'):
        with watch_losses(sites, settings):
            model(**model.data_preprocessor(next(data), True), mode='loss')
    return sites


def main_site(sites: list[LossSite], stats: LabelStatistics) -> LossSite | None:
    """The loss over the classes. A detector's softmax cannot be replaced, and a region proposal network has no classes.
    """
    fit = [site for site in sites if stats.kind != 'detection' or not site.softmax]
    return max((site for site in fit if len(sites) == 1 or 'rpn_head' not in site.key),
               key=lambda site: site.channels, default=None)


# --- the report

def describe_labels(stats: LabelStatistics) -> str:
    """Describe the training labels."""
    detection = stats.kind == 'detection'
    what = 'objects' if detection else 'labels'
    per_image = stats.per_image
    lines = [f'{stats.images:,} images, {len(stats.classes)} classes, {stats.kind}',
             (f'{what} per image: {per_image.mean():.3g} (from {per_image.min()} to {per_image.max()}; '
              f'{(per_image == 0).sum():,} images have none; {stats.ignored:,} {what} ignored)')]
    if not detection:
        lines += [f'negatives per positive: {_number(stats.negatives_per_positive())}'
                  + (' without the ignored' if stats.ignored else '')]
    lines += [(f'{what} per class: {_number(stats.counts.mean())}; most frequent over rarest: '
               f'{_number(stats.imbalance)}')]
    if len(stats.classes) > BARS:
        for title, order in (('most frequent', stats.order), ('rarest', stats.order[::-1])):
            names = ', '.join(f'{stats.classes[i]} {stats.counts[i]:,}' for i in order[:NAMED_CLASSES])
            lines += [f'  {title}: {names}']
    lines += [f'  classes without {what}: {len(stats.empty)}', '', _histogram(stats)]
    return '\n'.join(lines)


def _histogram(stats: LabelStatistics) -> str:
    """One bar per class, or one bar per range of counts if there are many classes."""
    few = len(stats.classes) <= BARS
    if few:
        names, values = list(stats.classes), stats.counts
    else:
        counts = stats.counts[stats.counts > 0]
        edges = np.unique(np.round(np.geomspace(counts.min(), counts.max() + 1, BARS)).astype(int))
        values = np.histogram(counts, edges)[0]
        names = [f'{low:,} to {high - 1:,}' for low, high in pairwise(edges)]
        if stats.empty:
            names, values = ['0', *names], np.insert(values, 0, len(stats.empty))
    width = max(map(len, names))
    bars = (math.ceil(BAR_WIDTH * value / values.max()) * '#' for value in values)
    title = [] if few else ['number of classes by count:']
    return '\n'.join([*title, *(f'{name:>{width}} {bar} {value:,}' for name, bar, value in zip(names, bars, values))])


def describe_site(site: LossSite) -> str:
    """Describe a loss and its calls."""
    ratio = site.negatives / site.positives if site.positives else math.inf
    text = (f'{site.key} ({type(site.module).__name__}{", softmax" if site.softmax else ""}): {site.positives:,} '
            f'positives, {site.negatives:,.0f} negatives ({_number(ratio)} per positive); the median negative starts '
            f'at p = {site.prior:.2g}')
    if site.weight_unannotated:
        text += f'; each label without annotation counts as {site.weight_unannotated:g} negatives'
    return f'{text}; positives have {site.own.share:.1%} of the gradient' if site.own else text


def describe_gradient(site: LossSite, suggestion: Suggestion) -> str:
    """Compare the gradient of the loss, of the author's ladder and of the suggestion."""
    names = {setting: name for name, setting in LADDER.items()}
    rung = suggestion.rung
    names[rung] = f'{names[rung]}, suggested below' if rung in names else 'suggested below'
    unit = site.settings[CROSS_ENTROPY].total
    sums: list[tuple[str, Setting | None, GradientSums]] = [
        (name, setting, site.settings[setting]) for setting, name in names.items()]
    if site.own:
        sums.insert(0, ('the config', site.setting, site.own))
    rows = [[name, setting or '', f'{found.share:.1%}', f'{100 * (1 - found.share):.2g}%',
             f'{found.silent / max(site.negatives, 1):.0%}', f'{found.total / unit:.3g}' if unit else '']
            for name, setting, found in sums]
    head = ['loss', '(gamma_pos, gamma_neg, clip)', 'positives', 'negatives', 'silent negatives', 'size']
    form = 'constant' if getattr(site.module, 'detach_focusing', False) else 'part of the gradient (Eq. 8)'
    return '\n'.join([
        describe_site(site),
        (f'Rows of the ladder have alpha = {site.alpha} and a focusing weight that is {form}. Silent negatives have no '
         'gradient. Size is the gradient relative to cross-entropy.'), '',
        markdown_table(rows, head, aligned=True)])


def describe_suggestion(cfg: Config, config: str, stats: LabelStatistics, site: LossSite, suggestion: Suggestion,
                        weights: dict[str, list[float]]) -> Iterator[str]:
    """Describe the suggestion, and write it as a config."""
    share = site.settings[suggestion.rung].share
    low_start = share > 0.99 and stats.kind != 'detection'
    yield '\n'.join([
        f'(gamma_pos, gamma_neg, clip) = {suggestion.setting}. A starting point, not a measured result:',
        *(f'- {reason}' for reason in suggestion.reasons),
        (f'In these batches positives have {share:.1%} of the gradient with this setting, and '
         f'{site.settings[CROSS_ENTROPY].share:.1%} with cross-entropy.'),
        *(['Negatives have almost no gradient at first because the head starts low, so all probabilities rise first.']
          if low_start else []),
        *(f'- {name}: {describe_weights(stats, values)}' for name, values in weights.items())])
    base = './' + osp.basename(config)
    yield f'```python\n{write_config(cfg, base, site, suggestion, weights)}\n```'


def describe_weights(stats: LabelStatistics, weights: list[float]) -> str:
    """Describe weights by class."""
    low, high = int(np.argmin(weights)), int(np.argmax(weights))
    empty = f'; a count of 0 counts as 1 ({len(stats.empty)} classes)' if stats.empty else ''
    return f'from {weights[low]:g} ({stats.classes[low]}) to {weights[high]:g} ({stats.classes[high]}){empty}'


def describe_ladder(stats: LabelStatistics) -> str:
    """Describe the ladder to compare the suggestion with."""
    ladder = ' -> '.join(f'{name} {setting}' for name, setting in LADDER.items())
    note = ('For detection, leave out the last rung: heads start below its margin.' if stats.kind == 'detection' else
            "The paper found gamma_pos = 0 better than 1 (Fig. 6). With AdamW, ASL's best rate was 0.6 to an eighth of "
            "cross-entropy's on photographs and digits (docs/choosing.md).")
    return (f"Compare it with the author's ladder, each rung at its best learning rate:\n{ladder}\n{note}\n"
            'Instead of a sweep, mmasl.AdaptiveAsymmetryHook(target=...) moves gamma_neg to a target probability gap.')


def plot_labels(stats: LabelStatistics, path: str) -> None:
    """Plot the number of labels of each class to a file."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    order = np.argsort(-stats.counts, kind='stable')
    counts, few = stats.counts[order], len(order) <= 50
    figure, axis = plt.subplots(figsize=(10, 4), layout='constrained')
    axis.bar(range(len(order)), counts, width=0.8 if few else 1)
    axis.set(ylabel='objects' if stats.kind == 'detection' else 'images', xlim=(-0.6, len(order) - 0.4),
             title=f'{counts.sum():,} labels of {len(order)} classes in {stats.images:,} images; most frequent over '
             f'rarest {stats.imbalance:.3g}; {len(stats.empty)} classes empty')
    if stats.imbalance > 10:
        axis.set_yscale('log')
    if few:
        axis.set_xticks(range(len(order)), [stats.classes[i] for i in order], rotation=90)
    else:
        axis.set_xlabel('classes in descending order of their counts')
    axis.grid(axis='y', alpha=0.3)
    axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
