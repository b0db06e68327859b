"""Show on a GPU what mmasl claims: correctness, speed, and training on photographs, within some minutes.

Each part is a process of its own with a time limit, and writes its rows as soon as it has them. A part that fails, or
takes too long, does not stop the others. A second call repeats only parts that did not finish. ``report.md`` says on a
page what was asked, what was measured and what falls short.
"""
import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))


class Part(NamedTuple):
    """A part of the run: its module, what it asks, its share of the time, and what its ``measure`` takes."""
    module: str
    asks: str
    share: float
    options: tuple[str, ...] = ()


# The most important first.
PARTS = {
    'correctness': Part('benchmarks.gpu_correctness', 'Does the kernel compute the equations?', 0.25, ('seconds', )),
    'tiles': Part('benchmarks.speed.tiles', 'Which tiles are fastest?', 0.08),
    'loss': Part('benchmarks.speed.loss', 'Is the loss as fast as promised?', 0.27),
    'step': Part('benchmarks.speed.step', 'Does it slow down a training step?', 0.15),
    'training': Part('benchmarks.gpu_training', 'Does it train better on photographs?', 0.25,
                     ('seconds', 'data', 'done')),
}
GRACE = 10.  # seconds between a part's own limit and its end
STATES = 'states.csv'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.requirements:
        print(ROOT.joinpath('benchmarks', 'gpu_requirements.txt').read_text(), end='')
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args)
        return
    from mmasl.reproduce.runs import read_rows, write_rows
    end = time.monotonic() + 60 * args.minutes
    states = {row['part']: row for row in read_rows(args.out / STATES)}
    left = [name for name in PARTS if not finished(states.get(name), args)]
    for name in left:
        shares = sum(PARTS[other].share for other in left[left.index(name):])
        limit = PARTS[name].share / shares * (end - time.monotonic())
        state, seconds = run_process(name, args, limit)
        states[name] = dict(part=name, state=state, seconds=round(seconds), limit=round(limit), rehearsal=args.quick)
        write_rows(args.out / STATES, [states[known] for known in PARTS if known in states])
        (args.out / 'report.md').write_text(report(args.out, args.device))
        print(f'{name}: {state} after {seconds:.0f} of {limit:.0f} s', flush=True)
    print((args.out / 'report.md').read_text())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10, help='time for all parts (default: 10)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu'), help='folder of rows, logs and the report')
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda',
                        help="cpu: a rehearsal with Triton's interpreter and small inputs, to see that everything runs")
    parser.add_argument('--data', type=Path, help='folder with VOCdevkit/VOC2007 (splits train and val) and corel5k '
                        '(annotations/{train,test}.json in the format of MultiLabelDataset, and images)')
    parser.add_argument('--requirements', action='store_true',
                        help='print what a machine with torch, torchvision, timm and matplotlib needs beyond these')
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument('--seconds', type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out, args.data = args.out.resolve(), args.data and args.data.resolve()
    args.quick = args.device == 'cpu'
    if args.device == 'cuda' and not args.requirements:
        import torch
        if not torch.cuda.is_available():
            parser.error('PyTorch finds no GPU. Use --device cpu for a rehearsal')
    return args


def finished(state: dict[str, str] | None, args: argparse.Namespace) -> bool:
    """Whether an earlier call with these settings has finished a part."""
    return state is not None and state['state'] == 'complete' and state['rehearsal'] == str(args.quick)


def run_process(name: str, args: argparse.Namespace, limit: float) -> tuple[str, float]:
    """Run a part as a process; its state, and the seconds that it took."""
    command = [sys.executable, __file__, '--part', name, '--seconds', str(max(limit - GRACE, 1)), '--out',
               str(args.out), '--device', args.device, *(['--data', str(args.data)] if args.data else [])]
    env = os.environ | (dict(TRITON_INTERPRET='1') if args.device == 'cpu' else {})
    start = time.monotonic()
    with (args.out / f'{name}.log').open('w') as log:
        # A group of its own, so that its workers end with it.
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            state = 'failed' if process.wait(limit) else 'complete'
        except subprocess.TimeoutExpired:
            state = 'out of time'
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return state, time.monotonic() - start


def run_part(args: argparse.Namespace) -> None:
    """Measure a part in this process. A training that did not start for lack of time makes it fail."""
    from benchmarks.speed.run import measure_part
    from mmasl.reproduce.runs import read_rows
    part, path = PARTS[args.part], rows_path(args.out, args.part, args.device)
    given: dict[str, Any] = dict(seconds=args.seconds, data=args.data, done=read_rows(path))
    module = import_module(part.module)
    measure_part(module, args.device, path, quick=args.quick, **{key: given[key] for key in part.options})
    if args.part == 'tiles' and args.device == 'cuda':
        module.write(read_rows(path))  # the next part uses them


def rows_path(out: Path, name: str, device: str) -> Path:
    """Where a part's rows are; ``benchmarks/speed`` has the same names."""
    return out / f'{name}_{device}.csv'


def report(out: Path, device: str) -> str:
    """The page on what was asked, what was measured and what falls short."""
    from mmasl.reproduce.runs import read_rows
    from mmasl.utils.markdown import markdown_table
    states = {row['part']: row for row in read_rows(out / STATES)}
    origin = next(iter(states.values()))
    asked, short = [], []
    for name, part in PARTS.items():
        rows, state = read_rows(rows_path(out, name, device)), states.get(name, dict(state='not run'))
        if state['state'] != 'complete':
            lines = (out / f'{name}.log').read_text().strip().splitlines() if (out / f'{name}.log').exists() else []
            short.append(f'{name}: {state["state"]}' + (f' ({lines[-1][:200]})' if lines else ''))
        for words, measured, reached in import_module(part.module).targets(rows) if rows else []:
            asked.append((name, words, measured, 'reached' if reached else '**not reached**'))
            if not reached:
                short.append(f'{words}: {measured}')
    parts = [(name, part.asks, states[name]['state'], states[name]['seconds'], states[name]['limit'])
             for name, part in PARTS.items() if name in states]
    rehearsal = '' if device == 'cuda' else 'A rehearsal on the CPU: its times say nothing about a GPU.\n\n'
    return (f'# mmasl on {origin["device"]}\n{rehearsal}torch {origin["torch"]}, commit {origin["commit"]}, '
            f'{origin["date"]}. The rows are beside this file.\n\n## Parts\n'
            f'{markdown_table(parts, ("part", "asks", "state", "seconds", "limit"))}\n\n## Asked and measured\n'
            f'{markdown_table(asked, ("part", "target", "measured", ""))}\n\n## Falls short\n'
            + ('\n'.join(f'- {line}' for line in short) or 'Nothing.') + '\n')


if __name__ == '__main__':
    main()
