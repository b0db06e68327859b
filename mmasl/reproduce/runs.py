"""Training and evaluation runs as child processes, and the CSV files of measured rows.

A :class:`Run` calls tools/train.py or tools/test.py and reads back the files that MMEngine writes. :func:`train` starts
several runs side by side, shows their progress and resumes interrupted ones.
"""
import csv
import datetime
import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mmasl.errors import ConfigError, MMASLError, UnavailableError
from mmasl.utils.files import atomic_write

TRAIN = Path(__file__).parents[2] / 'tools' / 'train.py'
TEST = TRAIN.with_name('test.py')
TEST_LINE = re.compile(r'Epoch\(test\)\s+\[\s*(\d+)/(\d+)\].*?eta: ([\d:]+(?: days?, [\d:]+)?)')
TRAIN_LINE = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]')
ORIGIN = ('commit', 'date', 'torch', 'device')  # columns that write_rows adds


@dataclass
class Run:
    """One training, or one evaluation of a checkpoint.

    ``work_dir/run.json`` records the settings and whether the run has finished. A finished run is not repeated, an
    interrupted one is resumed, and a work dir of other settings is refused.

    Args:
        config: Path of the config.
        work_dir: Folder of the run.
        options: Overrides of the config, as in ``--cfg-options``.
        placement: Overrides that fit the run to a machine. They are not part of its settings.
        checkpoint: Path or URL of the checkpoint to evaluate; '' trains.
    """
    config: str
    work_dir: str
    options: dict[str, object] = field(default_factory=dict)
    placement: dict[str, object] = field(default_factory=dict)
    checkpoint: str = ''

    def __post_init__(self) -> None:
        self._folder = Path(self.work_dir)
        self._begin: tuple[float, float] | None = None  # time in seconds and epochs done when progress was first seen

    @property
    def name(self) -> str:
        """Name of the work dir."""
        return self._folder.name

    @property
    def _metrics(self) -> Path:
        return self._folder / 'metrics.json'

    @property
    def state(self) -> str:
        """'new', 'interrupted', 'finished', or 'changed' if the work dir holds a run of other settings."""
        path = self._folder / 'run.json'
        if not path.exists():
            return 'new'
        stamp = json.loads(path.read_text())
        if stamp['settings'] != self._settings():
            return 'changed'
        return 'finished' if stamp['finished'] else 'interrupted'

    @property
    def finished(self) -> bool:
        """Whether the run has finished with these settings.

        Raises:
            ConfigError: The work dir holds a run of other settings.
        """
        state = self.state
        if state == 'changed':
            raise ConfigError(f'{self.work_dir} holds a run of {self.config} with other settings. Remove that folder, '
                              'or choose another work dir')
        return state == 'finished'

    def start(self, threads: int, gpus: int = 1, devices: str | None = None) -> subprocess.Popen:
        """Start or resume the run. Its output goes to ``work_dir/train.txt``.

        Args:
            threads: CPU threads of each process.
            gpus: Number of processes, one per GPU.
            devices: CUDA_VISIBLE_DEVICES of the run; None does not change it.

        Returns:
            The started process.
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
        # Threads that spin while they wait make a run many times slower where other processes are busy.
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'OMP_WAIT_POLICY': 'PASSIVE', 'PYTHONUNBUFFERED': '1'}
        if devices is not None:
            env['CUDA_VISIBLE_DEVICES'] = devices
        with open(self._folder / 'train.txt', 'a') as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)

    def finish(self) -> None:
        """Record that the run has finished."""
        self._stamp(finished=True)

    def progress(self) -> str:
        """One line: epoch, remaining time and the main metrics of the last evaluation.

        The remaining time follows from the epochs since this process started or resumed the run, evaluations included.
        """
        if self.checkpoint and (tested := TEST_LINE.findall(self.tail(20000))):
            return 'batch {}/{}  {} left'.format(*tested[-1])
        done = self.epochs_done()
        if done is None:
            return 'starting'
        text = f'epoch {done:.1f} of {self._epochs}'
        now = time.monotonic()
        if self._begin is None:
            self._begin = now, done
        elif done > self._begin[1]:
            seconds = (now - self._begin[0]) / (done - self._begin[1]) * (self._epochs - done)
            text += f'  about {duration(seconds)} left'
        if evaluations := self.evaluations():
            last = evaluations[-1]
            text += ''.join(f'  {key.split("/")[1]} {last[key]:.3g}'
                            for key in ('multi-label/mAP', 'coco/bbox_mAP', 'pascal_voc/mAP', 'accuracy/top1')
                            if key in last)
        return text

    def epochs_done(self) -> float | None:
        """Epochs trained so far, with fractions; None before the first logged step."""
        steps = TRAIN_LINE.findall(self.tail(20000))
        if not steps:
            return None
        epoch, step, steps_per_epoch = map(int, steps[-1])
        return epoch - 1 + step / steps_per_epoch

    @cached_property
    def _epochs(self) -> int:
        return self._config().train_cfg.max_epochs

    def tail(self, size: int) -> str:
        """The last ``size`` bytes of the output."""
        path = self._folder / 'train.txt'
        return path.read_bytes()[-size:].decode(errors='replace') if path.exists() else ''

    def evaluations(self) -> list[dict]:
        """The metrics of every evaluation so far, with the epoch as 'step'."""
        if self.checkpoint:
            return [json.loads(self._metrics.read_text())] if self._metrics.exists() else []
        return self._scalars(training=False)

    def training(self) -> list[dict]:
        """The scalars that were logged during training, with the iteration as 'step'."""
        return self._scalars(training=True)

    def _scalars(self, training: bool) -> list[dict]:
        rows = {}
        for path in sorted(self._folder.glob('*/vis_data/scalars.json')):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # incomplete line of a killed run
                if ('iter' in row) == training:
                    rows[row['step']] = row  # a resumed run writes a later file; its values replace earlier ones
        return [rows[step] for step in sorted(rows)]

    def last_checkpoint(self) -> str:
        """Path of the last checkpoint. It is looked up in the work dir, because the folder may have been moved."""
        return str(self._folder / Path((self._folder / 'last_checkpoint').read_text().strip()).name)

    def _config(self) -> Config:
        cfg = Config.fromfile(self.config)
        cfg.merge_from_dict(dict(self.options))
        return cfg

    def _settings(self) -> str:
        return fingerprint(self._config())

    def _stamp(self, finished: bool) -> None:
        stamp = dict(config=self.config, options=self.options, settings=self._settings(), finished=finished)
        atomic_write(self._folder / 'run.json', (json.dumps(stamp, indent=2) + '\n').encode())


def duration(seconds: float) -> str:
    """A duration as '40 s' or '3 min'."""
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds / 60:.0f} min'


def fingerprint(cfg: Config) -> str:
    """SHA-256 of a config, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write measured rows to a CSV file, with the commit, date, torch version and device of the measurement.

    Args:
        path: The file.
        rows: Values by column. Rows that already have a commit, date, torch version and device keep them.
    """
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    device = (torch.cuda.get_device_name() if torch.cuda.is_available() else
              f'{os.cpu_count()} cores {platform.machine()}')
    origin = dict(zip(ORIGIN, (commit, datetime.date.today().isoformat(), torch.__version__, device), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row if name not in origin)
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names, *origin], lineterminator='\n')
    writer.writeheader()
    writer.writerows(origin | row for row in rows)
    atomic_write(path, file.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; an empty list if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def train(runs: Sequence[Run], jobs: int | None = None, gpus: int = 1) -> None:
    """Train the unfinished runs side by side and show their progress.

    Args:
        runs: Finished ones are skipped.
        jobs: Number of simultaneous runs, which share the cores equally, even while fewer are left. None: as many as
            the GPUs allow; without a GPU, one per core.
        gpus: GPUs per run. Simultaneous runs use different GPUs while there are enough.

    Raises:
        ConfigError: A work dir holds a run of other settings.
        UnavailableError: There are fewer GPUs than one run needs.
        MMASLError: A run failed. The others are stopped; the next call resumes them.
    """
    cores = len(os.sched_getaffinity(0))
    devices = _devices(gpus)
    waiting = [run for run in runs if not run.finished]
    jobs = max(1, jobs or min(cores if devices == [None] else len(devices), len(waiting)))
    free = [devices[place % len(devices)] for place in range(jobs)]
    running: dict[str, tuple[Run, subprocess.Popen, str | None]] = {}
    console, reported = Console(soft_wrap=True, highlight=False, markup=False), dict[str, int]()
    # Without this handler, SIGTERM would leave the child processes running.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))
    try:
        with Live(console=console, transient=True, auto_refresh=False) as live:
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
                        raise MMASLError(f'{run.name} failed (exit {process.returncode}). The end of '
                                         f'{run.work_dir}/train.txt:\n{run.tail(3000)}')
                    run.finish()
                    console.print(f'{run.name}: done')
                lines = [f'{run.name}: {run.progress()}' for run, *_ in running.values()]
                live.update(Text('\n'.join([*lines, *(f'{run.name}: waiting' for run in waiting)])), refresh=True)
                if not console.is_terminal:  # a log file gets one line an epoch
                    for (run, *_), line in zip(list(running.values()), lines):
                        epochs = int(run.epochs_done() or 0)
                        if epochs > reported.get(run.work_dir, 0):
                            reported[run.work_dir] = epochs
                            console.print(line)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, handler)


def _devices(gpus: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of simultaneous runs, ``gpus`` each; [None] on a machine without a GPU."""
    count = torch.cuda.device_count()
    if not count:
        return [None]
    if gpus > count:
        raise UnavailableError(f'A run needs {gpus} GPUs, and PyTorch finds {count}. Pass --gpus {count}')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = visible.split(',') if visible else [str(number) for number in range(count)]
    return [','.join(names[place:place + gpus]) for place in range(0, count - gpus + 1, gpus)]
