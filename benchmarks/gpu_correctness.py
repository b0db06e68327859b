"""The tests of the kernel on a device: each case of tests/ops, with the expected values from the CPU."""
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
TESTS = ('tests/ops/test_functional.py', 'tests/ops/test_soft_labels.py', 'tests/ops/test_triton_impl.py')
RESULT = re.compile(r'^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b', re.MULTILINE)
REASON = re.compile(r'^(?:FAILED|ERROR) (\S+::.*?) - (.*)$', re.MULTILINE)
PROCESSES = 8  # each has a CUDA context of half a GiB


def measure(device: str, seconds: float, quick: bool = False) -> Iterator[dict]:
    """One row per test, with its numbers of cases by outcome.

    Args:
        device: 'cpu' (Triton's interpreter) or 'cuda'.
        seconds: Cases that have not run by then count as not run.
        quick: A few cases only.
    """
    end = time.monotonic() + seconds
    pytest = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-m', 'not slow' if quick else '']
    env = os.environ | dict(MMASL_DEVICE=device, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]))
    collected = subprocess.run([*pytest, '-q', '--collect-only', *TESTS], cwd=ROOT, env=env, text=True,
                               capture_output=True)
    cases = [line for line in collected.stdout.splitlines() if '::' in line]
    if collected.returncode or not cases:
        raise RuntimeError(f'pytest cannot collect {" ".join(TESTS)}:\n{collected.stdout}{collected.stderr}')
    # Of a quick run the kernel's, spread over all tests.
    cases = [case for case in cases if 'eager' not in case][::40] if quick else cases
    count = min(PROCESSES, len(os.sched_getaffinity(0)), len(cases))
    with TemporaryDirectory() as folder:
        logs = [Path(folder, f'{i}.log') for i in range(count)]
        running = []
        for i, log in enumerate(logs):
            # Neighbours are parameters of one test, which compile the kernel alike: the processes share Triton's cache.
            log.with_suffix('.txt').write_text('\n'.join(cases[i::count]))
            with log.open('w') as file:
                running.append(subprocess.Popen(
                    [*pytest, '-v', '--tb=line', '-rfE', '--color=no', f'@{log.with_suffix(".txt")}'], cwd=ROOT,
                    env=env | dict(COLUMNS='400'), stdout=file, stderr=subprocess.STDOUT))
        while any(process.poll() is None for process in running) and time.monotonic() < end:
            time.sleep(0.2)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        text = '\n'.join(log.read_text() for log in logs)
    yield from rows_of(cases, dict(RESULT.findall(text)), dict(REASON.findall(text)))


def rows_of(cases: list[str], outcomes: dict[str, str], reasons: dict[str, str]) -> Iterator[dict]:
    """Rows by test, in the order of the tests.

    Args:
        cases: Node ids of pytest.
        outcomes: Outcome of each case that ended.
        reasons: The message of each case that failed.
    """
    by_test: dict[str, list[str]] = {}
    for case in cases:
        by_test.setdefault(case.partition('[')[0], []).append(case)
    for test, members in by_test.items():
        found = [outcomes.get(case, '') for case in members]
        failed = [case for case, outcome in zip(members, found) if outcome in ('FAILED', 'ERROR')]
        first = f'{failed[0].partition("::")[2]}: {reasons.get(failed[0], "")}'[:300] if failed else ''
        yield dict(test=test.removeprefix('tests/ops/'), cases=len(members), passed=found.count('PASSED'),
                   failed=len(failed), skipped=found.count('SKIPPED'), not_run=found.count(''),
                   first_failure=first)


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Targets: description, measured value, whether it is reached."""
    total, passed, skipped = (sum(int(row[name]) for row in rows) for name in ('cases', 'passed', 'skipped'))
    return [("every case of the kernel's tests passes on the device", f'{passed} of {total - skipped}',
             passed == total - skipped > 0)]
