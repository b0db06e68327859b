"""The tables and figures of arXiv 2009.14119: what each row is, its training, and the paper's number beside ours.

On the paper's data ('real') or, for the comparisons of losses, on handwritten digits that 2 CPU cores train. Finished
trainings are kept in the work dir and not repeated, interrupted ones are resumed.
"""
import argparse
import os.path as osp
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmasl.cli import check_data
from mmasl.datasets.digits import DigitScenes
from mmasl.paper.experiments import OWN, Row, Training, digits_of, items, rows
from mmasl.paper.render import CURVES, Results, draw, render
from mmasl.runs import Run, fill_blocks, train, write_rows

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'reproduce.md'
END = 0.02  # share of the training over which 'at the end' is a mean, and a curve is averaged
POINTS = 50  # of a curve


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what')
    what.add_argument('--list', action='store_true', help='show every row: its config, number, command and state')
    what.add_argument('--table', type=int, nargs='+', default=[], metavar='N', help='1 to 13')
    what.add_argument('--figure', type=int, nargs='+', default=[], metavar='N', help='2 to 9')
    axes = ('share of missing training labels', 'labels per image', 'epochs', 'epochs of the pre-training')
    for item, axis in zip(OWN, axes, strict=True):
        what.add_argument(flag(item), action='append_const', const=item, dest='own', default=[],
                          help=f'mAP against the {axis} (digits only)')
    what.add_argument('--all', action='store_true', help='all that the data have')
    what.add_argument('--render', action='store_true',
                      help='train nothing; make tables and pictures anew, of finished trainings too')
    parser.add_argument('--data', choices=['digits', 'real'], help="default: 'digits'; both for --list")
    parser.add_argument('--seeds', type=int, help='trainings of each row (default: 3 on digits, 1 on real data)')
    parser.add_argument('--gpus', type=int, default=max(1, torch.cuda.device_count()), help='of one training')
    parser.add_argument('--jobs', type=int,
                        help='trainings side by side (default: one per core without a GPU, else one)')
    parser.add_argument('--work-dir', default='work_dirs/paper', help='folder of the runs (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/paper/results'),
                        help='folder of rows, tables and pictures; benchmarks/paper holds those of docs/reproduce.md, '
                        'which are put into the page too (default: %(default)s)')
    args = parser.parse_args(argv)
    data = args.data or 'digits'
    chosen = [f'Table {n}' for n in args.table] + [f'Fig. {n}' for n in args.figure]
    chosen += args.own
    known = items(data)
    for item in chosen:
        if item not in known:
            parser.error(f'{item} has no rows on --data {data}; there are: {", ".join(known)}')
    if not (chosen or args.list or args.all or args.render):
        parser.error('nothing to do: give '
                     f'--list, --all, --table N, --figure N, {", ".join(map(flag, OWN))} or --render')
    if args.seeds is not None and args.seeds < 1:
        parser.error(f'--seeds {args.seeds}: at least one')
    args.items = chosen or (known if args.all or args.render else [])
    return args


def flag(item: str) -> str:
    return f'--{item.lower().replace(" ", "-")}'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list:
        for data in [args.data] if args.data else ['real', 'digits']:
            print_list(data, Results(args.out, data))
        return
    data = args.data or 'digits'
    results = Results(args.out, data)
    trainings = list(dict.fromkeys(
        training for item in args.items for row in rows(item, data) for training in row.trainings))
    # On GPUs one training after the other.
    jobs = args.jobs or (1 if torch.cuda.is_available() else None)
    if trainings and not args.render:
        prepare(trainings, jobs, args.gpus)
    for seed in range(args.seeds or (3 if data == 'digits' else 1)):
        runs = {one: run_of(one, data, seed, args.work_dir) for one in trainings if seed not in results.seeds(one)}
        try:
            if runs and not args.render:
                print(f'== seed {seed}: {len(runs)} trainings')
                train(list(runs.values()), jobs, args.gpus)
        finally:  # an interrupted call leaves the rows of what has been trained
            collect({one: run for one, run in runs.items() if run.finished}, seed, results)
            results = Results(args.out, data)
    for item in args.items:
        picture = picture_of(item, data, args.out)
        drawn = draw(item, results, [picture, picture.with_suffix('.png')])
        text = f'## {item}\n{render(item, results)}\n' + (f'\n![{item}]({picture.name})\n' if drawn else '')
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.with_suffix('.md').write_text(text)
        print(f'\n{text}')
    print(f'Rows, tables and pictures: {args.out}')
    if args.out.resolve() == ROOT / 'benchmarks' / 'paper':
        PAGE.write_text(page(PAGE.read_text(), args.out.resolve()))


def page(text: str, folder: Path) -> str:
    """docs/reproduce.md with the tables and pictures of ``<!-- paper: ITEM, DATA -->`` made from a folder's rows."""
    def block(what: str) -> str:
        item, data = what.rsplit(', ', 1)
        drawn = picture_of(item, data, folder)
        link = f'\n\n![{item}](../{drawn.relative_to(ROOT).as_posix()})' if drawn.exists() else ''
        return render(item, Results(folder, data)) + link
    return fill_blocks(text, dict(paper=block))


def picture_of(item: str, data: str, folder: Path) -> Path:
    return folder / data / f'{item.lower().replace(". ", "").replace(" ", "")}.svg'


def run_of(training: Training, data: str, seed: int, work_dir: str) -> Run:
    options = dict(training.options) | {'randomness.seed': seed}
    if data == 'digits':
        # One evaluation, at the end; and what happens along the training, as fine as the curves need it.
        options |= {'train_cfg.val_interval': config(training).train_cfg.max_epochs, 'default_hooks.logger.interval': 5}
    return Run(training.path, f'{work_dir}/{data}/{training.name}_seed{seed}', options)


@cache
def config(training: Training) -> Config:
    cfg = Config.fromfile(training.path)
    cfg.merge_from_dict(dict(training.options))
    return cfg


def data_roots(cfg: Config) -> set[str]:
    return {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val')}


def starting_points(cfg: Config) -> Iterator[str]:
    """Checkpoints that a training starts from and another config of this repository makes."""
    initial = cfg.model.get('backbone', {}).get('init_cfg') or {}
    yield from (path for path in (cfg.get('load_from'), initial.get('checkpoint'))
                if path and osp.exists(f'configs/{osp.basename(osp.dirname(path))}.py'))


def prepare(trainings: Sequence[Training], jobs: int | None, gpus: int) -> None:
    """Write the digits, refuse missing data, and train what others start from.

    Raises:
        SystemExit: Data are missing.
    """
    first = {path: Training(osp.basename(osp.dirname(path))) for training in trainings
             for path in starting_points(config(training))}
    for training in [*first.values(), *trainings]:
        cfg = config(training)
        for root in data_roots(cfg):
            scenes: DigitScenes | None = digits_of(root)
            if scenes is not None:
                scenes.write(root)
        check_data(cfg, 'train', 'val')
    runs = [Run(training.path, osp.dirname(path)) for path, training in first.items() if not osp.exists(path)]
    if runs:
        print('== what the others start from')
        train(runs, jobs, gpus)


def collect(runs: dict[Training, Run], seed: int, results: Results) -> None:
    """Add finished runs to the rows, and the curves of those that a figure draws to theirs."""
    curved = {training for item in CURVES for row in rows(item, results.data) for training in row.trainings}
    new: list[dict[str, Any]] = [
        dict(config=one.config, options=one.overrides, seed=seed, **scalars(run)) for one, run in runs.items()]
    curves: list[dict[str, Any]] = [
        dict(config=one.config, options=one.overrides, seed=seed, **point)
        for one, run in runs.items() if one in curved for point in curve(run)]
    for path, old, added in ((results.path, results.rows, new), (results.curves_path, results.curve_rows, curves)):
        keys = {(row['config'], row['options'], str(row['seed'])) for row in added}
        both = [row for row in old if (row['config'], row['options'], row['seed']) not in keys] + added
        both.sort(key=lambda row: (row['config'], row['options'], int(row['seed']), float(row.get('share', 0))))
        names = list(dict.fromkeys(name for row in both for name in row))
        if both:
            write_rows(path, [{name: row.get(name, '') for name in names} for row in both])


def scalars(run: Run) -> dict[str, str]:
    """The last evaluation, in percent, and the end of the training."""
    last, steps = run.evaluations()[-1], run.training()
    values: dict[str, Any] = {
        key.split('/')[-1]: value * (100 if key.startswith('coco/') else 1) for key, value in last.items()
        if '/' in key and isinstance(value, (int, float))}
    end = [row for row in steps if row['step'] > (1 - END) * steps[-1]['step']]
    for name in ('p_t_pos', 'p_t_neg', 'gap'):
        if name in end[-1]:
            values[f'train_{name}'] = np.mean([row[name] for row in end])
    if 'gamma_neg' in end[-1]:
        values['gamma_neg'] = np.mean([row['gamma_neg'] for row in end])
        target = Config.fromfile(run.config).custom_hooks[0].get('target', 0.1)
        target = run.options.get('custom_hooks.0.target', target)
        near = [row['step'] for row in steps if abs(row['gap'] - target) <= END]
        values['reached'] = 100 * near[0] / steps[-1]['step'] if near else ''
    return {name: f'{value:.4g}' if value != '' else '' for name, value in values.items()}


def curve(run: Run) -> Iterator[dict[str, str]]:
    """What is logged of the probabilities along the training, averaged over 2 % of it."""
    steps = run.training()
    shares = np.array([row['step'] for row in steps]) / steps[-1]['step']
    for share in np.linspace(END, 1, POINTS):
        near = [row for row, place in zip(steps, shares, strict=True) if share - END <= place <= share]
        yield dict(share=f'{share:.3f}', **{name: f'{np.mean([row[name] for row in near]):.4g}'
                                            for name in ('p_t_pos', 'p_t_neg', 'gap', 'gamma_neg') if name in steps[0]})


def state(row: Row, results: Results) -> str:
    """Done, cited, or what is missing."""
    if row.cited:
        return 'cited'
    if not row.trainings:
        return 'drawn from the equations'
    seeds = min(len(results.seeds(training)) for training in row.trainings)
    if seeds:
        return f'done, {seeds} seed{"s" * (seeds > 1)}'
    cfgs = [config(training) for training in row.trainings]
    roots = {root for cfg in cfgs for root in data_roots(cfg) if digits_of(root) is None and not osp.isdir(root)}
    files = {path for cfg in cfgs for path in starting_points(cfg) if results.data == 'real' and not osp.exists(path)}
    wanted = [f'needs data: {", ".join(sorted(roots))}'] * bool(roots)
    wanted += [f'needs checkpoint: {", ".join(sorted(files))}'] * bool(files)
    return '; '.join(wanted) or 'to be trained'


def print_list(data: str, results: Results) -> None:
    print(f'# --data {data}')
    for item in items(data):
        found = rows(item, data)
        title = next((entry.title for row in found for entry in row.entries), '')
        print(f'\n## {item}' + (f': {title}' if title else ''))
        for row in found:
            numbers = ', '.join(f'{entry.column} {entry.value:g}' for entry in row.entries if entry.value is not None)
            print(f'{row.label}\n    paper: {numbers or "no number"}\n    state: {state(row, results)}')
            for command in [training.command for training in row.trainings] or [row.command]:
                print(f'    {command}')


if __name__ == '__main__':
    main()
