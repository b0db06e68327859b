"""Train a small classifier for an hour, and see that its memory does not grow and that no process is left behind.

Adaptive asymmetry, workers, an evaluation and a checkpoint each epoch, through tools/train.py on the CPU. Writes a row
for every look at the memory, and draws them.
"""
import argparse
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmasl.datasets.digits import DigitScenes
from mmasl.registry import HOOKS
from mmasl.reproduce.runs import TRAIN, Run, write_rows

ROOT = Path(__file__).parents[2]
MARK = 'MMASL_LONG_RUN'  # in the environment of all processes of a run, of those too that have lost their parent
ALLOWED = 2.  # percent
WINDOW = 0.1  # share of the time after the warm-up whose median counts, at either end
PATIENCE = 30  # seconds in which processes may end after the training
# Once from the start, and anew in each epoch: training and evaluation have workers of both kinds.
CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['mmasl', 'benchmarks.long_run.long_run'], allow_failed_imports=False)
model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(num_workers=2, persistent_workers=True, dataset=dict(data_root={data!r}))
val_dataloader = dict(num_workers=1, persistent_workers=False, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=10**6)
param_scheduler = dict(_delete_=True, type='ConstantLR', factor=1.)
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1, step=0.1, begin=0.),
                dict(type='mmasl.StopAfter', minutes={minutes})]
"""


@HOOKS.register_module(force=True)  # tests load this file more than once
class StopAfter(Hook):
    """Ends a training by epochs, after the first epoch in which its time is over.

    Args:
        minutes: Length of the training.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes

    def before_train(self, runner: Runner) -> None:
        self.start = time.monotonic()

    def after_train_epoch(self, runner: Runner) -> None:
        runner.train_loop.stop_training = time.monotonic() - self.start > self.seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--minutes', type=float, default=60., help='length of the training')
    parser.add_argument('--warm-up', type=float, default=0.25,
                        help='share of it in which memory may grow: the heap takes its shape, workers and caches start')
    parser.add_argument('--interval', type=float, default=10., help='seconds between two looks at the memory')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/long_run'), help='a new folder')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/long_run/long_run.csv'),
                        help='rows; the plot stands beside')
    args = parser.parse_args()
    if not 0 <= args.warm_up < 1:
        parser.error(f'--warm-up {args.warm_up} must be a share of the training, in [0, 1)')
    return args


def main() -> None:
    args = parse_args()
    if args.work_dir.exists():
        raise SystemExit(f'{args.work_dir} exists: a resumed training would be warm. Remove it, or name another '
                         '--work-dir')
    rows = watch(args.minutes, args.work_dir.resolve(), args.interval)
    write_rows(args.out, rows)
    draw(rows, args.warm_up, args.out.with_suffix('.svg'))
    print(verdict(rows, args.warm_up))


def watch(minutes: float, work_dir: Path, interval: float) -> list[dict]:
    """Train, and look at the memory of all processes now and then; the last row is of what is left after the end.

    Raises:
        SystemExit: The training failed.
    """
    data = DigitScenes(train=960, val=240, long_tail=0.7, missing=0.3).write(work_dir / 'digits')
    config, run = work_dir / 'config.py', Run('', str(work_dir))
    config.write_text(CONFIG.format(base=str(ROOT / 'configs/digits/resnet_adaptive_digits_hard.py'), data=str(data),
                                    minutes=minutes))
    token = uuid.uuid4().hex
    with open(work_dir / 'train.txt', 'w') as output:
        process = subprocess.Popen([sys.executable, TRAIN, config, '--work-dir', work_dir], stdout=output,
                                   stderr=subprocess.STDOUT, cwd=ROOT,
                                   env={**os.environ, 'PYTHONPATH': str(ROOT), MARK: token, 'OMP_NUM_THREADS': '1'})
    rows, start = [], time.monotonic()
    try:
        while process.poll() is None:
            rows.append(dict(minute=f'{(time.monotonic() - start) / 60:.2f}', **measure(token)))
            time.sleep(interval)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise SystemExit(f'The training failed (exit {process.returncode}); the end of its output:\n{run.tail(3000)}')
    deadline = time.monotonic() + PATIENCE
    while processes(token) and time.monotonic() < deadline:
        time.sleep(0.2)
    print(f'{len(run.evaluations())} epochs')
    return [*rows, dict(minute=f'{(time.monotonic() - start) / 60:.2f}', **measure(token))]


def processes(token: str) -> list[int]:
    """The processes that were started with this mark, and those that they started, whoever their parent is now."""
    mark, found = f'{MARK}={token}'.encode(), []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            if mark in (folder / 'environ').read_bytes().split(b'\0'):
                found.append(int(folder.name))
        except OSError:  # another user's, or it has ended
            continue
    return found


def measure(token: str) -> dict[str, object]:
    """Number of processes and their memory in MiB.

    ``allocated`` is what they hold of their own: anonymous memory and shared memory without a file, a page that n of
    them share counted 1/n in each (Pss_Anon, Pss_Shmem). ``rss`` is the sum of their resident sets, which counts such a
    page n times, and the libraries' pages that other programs have loaded too.
    """
    pids, sums = processes(token), dict(Rss=0, Pss_Anon=0, Pss_Shmem=0)
    for pid in pids:
        try:
            lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()[1:]
        except OSError:  # it has ended
            continue
        figures = {line.split(':')[0]: int(line.split()[1]) for line in lines}
        sums = {name: value + figures[name] for name, value in sums.items()}
    return dict(processes=len(pids), allocated=f'{(sums["Pss_Anon"] + sums["Pss_Shmem"]) / 1024:.1f}',
                rss=f'{sums["Rss"] / 1024:.1f}')


def growth(rows: Sequence[dict], warm_up: float, figure: str) -> float:
    """Growth of a figure in percent, from the first part of the time after the warm-up to the last.

    Medians: single looks fall into an evaluation or the writing of a checkpoint.
    """
    minutes, values = (np.array([float(row[name]) for row in rows[:-1]]) for name in ('minute', figure))
    begin, end = warm_up * minutes[-1], minutes[-1]
    width = WINDOW * (end - begin)
    first = np.median(values[(minutes >= begin) & (minutes <= begin + width)])
    return 100 * float(np.median(values[minutes >= end - width]) / first - 1)


def verdict(rows: Sequence[dict], warm_up: float) -> str:
    """What was found, in words.

    Raises:
        SystemExit: Memory grew by more than is allowed, or a process is left.
    """
    found = {figure: growth(rows, warm_up, figure) for figure in ('allocated', 'rss')}
    text = ', '.join(f'{figure} {value:+.2f} %' for figure, value in found.items())
    minutes = float(rows[-2]['minute'])
    text = f'{text} after the first {warm_up:.0%} of {minutes:.0f} minutes ({ALLOWED:g} % are allowed)'
    if int(rows[-1]['processes']):
        raise SystemExit(f'{rows[-1]["processes"]} processes are left {PATIENCE} s after the end; {text}')
    if max(found.values()) > ALLOWED:
        raise SystemExit(f'The memory grows: {text}')
    return f'No process is left; {text}'


def draw(rows: Sequence[dict], warm_up: float, path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    minutes = np.array([float(row['minute']) for row in rows[:-1]])
    figure, axes = plt.subplots(2, figsize=(8, 5), layout='constrained', sharex=True)
    for axis, name, title in zip(axes, ('allocated', 'rss'), ('allocated', 'sum of resident sets')):
        values = np.array([float(row[name]) for row in rows[:-1]])
        axis.plot(minutes, values, linewidth=1, color='C0')
        warm = minutes >= warm_up * minutes[-1]
        level = np.median(values[warm][:max(1, round(WINDOW * warm.sum()))])
        axis.axhspan(level * (1 - ALLOWED / 100), level * (1 + ALLOWED / 100), color='C2', alpha=0.2,
                     label=f'{ALLOWED:g} % about the level after the warm-up')
        axis.axvspan(0, warm_up * minutes[-1], color='grey', alpha=0.15, label='warm-up')
        axis.set(ylabel=f'{title} [MiB]', ylim=(0.6 * level, 1.4 * level))
        axis.grid(alpha=0.3)
    axes[0].legend(loc='lower right')
    axes[1].set_xlabel('minutes')
    figure.savefig(path)
    plt.close(figure)


if __name__ == '__main__':
    main()
