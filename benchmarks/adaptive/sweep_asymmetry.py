"""Compare fixed with adaptive asymmetry on the harder digits, as in Table 3 and Fig. 9 of arXiv 2009.14119.

Writes the data, trains side by side, and writes rows, tables and figures. Finished runs are not repeated; interrupted
ones are resumed.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from mmasl.datasets.digits import DigitScenes
from mmasl.reproduce.results import END, training_end
from mmasl.reproduce.runs import Run, read_rows, train, write_rows
from mmasl.utils.markdown import markdown_table
from mmasl.utils.statistics import interval
from mmasl.utils.tools import exit_on_user_error

CONFIGS = dict(fixed='configs/digits/resnet_asl_digits_hard.py',
               adaptive='configs/digits/resnet_adaptive_digits_hard.py')
DIGITS = DigitScenes(train=6000, long_tail=0.7, missing=0.3)
HOOK, LOSS = 'custom_hooks.0', 'model.head.loss'
# Attempts to make adaptive asymmetry as good as the best fixed one. The first is the default. The files also hold rows
# of arguments that the hook no longer has, because they gained nothing: control per class, a decaying step, other
# windows and dampings.
ATTEMPTS: dict[str, dict] = {
    'adaptive, target 0.1 (default)': {},
    'target 0': {f'{HOOK}.target': 0.},
    'target -0.2': {f'{HOOK}.target': -0.2},
    'warm start: fixed for 20 %': {f'{HOOK}.begin': 0.2},
    'margin, gamma_neg 1': {f'{HOOK}.adapt': 'clip', f'{LOSS}.gamma_neg': 1.},
    'target 0, warm start': {f'{HOOK}.target': 0., f'{HOOK}.begin': 0.2},
    'target -0.2, warm start': {f'{HOOK}.target': -0.2, f'{HOOK}.begin': 0.2}}
# Choices that the paper leaves open, one changed at a time, with target 0.1, starting from gamma_neg 0. The default
# step is 0.58 here.
CHOICES: dict[str, dict] = {
    **{f'step {step:g}': {f'{HOOK}.step': step} for step in (0.1, 1.5, 4.)},
    'begin at once': {f'{HOOK}.begin': 0.}}
FIGURES = ('mAP', 'CF1', 'gap')
NEAR = 0.02  # distance from the target that counts as reached


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--targets', type=float, nargs='*', default=[0., 0.1, 0.2, 0.3],
                        help='target gaps of the control runs')
    parser.add_argument('--starts', type=float, nargs='*', default=[0., 8.],
                        help='initial gamma_neg of the control runs')
    parser.add_argument('--gammas', type=float, nargs='+', default=[0., 1., 2., 3., 4., 6.],
                        help='values of a fixed gamma_neg')
    parser.add_argument('--choices', action=argparse.BooleanOptionalAction, default=True,
                        help='also vary step and begin')
    parser.add_argument('--seeds', type=int, default=5, help='seeds of the fixed runs and of the attempts')
    parser.add_argument('--work-dir', default='work_dirs/sweep_asymmetry', help='folder of the runs')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/adaptive'), help='folder of rows and figures')
    parser.add_argument('--jobs', type=int, help='simultaneous runs (default: one per core)')
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f'--seeds {args.seeds} must be at least 1')
    return args


@exit_on_user_error()
def main() -> None:
    args = parse_args()
    DIGITS.write('data/digits_hard')

    def run(kind: str, name: str, seed: int, options: dict) -> Run:
        options = {'randomness.seed': seed, 'train_cfg.val_interval': 8, 'default_hooks.logger.interval': 5, **options}
        return Run(CONFIGS[kind], f'{args.work_dir}/{name}_seed{seed}', options)

    dynamics = {(target, start): run('adaptive', f'target{target:g}_from{start:g}', 0,
                                     {f'{HOOK}.target': target, f'{LOSS}.gamma_neg': start})
                for target in args.targets for start in args.starts}
    choices = {name: run('adaptive', f'choice{number}', 0, {f'{LOSS}.gamma_neg': 0., **options})
               for number, (name, options) in enumerate(CHOICES.items() if args.choices else ())}
    if choices and (0.1, 0.) in dynamics:
        choices = {'default': dynamics[0.1, 0.], **choices}
    methods = {f'fixed {gamma:g}': [run('fixed', f'fixed{gamma:g}', seed, {f'{LOSS}.gamma_neg': gamma})
                                    for seed in range(args.seeds)] for gamma in args.gammas}
    methods |= {name: [run('adaptive', f'attempt{number}', seed, options) for seed in range(args.seeds)]
                for number, (name, options) in enumerate(ATTEMPTS.items())}
    seed_by_seed = [runs[seed] for seed in range(args.seeds) for runs in methods.values()]
    others = [one for one in choices.values() if one not in dynamics.values()]
    train([*dynamics.values(), *others, *seed_by_seed], args.jobs)

    args.out.mkdir(parents=True, exist_ok=True)
    control = [dict(target=target, start=start, **judge(one, target), **figures(one))
               for (target, start), one in dynamics.items()]
    varied = [dict(choice=name, **judge(one, 0.1), **figures(one)) for name, one in choices.items()]
    seeds = [dict(method=name, seed=seed, **figures(one)) for name, runs in methods.items()
             for seed, one in enumerate(runs)]
    control, varied, seeds = (update(args.out / f'{name}.csv', rows, keys) for name, rows, keys in (
        ('control', control, ('target', 'start')), ('choices', varied, ('choice', )),
        ('seeds', seeds, ('method', 'seed'))))
    if dynamics:
        plot_control(dynamics, args.out / 'control.svg')
    plot_seeds(seeds, args.out / 'seeds.svg')
    tables = '\n\n'.join([render_control(control, ('target', 'start')), render_control(varied, ('choice', )),
                          render_seeds(seeds)])
    (args.out / 'results.md').write_text(tables + '\n')
    print(f'\n{tables}\n\nRows, tables and figures: {args.out}')


def update(path: Path, new: list[dict], keys: Sequence[str]) -> list[dict]:
    """Write rows to a CSV file. They replace rows with the same keys; other rows are kept."""
    rows = {tuple(str(row[key]) for key in keys): row for row in [*read_rows(path), *new]}
    write_rows(path, list(rows.values()))
    return read_rows(path)


def figures(run: Run) -> dict[str, str]:
    """The last evaluation, and the mean gamma_neg and margin over the last 2 % of the training."""
    last, end = run.evaluations()[-1], training_end(run.training())
    return {**{key: f'{last[f"multi-label/{key}"]:.4g}' for key in FIGURES},
            **{name: f'{np.mean([row[name] for row in end]):.4g}' for name in ('gamma_neg', 'clip')}}


def curve(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A logged scalar, averaged over 2 % of the training.

    Returns:
        Shares of the training, (T,), and the scalar there, (T,).
    """
    rows = run.training()
    steps = np.array([row['step'] for row in rows]) / rows[-1]['step']
    values = np.array([row[name] for row in rows])
    length = max(1, round(END * len(rows)))
    return steps[length - 1:], np.convolve(values, np.ones(length) / length, 'valid')


def judge(run: Run, target: float) -> dict[str, str]:
    """When the gap first reached its target, and its distance from the target after a tenth of the training."""
    done, gap = curve(run, 'gap')
    near = np.abs(gap - target) <= NEAR
    later = np.abs(gap - target)[done >= 0.1]
    return dict(reached=f'{done[near.argmax()]:.3f}' if near.any() else '', near=f'{np.mean(later <= NEAR):.3f}',
                farthest=f'{later.max():.3f}', mean_gap=f'{gap[done >= 0.1].mean():.4f}')


def render_control(rows: list[dict], keys: Sequence[str]) -> str:
    """The control runs as Markdown. ``keys`` are the columns that identify a run."""
    head = [*keys, 'gap at the target after', 'then near it', 'farthest', 'final gamma_neg', 'mAP']
    return markdown_table([
        [*(row[key] for key in keys), f'{float(row["reached"]):.0%}' if row['reached'] else 'never',
         f'{float(row["near"]):.0%}', row['farthest'], f'{float(row["gamma_neg"]):.1f}', f'{float(row["mAP"]):.1f}']
        for row in rows], head)


def by_method(rows: list[dict], name: str) -> dict[str, np.ndarray]:
    """A column by method, in the order of the seeds."""
    return {method: np.array([float(row[name]) for row in rows if row['method'] == method])
            for method in dict.fromkeys(row['method'] for row in rows)}


def render_seeds(rows: list[dict]) -> str:
    """The fixed runs and the attempts as Markdown: means over the seeds and differences on the same seeds."""
    columns = {name: by_method(rows, name) for name in ('mAP', 'CF1', 'gap', 'gamma_neg', 'clip')}
    best = max((method for method in columns['mAP'] if method.startswith('fixed')),
               key=lambda method: columns['mAP'][method].mean())
    lines = []
    for method, values in columns['mAP'].items():
        against = '' if method == best else '{:+.2f} ± {:.2f}'.format(*interval(values - columns['mAP'][best]))
        cf1, gap, gamma, margin = (columns[name][method].mean() for name in ('CF1', 'gap', 'gamma_neg', 'clip'))
        lines.append((method, '{:.2f} ± {:.2f}'.format(*interval(values)), against, f'{cf1:.1f}', f'{gap:+.2f}',
                      f'{gamma:.1f}', f'{margin:.3f}'))
    return markdown_table(lines, ('asymmetry', 'mAP', f'mAP above {best} on the same seeds', 'CF1', 'gap (validation)',
                                  'final gamma_neg', 'final margin'))


def plot_control(runs: dict[tuple[float, float], Run], path: Path) -> None:
    """Plot gamma_neg and the gap as in Fig. 9, for every target and start."""
    targets = list(dict.fromkeys(target for target, _ in runs))
    starts = list(dict.fromkeys(start for _, start in runs))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    for (target, start), run in runs.items():
        style = dict(color=f'C{targets.index(target)}', linestyle=('-', '--', ':', '-.')[starts.index(start) % 4],
                     linewidth=1.3)
        for axis, name in zip(axes, ('gamma_neg', 'gap')):
            axis.plot(*curve(run, name), **style, label=f'target {target:g}' if start == starts[0] else None)
    for target in targets:
        axes[1].axhline(target, color=f'C{targets.index(target)}', linewidth=0.6)
    axes[0].set(title=r'$\gamma_-$', ylabel=r'$\gamma_-$')
    axes[1].set(title=r'probability gap $\Delta p$', ylabel=r'$\Delta p$ of the training batches', ylim=(-0.5, 0.5))
    drawn = zip(starts, ('solid', 'dashed', 'dotted', 'dash-dotted') * len(starts))
    axes[0].legend(title=', '.join(f'from {start:g}: {style}' for start, style in drawn))
    for axis in axes:
        axis.set(xlabel='share of the training', xlim=(0, 1))
        axis.axvline(0.1, color='grey', linewidth=0.6, linestyle=':')
        axis.grid(alpha=0.3)
    save(figure, path)


def plot_seeds(rows: list[dict], path: Path) -> None:
    """Plot mAP over the final gamma_neg: the fixed runs as a line, the attempts as points."""
    scores = {method: interval(values) for method, values in by_method(rows, 'mAP').items()}
    gammas = {method: values.mean() for method, values in by_method(rows, 'gamma_neg').items()}
    figure, axis = plt.subplots(figsize=(10, 4.5), layout='constrained')
    fixed = [method for method in scores if method.startswith('fixed')]
    mean, half = zip(*(scores[method] for method in fixed))
    axis.errorbar([gammas[method] for method in fixed], mean, half, color='black', marker='o', capsize=3, label='fixed')
    for number, method in enumerate(m for m in scores if m not in fixed):
        axis.errorbar(gammas[method], *scores[method], color=f'C{number}', marker='Ds^vP*XhHd'[number % 10],
                      capsize=3, linestyle='', label=method)
    axis.set(xlabel=r'$\gamma_-$ at the end of the training', ylabel='mAP [%], mean and 95 % interval')
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc='outside right upper')
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure without its date, so that equal figures are equal files."""
    figure.savefig(path, metadata=dict(Date=None))
    plt.close(figure)


if __name__ == '__main__':
    plt.rcParams['svg.hashsalt'] = 'mmasl'
    main()
