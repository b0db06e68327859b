"""The results of the paper's trainings: read from finished runs, kept as rows, summarised over seeds."""
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from mmasl.reproduce.experiments import Training
from mmasl.reproduce.runs import Run, read_rows, write_rows

END = 0.02  # 'at the end' is the mean over this share of the training; curves are averaged over it too
POINTS = 50  # of a curve


class Results:
    """The rows of trainings, and of some training curves.

    Args:
        folder: Folder of ``<data>.csv``, ``<data>_curves.csv`` and ``<data>_missing.csv``, which need not exist.
            benchmarks/paper/missing_labels.py writes the last.
        data: 'real' or 'digits'.
    """

    def __init__(self, folder: Path, data: str) -> None:
        self.data = data
        self.path, self.curves_path, self.missing_path = (
            folder / f'{data}{what}.csv' for what in ('', '_curves', '_missing'))
        self.rows, self.curve_rows, self.missing_rows = map(
            read_rows, (self.path, self.curves_path, self.missing_path))

    def of(self, training: Training) -> list[dict]:
        """The rows of a training, one per seed."""
        return self._of(training, self.rows)

    def seeds(self, training: Training) -> list[int]:
        """The trained seeds in ascending order."""
        return sorted(int(row['seed']) for row in self.of(training))

    def outdated(self, training: Training) -> bool:
        """Whether a row of the training has other settings than its config has now."""
        return any(row.get('settings') != training.settings for row in self.of(training))

    def scores(self, training: Training, scalar: str) -> dict[int, float]:
        """A scalar by seed."""
        return {int(row['seed']): float(row[scalar])
                for row in self._of(training, [*self.rows, *self.missing_rows]) if row.get(scalar)}

    def curve(self, training: Training, scalar: str) -> tuple[np.ndarray, np.ndarray]:
        """A scalar during the training.

        Returns:
            Shares of the training, (T,), and the scalar's mean over the seeds, (T,).
        """
        found = self._of(training, self.curve_rows)
        shares = sorted({float(row['share']) for row in found})
        return np.array(shares), np.array([
            np.mean([float(row[scalar]) for row in found if float(row['share']) == share]) for share in shares])

    def add(self, runs: Mapping[Training, Run], seed: int, curved: Iterable[Training]) -> None:
        """Write the rows of finished runs. They replace rows of the same training and seed.

        Args:
            runs: Finished runs by training.
            seed: The seed of all runs.
            curved: Trainings whose curves are written too.
        """
        keys = ('config', 'options', 'seed')
        named = {one: dict(zip(keys, (one.config, one.overrides, str(seed)), strict=True)) for one in runs}
        self.rows = _replace(self.path, self.rows, [
            named[one] | dict(settings=one.settings) | scalars(run) for one, run in runs.items()])
        self.curve_rows = _replace(self.curves_path, self.curve_rows, [
            named[one] | point for one in set(curved) & set(runs) for point in curve(runs[one])])

    @staticmethod
    def _of(training: Training, found: Iterable[dict]) -> list[dict]:
        return [row for row in found if (row['config'], row['options']) == (training.config, training.overrides)]


def _replace(path: Path, old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Write rows to a file, the new ones in place of old ones with the same key."""
    keys = {(row['config'], row['options'], row['seed']) for row in new}
    rows = [row for row in old if (row['config'], row['options'], row['seed']) not in keys] + list(new)
    rows.sort(key=lambda row: (row['config'], row['options'], int(row['seed']), float(row.get('share', 0))))
    if new:
        write_rows(path, rows)
    return rows


def scalars(run: Run) -> dict[str, str]:
    """The last evaluation of a run in percent, and means over the end of its training."""
    last, steps = run.evaluations()[-1], run.training()
    values: dict[str, Any] = {
        key.split('/')[-1]: value * (100 if key.startswith(('coco/', 'pascal_voc/')) else 1)
        for key, value in last.items() if '/' in key and isinstance(value, (int, float))}
    end = training_end(steps)
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


def training_end(steps: Sequence[dict]) -> list[dict]:
    """The scalars logged in the last 2 % of a training; empty for an evaluation."""
    return [row for row in steps if row['step'] > (1 - END) * steps[-1]['step']]


def curve(run: Run) -> Iterator[dict[str, str]]:
    """The probabilities and gamma_neg during a training, averaged over 2 % of it at each point."""
    steps = run.training()
    shares = np.array([row['step'] for row in steps]) / steps[-1]['step']
    for share in np.linspace(END, 1, POINTS):
        near = [row for row, place in zip(steps, shares, strict=True) if share - END <= place <= share]
        yield dict(share=f'{share:.3f}', **{name: f'{np.mean([row[name] for row in near]):.4g}'
                                            for name in ('p_t_pos', 'p_t_neg', 'gap', 'gamma_neg') if name in steps[0]})
