"""Plots of the loss and its gradient over the probability (Fig. 2 and 3 of arXiv 2009.14119), and Table 1."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from mmasl.analysis.gradient import Setting, analyse_gradient, loss_and_gradient
from mmasl.utils.markdown import markdown_table

CE = Setting(0, 0, 0)
FIGURE_2 = [CE, Setting(2, 2, 0), Setting(2, 2, 0.2)]
FIGURE_3 = [CE, Setting(0, 2, 0), Setting(0, 0, 0.2), Setting(0, 2, 0.2)]
FORMS = {False: 'Eq. 8', True: 'constant weight'}
COLUMNS = ('loss', 'gamma_pos, gamma_neg, clip', 'gradient', 'hard threshold', 'soft threshold', 'discard mislabelled',
           'continuous gradient', 'largest gradient', 'p*')

# Colours of Okabe and Ito, for colour-blind readers, and dashes for readers without colour.
STYLES = [('black', (2, 2)), ('#0072B2', (6, 2)), ('#E69F00', (4, 1, 1, 1)), ('#D55E00', ()), ('#009E73', (8, 1, 2, 1)),
          ('#CC79A7', (3, 1)), ('#56B4E9', (1, 1))]
SHADES = {'hard threshold': '#dfe6ee', 'soft threshold': '#ffffff', 'mislabelled': '#f7e3da'}

Panel = tuple[Callable[[Axes, Sequence[Setting], bool], None], Sequence[Setting]]


def group_by_form(settings: Sequence[Setting], form: str | None) -> dict[bool, list[Setting]]:
    """Group settings by the form of their gradient, each group after cross-entropy.

    Args:
        settings: The settings.
        form: 'False' or 'True' to replace ``detach_focusing`` of all settings, 'both' for both forms, None to keep it.

    Returns:
        Settings by ``detach_focusing``, without duplicates.
    """
    if form is None:
        groups = {detach: [s for s in settings if s.detach_focusing == detach] for detach in FORMS}
    else:
        groups = {detach: list(settings) for detach in FORMS if form in (str(detach), 'both')}
    return {detach: list(dict.fromkeys(replace(s, detach_focusing=detach) for s in (CE, *group)))
            for detach, group in groups.items() if group}


def render_table(settings: Sequence[Setting]) -> str:
    """Format Table 1 of the paper for any settings as Markdown, with a value beside each sign.

    Raises:
        ConfigError: A setting has no gradient at any negative.
    """
    rows = []
    for s in settings:
        found = analyse_gradient(s)
        rows.append([
            s.name, str(s)[1:-1], FORMS[s.detach_focusing],
            f'+ (0 for p < {found.threshold:.3g})' if found.hard_threshold else '-',
            f'+ (order {found.order:.2f})' if found.soft_threshold else '-',
            f'{"+" if found.discards_mislabelled else "-"} ({found.remaining:.0%} left)',
            '+' if found.continuous else f'- (jump of {found.jump:.0%})',
            f'{found.peak:.3f}', 'none' if found.p_star is None else f'{found.p_star:.3f}'])
    return markdown_table(rows, COLUMNS)


def draw_loss(axes: Axes, settings: Sequence[Setting], positive: bool) -> None:
    """Draw Fig. 2: the loss of one label over its probability."""
    for label, setting, style in _curves(settings, positive):
        p = _probabilities(setting)
        axes.plot(p, loss_and_gradient(p, setting, positive)[0], label=label, **style)
    axes.set_ylim(0, 3)
    _finish(axes, f'loss of {"positives" if positive else "negatives"}', 'loss')


def draw_gradient(axes: Axes, settings: Sequence[Setting], positive: bool) -> None:
    """Draw Fig. 3: |dL/dz| of one label over its probability, each curve divided by its largest value.

    The regimes of negatives are those of the last setting.
    """
    for label, setting, style in _curves(settings, positive):
        p = _probabilities(setting)
        gradient = loss_and_gradient(p, setting, positive)[1].abs()
        p_star = None if positive else analyse_gradient(setting).p_star
        mark = ''
        if p_star is not None:
            mark = f', $p^* = {p_star:.3f}$'
            axes.plot(p_star, 1, 'o', color=style['color'], markersize=5, zorder=3, clip_on=False)
        axes.plot(p, gradient / gradient.max(), label=label + mark, **style)
    if not positive:
        for name, (low, high) in analyse_gradient(settings[-1]).regimes.items():
            axes.axvspan(low, high, color=SHADES[name], zorder=0, linewidth=0)
            axes.text((low + high) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha='center', va='bottom')
    axes.set_ylim(0, 1.04)
    side, form = 'positives' if positive else 'negatives', FORMS[settings[-1].detach_focusing]
    _finish(axes, f'gradient of {side}, {form}', '|dL/dz| / maximum')


def save_figure(panels: Sequence[Panel], positives: bool, path: Path) -> None:
    """Save a figure.

    Args:
        panels: Pairs of a draw function and its settings.
        positives: Whether to add a row for positives below the row for negatives.
        path: File, .svg or .png. The same figure gives the same bytes.
    """
    with plt.rc_context({'font.size': 9, 'axes.titlesize': 10, 'svg.hashsalt': 'mmasl'}):
        size = (4.8 * len(panels), 4.6 * (1 + positives))
        figure, axes = plt.subplots(1 + positives, len(panels), figsize=size, layout='constrained', squeeze=False)
        for positive, row in enumerate(axes):
            for axis, (draw, settings) in zip(row, panels):
                draw(axis, settings, bool(positive))
        metadata = dict(Date=None, Creator=None) if path.suffix == '.svg' else None
        figure.savefig(path, dpi=110, metadata=metadata)
        plt.close(figure)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set(xlabel='probability p', ylabel=ylabel, xlim=(0, 1))
    axes.set_title(title, pad=20)
    axes.grid(alpha=0.3)
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), frameon=False)


def _curves(settings: Sequence[Setting], positive: bool) -> Iterator[tuple[str, Setting, dict]]:
    """Label, setting and line style of each curve. Settings with the same curve share its label."""
    shared: dict[tuple, list[Setting]] = {}
    for s in settings:
        shared.setdefault((s.gamma_pos, s.alpha) if positive else (s.gamma_neg, s.clip, s.alpha), []).append(s)
    for number, group in enumerate(shared.values()):
        s, (color, dashes) = group[0], STYLES[number % len(STYLES)]
        values = {r'\gamma_+': s.gamma_pos} if positive else {r'\gamma_-': s.gamma_neg, 'm': s.clip}
        values = {symbol: value for symbol, value in {**values, r'\alpha': s.alpha}.items() if value}
        label = ', '.join([*dict.fromkeys(s.name for s in group), *(f'${k} = {v:g}$' for k, v in values.items())])
        yield label, s, dict(color=color, dashes=dashes, linewidth=1.8)


def _probabilities(setting: Setting) -> torch.Tensor:
    """Points in (0, 1), with two that make the jump at the margin vertical, and more points close to 1."""
    points = torch.cat([torch.linspace(0, 1, 301, dtype=torch.float64),
                        1 - torch.logspace(-6, -2, 20, dtype=torch.float64),
                        torch.tensor([setting.clip - 1e-9, setting.clip + 1e-9], dtype=torch.float64)]).sort().values
    return points[(points > 0) & (points < 1)]
