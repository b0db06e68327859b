"""The tables and figures of arXiv 2009.14119: what each row is, its training, and the paper's number beside ours.

On the paper's data ('real') or, for the comparisons of losses, on handwritten digits that 2 CPU cores train. Finished
trainings are kept in the work dir and not repeated, interrupted ones are resumed.
"""
import argparse
import os.path as osp
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmasl.datasets.digits import DigitScenes
from mmasl.reproduce.experiments import OWN, Row, Training, config_path, digits_of, items, rows
from mmasl.reproduce.render import CURVES, Results, draw, render
from mmasl.reproduce.runs import Run, fill_blocks, fingerprint, train, write_rows
from mmasl.utils.tools import check_data
from tools import plot_loss

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'reproduce.md'
END = 0.02  # share of the training over which 'at the end' is a mean, and a curve is averaged
POINTS = 50  # of a curve
# The figures that need no training.
EQUATIONS = {'Fig. 2': (plot_loss.draw_loss, plot_loss.FIGURE_2),
             'Fig. 3': (plot_loss.draw_gradient, plot_loss.FIGURE_3)}


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
    what.add_argument('--released', action='store_true', help='also evaluate the checkpoints that the authors released '
                      'for the data of a table, which are downloaded')
    what.add_argument('--render', action='store_true',
                      help='train nothing; make tables and pictures anew, of finished trainings too')
    parser.add_argument('--data', choices=['digits', 'real'], help="default: 'digits'; both for --list")
    parser.add_argument('--seeds', type=int, help='trainings of each row (default: 3 on digits, 1 on real data)')
    parser.add_argument('--gpus', type=int, help="of one training on real data, which share its config's total batch "
                        '(default: all); the digits have one')
    parser.add_argument('--jobs', type=int,
                        help='trainings side by side (default: as many as the GPUs allow; without one, one per core)')
    parser.add_argument('--work-dir', default='work_dirs/paper', help='folder of the runs (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/paper/results'),
                        help='folder of rows, tables and pictures; benchmarks/paper holds those of docs/reproduce.md, '
                        'which are put into the page too (default: %(default)s)')
    args = parser.parse_args(argv)
    args.kinds = [args.data] if args.data else ['real', 'digits'] if args.list else ['digits']
    known = list(dict.fromkeys(item for data in args.kinds for item in items(data)))
    chosen = [f'Table {n}' for n in args.table] + [f'Fig. {n}' for n in args.figure] + args.own
    for item in chosen:
        if item not in known:
            parser.error(f'{item} has no rows on --data {" or ".join(args.kinds)}; there are: {", ".join(known)}')
    if not (chosen or args.list or args.all or args.render):
        parser.error('nothing to do: give '
                     f'--list, --all, --table N, --figure N, {", ".join(map(flag, OWN))} or --render')
    for name, value in (('--seeds', args.seeds), ('--gpus', args.gpus), ('--jobs', args.jobs)):
        if value is not None and value < 1:
            parser.error(f'{name} {value}: at least one')
    if args.kinds == ['digits'] and (args.gpus or 1) > 1:
        parser.error(f'--gpus {args.gpus}: a training on digits is of one process; for several side by side see --jobs')
    args.items = known if args.all or not chosen else chosen
    return args


def flag(item: str) -> str:
    return f'--{item.lower().replace(" ", "-")}'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list:
        for data in args.kinds:
            print_list(data, [item for item in items(data) if item in args.items], Results(args.out, data))
        return
    data, = args.kinds
    gpus = 1 if data == 'digits' else args.gpus or max(1, torch.cuda.device_count())
    results = Results(args.out, data)
    trainings = list(dict.fromkeys(
        training for item in args.items for row in rows(item, data) for training in row.trainings
        if args.released or not training.released))
    refuse_changed(trainings, results)
    if trainings and not args.render:
        prepare(trainings, data, args.jobs, gpus)
    for seed in range(args.seeds or (3 if data == 'digits' else 1)):
        runs = {one: run_of(one, data, seed, args.work_dir, gpus) for one in trainings
                if seed not in results.seeds(one) and not (one.released and seed)}
        try:
            if runs and not args.render:
                print(f'== seed {seed}: {len(runs)} trainings')
                train(list(runs.values()), args.jobs, gpus)
        finally:  # an interrupted call leaves the rows of what has been trained
            collect({one: run for one, run in runs.items() if run.state == 'finished'}, seed, results)
            results = Results(args.out, data)
    for item in args.items:
        picture = picture_of(item, data, args.out)
        picture.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw_item(item, results, [picture, picture.with_suffix('.png')])
        text = f'## {item}\n{table_of(item, results)}\n' + (f'\n![{item}]({picture.name})\n' if drawn else '')
        picture.with_suffix('.md').write_text(text)
        print(f'\n{text}')
    print(f'Rows, tables and pictures: {args.out}')
    if args.out.resolve() == ROOT / 'benchmarks' / 'paper':
        PAGE.write_text(page(PAGE.read_text(), args.out.resolve()))


def refuse_changed(trainings: Sequence[Training], results: Results) -> None:
    """Refuse rows of other settings than the configs have now, before anything is trained beside them."""
    changed = [training for training in trainings if changed_since(training, results)]
    if changed:
        raise SystemExit(f'{results.path} has rows of other settings than these configs have now: '
                         f'{", ".join(training.name for training in changed)}. Remove the rows, and the runs in the '
                         'work dir, or choose another --out and --work-dir')


def changed_since(training: Training, results: Results) -> bool:
    return any(row.get('settings') != settings(training) for row in results.of(training))


def draw_item(item: str, results: Results, paths: Sequence[Path]) -> bool:
    """Draw what has been trained of an item, or a figure of the equations, to files; whether there was anything."""
    if item in EQUATIONS:
        for path in paths:
            plot_loss.save([EQUATIONS[item]], False, path)
    return item in EQUATIONS or draw(item, results, paths)


def table_of(item: str, results: Results) -> str:
    return plot_loss.render_table(EQUATIONS[item][1]) if item in EQUATIONS else render(item, results)


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


def run_of(training: Training, data: str, seed: int, work_dir: str, gpus: int = 1) -> Run:
    if training.released:
        return Run(training.path, f'{work_dir}/{data}/{training.name}', checkpoint=training.checkpoint)
    options = dict(training.options) | {'randomness.seed': seed}
    if data == 'digits':
        # One evaluation, at the end; and what happens along the training, as fine as the curves need it.
        options |= {'train_cfg.val_interval': config(training).train_cfg.max_epochs, 'default_hooks.logger.interval': 5}
    folder = f'{work_dir}/{data}/{training.name}_seed{seed}'
    return Run(training.path, folder, options, shared_batch(training, data, gpus))


def shared_batch(training: Training, data: str, gpus: int) -> dict[str, object]:
    """The option that keeps the total batch on any number of GPUs: the learning rate is meant for it.

    Raises:
        SystemExit: It cannot be shared equally.
    """
    if data == 'digits':  # for one process
        return {}
    total = config(training).auto_scale_lr.base_batch_size
    if total % gpus:
        raise SystemExit(f'{training.path} trains on batches of {total} images, which {gpus} GPUs cannot share: choose '
                         f'--gpus among {", ".join(str(n) for n in range(1, 65) if total % n == 0)}')
    return {'train_dataloader.batch_size': total // gpus}


load = cache(Config.fromfile)


@cache
def config(training: Training) -> Config:
    cfg = deepcopy(load(training.path))
    cfg.merge_from_dict(dict(training.options))
    return cfg


@cache
def settings(training: Training) -> str:
    """Stands in the rows of a training: they do not count once its config has changed."""
    return fingerprint(config(training))[:12]


def data_roots(cfg: Config) -> set[str]:
    return {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val')}


def starting_points(cfg: Config) -> Iterator[str]:
    """Checkpoints that a training starts from and another config of this repository makes."""
    initial = cfg.model.get('backbone', {}).get('init_cfg') or {}
    yield from (path for path in (cfg.get('load_from'), initial.get('checkpoint'))
                if path and osp.exists(config_path(osp.basename(osp.dirname(path)))))


def prepare(trainings: Sequence[Training], data: str, jobs: int | None, gpus: int) -> None:
    """Write the digits, refuse missing data, and train what others start from.

    Raises:
        SystemExit: Data are missing, or what others start from was trained with other settings.
    """
    first = {path: Training(osp.basename(osp.dirname(path))) for training in trainings
             if not training.released for path in starting_points(config(training))}
    for training in [*first.values(), *trainings]:
        cfg = config(training)
        for root in data_roots(cfg):
            scenes: DigitScenes | None = digits_of(root)
            if scenes is not None:
                scenes.write(root)
        check_data(cfg, *(['test'] if training.released else ['train', 'val']))
    runs = []
    for path, training in first.items():
        run = Run(training.path, osp.dirname(path), placement=shared_batch(training, data, gpus))
        if not (run.finished or (run.state == 'new' and osp.exists(path))):  # it may have come from elsewhere
            runs.append(run)
    if runs:
        print('== what the others start from')
        train(runs, jobs, gpus)


def collect(runs: dict[Training, Run], seed: int, results: Results) -> None:
    """Add finished runs to the rows, and the curves of those that a figure draws to theirs."""
    curved = {training for item in CURVES for row in rows(item, results.data) for training in row.trainings}
    new: list[dict[str, Any]] = [
        dict(config=one.config, options=one.overrides, seed=seed, settings=settings(one), **scalars(run))
        for one, run in runs.items()]
    curves: list[dict[str, Any]] = [
        dict(config=one.config, options=one.overrides, seed=seed, **point)
        for one, run in runs.items() if one in curved for point in curve(run)]
    for path, old, added in ((results.path, results.rows, new), (results.curves_path, results.curve_rows, curves)):
        keys = {(row['config'], row['options'], str(row['seed'])) for row in added}
        both = [row for row in old if (row['config'], row['options'], row['seed']) not in keys] + added
        both.sort(key=lambda row: (row['config'], row['options'], int(row['seed']), float(row.get('share', 0))))
        if both:
            write_rows(path, both)


def scalars(run: Run) -> dict[str, str]:
    """The last evaluation, in percent, and the end of the training."""
    last, steps = run.evaluations()[-1], run.training()
    values: dict[str, Any] = {
        key.split('/')[-1]: value * (100 if key.startswith('coco/') else 1) for key, value in last.items()
        if '/' in key and isinstance(value, (int, float))}
    end = [row for row in steps if row['step'] > (1 - END) * steps[-1]['step']]  # none of an evaluation
    for name in ('p_t_pos', 'p_t_neg', 'gap'):
        if end and name in end[-1]:
            values[f'train_{name}'] = np.mean([row[name] for row in end])
    if end and 'gamma_neg' in end[-1]:
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
    if any(changed_since(training, results) for training in row.trainings):
        return 'to be trained again: its config has changed since'
    seeds = min(len(results.seeds(training)) for training in row.trainings)
    if seeds:
        return f'done, {seeds} seed{"s" * (seeds > 1)}'
    cfgs = [config(training) for training in row.trainings]
    roots = {root for cfg in cfgs for root in data_roots(cfg) if digits_of(root) is None and not osp.isdir(root)}
    files = {path for training, cfg in zip(row.trainings, cfgs, strict=True) for path in starting_points(cfg)
             if results.data == 'real' and not training.released and not osp.exists(path)}
    wanted = [f'needs data: {", ".join(sorted(roots))}'] * bool(roots)
    wanted += [f'needs checkpoint: {", ".join(sorted(files))}'] * bool(files)
    return '; '.join(wanted) or ('to be evaluated' if row.trainings[0].released else 'to be trained')


def print_list(data: str, chosen: Sequence[str], results: Results) -> None:
    print(f'# --data {data}')
    for item in chosen:
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
