"""benchmarks/long_run/long_run.py: what it counts and how it judges; and, slow, the long run itself."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.long_run import long_run
from mmasl.reproduce.runs import read_rows

ROOT = Path(__file__).parents[2]

# Holds 64 MiB, starts a child in a session of its own and tells its number.
HOLD = """
import subprocess, sys, time
held = b'x' * 2**26
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], start_new_session=True)
print(child.pid, flush=True)
time.sleep(100)
"""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_counts_processes_that_lost_their_parent_and_their_memory():
    token = f'token{os.getpid()}'
    parent = subprocess.Popen([sys.executable, '-c', HOLD], env={**os.environ, long_run.MARK: token},
                              stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        wait_for(lambda: set(long_run.processes(token)) == {parent.pid, child})
        found = long_run.measure(token)
        assert found['processes'] == 2
        assert 64 < float(found['allocated']) < 110
        assert float(found['rss']) > float(found['allocated'])
        parent.kill()
        parent.wait()
        assert long_run.processes(token) == [child]
        assert float(long_run.measure(token)['allocated']) < 64
    finally:
        parent.kill()
        os.kill(child, 9)
    wait_for(lambda: long_run.measure(token) == dict(processes=0, allocated='0.0', rss='0.0'))


def rows(allocated: np.ndarray, left: int = 0) -> list[dict]:
    """A look a minute, with the resident sets twice as large; then the one after the end."""
    return [dict(minute=f'{minute:.2f}', processes=3, allocated=f'{value:.1f}', rss=f'{2 * value:.1f}')
            for minute, value in enumerate(allocated)] + [dict(
                minute=f'{len(allocated)}', processes=left, allocated='0.0', rss='0.0')]


FLAT = np.full(61, 1000.)
PEAKS = FLAT + 300 * (np.arange(61) % 3 == 0)
WARMING = np.minimum(400 + 50. * np.arange(61), 1000)


@pytest.mark.parametrize('curve', [FLAT, PEAKS, WARMING, FLAT - np.arange(61)],
                         ids=['flat', 'peaks', 'warming', 'falling'])
def test_accepts_memory_that_does_not_grow(curve):
    assert long_run.growth(rows(curve), 0.25, 'allocated') <= 0
    assert 'No process is left; allocated' in long_run.verdict(rows(curve), 0.25)


def test_the_readme_tells_what_was_measured():
    measured = read_rows(ROOT / 'benchmarks' / 'long_run' / 'long_run.csv')
    promised = re.search(r"An hour's training holds its memory within ([\d.]+) %", (ROOT / 'README.md').read_text())
    assert float(measured[-2]['minute']) > 59 and int(measured[-1]['processes']) == 0
    for figure in ('allocated', 'rss'):
        assert abs(long_run.growth(measured, 0.25, figure)) <= float(promised[1])


def test_finds_a_leak():
    leak = rows(PEAKS + np.arange(61))  # 1 MiB a minute: from 17 at the first median to 58
    assert long_run.growth(leak, 0.25, 'allocated') == pytest.approx(100 * (1058 / 1017 - 1), abs=0.2)
    with pytest.raises(SystemExit, match=r'The memory grows: allocated \+[34]\.\d\d %, rss \+'):
        long_run.verdict(leak, 0.25)
    assert 'No process' in long_run.verdict(rows(PEAKS + 0.4 * np.arange(61)), 0.25)


def test_finds_a_process_that_is_left():
    with pytest.raises(SystemExit, match='2 processes are left'):
        long_run.verdict(rows(FLAT, left=2), 0.25)


def test_ends_the_training_in_time(monkeypatch):
    clock = SimpleNamespace(now=0.)
    monkeypatch.setattr(long_run.time, 'monotonic', lambda: clock.now)
    runner, hook = SimpleNamespace(train_loop=SimpleNamespace(stop_training=False)), long_run.StopAfter(2)
    hook.before_train(runner)
    for clock.now, stopped in ((60., False), (121., True)):
        hook.after_train_epoch(runner)
        assert runner.train_loop.stop_training is stopped


def test_draws_what_was_measured(tmp_path):
    long_run.draw(rows(PEAKS), 0.25, tmp_path / 'plot.svg')
    assert 'after the warm-up' in (tmp_path / 'plot.svg').read_text()


def test_refuses_a_folder_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['long_run.py', '--work-dir', str(tmp_path)])
    with pytest.raises(SystemExit, match=f'{tmp_path} exists'):
        long_run.main()


@pytest.mark.slow
def test_an_hour_of_training(tmp_path):
    minutes = os.environ.get('MMASL_LONG_RUN_MINUTES', '60')
    done = subprocess.run(
        [sys.executable, ROOT / 'benchmarks/long_run/long_run.py', '--minutes', minutes,
         '--work-dir', tmp_path / 'work', '--out', tmp_path / 'long_run.csv'], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:]
    assert len((tmp_path / 'long_run.csv').read_text().splitlines()) > 5 * float(minutes)
