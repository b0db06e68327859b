"""Draw the loss and the normalised gradient over the probability (Fig. 2 and 3 of arXiv 2009.14119) and print Table 1.

Without settings these are the paper's figures, for gamma 2 and margin 0.2. The curves start with cross-entropy; the
regimes that are marked are the last curve's. Every sign of the table is measured on the gradient (mmasl/analysis/gradient.py).
"""
import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from mmengine.config import Config

from mmasl.analysis.gradient import Setting, analyse, loss_and_gradient
from mmasl.utils.tools import require_file

CE = Setting(0, 0, 0)
FIGURE_2 = [CE, Setting(2, 2, 0), Setting(2, 2, 0.2)]
FIGURE_3 = [CE, Setting(0, 2, 0), Setting(0, 0, 0.2), Setting(0, 2, 0.2)]
FORMS = {False: 'Eq. 8', True: 'constant weight'}

# Okabe and Ito's colours, which colour-blind readers can tell apart, and dashes for readers without colour.
STYLES = [('black', (2, 2)), ('#0072B2', (6, 2)), ('#E69F00', (4, 1, 1, 1)), ('#D55E00', ()), ('#009E73', (8, 1, 2, 1)),
          ('#CC79A7', (3, 1)), ('#56B4E9', (1, 1))]
SHADES = {'hard threshold': '#dfe6ee', 'soft threshold': '#ffffff', 'mislabelled': '#f7e3da'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--setting', type=parse_setting, action='append', default=[],
                        metavar='[GAMMA_POS,]GAMMA_NEG,CLIP', help='a curve beside cross-entropy, as in 4,0.05 or '
                        '1,4,0.05 (gamma_pos is 0 where it is left out); may be repeated')
    parser.add_argument('--config', help='draw every mmasl.AsymmetricLoss of this config file')
    parser.add_argument('--detach-focusing', choices=('False', 'True', 'both'),
                        help='gradient through the focusing weight (False, Eq. 8), or with the weight constant '
                        "(default: the config's, and False for a setting)")
    parser.add_argument('--positives', action='store_true', help='draw positives below negatives')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/plot_loss'),
                        help='folder for loss.svg and gradient.svg, or one file for both, .svg or .png (default: '
                        '%(default)s)')
    return parser.parse_args(argv)


def parse_setting(text: str) -> Setting:
    try:
        numbers = [float(number) for number in text.split(',')]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3):
        raise argparse.ArgumentTypeError(f'{text!r} must be GAMMA_NEG,CLIP or GAMMA_POS,GAMMA_NEG,CLIP, as in 4,0.05')
    try:
        gamma_pos, gamma_neg, clip = [0.] * (3 - len(numbers)) + numbers
        return Setting(gamma_pos, gamma_neg, clip)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text}: {error}') from None


def settings_of(config: str) -> list[Setting]:
    """Every mmasl.AsymmetricLoss in a config."""
    require_file(config, 'config')
    settings = []
    for key, loss in find_losses(Config.fromfile(config).to_dict()):
        try:
            settings.append(Setting(**{f.name: loss[f.name] for f in fields(Setting) if f.name in loss}))
        except ValueError as error:
            raise SystemExit(f'{config}, {key}: {error}') from None
    if not settings:
        raise SystemExit(f"{config} has no loss of type='mmasl.AsymmetricLoss' (with the scope): give another config, "
                         'or --setting')
    return settings


def find_losses(node: object, key: str = '') -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if node.get('type') == 'mmasl.AsymmetricLoss':
            yield key, node
        for name, inner in node.items():
            yield from find_losses(inner, f'{key}.{name}'.lstrip('.'))
    elif isinstance(node, (list, tuple)):
        for number, inner in enumerate(node):
            yield from find_losses(inner, f'{key}.{number}')


def with_forms(settings: Sequence[Setting], form: str | None) -> dict[bool, list[Setting]]:
    """The settings of each gradient form, cross-entropy first in each."""
    if form is None:
        groups = {detach: [s for s in settings if s.detach_focusing == detach] for detach in FORMS}
    else:
        groups = {detach: list(settings) for detach in FORMS if form in (str(detach), 'both')}
    return {detach: list(dict.fromkeys(replace(s, detach_focusing=detach) for s in (CE, *group)))
            for detach, group in groups.items() if group}


def render_table(settings: Sequence[Setting]) -> str:
    """Table 1 of the paper for any settings, as Markdown, with the measured value beside each sign."""
    lines = [('| loss | gamma_pos, gamma_neg, clip | gradient | hard threshold | soft threshold | discard mislabelled '
              '| continuous gradient | largest gradient | p* |'), '|---|---|---|---|---|---|---|---|---|']
    for s in settings:
        found = analyse(s)
        cells = [s.name, f'{s.gamma_pos:g}, {s.gamma_neg:g}, {s.clip:g}', FORMS[s.detach_focusing],
                 f'+ (0 for p < {found.threshold:.3g})' if found.hard_threshold else '-',
                 f'+ (order {found.order:.2f})' if found.soft_threshold else '-',
                 f'{"+" if found.discards_mislabelled else "-"} ({found.remaining:.0%} left)',
                 '+' if found.continuous else f'- (jump of {found.jump:.0%})',
                 f'{found.peak:.3f}', 'none' if found.p_star is None else f'{found.p_star:.3f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw_loss(axes: Axes, settings: Sequence[Setting], positive: bool) -> None:
    """Fig. 2: the loss of one label over its probability."""
    for label, setting, style in curves(settings, positive):
        p = probabilities(setting)
        axes.plot(p, loss_and_gradient(p, setting, positive)[0], label=label, **style)
    axes.set_ylim(0, 3)
    finish(axes, f'loss of {"positives" if positive else "negatives"}', 'loss')


def draw_gradient(axes: Axes, settings: Sequence[Setting], positive: bool) -> None:
    """Fig. 3: |dL/dz| of one label over its probability, each curve divided by its largest value."""
    for label, setting, style in curves(settings, positive):
        p = probabilities(setting)
        gradient = loss_and_gradient(p, setting, positive)[1].abs()
        p_star = None if positive else analyse(setting).p_star
        mark = ''
        if p_star is not None:
            mark = f', $p^* = {p_star:.3f}$'
            axes.plot(p_star, 1, 'o', color=style['color'], markersize=5, zorder=3, clip_on=False)
        axes.plot(p, gradient / gradient.max(), label=label + mark, **style)
    if not positive:
        mark_regimes(axes, settings[-1])
    axes.set_ylim(0, 1.04)
    side, form = 'positives' if positive else 'negatives', FORMS[settings[-1].detach_focusing]
    finish(axes, f'gradient of {side}, {form}', '|dL/dz| / maximum')


def mark_regimes(axes: Axes, setting: Setting) -> None:
    """The three regimes of a setting as shades of the background, named above it."""
    for name, (low, high) in analyse(setting).regimes.items():
        axes.axvspan(low, high, color=SHADES[name], zorder=0, linewidth=0)
        axes.text((low + high) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha='center', va='bottom')


def finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set(xlabel='probability p', ylabel=ylabel, xlim=(0, 1))
    axes.set_title(title, pad=20)
    axes.grid(alpha=0.3)
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), frameon=False)


def curves(settings: Sequence[Setting], positive: bool) -> Iterator[tuple[str, Setting, dict]]:
    """Label, setting and line style of every curve; settings that share a curve share its label."""
    shared: dict[tuple, list[Setting]] = {}
    for s in settings:
        shared.setdefault((s.gamma_pos, s.alpha) if positive else (s.gamma_neg, s.clip, s.alpha), []).append(s)
    for number, group in enumerate(shared.values()):
        s, (color, dashes) = group[0], STYLES[number % len(STYLES)]
        values = {r'\gamma_+': s.gamma_pos} if positive else {r'\gamma_-': s.gamma_neg, 'm': s.clip}
        values = {symbol: value for symbol, value in {**values, r'\alpha': s.alpha}.items() if value}
        label = ', '.join([*dict.fromkeys(s.name for s in group), *(f'${k} = {v:g}$' for k, v in values.items())])
        yield label, s, dict(color=color, dashes=dashes, linewidth=1.8)


def probabilities(setting: Setting) -> torch.Tensor:
    """Points from 0 to 1, with two that make the jump at the margin upright and some more close to 1."""
    points = torch.cat([torch.linspace(0, 1, 301, dtype=torch.float64),
                        1 - torch.logspace(-6, -2, 20, dtype=torch.float64),
                        torch.tensor([setting.clip - 1e-9, setting.clip + 1e-9], dtype=torch.float64)]).sort().values
    return points[(points > 0) & (points < 1)]


def save(panels: Sequence[tuple], positives: bool, path: Path) -> None:
    """One figure of (draw, settings) panels: a row of negatives, and on request one of positives."""
    with plt.rc_context({'font.size': 9, 'axes.titlesize': 10, 'svg.hashsalt': 'mmasl'}):
        size = (4.8 * len(panels), 4.6 * (1 + positives))
        figure, axes = plt.subplots(1 + positives, len(panels), figsize=size, layout='constrained', squeeze=False)
        for positive, row in enumerate(axes):
            for axis, (draw, settings) in zip(row, panels):
                draw(axis, settings, bool(positive))
        # Without date and version the same figure is the same file.
        metadata = dict(Date=None, Creator=None) if path.suffix == '.svg' else None
        figure.savefig(path, dpi=110, metadata=metadata)
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out.suffix not in ('', '.svg', '.png'):
        raise SystemExit(f'--out {args.out}: a picture ends in .svg or .png, a folder has no ending')
    settings = args.setting + (settings_of(args.config) if args.config else [])
    groups = with_forms(settings or FIGURE_3, args.detach_focusing)
    values = list(dict.fromkeys(replace(s, detach_focusing=False) for s in [CE, *settings])) if settings else FIGURE_2
    try:
        print(render_table([s for group in groups.values() for s in group]))
    except ValueError as error:
        raise SystemExit(str(error)) from None

    losses = [(draw_loss, values)]
    gradients = [(draw_gradient, group) for group in groups.values()]
    folder = args.out.parent if args.out.suffix else args.out
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {args.out: losses + gradients} if args.out.suffix else {
        folder / 'loss.svg': losses, folder / 'gradient.svg': gradients}
    for path, panels in pictures.items():
        save(panels, args.positives, path)
    print(f'\nFigures: {", ".join(map(str, pictures))}')


if __name__ == '__main__':
    main()
