"""Train a small classifier for an hour, and check that its memory does not grow and no process remains.

The training runs tools/train.py on the CPU with adaptive asymmetry, data loader workers, and an evaluation and a
checkpoint per epoch. The memory is sampled in rows, which are plotted too.
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
from mmasl.errors import ConfigError, MMASLError
from mmasl.registry import HOOKS
from mmasl.reproduce.experiments import config_path
from mmasl.reproduce.runs import TRAIN, Run, write_rows
from mmasl.utils.tools import exit_on_user_error

ROOT = Path(__file__).parents[2]
MARK = 'MMASL_LONG_RUN'  # environment variable that identifies all processes of a run, orphans too
ALLOWED = 2.  # growth in percent
WINDOW = 0.1  # the medians are over this share of the time after the warm-up, at its start and its end
PATIENCE = 30  # seconds in which processes may end after the training
# Training keeps its workers, and evaluation starts new ones each time: both kinds are tested.
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


@HOOKS.register_module()
class StopAfter(Hook):
    """Stops a training at the end of the epoch in which a time has passed.

    Args:
        minutes: The time in minutes.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes

    def before_train(self, runner: Runner) -> None:
        self.start = time.monotonic()

    def after_train_epoch(self, runner: Runner) -> None:
        runner.train_loop.stop_training = time.monotonic() - self.start > self.seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--minutes', type=float, default=60., help='minutes of training')
    parser.add_argument('--warm-up', type=float, default=0.25,
                        help='share of the time in which memory may grow, because workers and caches start')
    parser.add_argument('--interval', type=float, default=10., help='seconds between two samples of the memory')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/long_run'), help='a new folder')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/long_run/long_run.csv'),
                        help='CSV file of the samples; the plot is written beside it')
    args = parser.parse_args()
    if not 0 <= args.warm_up < 1:
        parser.error(f'--warm-up {args.warm_up} must be in [0, 1)')
    return args


@exit_on_user_error()
def main() -> None:
    args = parse_args()
    if args.work_dir.exists():
        raise ConfigError(f'{args.work_dir} exists, but the training must not be resumed. Remove the folder, or choose '
                          'another --work-dir')
    rows = watch(args.minutes, args.work_dir.resolve(), args.interval)
    write_rows(args.out, rows)
    draw(rows, args.warm_up, args.out.with_suffix('.svg'))
    print(verdict(rows, args.warm_up))


def watch(minutes: float, work_dir: Path, interval: float) -> list[dict]:
    """Train, and sample the memory of all processes.

    Args:
        minutes: Duration of the training.
        work_dir: A new folder.
        interval: Seconds between two samples.

    Returns:
        One row per sample. The last one is of the processes that remain after the end.

    Raises:
        MMASLError: The training failed.
    """
    data = DigitScenes(train=960, val=240, long_tail=0.7, missing=0.3).write(work_dir / 'digits')
    config, run = work_dir / 'config.py', Run('', str(work_dir))
    config.write_text(CONFIG.format(base=str(ROOT / config_path('resnet_adaptive_digits_hard')), data=str(data),
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
        raise MMASLError(f'The training failed (exit {process.returncode}). The end of its output:\n{run.tail(3000)}')
    deadline = time.monotonic() + PATIENCE
    while processes(token) and time.monotonic() < deadline:
        time.sleep(0.2)
    print(f'{len(run.evaluations())} epochs')
    return [*rows, dict(minute=f'{(time.monotonic() - start) / 60:.2f}', **measure(token))]


def processes(token: str) -> list[int]:
    """IDs of the processes that have the token in their environment."""
    mark, found = f'{MARK}={token}'.encode(), []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            if mark in (folder / 'environ').read_bytes().split(b'\0'):
                found.append(int(folder.name))
        except OSError:  # another user's process, or it has ended
            continue
    return found


def measure(token: str) -> dict[str, object]:
    """Number of processes with a token, and their memory in MiB.

    ``allocated`` is anonymous memory and shared memory without a file; a page that n processes share counts 1/n in each
    (Pss_Anon, Pss_Shmem). ``rss`` is the sum of the resident sets. It counts such a page n times, and includes pages of
    libraries.
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
    """Growth of a column in percent, from the start of the time after the warm-up to its end.

    Medians ignore samples that fall into an evaluation or the writing of a checkpoint.

    Args:
        rows: Samples as :func:`watch` returns them.
        warm_up: Share of the time that is ignored.
        figure: 'allocated' or 'rss'.
    """
    minutes, values = (np.array([float(row[name]) for row in rows[:-1]]) for name in ('minute', figure))
    begin, end = warm_up * minutes[-1], minutes[-1]
    width = WINDOW * (end - begin)
    first = np.median(values[(minutes >= begin) & (minutes <= begin + width)])
    return 100 * float(np.median(values[minutes >= end - width]) / first - 1)


def verdict(rows: Sequence[dict], warm_up: float) -> str:
    """The result in words.

    Raises:
        MMASLError: The memory grew by more than :data:`ALLOWED`, or a process remains.
    """
    found = {figure: growth(rows, warm_up, figure) for figure in ('allocated', 'rss')}
    text = ', '.join(f'{figure} {value:+.2f} %' for figure, value in found.items())
    minutes = float(rows[-2]['minute'])
    text = f'{text} after the first {warm_up:.0%} of {minutes:.0f} minutes (allowed: {ALLOWED:g} %)'
    if int(rows[-1]['processes']):
        raise MMASLError(f'{rows[-1]["processes"]} processes remain {PATIENCE} s after the end; {text}')
    if max(found.values()) > ALLOWED:
        raise MMASLError(f'The memory grows: {text}')
    return f'No process remains; {text}'


def draw(rows: Sequence[dict], warm_up: float, path: Path) -> None:
    """Plot the samples."""
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
