"""Runs of tools/train.py and tools/test.py as processes: side by side, watched, resumed, and read back from what they
write."""
import csv
import datetime
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config

from mmasl.utils.files import write_whole

TRAIN = Path(__file__).parents[2] / 'tools' / 'train.py'
TEST = TRAIN.with_name('test.py')
TESTED = re.compile(r'Epoch\(test\)\s+\[\s*(\d+)/(\d+)\].*?eta: ([\d:]+(?: days?, [\d:]+)?)')
PROGRESS = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: ([\d:]+(?: days?, [\d:]+)?)')


@dataclass
class Run:
    """One training, or the evaluation of a ``checkpoint`` if there is one: a config, a work directory, and overrides as
    ``--cfg-options`` takes them.

    A finished run is not trained again, an interrupted one is resumed, and one whose settings have changed since is
    refused. Overrides in ``placement`` say how it is spread over a machine: they may change from call to call.
    """
    config: str
    work_dir: str
    options: dict[str, object] = field(default_factory=dict)
    placement: dict[str, object] = field(default_factory=dict)
    checkpoint: str = ''

    def __post_init__(self) -> None:
        self._folder = Path(self.work_dir)

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def _metrics(self) -> Path:
        return self._folder / 'metrics.json'

    @property
    def state(self) -> str:
        """'new', 'interrupted', 'finished', or 'changed' where the folder holds a run of other settings."""
        path = self._folder / 'run.json'
        if not path.exists():
            return 'new'
        stamp = json.loads(path.read_text())
        if stamp['settings'] != self._settings():
            return 'changed'
        return 'finished' if stamp['finished'] else 'interrupted'

    @property
    def finished(self) -> bool:
        """Whether the run has been trained to its end with these settings.

        Raises:
            SystemExit: The folder holds a run of other settings.
        """
        state = self.state
        if state == 'changed':
            raise SystemExit(f'{self.work_dir} holds a run of {self.config} with other settings than now: remove the '
                             'folder, or choose another work dir')
        return state == 'finished'

    def start(self, threads: int, gpus: int = 1, devices: str | None = None) -> subprocess.Popen:
        """Train, or go on training, on several GPUs if so, with its output in ``work_dir/train.txt``.

        Args:
            threads: Of each process, on the CPU.
            gpus: Processes, one on each GPU.
            devices: CUDA_VISIBLE_DEVICES of the run; None leaves it as it is.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stamp(finished=False)
        options = [f'{key}={value}' for key, value in (self.options | self.placement).items()]
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={gpus}'] if gpus > 1 else []
        what = [str(TRAIN), self.config, '--work-dir', self.work_dir, '--resume']
        if self.checkpoint:
            what = [str(TEST), self.config, self.checkpoint, '--work-dir', self.work_dir,
                    '--out', str(self._metrics), '--out-item', 'metrics']
        command = [sys.executable, *launch, *what, *['--launcher', 'pytorch'] * (gpus > 1)]
        if options:
            command += ['--cfg-options', *options]
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
        if devices is not None:
            env['CUDA_VISIBLE_DEVICES'] = devices
        with open(self._folder / 'train.txt', 'a') as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)

    def finish(self) -> None:
        self._stamp(finished=True)

    def progress(self) -> str:
        """Where the run is: epoch, time left and the last value of every figure of the last evaluation."""
        tested, steps = (pattern.findall(self.tail(20000)) for pattern in (TESTED, PROGRESS))
        if self.checkpoint and tested:
            return 'batch {}/{}  {} left'.format(*tested[-1])
        if not steps:
            return 'starting'
        epoch, step, steps_per_epoch, eta = steps[-1]
        text = f'epoch {epoch}  step {step}/{steps_per_epoch}  {eta} left'
        evaluations = self.evaluations()
        if evaluations:
            last = evaluations[-1]
            text += ''.join(f'  {key.split("/")[1]} {last[key]:.3g}'
                            for key in ('multi-label/mAP', 'coco/bbox_mAP', 'accuracy/top1') if key in last)
        return text

    def tail(self, size: int) -> str:
        """The end of the run's output."""
        path = self._folder / 'train.txt'
        return path.read_bytes()[-size:].decode(errors='replace') if path.exists() else ''

    def evaluations(self) -> list[dict]:
        """Every evaluation so far, by epoch ('step'), from the scalars that MMEngine writes."""
        if self.checkpoint:
            return [json.loads(self._metrics.read_text())] if self._metrics.exists() else []
        return self._scalars(training=False)

    def training(self) -> list[dict]:
        """What was logged while training, by iteration ('step')."""
        return self._scalars(training=True)

    def _scalars(self, training: bool) -> list[dict]:
        rows = {}
        for path in sorted(self._folder.glob('*/vis_data/scalars.json')):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the run was killed, or the disk full, in the middle of a line
                if ('iter' in row) == training:
                    rows[row['step']] = row  # a later file is that of a resumed run, and counts
        return [rows[step] for step in sorted(rows)]

    def last_checkpoint(self) -> str:
        """The last checkpoint, in the work dir, which may have been moved since."""
        return str(self._folder / Path((self._folder / 'last_checkpoint').read_text().strip()).name)

    def _settings(self) -> str:
        cfg = Config.fromfile(self.config)
        cfg.merge_from_dict(dict(self.options))
        return fingerprint(cfg)

    def _stamp(self, finished: bool) -> None:
        stamp = dict(config=self.config, options=self.options, settings=self._settings(), finished=finished)
        write_whole(self._folder / 'run.json', (json.dumps(stamp, indent=2) + '\n').encode())


def fingerprint(cfg: Config) -> str:
    """64 hexadecimal digits that are others wherever a setting is."""
    return hashlib.sha256(json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write measured rows as CSV, each with the commit, the day, and the torch and device that they were made with.

    Rows that have these already, as those of an earlier run, keep them.
    """
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    device = (torch.cuda.get_device_name() if torch.cuda.is_available() else
              f'{os.cpu_count()} cores {platform.machine()}')
    origin = dict(commit=commit, date=datetime.date.today().isoformat(), torch=torch.__version__, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row if name not in origin)
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, [*names, *origin], lineterminator='\n')
        writer.writeheader()
        writer.writerows(origin | row for row in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def fill_blocks(text: str, makers: Mapping[str, Callable[[str], str]]) -> str:
    """A document in which ``makers[KIND](WHAT)`` made what is from ``<!-- KIND: WHAT -->`` to ``<!-- end -->`` anew.

    Comments of other kinds are left alone.
    """
    def fill(match: re.Match) -> str:
        opening, kind, what = match.groups()
        return f'{opening}{makers[kind](what)}\n<!-- end -->' if kind in makers else match[0]

    return re.sub(r'(<!-- (\w+): ([^>]*?) -->\n).*?<!-- end -->', fill, text, flags=re.DOTALL)


def train(runs: Sequence[Run], jobs: int | None = None, gpus: int = 1) -> None:
    """Train what is not finished, side by side, and show the progress.

    Args:
        runs: Finished ones are passed over.
        jobs: Trainings at a time. By default as many as the GPUs allow, or one per core where there is none.
        gpus: Of one training. Trainings at a time have GPUs of their own as long as there are enough.

    Raises:
        SystemExit: A run failed; the others are stopped, and resume at the next call.
    """
    cores = len(os.sched_getaffinity(0))
    devices = _devices(gpus)
    waiting = [run for run in runs if not run.finished]
    jobs = max(1, min(jobs or (cores if devices == [None] else len(devices)), len(waiting)))
    free = [devices[place % len(devices)] for place in range(jobs)]
    running: dict[str, tuple[Run, subprocess.Popen, str | None]] = {}
    board = _Board()
    # A plain kill would leave the trainings running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))
    try:
        while waiting or running:
            while waiting and free:
                run, place = waiting.pop(0), free.pop(0)
                running[run.work_dir] = run, run.start(max(1, cores // jobs), gpus, place), place
            time.sleep(1)
            for run, process, place in list(running.values()):
                if process.poll() is None:
                    continue
                del running[run.work_dir]
                free.append(place)
                if process.returncode:
                    raise SystemExit(f'{run.name} failed (exit {process.returncode}); the end of '
                                     f'{run.work_dir}/train.txt:\n{run.tail(3000)}')
                run.finish()
                board.say(f'{run.name}: done')
            board.show([f'{run.name}: {run.progress()}' for run, *_ in running.values()]
                       + [f'{run.name}: waiting' for run in waiting])
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _devices(gpus: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of trainings side by side, ``gpus`` each; [None] on a machine without GPUs."""
    count = torch.cuda.device_count()
    if not count:
        return [None]
    if gpus > count:
        raise SystemExit(f'{gpus} GPUs for one training, and PyTorch finds {count} here: give --gpus {count}')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = visible.split(',') if visible else [str(number) for number in range(count)]
    return [','.join(names[place:place + gpus]) for place in range(0, count - gpus + 1, gpus)]


class _Board:
    """Lines that are redrawn in place on a terminal, and printed now and then elsewhere."""

    def __init__(self, interval: float = 20.) -> None:
        self.live = sys.stdout.isatty()
        self.interval = interval
        self.height = 0
        self.shown = time.monotonic()

    def say(self, line: str) -> None:
        self._clear()
        print(line, flush=True)

    def show(self, lines: list[str]) -> None:
        if self.live:
            self._clear()
            print('\n'.join(lines), flush=True)
            self.height = len(lines)
        elif time.monotonic() - self.shown > self.interval:
            print('\n'.join(line for line in lines if not line.endswith('waiting')), flush=True)
            self.shown = time.monotonic()

    def _clear(self) -> None:
        if self.height:
            print(f'\x1b[{self.height}F\x1b[J', end='')
            self.height = 0
