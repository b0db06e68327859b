"""Write the tables of docs/choosing.md and the picture from the rows of benchmarks/photos/."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.photos import fine_tuned  # noqa: E402
from benchmarks.photos.frozen import ASL, CE, DATA, DOC, PICTURE, ROWS, describe, key  # noqa: E402
from mmasl.reproduce.runs import read_rows  # noqa: E402
from mmasl.utils.markdown import fill_blocks, markdown_table  # noqa: E402
from mmasl.utils.statistics import interval  # noqa: E402

Column = dict[str, np.ndarray]  # values of a setting by figure, one for each repetition
FIGURES = ('mAP', 'frequent', 'middle', 'rare', 'CF1', 'OF1', 'CF1_calibrated', 'OF1_calibrated')


def read_columns(data: str) -> dict[tuple[str, ...], Column]:
    """The figures of the settings of a data set."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read_rows(ROWS):
        if row['data'] == data:
            found.setdefault(key(row)[1:], []).append(row)
    return {setting: {figure: np.array([float(row[figure]) for row in rows]) for figure in FIGURES}
            for setting, rows in found.items()}


def name(setting: Sequence[str]) -> str:
    """A setting as the tables have it: (gamma_pos, gamma_neg, clip), alpha and gradient."""
    gamma_pos, gamma_neg, clip, alpha, gradient = setting
    return f'({gamma_pos}, {gamma_neg}, {clip})' + (f', alpha {alpha}' if alpha else '') + (
        ', constant weight' if gradient == 'constant weight' else '')


def against(column: Column, baseline: Column, figure: str = 'mAP') -> tuple[float, float]:
    """Mean of the paired differences to a baseline, and half-width of its 95 % interval."""
    return interval(column[figure] - baseline[figure])


def cross_entropy(columns: dict[tuple[str, ...], Column]) -> Column:
    return columns[key(describe('', CE))[1:]]


def table(data: str) -> str:
    """The settings of a data set, the best first."""
    columns = read_columns(data)
    lines = []
    for setting in sorted(columns, key=lambda one: -columns[one]['mAP'].mean()):
        column = columns[setting]
        mean, half = interval(column['mAP'])
        difference = against(column, cross_entropy(columns))
        lines.append([name(setting), f'{mean:.1f} ± {half:.1f}',
                      '' if column is cross_entropy(columns) else '{:+.2f} ± {:.2f}'.format(*difference),
                      *(f'{column[figure].mean():.1f}' for figure in FIGURES[1:])])
    heads = ['setting', 'mAP', 'against cross-entropy', *(figure.replace('_', ', ') for figure in FIGURES[1:])]
    return markdown_table(lines, heads)


def draw() -> None:
    """The difference to cross-entropy of every setting on every data set, as a map."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = {data: columns for data in DATA if (columns := read_columns(data))}
    names = list(dict.fromkeys(setting for columns in found.values() for setting in columns))
    differences = np.full((len(names), len(found)), np.nan)
    figure, axis = plt.subplots(figsize=(2 + 1.5 * len(found), 1 + 0.28 * len(names)), layout='constrained')
    for j, columns in enumerate(found.values()):
        for i, setting in enumerate(names):
            if setting in columns:
                mean, half = against(columns[setting], cross_entropy(columns))
                differences[i, j] = mean
                axis.text(j, i, f'{mean:+.1f}' + ('' if abs(mean) > half else ' ='), ha='center', va='center',
                          fontsize=8)
    axis.imshow(differences, cmap='RdBu', vmin=-5, vmax=5, aspect='auto')
    axis.set(xticks=range(len(found)), yticks=range(len(names)), yticklabels=map(name, names))
    axis.set_xticklabels([DATA[data].title.replace(', ', ',\n').replace(' of labels', '\nof labels') for data in found],
                         fontsize=8)
    axis.set_title('mAP against cross-entropy; "=": the interval contains 0', fontsize=9)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def trained_table(what: str) -> str:
    """The settings that trained layers, the best first; ``what`` is 'LAYERS, DATA'."""
    layers, data = what.split(', ')
    figures = ('mAP', 'CF1', 'OF1', 'CF1_calibrated', 'OF1_calibrated')
    found: dict[tuple[str, ...], list[list[float]]] = {}
    for row in trained_rows(layers, data):
        found.setdefault((name(key(row)[1:]), row['lr']), []).append([float(row[figure]) for figure in figures])
    lines = [[*which, len(values), *(f'{mean:.1f}' for mean in np.mean(values, 0))]
             for which, values in sorted(found.items(), key=lambda item: -np.mean(item[1], 0)[0])]
    return markdown_table(lines, ['setting', 'learning rate', 'seeds', *(one.replace('_', ', ') for one in figures)])


def trained_rows(layers: str, data: str) -> list[dict[str, str]]:
    """The rows with the usual recipe."""
    return [row for row in read_rows(fine_tuned.LAYERS[layers].rows) if row['data'] == data and not row['recipe']]


def trained_scores(layers: str, data: str) -> dict[tuple[str, ...], float]:
    """mAP of each setting that trained layers: mean over the seeds, at its best learning rate.

    A learning rate counts if all settings have it.
    """
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in trained_rows(layers, data):
        found.setdefault(key(row)[1:], {}).setdefault(row['lr'], []).append(float(row['mAP']))
    common = set.intersection(*map(set, found.values())) if found else ()
    return {setting: max(float(np.mean(by_rate[rate])) for rate in common) for setting, by_rate in found.items()}


def searched_scores(data: str) -> dict[tuple[str, ...], float]:
    """mAP of each setting in the search on frozen features, as a user sees it."""
    return {key(row)[1:]: float(row['search_mAP']) for row in read_rows(ROWS) if row['data'] == data}


class Agreement(NamedTuple):
    """How far one way to compare settings predicts another.

    Args:
        settings: Number of settings that have both.
        correlation: Spearman's rank correlation.
        chosen: The best setting of the prediction.
        behind: mAP that the chosen setting loses against the best one in training.
        default: The same for ASL's usual setting.
    """
    settings: int
    correlation: float
    chosen: tuple[str, ...]
    behind: float
    default: float


def agreement(predicted: dict[tuple[str, ...], float], trained: dict[tuple[str, ...], float]) -> Agreement:
    common = [setting for setting in trained if setting in predicted]
    best = max(trained.values())
    chosen = max(common, key=lambda setting: predicted[setting])
    correlation = spearmanr([predicted[one] for one in common], [trained[one] for one in common]).statistic
    return Agreement(len(common), float(correlation), chosen, best - trained[chosen],
                     best - trained[key(describe('', ASL))[1:]])


def agreements() -> dict[tuple[str, str, str], Agreement]:
    """By data set, prediction and trained layers, what has at least two settings in common."""
    found = {}
    for data in DATA:
        last, network = (trained_scores(layers, data) for layers in ('last', 'all'))
        frozen = searched_scores(data)
        for names, predicted, trained in ((('frozen features', fine_tuned.LAST.title), frozen, last),
                                          (('frozen features', fine_tuned.ALL.title), frozen, network),
                                          ((fine_tuned.LAST.title, fine_tuned.ALL.title), last, network)):
            if len(set(predicted) & set(trained)) > 1:
                found[data, *names] = agreement(predicted, trained)
    return found


def agreement_table(_: str) -> str:
    lines = [[DATA[data].title, prediction, layers, one.settings, f'{one.correlation:.2f}', name(one.chosen),
              f'{one.behind:.1f}', f'{one.default:.1f}'] for (data, prediction, layers), one in agreements().items()]
    return markdown_table(lines, ['data', 'prediction', 'trained', 'settings', 'rank correlation', 'chosen',
                                  'mAP behind the best', 'ASL (0, 4, 0.05) behind the best'])


def reasons(data: str) -> dict[tuple[str, str], list[dict[str, str]]]:
    """The rows of the last stage with shares of the gradient, at the learning rate of all, by setting and recipe."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_rows(fine_tuned.LAST.rows):
        if (row['data'], row['lr']) == (data, '0.001') and row['p_annotated']:
            found.setdefault((name(key(row)[1:]), row['recipe']), []).append(row)
    return found


def reasons_table(data: str) -> str:
    """What each change does to mAP, and to the gradient of the removed labels; the best first."""
    found = reasons(data)
    usual = {row['seed']: float(row['mAP']) for row in found[name(key(describe('', ASL))[1:]), '']}
    lines = []
    for (setting, recipe), rows in found.items():
        means = {figure: np.mean([float(row[figure]) for row in rows])
                 for figure in ('mAP', *(f'{what}_{kind}' for what in ('p', 'gradient') for kind in fine_tuned.KINDS))}
        change = np.mean([float(row['mAP']) - usual[row['seed']] for row in rows])
        lines.append([setting, recipe, len(rows), f'{means["mAP"]:.1f}', f'{change:+.1f}', *(
            f'{means[f"p_{kind}"]:.2f}' for kind in fine_tuned.KINDS), *(
            f'{means[f"gradient_{kind}"]:.0f} %' for kind in fine_tuned.KINDS)])
    lines.sort(key=lambda line: -float(line[3]))
    return markdown_table(lines, ['setting', 'change of the recipe', 'seeds', 'mAP', 'against ASL', *(
        f'{what}, {kind}' for what in ('p', 'gradient') for kind in fine_tuned.KINDS)])


def page(text: str) -> str:
    """docs/choosing.md with its tables."""
    return fill_blocks(text, dict(frozen=table, trained=trained_table, agreement=agreement_table,
                                  reasons=reasons_table))


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    draw()
    DOC.write_text(page(DOC.read_text()))


if __name__ == '__main__':
    main()
