"""Tables and pictures of the paper's comparisons, from the rows that tools/reproduce.py writes."""
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mmasl.analysis.gradient import Setting, analyse
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
from mmasl.reproduce.runs import read_rows

# What is shown of the digits' trainings; the first decides which of several is the best, and is drawn.
SHOWN = {'Fig. 4': ('mAP', 'train_p_t_pos', 'train_p_t_neg', 'train_gap'), 'Table 13': ('bbox_mAP', 'bbox_mAP_50'),
         'Table 3': ('mAP', 'gamma_neg', 'CF1', 'gap'), 'Fig. 9': ('reached', 'gamma_neg', 'mAP'),
         **dict.fromkeys(('Table 2', MISSING_LABELS), ('mAP', 'CF1', 'gap', 'p_annotated', 'p_missing', 'p_absent',
                                                       'gradient_missing'))}
HEADS = {'train_p_t_pos': 'p_t+ at the end', 'train_p_t_neg': 'p_t- at the end', 'train_gap': 'gap at the end',
         'bbox_mAP': 'AP', 'bbox_mAP_50': 'AP50', 'gap': 'gap (validation)', 'gamma_neg': 'final gamma_neg',
         'p_annotated': 'p of annotated', 'p_missing': 'of missing', 'p_absent': 'of absent labels',
         'gradient_missing': 'gradient on missing labels [%]',
         'mAP_weighted': 'macro mAP', 'f1-score': 'macro F1', 'reached': 'gap reached after [% of the training]'}
# What a row's difference is to, where not to the item's first row: see Row.against.
AGAINST = {'Fig. 8': 'against cross-entropy, same backbone', 'Table 13': 'against focal loss, same detector',
           **dict.fromkeys(OWN, 'against CE, same point')}
FRACTIONS = ('train_p_t_pos', 'train_p_t_neg', 'train_gap', 'gap', 'gamma_neg', 'p_annotated', 'p_missing', 'p_absent')
CURVES = {'Fig. 4': ('p_t_pos', 'p_t_neg'), 'Fig. 9': ('gamma_neg', 'gap')}


class Results:
    """The rows of trainings, and of the curves of some.

    Args:
        folder: Holds ``<data>.csv``, ``<data>_curves.csv`` and ``<data>_missing.csv``, which benchmarks/paper/missing_labels.py
            writes; none need exist.
        data: 'real' or 'digits'.
    """

    def __init__(self, folder: Path, data: str) -> None:
        self.data = data
        self.path, self.curves_path, self.missing_path = (
            folder / f'{data}{what}.csv' for what in ('', '_curves', '_missing'))
        self.rows, self.curve_rows, self.missing_rows = map(
            read_rows, (self.path, self.curves_path, self.missing_path))

    def seeds(self, training: Training) -> list[int]:
        """Seeds that have been trained, ascending."""
        return sorted(int(row['seed']) for row in self.of(training))

    def of(self, training: Training) -> list[dict]:
        """The rows of a training, one a seed."""
        return self._of(training, self.rows)

    def scores(self, training: Training, scalar: str) -> dict[int, float]:
        """A scalar of the trained seeds."""
        return {int(row['seed']): float(row[scalar])
                for row in self._of(training, [*self.rows, *self.missing_rows]) if row.get(scalar)}

    def curve(self, training: Training, scalar: str) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the training, (T,), and a scalar there, the mean over the seeds, (T,)."""
        found = self._of(training, self.curve_rows)
        shares = sorted({float(row['share']) for row in found})
        return np.array(shares), np.array([
            np.mean([float(row[scalar]) for row in found if float(row['share']) == share]) for share in shares])

    @staticmethod
    def _of(training: Training, found: Iterable[dict]) -> list[dict]:
        return [row for row in found if (row['config'], row['options']) == (training.config, training.overrides)]


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student's t; NaN for one value)."""
    from scipy.stats import t
    x, count = np.asarray(values, float), len(values)
    return x.mean(), t.ppf(0.975, count - 1) * x.std(ddof=1) / count**0.5 if count > 1 else np.nan


def best(row: Row, results: Results) -> Training:
    """Of a row's trainings that with the highest mean of what its item shows first, over the seeds that all have."""
    scalar = shown(row.item, results.data, [row])[0]
    known = {one: scores for one in row.trainings if (scores := results.scores(one, scalar))}
    common = set.intersection(*map(set, known.values())) if known else set()
    return max(known or row.trainings, key=lambda one: np.mean([known[one][seed] for seed in common] or [0]))


def shown(item: str, data: str, found: Iterable[Row]) -> tuple[str, ...]:
    """The scalars that a table has columns of."""
    if data == 'digits' or item in CURVES or item == 'Table 13':
        return SHOWN.get(item, ('mAP', 'CF1', 'gap'))
    columns = (entry.column for row in found if row.trainings for entry in row.entries)
    scalars = dict.fromkeys(COLUMNS[column] for column in columns if column in COLUMNS) or ('mAP', )
    return tuple(sorted(scalars, key=lambda scalar: scalar == 'gamma_neg'))  # a result of the training, not its score


def render(item: str, results: Results) -> str:
    """A table or figure as Markdown: the paper's numbers, ours, and what is to be known of them.

    Ours are the mean over the seeds and its 95 % interval; a difference is that to another row, by default the first,
    on the same seeds.
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
    lines = ['| ' + ' | '.join(['', *heads]) + ' |', '|---' * (len(heads) + 1) + '|']
    first = next((row.label for row in found if row.trainings), '')
    compared = {row.label: best(row, results) for row in found if row.trainings}
    for row in found:
        cells = [row.label + (' (cited)' if row.cited else '')]
        cells += [_printed(next((entry for entry in row.entries if entry.column == column), None), notes)
                  for column in columns]
        if trained:
            cells += (_measured(row, compared[row.against or first], scalars, results) if row.trainings
                      else [''] * (len(scalars) + 2))
        lines.append('| ' + ' | '.join(cells) + ' |')
    lines += [''] * bool(notes) + [f'({number}) {FOOTNOTES[key]}  ' for number, key in enumerate(notes, 1)]
    return '\n'.join(lines)


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
    """Table 1: the paper's signs, and what the gradients themselves have (gamma 2, margin 0.2)."""
    settings = {'CE': (0., 0.), 'AF': (2., 0.), 'CE+PS': (0., 0.2), 'ASL (AF+PS)': (2., 0.2)}
    names = ('hard_threshold', 'soft_threshold', 'discards_mislabelled', 'continuous')
    lines = ['| | ' + ' | '.join(f'paper: {entry.column} | measured' for entry in found[0].entries) + ' |',
             '|---' * (2 * len(names) + 1) + '|']
    for row in found:
        gamma, clip = settings[row.label]
        properties = analyse(Setting(gamma_neg=gamma, clip=clip))
        pairs = ((entry.value, getattr(properties, name)) for entry, name in zip(row.entries, names, strict=True))
        lines.append(f'| {row.label} | ' + ' | '.join(f'{"-+"[bool(a)]} | {"-+"[bool(b)]}' for a, b in pairs) + ' |')
    return '\n'.join(lines)


def draw(item: str, results: Results, paths: Sequence[Path]) -> bool:
    """Draw what has been trained of an item to files; whether there was anything."""
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
