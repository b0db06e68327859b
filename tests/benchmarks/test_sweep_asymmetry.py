"""benchmarks/adaptive/sweep_asymmetry.py: its summary of a run, and the documents against its rows."""
from pathlib import Path

import numpy as np
import pytest

from benchmarks.adaptive import sweep_asymmetry as sweep
from mmasl.reproduce.runs import read_rows

ROOT = Path(__file__).parents[2]


class FakeRun:
    """1000 updates, every fifth logged: the gap falls from 0.5 to 0.1 in the first tenth and leaves 0.1 once later."""

    def training(self):
        steps = np.arange(5, 1001, 5)
        gaps = np.where(steps < 100, 0.5 - 0.004 * steps, 0.1) + np.where((steps > 500) & (steps <= 600), 0.05, 0)
        return [dict(step=int(step), gap=float(gap), gamma_neg=step / 1000, clip=0.05)
                for step, gap in zip(steps, gaps)]

    def evaluations(self):
        return [{'multi-label/mAP': 77.777, 'multi-label/CF1': 60., 'multi-label/gap': 0.0512, 'step': 8}]


def test_summary_of_a_run():
    found = {key: float(value) for key, value in sweep.judge(FakeRun(), 0.1).items()}
    assert found['reached'] == pytest.approx(0.1, abs=0.01)
    assert found['near'] == pytest.approx(1 - 0.1 / 0.9, abs=0.02)
    assert found['farthest'] == pytest.approx(0.05, abs=1e-3)
    assert sweep.figures(FakeRun()) == dict(mAP='77.78', CF1='60', gap='0.0512', gamma_neg='0.9925', clip='0.05')


def read(name):
    return read_rows(ROOT / 'benchmarks' / 'adaptive' / name)


def test_the_page_shows_what_was_measured():
    tables = [sweep.render_control(read('control.csv'), ('target', 'start')),
              sweep.render_control(read('choices.csv'), ('choice', )), sweep.render_seeds(read('seeds.csv'))]
    assert (ROOT / 'benchmarks' / 'adaptive' / 'results.md').read_text() == '\n\n'.join(tables) + '\n'
    page = (ROOT / 'docs' / 'analysis.md').read_text()
    assert all(table in page for table in tables)


def test_every_method_has_every_seed():
    rows = read('seeds.csv')
    methods = {row['method'] for row in rows}
    assert {(row['method'], row['seed']) for row in rows} == {
        (method, seed) for method in methods for seed in {row['seed'] for row in rows}}
    assert methods >= set(sweep.ATTEMPTS)


def test_the_readme_sums_up_the_rows():
    mean = {name: values.mean() for name, values in sweep.by_method(read('seeds.csv'), 'mAP').items()}
    best = max(value for name, value in mean.items() if name.startswith('fixed'))
    behind = {name: best - mean[name] for name in sweep.ATTEMPTS}
    p, posterior, *_ = read_rows(ROOT / 'benchmarks' / 'calibration' / 'resnet_asl_digits.csv')
    text = ' '.join((ROOT / 'README.md').read_text().split())
    for expected in (f'error of {float(posterior["ECE"]):.3f} on the digits where p has {float(p["ECE"]):.3f}',
                     f'decides {float(posterior["CF1"]) - float(p["CF1"]):.1f} points of CF1 better',
                     f'its default is {behind["adaptive, target 0.1 (default)"]:.1f} mAP behind',
                     f'its best setting {min(behind.values()):.1f}'):
        assert expected in text
