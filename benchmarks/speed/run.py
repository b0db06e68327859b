"""Measures what docs/speed.md and docs/scale.md claim, and says which target falls short."""
import argparse
import importlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from mmasl.reproduce.runs import fill_blocks, read_rows, write_rows

PARTS = ('loss', 'kernel', 'step', 'linear', 'metrics', 'annotations')
ORIGIN = ('commit', 'date', 'torch', 'device')
ROOT = Path(__file__).parents[2]
DOCS = (ROOT / 'docs' / 'speed.md', ROOT / 'docs' / 'scale.md', ROOT / 'README.md')


def part_module(name: str) -> Any:
    return importlib.import_module(f'benchmarks.speed.{name}')


def table(rows: list[dict[str, str]]) -> str:
    """Rows as Markdown, with what all of them share (device, versions) in one line below."""
    columns = [key for key in rows[0] if key not in ORIGIN and any(row[key] for row in rows)]
    lines = [' | '.join(column.replace('_', ' ') for column in columns), ' | '.join(['---'] * len(columns))]
    lines += [' | '.join(row[column] for column in columns) for row in rows]
    origins = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in rows})
    return '\n'.join(f'| {line} |' for line in lines) + '\n\n' + '; '.join(origins) + '.'


def verdicts(name: str, rows: list[dict[str, str]]) -> str:
    """The targets of a part as Markdown: reached or not."""
    lines = ['| target | measured | |', '|---|---|---|']
    lines += [f'| {words} | {measured} | {"reached" if reached else "**not reached**"} |'
              for words, measured, reached in part_module(name).targets(rows)]
    return '\n'.join(lines)


def summary(rows: list[dict[str, str]]) -> str:
    """Of the losses' rows, our time and memory at the large shapes beside the fastest others'."""
    loss = part_module('loss')
    lines = [('| logits | mmasl | fastest eager ASL | torch.compile '
              '| extra memory, in gradients: mmasl, the eager ASL |'), '|---|---|---|---|---|']
    for shape in loss.LARGE:
        ours, eager, compiled = loss.contestants(rows, shape)
        best, fastest = (min(peers, key=lambda row: float(row['time_ms'])) for peers in (eager, compiled))
        lines.append(f"| {shape} | {float(ours['time_ms']):.1f} ms | {float(best['time_ms']):.1f} ms ({best['loss']}) "
                     f"| {float(fastest['time_ms']):.1f} ms | {float(ours['memory_in_gradients']):.1f}, "
                     f"{float(best['memory_in_gradients']):.1f} |")
    return '\n'.join(lines)


def render(doc: str, folder: Path) -> str:
    """The document with the blocks ``<!-- KIND: PART DEVICE -->`` made from the rows."""
    def block(kind: str, what: str) -> str:
        name, device = what.split()
        rows = read_rows(folder / f'{name}_{device}.csv')
        if not rows:
            return f'Not measured yet: `python benchmarks/speed/run.py {name} --device {device}`.'
        return table(rows) if kind == 'rows' else summary(rows) if kind == 'summary' else verdicts(name, rows)

    return fill_blocks(doc, {kind: partial(block, kind) for kind in ('rows', 'targets', 'summary')})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', metavar='PART', help=f'of {", ".join(PARTS)}; default: all')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'speed', help='folder of the CSV files')
    parser.add_argument('--render', action='store_true', help='only put the rows there are into the documents')
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f'no part {", ".join(unknown)}: the parts are {", ".join(PARTS)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU here; leave --device out to measure on the CPU')

    missed = []
    for name in [] if args.render else args.parts or PARTS:
        part, rows, start = part_module(name), [], time.time()
        print(f'== {name} on {args.device}: {part.__doc__.strip().splitlines()[0]}', flush=True)
        for row in part.measure(args.device):
            rows.append(row)
            print(f'[{time.time() - start:5.0f} s]', ', '.join(f'{k} {v}' for k, v in row.items() if v != ''),
                  flush=True)
        write_rows(args.out / f'{name}_{args.device}.csv', rows)
        for words, measured, reached in part.targets(read_rows(args.out / f'{name}_{args.device}.csv')):
            print('reached    ' if reached else 'NOT REACHED', f'{words}: {measured}', flush=True)
            if not reached:
                missed.append(f'{words}: {measured}')
    for doc in DOCS:
        doc.write_text(render(doc.read_text(), args.out))
    if missed:
        print(f'\n{len(missed)} targets fall short:', *missed, sep='\n  ')


if __name__ == '__main__':
    main()
