"""Markdown tables and figures from the rows of trainings and measurements."""
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mmasl.analysis.gradient import Setting, analyse_gradient
from mmasl.reproduce.experiments import (
    COLUMNS,
    CONVERGENCE,
    IMBALANCE,
    MISSING_LABELS,
    OWN,
    PRETRAINING,
    Row,
    Training,
    rows,
)
from mmasl.reproduce.numbers import FOOTNOTES, Entry
from mmasl.reproduce.results import Results
from mmasl.reproduce.runs import ORIGIN
from mmasl.utils.markdown import markdown_table
from mmasl.utils.statistics import interval

# Columns of the digits' tables. The first selects the best of several trainings, and is drawn.
SHOWN = {'Fig. 4': ('mAP', 'train_p_t_pos', 'train_p_t_neg', 'train_gap'), 'Table 13': ('bbox_mAP', 'bbox_mAP_50'),
         'Table 3': ('mAP', 'gamma_neg', 'CF1', 'gap'), 'Fig. 9': ('reached', 'gamma_neg', 'mAP'),
         **dict.fromkeys(('Table 2', MISSING_LABELS), ('mAP', 'CF1', 'gap', 'p_annotated', 'p_missing', 'p_absent',
                                                       'gradient_missing'))}
HEADS = {'train_p_t_pos': 'p_t+ at the end', 'train_p_t_neg': 'p_t- at the end', 'train_gap': 'gap at the end',
         'bbox_mAP': 'AP', 'bbox_mAP_50': 'AP50', 'gap': 'gap (validation)', 'gamma_neg': 'final gamma_neg',
         'p_annotated': 'p of annotated labels', 'p_missing': 'p of missing labels', 'p_absent': 'p of absent labels',
         'gradient_missing': 'gradient on missing labels [%]',
         'mAP_weighted': 'macro mAP', 'f1-score': 'macro F1', 'reached': 'gap reached after [% of the training]'}
# Heading of the differences, where rows are not compared with the item's first row: see Row.against.
AGAINST = {'Fig. 8': 'against cross-entropy, same backbone', 'Table 13': 'against focal loss, same detector',
           **dict.fromkeys(OWN, 'against CE, same point')}
FRACTIONS = ('train_p_t_pos', 'train_p_t_neg', 'train_gap', 'gap', 'gamma_neg', 'p_annotated', 'p_missing', 'p_absent')
CURVES = {'Fig. 4': ('p_t_pos', 'p_t_neg'), 'Fig. 9': ('gamma_neg', 'gap')}


def best(row: Row, results: Results) -> Training:
    """A row's training with the highest mean of the item's first scalar, over the seeds that all trainings have."""
    scalar = shown(row.item, results.data, [row])[0]
    known = {one: scores for one in row.trainings if (scores := results.scores(one, scalar))}
    common = set.intersection(*map(set, known.values())) if known else set()
    return max(known or row.trainings, key=lambda one: np.mean([known[one][seed] for seed in common] or [0]))


def shown(item: str, data: str, found: Iterable[Row]) -> tuple[str, ...]:
    """The scalars that a table has columns for."""
    if data == 'digits' or item in CURVES or (item, data) == ('Table 13', 'real'):
        return SHOWN.get(item, ('mAP', 'CF1', 'gap'))
    columns = (entry.column for row in found if row.trainings for entry in row.entries)
    scalars = dict.fromkeys(COLUMNS[column] for column in columns if column in COLUMNS) or ('mAP', )
    return tuple(sorted(scalars, key=lambda scalar: scalar == 'gamma_neg'))  # it is an outcome, not the score


def render_item(item: str, results: Results) -> str:
    """A table or figure as Markdown, with the paper's numbers, ours and footnotes.

    Ours are means over the seeds with their 95 % intervals. A difference compares two rows on the same seeds.

    Args:
        item: A table or figure, as in :func:`mmasl.reproduce.experiments.rows`.
        results: The rows.
    """
    found = rows(item, results.data)
    if item == 'Table 1':
        return _properties(found)
    notes: list[str] = []
    scalars = shown(item, results.data, found)
    columns = list(dict.fromkeys(entry.column for row in found for entry in row.entries))
    where = next((entry.dataset for row in found for entry in row.entries), '')
    trained = any(row.trainings for row in found)
    heads = [f'paper{f", {where}" if where else ""}: {column}' for column in columns]
    if trained:
        heads += [HEADS.get(scalar, scalar) for scalar in scalars]
        heads.insert(len(columns) + 1, AGAINST.get(item, 'against the first row'))
        heads += ['seeds']
    lines = []
    first = next((row.label for row in found if row.trainings), '')
    compared = {row.label: best(row, results) for row in found if row.trainings}
    for row in found:
        cells = [row.label + (' (cited)' if row.cited else '')]
        cells += [_printed(next((entry for entry in row.entries if entry.column == column), None), notes)
                  for column in columns]
        if trained:
            cells += (_measured(row, compared[row.against or first], scalars, results) if row.trainings
                      else [''] * (len(scalars) + 2))
        lines.append(cells)
    footnotes = [f'({number}) {FOOTNOTES[key]}  ' for number, key in enumerate(notes, 1)]
    return '\n'.join([markdown_table(lines, ['', *heads]), *[''] * bool(notes), *footnotes])


def _printed(entry: Entry | None, notes: list[str]) -> str:
    if entry is None or entry.value is None:
        return ''
    for key in entry.footnotes:
        if key not in notes:
            notes.append(key)
    return f'{entry.value:g}' + ''.join(f' ({notes.index(key) + 1})' for key in entry.footnotes)


def _measured(row: Row, other: Training, scalars: Sequence[str], results: Results) -> list[str]:
    training = best(row, results)
    cells = [_mean(results.scores(training, scalar), scalar) for scalar in scalars]
    ours, theirs = results.scores(training, scalars[0]), results.scores(other, scalars[0])
    common = sorted(set(ours) & set(theirs))
    against = '' if training == other or not common else _mean(
        {seed: ours[seed] - theirs[seed] for seed in common}, scalars[0], '+')
    options = ', '.join(f'{key.split(".")[-1]}={value}' for key, value in training.options) or training.config
    chosen = f' ({options})' if len(row.trainings) > 1 and ours else ''
    return [cells[0] + chosen, against, *cells[1:], str(len(results.seeds(training)))]


def _mean(scores: dict[int, float], scalar: str, sign: str = '') -> str:
    if not scores:
        return ''
    mean, half = interval([*scores.values()])
    digits = 2 if scalar in FRACTIONS else 1
    return f'{mean:{sign}.{digits}f}' + ('' if np.isnan(half) else f' ± {half:.{digits}f}')


def _properties(found: Sequence[Row]) -> str:
    """Table 1: the paper's signs, and the properties of the gradients (gamma 2, margin 0.2)."""
    settings = {'CE': (0., 0.), 'AF': (2., 0.), 'CE+PS': (0., 0.2), 'ASL (AF+PS)': (2., 0.2)}
    names = ('hard_threshold', 'soft_threshold', 'discards_mislabelled', 'continuous')
    heads = ['', *(head for entry in found[0].entries for head in (f'paper: {entry.column}', 'measured'))]
    lines = []
    for row in found:
        gamma, clip = settings[row.label]
        properties = analyse_gradient(Setting(gamma_neg=gamma, clip=clip))
        pairs = ((entry.value, getattr(properties, name)) for entry, name in zip(row.entries, names, strict=True))
        lines.append([row.label, *('-+'[bool(value)] for pair in pairs for value in pair)])
    return markdown_table(lines, heads)


def rows_table(found: Sequence[dict[str, str]]) -> str:
    """Measured rows as Markdown, with their common device, versions and date in one line below.

    Fractions are rounded to three significant digits. Columns without a value are left out.

    Args:
        found: Rows as :func:`mmasl.reproduce.runs.read_rows` returns them.
    """
    columns = [key for key in found[0] if key not in ORIGIN and any(row[key] for row in found)]
    origins = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in found})
    table = markdown_table([[_rounded(row[column]) for column in columns] for row in found],
                           [column.replace('_', ' ') for column in columns])
    return f'{table}\n\n{"; ".join(origins)}.'


def _rounded(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    if '.' not in text and 'e' not in text:
        return text
    return f'{value:.0f}' if abs(value) >= 100 else f'{value:.3g}'


def draw(item: str, results: Results, paths: Sequence[Path]) -> bool:
    """Draw the trained rows of an item.

    Args:
        item: A table or figure.
        results: The rows.
        paths: Files to write, SVG or PNG.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = [row for row in rows(item, results.data) if any(results.seeds(training) for training in row.trainings)]
    if not found:
        return False
    plt.rcParams['svg.hashsalt'] = 'mmasl'
    panels = CURVES.get(item, (shown(item, results.data, found)[0], ))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels) + 1.5, 4), layout='constrained',
                                squeeze=False)
    for axis, scalar in zip(axes[0], panels, strict=True):
        painter: Callable = _draw_curves if item in CURVES else _draw_lines if found[0].x is not None else _draw_dots
        painter(axis, [row for row in found if item in CURVES or (row.x is None) == (found[0].x is None)], scalar,
                results)
        axis.grid(alpha=0.3)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata=dict(Date=None) if path.suffix == '.svg' else None)
    plt.close(figure)
    return True


XLABELS = {'Fig. 5': r'focal loss $\gamma$', 'Fig. 6': r'$\gamma_+$', 'Fig. 7': 'margin m',
           'Table 3': r'$\Delta p_{target}$', MISSING_LABELS: 'share of the training labels missing',
           IMBALANCE: 'labels per image, of 40', CONVERGENCE: 'epochs', PRETRAINING: 'epochs of the pre-training'}
YLABELS = {'p_t_pos': r'$p_t^+$', 'p_t_neg': r'$p_t^-$', 'gap': r'$\Delta p$', 'gamma_neg': r'$\gamma_-$'}


def _draw_lines(axis: Any, found: Sequence[Row], scalar: str, results: Results) -> None:
    for name, group in groupby(found, key=lambda row: row.series):
        points = [(row.x, *interval([*results.scores(best(row, results), scalar).values()])) for row in group]
        x, mean, half = np.array(points).T
        axis.errorbar(x, mean, np.nan_to_num(half), marker='o', capsize=3, label=name)
    axis.set(xlabel=XLABELS[found[0].item], ylabel=f'{HEADS.get(scalar, scalar)} [%], mean and 95 % interval')
    axis.legend()


def _draw_dots(axis: Any, found: Sequence[Row], scalar: str, results: Results) -> None:
    for place, row in enumerate(found):
        values = [*results.scores(best(row, results), scalar).values()]
        mean, half = interval(values)
        axis.plot(values, [place] * len(values), '.', color='grey', alpha=0.6)
        axis.errorbar(mean, place, xerr=np.nan_to_num(half), marker='o', capsize=4, color='C0')
    axis.set(yticks=range(len(found)), yticklabels=[row.label for row in found],
             xlabel=f'{HEADS.get(scalar, scalar)} [%]: seeds, mean and 95 % interval')
    axis.invert_yaxis()


def _draw_curves(axis: Any, found: Sequence[Row], scalar: str, results: Results) -> None:
    for row in found:
        axis.plot(*results.curve(row.trainings[0], scalar), label=row.label)
    axis.set(xlabel='share of the training', ylabel=YLABELS[scalar], xlim=(0, 1))
    axis.legend()
