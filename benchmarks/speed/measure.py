"""Measurement of time and memory for the parts of benchmarks/speed/run.py.

Peers take turns in one process, memory is the allocator's exact count, and large jobs run in their own process.
"""
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parents[2]
Name = TypeVar('Name')
Statistic = TypeVar('Statistic')


def in_turn(calls: Mapping[Name, Callable[[], object]], seconds: float = 5, least: int = 5,
            statistic: Callable[[list[float]], Statistic] = median, repeat: int = 1,
            clock: Callable[[], float] = time.perf_counter) -> dict[Name, Statistic]:
    """Median (or other ``statistic``) time of each call in seconds.

    The calls take turns, so that a slower minute of the machine slows all.

    Args:
        calls: What to time, by name; each is called once beforehand.
        seconds: Rounds go on for about this long.
        least: Rounds at least.
        statistic: ``min`` for calls of many seconds, of which there are few rounds, and which other work only delays.
        repeat: Consecutive calls of a turn, whose mean counts. For calls of less than a millisecond: there the first
            call of a turn takes up to twice as long, because another one has used the CPU's caches.
        clock: ``time.process_time`` counts the CPU's time for this process, without that for others.
    """
    for call in calls.values():
        call()
    times: dict[Name, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            synchronize()
            begin = clock()
            for _ in range(repeat):
                call()
            synchronize()
            times[name].append((clock() - begin) / repeat)
    return {name: statistic(values) for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_tensor_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that tensors held during ``call`` above what they held before, by the allocators' own account."""
    call()  # what is made once, such as compiled code and workspaces, does not count
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory_of_process(name: str, file: str = 'status') -> int:
    """Bytes of a line of this process's /proc/self/status, or of another file there."""
    kib, = re.findall(rf'^{name}:\s+(\d+) kB', Path('/proc/self', file).read_text(), re.MULTILINE)
    return 1024 * int(kib)


def in_process(code: str, timeout: float = 1800) -> dict[str, Any]:
    """Runs Python code that prints one JSON object last, in a fresh process: its memory is then its own.

    Returns:
        The object, and ``peak_rss_bytes``, the most memory of the process itself (not of its children).
    """
    # VmHWM and not getrusage, whose maximum begins with that of the process that started this one.
    code += ("\nimport json as _json, re as _re\n"
             "_peak = _re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())\n"
             "print(_json.dumps(dict(peak_rss_bytes=1024 * int(_peak[1]))))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f'a measurement failed:\n{done.stderr[-2000:]}')
    return {key: value for line in done.stdout.splitlines()[-2:] for key, value in json.loads(line).items()}

