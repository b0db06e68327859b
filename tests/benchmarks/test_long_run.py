"""benchmarks/long_run/long_run.py: it finds orphans and leaks; and, slow, the long run itself."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.long_run import long_run
from mmasl.reproduce.runs import read_rows

ROOT = Path(__file__).parents[2]

# Holds 64 MiB and starts a child in its own session.
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


def test_finds_orphans_and_leaks():
    token = f'token{os.getpid()}'
    parent = subprocess.Popen([sys.executable, '-c', HOLD], env={**os.environ, long_run.MARK: token},
                              stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        wait_for(lambda: set(long_run.processes(token)) == {parent.pid, child})
        found = long_run.measure(token)
        assert found['processes'] == 2 and 64 < float(found['allocated']) < 110
        parent.kill()
        parent.wait()
        assert long_run.processes(token) == [child]
    finally:
        parent.kill()
        os.kill(child, 9)

    def rows(allocated: np.ndarray, left: int = 0) -> list[dict]:
        """One sample per minute, and the last one after the end."""
        values = [(allocated[minute], 3) for minute in range(61)] + [(0., left)]
        return [dict(minute=f'{minute}', processes=count, allocated=f'{value:.1f}', rss=f'{2 * value:.1f}')
                for minute, (value, count) in enumerate(values)]

    minutes = np.arange(61)
    peaks = 1000 + 300. * (minutes % 3 == 0)
    assert 'No process remains' in long_run.verdict(rows(peaks), 0.25)
    assert 'No process remains' in long_run.verdict(rows(np.minimum(400 + 50. * minutes, 1000)), 0.25)  # warm-up
    with pytest.raises(Exception, match=r'The memory grows: allocated \+[34]\.\d\d %, rss \+'):
        long_run.verdict(rows(peaks + minutes), 0.25)
    with pytest.raises(Exception, match='2 processes remain'):
        long_run.verdict(rows(peaks, left=2), 0.25)


def test_the_readme_states_the_measured_growth():
    measured = read_rows(ROOT / 'benchmarks' / 'long_run' / 'long_run.csv')
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    promised = re.search(r"An hour's training holds its memory within ([\d.]+) %", readme)
    assert float(measured[-2]['minute']) > 59 and int(measured[-1]['processes']) == 0
    for figure in ('allocated', 'rss'):
        assert abs(long_run.growth(measured, 0.25, figure)) <= float(promised[1])


@pytest.mark.slow
def test_an_hour_of_training(tmp_path):
    minutes = os.environ.get('MMASL_LONG_RUN_MINUTES', '60')
    done = subprocess.run(
        [sys.executable, ROOT / 'benchmarks/long_run/long_run.py', '--minutes', minutes, '--work-dir',
         tmp_path / 'work', '--out', tmp_path / 'long_run.csv'], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:]
    assert len((tmp_path / 'long_run.csv').read_text().splitlines()) > 5 * float(minutes)
