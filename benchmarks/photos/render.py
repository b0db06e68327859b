"""Write the tables of docs/choosing.md and the picture from the rows of benchmarks/photos/."""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.photos import fine_tuned  # noqa: E402
from benchmarks.photos.fine_tuned import MILD, continue_search  # noqa: E402
from benchmarks.photos.frozen import ASL, CE, DATA, DOC, FOCAL, PICTURE, ROWS, SETTINGS, describe, key  # noqa: E402
from mmasl.analysis import probe_report  # noqa: E402
from mmasl.analysis.gradient import Setting  # noqa: E402
from mmasl.reproduce import experiments  # noqa: E402
from mmasl.reproduce.results import Results  # noqa: E402
from mmasl.reproduce.runs import read_rows  # noqa: E402
from mmasl.utils.markdown import fill_blocks, markdown_table  # noqa: E402
from mmasl.utils.statistics import interval  # noqa: E402

Column = dict[str, np.ndarray]  # values of a setting by figure, one for each repetition
RATES_PICTURE = PICTURE.with_name('rates.png')
TITLES = {CE: 'cross-entropy', FOCAL: 'focal loss (2, 2, 0)', MILD: '(0, 2, 0)', ASL: 'ASL (0, 4, 0.05)'}
USUAL = {key(describe('', setting))[1:] for setting in (*SETTINGS[:6], fine_tuned.CONSTANT)}  # the rows of the tables
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
    """The usual settings on a data set and the best one of all, the best first."""
    columns = read_columns(data)
    ranked = sorted(columns, key=lambda one: -columns[one]['mAP'].mean())
    lines = []
    for setting in (one for one in ranked if one in (*USUAL, ranked[0])):
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
    """The settings that trained layers at their learning rates, the best first; ``what`` is 'LAYERS, DATA'."""
    layers, data = what.split(', ')
    chosen = chosen_rates(layers, data)
    figures = ('mAP', 'CF1', 'OF1', 'CF1_calibrated', 'OF1_calibrated')
    found: dict[tuple[str, ...], list[list[float]]] = {}
    for row in trained_rows(layers, data):
        if chosen.get(key(row)[1:]) == float(row['lr']):
            found.setdefault(key(row)[1:], []).append([float(row[figure]) for figure in figures])
    rates = scores_by_rate(layers, data)
    lines = [[name(setting), f'{chosen[setting]:g}', ', '.join(f'{rate:g}' for rate in sorted(rates[setting])),
              len(values), f'{means[0]:.1f}', against_cross_entropy(layers, data).get(setting, ''),
              *(f'{mean:.1f}' for mean in means[1:])]
             for setting, values in found.items() for means in [np.mean(values, 0)]]
    lines.sort(key=lambda line: -float(line[4]))
    return markdown_table(lines, ['setting', 'learning rate', 'rates tried', 'seeds', 'mAP', 'against cross-entropy',
                                  *(one.replace('_', ', ') for one in figures[1:])])


def against_cross_entropy(layers: str, data: str) -> dict[tuple[str, ...], str]:
    """Difference in mAP of each setting to cross-entropy on the same seeds, with its 95 % interval if there are two."""
    rates, chosen = scores_by_rate(layers, data), chosen_rates(layers, data)
    baseline = key(describe('', CE))[1:]
    found = {}
    for setting in set(chosen) - {baseline} if baseline in chosen else ():
        mean, half = interval([one - other for one, other in zip(
            rates[setting][chosen[setting]], rates[baseline][chosen[baseline]])])
        found[setting] = f'{mean:+.1f}' + ('' if np.isnan(half) else f' ± {half:.1f}')
    return found


def trained_rows(layers: str, data: str) -> list[dict[str, str]]:
    """The rows with the usual recipe."""
    return [row for row in read_rows(fine_tuned.LAYERS[layers].rows) if row['data'] == data and not row['recipe']]


def trained_scores(layers: str, data: str) -> dict[tuple[str, ...], float]:
    """mAP of each setting that trained layers at its learning rate: mean over its seeds."""
    rates = scores_by_rate(layers, data)
    return {setting: float(np.mean(rates[setting][rate])) for setting, rate in chosen_rates(layers, data).items()}


def chosen_rates(layers: str, data: str) -> dict[tuple[str, ...], float]:
    """The learning rate of each setting, the best one with seed 0.

    Settings whose search is finished count. Without two of them, all do, at the learning rates that all have.
    """
    rates = scores_by_rate(layers, data)
    finished = {setting: best_rate(by_rate) for setting, by_rate in rates.items() if is_searched(by_rate)}
    if len(finished) > 1:
        return finished
    common = set.intersection(*map(set, rates.values())) if rates else set()
    return {setting: best_rate({rate: by_rate[rate] for rate in common})
            for setting, by_rate in rates.items() if common}


def scores_by_rate(layers: str, data: str) -> dict[tuple[str, ...], dict[float, list[float]]]:
    """mAP of each setting by learning rate, one for each seed."""
    found: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for row in sorted(trained_rows(layers, data), key=lambda row: int(row['seed'])):
        found.setdefault(key(row)[1:], {}).setdefault(float(row['lr']), []).append(float(row['mAP']))
    return found


def best_rate(by_rate: dict[float, list[float]]) -> float:
    return max(by_rate, key=lambda rate: by_rate[rate][0])


def is_searched(by_rate: dict[float, list[float]]) -> bool:
    """Whether the search of the learning rate has ended."""
    return continue_search({rate: values[0] for rate, values in by_rate.items()}) is None


def draw_rates() -> None:
    """mAP against the learning rate of the last stage, for the main settings on every data set."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = {data: rates for data in DATA if (rates := scores_by_rate('last', data))}
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), sharex=True, layout='constrained')
    for axis, (data, rates) in zip(axes, found.items(), strict=True):
        for color, (setting, title) in enumerate(TITLES.items()):
            points = sorted((rate, values[0]) for rate, values in rates.get(key(describe('', setting))[1:], {}).items())
            axis.plot(*zip(*points), color=f'C{color}', marker='o', markersize=4, label=title)
        axis.set(xscale='log', xlabel='learning rate')
        axis.set_title(DATA[data].title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('mAP [%]')
    axes[-1].legend(fontsize=8)
    figure.savefig(RATES_PICTURE, dpi=110)
    plt.close(figure)


def digits_scores() -> dict[tuple[str, ...], float]:
    """mAP of each setting that docs/reproduce.md trained on the harder digits: mean over the seeds."""
    trained = Results(ROOT / 'benchmarks' / 'paper', 'digits')
    found = {}
    for item in ('Table 2', 'Fig. 5', 'Fig. 6', 'Fig. 7'):
        for training in (one for row in experiments.rows(item, 'digits') for one in row.trainings):
            loss = training.cfg.model.head.loss
            setting = Setting(**{field.name: loss.get(field.name) for field in fields(Setting)})
            found[key(describe('', setting))[1:]] = float(np.mean(list(trained.scores(training, 'mAP').values())))
    return found


def searched_scores(data: str) -> dict[tuple[str, ...], float]:
    """mAP in the search on frozen features, as a user of ``--probe`` sees it, of each setting that it compares."""
    probed = {key(describe('', setting))[1:] for setting in probe_report.SETTINGS.values()}
    return {key(row)[1:]: float(row['search_mAP']) for row in read_rows(ROWS)
            if row['data'] == data and key(row)[1:] in probed}


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


def agreements() -> dict[tuple[str, str], Agreement]:
    """By data set and trained layers, how far the search on frozen features predicts them."""
    found = {}
    for data in DATA:
        predicted = searched_scores(data)
        for layers in fine_tuned.LAYERS:
            trained = digits_scores() if (data, layers) == ('digits_hard', 'all') else trained_scores(layers, data)
            if len(set(predicted) & set(trained)) > 1:
                found[data, layers] = agreement(predicted, trained)
    return found


def agreement_table(_: str) -> str:
    lines = [[DATA[data].title, fine_tuned.LAYERS[layers].title, one.settings, f'{one.correlation:.2f}',
              name(one.chosen), f'{one.behind:.1f}', f'{one.default:.1f}']
             for (data, layers), one in agreements().items()]
    return markdown_table(lines, ['data', 'trained', 'settings', 'rank correlation', 'chosen', 'mAP behind the best',
                                  'ASL (0, 4, 0.05) behind the best'])


def reasons(data: str) -> dict[tuple[str, str, str], dict[str, float]]:
    """The rows of the last stage with shares of the gradient, of seed 0, by setting, recipe and learning rate."""
    figures = ('mAP', *(f'{kind}_{part}' for kind in ('p', 'gradient') for part in fine_tuned.KINDS))
    return {(name(key(row)[1:]), row['recipe'], row['lr']): {figure: float(row[figure]) for figure in figures}
            for row in read_rows(fine_tuned.LAST.rows)
            if (row['data'], row['seed']) == (data, '0') and row['p_annotated']}


def reasons_table(data: str) -> str:
    """What the learning rate and each change do to mAP, to the probabilities and to the gradient; the best first."""
    lines = [[*what, f'{row["mAP"]:.1f}', *(f'{row[f"p_{kind}"]:.2f}' for kind in fine_tuned.KINDS),
              *(f'{row[f"gradient_{kind}"]:.0f} %' for kind in fine_tuned.KINDS)]
             for what, row in sorted(reasons(data).items(), key=lambda item: -item[1]['mAP'])]
    return markdown_table(lines, ['setting', 'change of the recipe', 'learning rate', 'mAP', *(
        f'{what}, {kind}' for what in ('p', 'gradient') for kind in fine_tuned.KINDS)])


def changes(data: str) -> dict[str, tuple[float, float]]:
    """mAP of cross-entropy and ASL with the last stage by recipe: seed 0, each at the learning rate of its search."""
    chosen = chosen_rates('last', data)
    settings = [key(describe('', setting))[1:] for setting in (CE, ASL)]
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for row in read_rows(fine_tuned.LAST.rows):
        setting = key(row)[1:]
        if (row['data'], row['seed']) == (data, '0') and chosen.get(setting) == float(row['lr']):
            found.setdefault(row['recipe'], {})[setting] = float(row['mAP'])
    return {recipe: (values[settings[0]], values[settings[1]]) for recipe in fine_tuned.RECIPES
            if set(settings) <= set(values := found.get(recipe, {}))}


def changes_table(data: str) -> str:
    lines = [[recipe or 'none', f'{ce:.1f}', f'{asl:.1f}', f'{asl - ce:+.1f}']
             for recipe, (ce, asl) in changes(data).items()]
    return markdown_table(lines, ['change of the recipe', 'cross-entropy', TITLES[ASL], 'difference'])


def page(text: str) -> str:
    """docs/choosing.md with its tables."""
    return fill_blocks(text, dict(frozen=table, trained=trained_table, agreement=agreement_table,
                                  reasons=reasons_table, changes=changes_table))


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    draw()
    draw_rates()
    DOC.write_text(page(DOC.read_text()))


if __name__ == '__main__':
    main()
