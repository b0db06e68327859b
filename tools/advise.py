"""Say what a config and its training data ask of the loss, before a GPU hour is spent: labels, the gradient of the
first batches, a setting to start from, and known mistakes. Runs on the CPU and downloads nothing."""
import argparse
import logging
import math
import os.path as osp
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmasl.analysis import advice
from mmasl.analysis.advice import LADDER, LabelStats, LossSite, Setting, Suggestion
from mmasl.utils.tools import check_data, load_config, parse_args, set_dataloader_defaults

BARS = 12  # lines of the histogram
WIDTH = 40  # of its longest bar
NAMES = 5  # rarest and commonest classes to name


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--batches', type=int, default=4, help='batches of training data to look at (default: 4)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs of the planned run (default: 1)')
    parser.add_argument('--plot', metavar='FILE', help='draw the labels of each class (.png, .svg, .pdf)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in train_dataloader.batch_size=8')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config, made fit for a look at it on the CPU."""
    for flag in ('batches', 'gpus'):
        if getattr(args, flag) < 1:
            raise SystemExit(f'--{flag} {getattr(args, flag)}: at least 1 is needed')
    if args.plot and not args.plot.endswith(('.png', '.svg', '.pdf')):
        raise SystemExit(f'--plot {args.plot}: pictures are written to .png, .svg or .pdf')
    cfg = load_config(args)
    for key in ('model', 'train_dataloader'):
        if not cfg.get(key):
            raise SystemExit(f'{args.config} has no {key}')
    check_data(cfg, 'train')
    set_dataloader_defaults(cfg, 'train')
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, pin_memory=False)
    cfg.train_dataloader.pop('prefetch_factor', None)
    if 'data_preprocessor' in cfg:  # as MMEngine's Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """End in a message where a part of the config does not work."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, IndexError, KeyError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        raise SystemExit(f'{what}: {type(error).__name__}: {error}') from error


def drop_downloads(model: dict | list, key: str = 'model') -> Iterator[str]:
    """Take weights that are no local file out of a model's config; yields what they were."""
    for name, value in list(model.items() if isinstance(model, dict) else enumerate(model)):
        if isinstance(value, dict) and value.get('type') == 'Pretrained' and not osp.isfile(
                osp.expanduser(value['checkpoint'])):
            yield f"{key}.{name}.checkpoint = {value['checkpoint']}"
            model[name] = None
        elif name == 'pretrained' and value and not (isinstance(value, str) and osp.isfile(value)):
            yield f'{key}.{name} = {value}'
            model[name] = False if value is True else None
        elif isinstance(value, (dict, list)):
            yield from drop_downloads(value, f'{key}.{name}')
            if isinstance(value, list) and name == 'init_cfg':
                model[name] = [entry for entry in value if entry] or None


def build_model(cfg: Config, notes: list[str]) -> torch.nn.Module:
    """The model as a training would start with it, but for weights that would have to be downloaded."""
    model_cfg = deepcopy(cfg.model)
    notes += [f'{dropped} is no local file: random weights instead' for dropped in drop_downloads(model_cfg)]
    with user_errors('The model cannot be built'):
        model = MODELS.build(model_cfg)
        model.init_weights()
    if cfg.get('load_from'):
        if osp.isfile(cfg.load_from):
            with user_errors('load_from cannot be loaded'):
                load_checkpoint(model, cfg.load_from, map_location='cpu')
        else:
            notes.append(f'load_from = {cfg.load_from} is no local file: left out')
            cfg.load_from = None
    return model.train().requires_grad_(False)  # no memory for a backward pass


def check_num_classes(model: torch.nn.Module, stats: LabelStats) -> None:
    for name, module in model.named_modules():
        found = getattr(module, 'num_classes', None)
        if name.endswith('head') and isinstance(found, int) and found not in (1, len(stats.classes)):
            raise SystemExit(f'model.{name} has num_classes={found}, but the training data has {len(stats.classes)} '
                             'classes: set num_classes, or metainfo.classes of the data')


def look(model: Any, loader: DataLoader, batches: int, settings: list[Setting]) -> list[LossSite]:
    """The model's losses after the first batches. Those that were not called have no form."""
    sites = advice.find_losses(model)
    for key in ('epoch', 'iter'):  # TOOD and YOLOX read them
        MessageHub.get_current_instance().update_info(key, 0)
    with user_errors('The first batches do not go through the model'):
        data = iter(loader)
        for _ in tqdm(range(min(batches, len(loader))), desc='batches', unit='batch'):
            with advice.watch_losses(sites, settings):
                model(**model.data_preprocessor(next(data), True), mode='loss')
    return sites


# --- the report

def render_table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, with the columns aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ['-' * width for width in widths], *rows]
    return '\n'.join('| ' + ' | '.join(
        cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))) + ' |'
        for line in lines)


def number(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def render_labels(stats: LabelStats) -> str:
    detection = stats.kind == 'detection'
    what = 'objects' if detection else 'labels'
    per_image = stats.per_image
    lines = [f'{stats.images:,} images, {len(stats.classes)} classes, {stats.kind}',
             (f'{what} per image: {per_image.mean():.3g} (from {per_image.min()} to {per_image.max()}; '
              f'{(per_image == 0).sum():,} images without any; {stats.ignored:,} {what} ignored)')]
    if not detection:
        lines += [f'negatives per positive: {number(stats.negatives_per_positive())}'
                  + (' without the ignored' if stats.ignored else '')]
    rarest = stats.order[::-1]
    lines += [f'{what} per class: {number(stats.counts.mean())}, commonest over rarest: {number(stats.imbalance)}']
    if len(stats.classes) > BARS:
        for title, order in (('commonest', stats.order), ('rarest', rarest)):
            lines += [f'  {title}: ' + ', '.join(f'{stats.classes[i]} {stats.counts[i]:,}' for i in order[:NAMES])]
    lines += [f'  without any: {len(stats.empty)} classes', '', render_histogram(stats)]
    return '\n'.join(lines)


def render_histogram(stats: LabelStats) -> str:
    """A bar a class, or a bar a range of counts where there are many classes."""
    if len(stats.classes) <= BARS:
        names, values = list(stats.classes), stats.counts
    else:
        counts = stats.counts[stats.counts > 0]
        edges = np.unique(np.round(np.geomspace(counts.min(), counts.max() + 1, BARS)).astype(int))
        values = np.histogram(counts, edges)[0]
        names = [f'{low:,} to {high - 1:,}' for low, high in pairwise(edges)]
        if stats.empty:
            names, values = ['0', *names], np.insert(values, 0, len(stats.empty))
    width = max(map(len, names))
    bars = (math.ceil(WIDTH * value / values.max()) * '#' for value in values)
    title = [] if len(stats.classes) <= BARS else ['classes with so many:']
    return '\n'.join([*title, *(f'{name:>{width}} {bar} {value:,}' for name, bar, value in zip(names, bars, values))])


def name_setting(setting: Setting | None) -> str:
    return '(' + ', '.join(f'{value:g}' for value in setting) + ')' if setting else ''


def summarise(site: LossSite) -> str:
    ratio = site.negatives / site.positives if site.positives else math.inf
    text = (f'{site.key} ({type(site.module).__name__}{", on a softmax" if site.softmax else ""}): {site.positives:,} '
            f'positives, {site.negatives:,.0f} negatives ({number(ratio)} per positive), whose median starts at p = '
            f'{site.prior:.2g}')
    if site.weight_unannotated:
        text += f'; each label without annotation is {site.weight_unannotated:g} negatives'
    return f'{text}; positives have {site.own.share:.1%} of the gradient' if site.own else text


def render_gradient(site: LossSite, suggestion: Suggestion) -> str:
    """Shares of the gradient, for the loss as it is, the author's ladder and the suggestion."""
    names: dict[Setting, str] = {setting: name for name, setting in LADDER.items()}
    if suggestion.setting not in names:
        names[suggestion.setting] = 'suggested below'
    else:
        names[suggestion.setting] += ', suggested below'
    unit = site.settings[0, 0, 0].total
    gradients: list[tuple[str, Setting | None, advice.Gradient]] = [
        (name, setting, site.settings[setting]) for setting, name in names.items()]
    if site.own:
        gradients.insert(0, ('the config', site.setting, site.own))
    rows = [[name, name_setting(setting), f'{gradient.share:.1%}', f'{100 * (1 - gradient.share):.2g}%',
             f'{gradient.silent / max(site.negatives, 1):.0%}', f'{gradient.total / unit:.3g}' if unit else '']
            for name, setting, gradient in gradients]
    head = ['loss', '(gamma_neg, gamma_pos, clip)', 'positives', 'negatives', 'silent negatives', 'size']
    form = 'held constant' if getattr(site.module, 'detach_focusing', False) else 'differentiated, Eq. 8'
    return '\n'.join([
        summarise(site),
        (f'alpha = {site.alpha} in the rows of the ladder; focusing weight {form}. Silent: without any gradient. '
         'Size: of the gradient, against cross-entropy.'), '',
        render_table(head, rows)])


def main_site(sites: list[LossSite], stats: LabelStats) -> LossSite | None:
    """The loss over the classes; a softmax in a detector is none to replace, and a proposal network has no classes."""
    fit = [site for site in sites if stats.kind != 'detection' or not site.softmax]
    return max((site for site in fit if len(sites) == 1 or 'rpn_head' not in site.key),
               key=lambda site: site.channels, default=None)


def plot_labels(stats: LabelStats, path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('--plot needs matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    order = np.argsort(-stats.counts, kind='stable')
    counts, few = stats.counts[order], len(order) <= 50
    figure, axis = plt.subplots(figsize=(10, 4), layout='constrained')
    axis.bar(range(len(order)), counts, width=0.8 if few else 1)
    axis.set(ylabel='objects' if stats.kind == 'detection' else 'images', xlim=(-0.6, len(order) - 0.4),
             title=f'{counts.sum():,} labels of {len(order)} classes in {stats.images:,} images; commonest over rarest '
             f'{stats.imbalance:.3g}; {len(stats.empty)} empty')
    if stats.imbalance > 10:
        axis.set_yscale('log')
    if few:
        axis.set_xticks(range(len(order)), [stats.classes[i] for i in order], rotation=90)
    else:
        axis.set_xlabel('class, the commonest first')
    axis.grid(axis='y', alpha=0.3)
    axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def advise(cfg: Config, args: argparse.Namespace) -> Iterator[str]:
    """The paragraphs of the report."""
    notes: list[str] = []
    torch.manual_seed(0)
    with user_errors('The training data cannot be read'):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        stats = advice.count_labels(loader.dataset, partial(tqdm, desc='labels', unit='img', unit_scale=True))
    yield f'## Data\n{render_labels(stats)}'
    if args.plot:
        plot_labels(stats, args.plot)
        yield f'Drawn: {args.plot}'

    model = build_model(cfg, notes)
    check_num_classes(model, stats)
    starts = () if stats.kind == 'detection' else advice.STARTS
    sites = look(model, loader, args.batches, [*LADDER.values(), *starts])
    asleep, sites = [site for site in sites if not site.form], [site for site in sites if site.form]
    site = main_site(sites, stats)
    suggestion = advice.suggest(stats, site)
    batches = min(args.batches, len(loader))
    yield '\n'.join([
        f'## Gradient of the first {batches} batches of {cfg.train_dataloader.batch_size} images',
        'Shares of the sum of |dL/dz| over the logits, at the model as it is initialised; they move while it learns.',
        *(f'Note: {note}.' for note in notes)])
    if site:
        yield render_gradient(site, suggestion)
    others = [each for each in sites if each is not site]
    if others:
        yield 'The other classification losses:\n' + '\n'.join(f'- {summarise(each)}' for each in others)

    yield '## A setting to start from'
    if site is None:
        yield ('No loss over the classes that is on sigmoids was called (loss_cls of a detector, loss of a '
               'classifier): there is none to replace.')
    else:
        share = site.settings[suggestion.setting].share
        yield '\n'.join([
            f'(gamma_neg, gamma_pos, clip) = {name_setting(suggestion.setting)}. A starting point, not a result:',
            *(f'- {reason}' for reason in suggestion.reasons),
            (f'On these batches positives have {share:.1%} of the gradient with it, '
             f'{site.settings[0, 0, 0].share:.1%} with cross-entropy.'),
            *(['Negatives then start with next to none, so that all probabilities rise first: the head starts low.']
              if share > 0.99 and stats.kind != 'detection' else [])])
        base = './' + osp.basename(args.config)
        yield f'```python\n{advice.write_config(cfg, base, site, suggestion)}\n```'
        if asleep:
            yield f'Not called in these batches, to be replaced alike: {", ".join(each.key for each in asleep)}.'
        ladder = ' -> '.join(f'{name} {name_setting(setting)}' for name, setting in LADDER.items())
        yield (f'Check it with the ladder of the author, each rung at its best learning rate:\n{ladder}\n'
               + ('In detection without the last rung: its margin lies above where a head starts.'
                  if stats.kind == 'detection' else 'The paper itself found gamma_pos = 0 better than 1 (Fig. 6).')
               + '\nInstead of a sweep, mmasl.AdaptiveAsymmetryHook(target=...) moves gamma_neg to a probability gap.')

    mistakes = advice.find_mistakes(cfg, stats, sites, math.ceil(len(loader) / args.gpus))
    yield f'## Warnings: {len(mistakes)}'
    for number, mistake in enumerate(mistakes, 1):
        yield '\n'.join([f'{number}. {mistake.what}', f'   where: {mistake.where}', f'   why:   {mistake.why}',
                         f'   cure:  {mistake.cure}'])


def main() -> None:
    args = parse_args(build_parser())
    cfg = configure(args)
    logging.disable(logging.WARNING)  # of initialisation, parameter by parameter; empty classes are reported here
    report = sys.stdout
    # What the libraries print is progress, not report.
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')), redirect_stdout(sys.stderr):
        for paragraph in advise(cfg, args):
            print(paragraph, end='\n\n', file=report, flush=True)


if __name__ == '__main__':
    main()
