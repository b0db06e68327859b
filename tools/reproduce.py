"""Reproduce the tables and figures of arXiv 2009.14119, and show the paper's numbers beside ours.

Trains the rows of a table or figure on the paper's data ('real'), on photographs at 128 px with a small pre-trained
backbone ('photos'), or on handwritten digits ('digits'), which train on 2 CPU cores. Finished trainings are not
repeated; interrupted ones are resumed.
"""
import argparse
import os.path as osp
from collections.abc import Sequence
from pathlib import Path

import torch

from mmasl.analysis.loss_plots import FIGURE_2, FIGURE_3, draw_gradient, draw_loss, render_table, save_figure
from mmasl.datasets.digits import DigitScenes
from mmasl.errors import ConfigError
from mmasl.reproduce.experiments import OWN, Row, Training, digits_of, items, rows
from mmasl.reproduce.render import CURVES, draw, render_item
from mmasl.reproduce.results import Results
from mmasl.reproduce.runs import Run, train
from mmasl.utils.markdown import fill_blocks
from mmasl.utils.tools import check_data, exit_on_user_error

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'reproduce.md'
# Figures that need no training.
EQUATIONS = {'Fig. 2': (draw_loss, FIGURE_2), 'Fig. 3': (draw_gradient, FIGURE_3)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what to reproduce')
    what.add_argument('--list', action='store_true', help='list every row: config, number, command and state')
    what.add_argument('--table', type=int, nargs='+', default=[], metavar='N', help='1 to 13')
    what.add_argument('--figure', type=int, nargs='+', default=[], metavar='N', help='2 to 9')
    axes = ('share of missing training labels', 'labels per image', 'epochs', 'epochs of the pre-training')
    for item, axis in zip(OWN, axes, strict=True):
        what.add_argument(flag(item), action='append_const', const=item, dest='own', default=[],
                          help=f'mAP against the {axis} (digits only)')
    what.add_argument('--all', action='store_true', help='every table and figure of the data')
    what.add_argument('--released', action='store_true',
                      help="also download and evaluate the authors' checkpoints for the table's data set")
    what.add_argument('--render', action='store_true', help='do not train; only write tables and pictures again')
    parser.add_argument('--data', choices=['digits', 'photos', 'real'], help="default: 'digits'; all for --list")
    parser.add_argument('--seeds', type=int, help='trainings per row (default: 3 on digits, 1 on other data)')
    parser.add_argument('--gpus', type=int, help="GPUs per training on real data, which share the config's total batch "
                        '(default: all); a training on digits uses one process')
    parser.add_argument('--jobs', type=int,
                        help='simultaneous trainings (default: as many as the GPUs allow; without a GPU, one per core)')
    parser.add_argument('--work-dir', default='work_dirs/paper', help='folder of the runs (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/paper/results'),
                        help='folder of rows, tables and pictures; with benchmarks/paper, docs/reproduce.md is updated '
                        'too (default: %(default)s)')
    args = parser.parse_args(argv)
    args.kinds = [args.data] if args.data else ['real', 'photos', 'digits'] if args.list else ['digits']
    known = list(dict.fromkeys(item for data in args.kinds for item in items(data)))
    chosen = [f'Table {n}' for n in args.table] + [f'Fig. {n}' for n in args.figure] + args.own
    for item in chosen:
        if item not in known:
            parser.error(f'{item} has no rows on --data {" or ".join(args.kinds)}; choose from: {", ".join(known)}')
    if not (chosen or args.list or args.all or args.render):
        parser.error('nothing to do: pass '
                     f'--list, --all, --table N, --figure N, {", ".join(map(flag, OWN))} or --render')
    for name, value in (('--seeds', args.seeds), ('--gpus', args.gpus), ('--jobs', args.jobs)):
        if value is not None and value < 1:
            parser.error(f'{name} {value} must be at least 1')
    if args.kinds in (['digits'], ['photos']) and (args.gpus or 1) > 1:
        parser.error(f'--gpus {args.gpus}: a training on {args.kinds[0]} uses one process; use --jobs for several at a '
                     'time')
    args.items = known if args.all or not chosen else chosen
    return args


def flag(item: str) -> str:
    """The flag of one of our own comparisons."""
    return f'--{item.lower().replace(" ", "-")}'


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list:
        for data in args.kinds:
            print_list(data, [item for item in items(data) if item in args.items], Results(args.out, data))
        return
    data, = args.kinds
    gpus = 1 if data != 'real' else args.gpus or max(1, torch.cuda.device_count())
    results = Results(args.out, data)
    trainings = list(dict.fromkeys(
        training for item in args.items for row in rows(item, data) for training in row.trainings
        if args.released or not training.released))
    refuse_outdated(trainings, results)
    if trainings and not args.render:
        prepare(trainings, data, args.jobs, gpus)
    curved = [training for item in CURVES for row in rows(item, data) for training in row.trainings]
    for seed in range(args.seeds or (3 if data == 'digits' else 1)):
        runs = {one: one.run(data, seed, args.work_dir, gpus) for one in trainings
                if seed not in results.seeds(one) and not (one.released and seed)}
        try:
            if runs and not args.render:
                print(f'== seed {seed}: {len(runs)} trainings')
                train(list(runs.values()), args.jobs, gpus)
        finally:  # an interrupted call keeps the rows of finished trainings
            results.add({one: run for one, run in runs.items() if run.state == 'finished'}, seed, curved)
    for item in args.items:
        picture = picture_path(item, data, args.out)
        picture.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw_item(item, results, [picture, picture.with_suffix('.png')])
        table = render_table(EQUATIONS[item][1]) if item in EQUATIONS else render_item(item, results)
        text = f'## {item}\n{table}\n' + (f'\n![{item}]({picture.name})\n' if drawn else '')
        picture.with_suffix('.md').write_text(text)
        print(f'\n{text}')
    print(f'Rows, tables and pictures: {args.out}')
    if args.out.resolve() == ROOT / 'benchmarks' / 'paper':
        PAGE.write_text(fill_page(PAGE.read_text(), args.out.resolve()))


def refuse_outdated(trainings: Sequence[Training], results: Results) -> None:
    """Check that the rows have the settings of the present configs.

    Raises:
        ConfigError: They have not.
    """
    outdated = [training for training in trainings if results.outdated(training)]
    if outdated:
        raise ConfigError(f'{results.path} has rows of other settings than these configs have now: '
                          f'{", ".join(training.name for training in outdated)}. Remove the rows, and the runs in the '
                          'work dir, or choose another --out and --work-dir')


def draw_item(item: str, results: Results, paths: Sequence[Path]) -> bool:
    """Draw the trained rows of an item, or a figure of the equations; whether there was anything to draw."""
    if item in EQUATIONS:
        for path in paths:
            save_figure([EQUATIONS[item]], False, path)
    return item in EQUATIONS or draw(item, results, paths)


def fill_page(text: str, folder: Path) -> str:
    """docs/reproduce.md with the blocks ``<!-- paper: ITEM, DATA -->`` made from the rows of a folder."""
    def block(what: str) -> str:
        item, data = what.rsplit(', ', 1)
        drawn = picture_path(item, data, folder)
        link = f'\n\n![{item}](../{drawn.relative_to(ROOT).as_posix()})' if drawn.exists() else ''
        return render_item(item, Results(folder, data)) + link
    return fill_blocks(text, dict(paper=block))


def picture_path(item: str, data: str, folder: Path) -> Path:
    """Path of an item's picture."""
    return folder / data / f'{item.lower().replace(". ", "").replace(" ", "")}.svg'


def prepare(trainings: Sequence[Training], data: str, jobs: int | None, gpus: int) -> None:
    """Write the digits, check that all data exist, and train the initial checkpoints.

    Raises:
        MMASLError: Data are missing, or an initial checkpoint was trained with other settings.
    """
    first = {path: Training(Path(path).parent.name) for training in trainings
             if not training.released for path in training.initial_checkpoints}
    for training in [*first.values(), *trainings]:
        for root in training.data_roots:
            scenes: DigitScenes | None = digits_of(root)
            if scenes is not None:
                scenes.write(root)
        check_data(training.cfg, *(['test'] if training.released else ['train', 'val']))
    runs = []
    for path, training in first.items():
        run = Run(training.path, osp.dirname(path), placement=training.placement(data, gpus))
        if not (run.finished or (run.state == 'new' and osp.exists(path))):  # a file from elsewhere is used as it is
            runs.append(run)
    if runs:
        print('== initial checkpoints')
        train(runs, jobs, gpus)


def describe_state(row: Row, results: Results) -> str:
    """Whether a row is done or cited, or what it needs."""
    if row.cited:
        return 'cited'
    if not row.trainings:
        return 'drawn from the equations'
    if any(results.outdated(training) for training in row.trainings):
        return 'outdated: its config has changed since the training'
    seeds = min(len(results.seeds(training)) for training in row.trainings)
    if seeds:
        return f'done, {seeds} seed{"s" * (seeds > 1)}'
    roots = {root for training in row.trainings for root in training.data_roots
             if digits_of(root) is None and not osp.isdir(root)}
    files = {path for training in row.trainings if results.data != 'digits' and not training.released
             for path in training.initial_checkpoints if not osp.exists(path)}
    needs = [f'needs data: {", ".join(sorted(roots))}'] * bool(roots)
    needs += [f'needs checkpoint: {", ".join(sorted(files))}'] * bool(files)
    return '; '.join(needs) or ('not evaluated' if row.trainings[0].released else 'not trained')


def print_list(data: str, chosen: Sequence[str], results: Results) -> None:
    """Print the paper's numbers, state and commands of every row."""
    print(f'# --data {data}')
    for item in chosen:
        found = rows(item, data)
        title = next((entry.title for row in found for entry in row.entries), '')
        print(f'\n## {item}' + (f': {title}' if title else ''))
        for row in found:
            numbers = ', '.join(f'{entry.column} {entry.value:g}' for entry in row.entries if entry.value is not None)
            print(f'{row.label}\n    paper: {numbers or "no number"}\n    state: {describe_state(row, results)}')
            for command in [training.command for training in row.trainings] or [row.command]:
                print(f'    {command}')


if __name__ == '__main__':
    main()
