"""Measure the numbers of docs/speed.md and docs/scale.md, and report which targets are not reached."""
import argparse
import importlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from mmasl.reproduce.render import rows_table
from mmasl.reproduce.runs import read_rows, write_rows
from mmasl.utils.markdown import fill_blocks, markdown_table

ON_GPU = ('tiles', )
PARTS = ('loss', 'kernel', 'overhead', 'step', 'layout', 'linear', 'metrics', 'annotations')
ROOT = Path(__file__).parents[2]
DOCS = (ROOT / 'docs' / 'speed.md', ROOT / 'docs' / 'scale.md', ROOT / 'README.md')


def part_module(name: str) -> Any:
    """The module of a part. It has ``measure(device)``, which yields rows, and ``targets(rows)``, which judges them."""
    return importlib.import_module(f'benchmarks.speed.{name}')


def targets_table(name: str, rows: list[dict[str, str]]) -> str:
    """The targets of a part as Markdown: reached or not."""
    return markdown_table([(words, measured, 'reached' if reached else '**not reached**')
                           for words, measured, reached in part_module(name).targets(rows)], ('target', 'measured', ''))


def summary_table(rows: list[dict[str, str]]) -> str:
    """Time and memory of our loss beside the fastest peers', at the large shapes."""
    loss, lines = part_module('loss'), []
    for shape in loss.LARGE:
        ours, eager, compiled = loss.contestants(rows, shape)
        best, fastest = (min(peers, key=lambda row: float(row['time_ms'])) for peers in (eager, compiled))
        lines.append((shape, f"{float(ours['time_ms']):.1f} ms", f"{float(best['time_ms']):.1f} ms ({best['loss']})",
                      f"{float(fastest['time_ms']):.1f} ms",
                      f"{float(ours['memory_in_gradients']):.1f}, {float(best['memory_in_gradients']):.1f}"))
    return markdown_table(lines, ('logits', 'mmasl', 'fastest eager ASL', 'torch.compile',
                                  'extra memory, in gradients: mmasl, the eager ASL'))


def render(doc: str, folder: Path) -> str:
    """Fill the blocks ``<!-- KIND: PART DEVICE -->`` of a document from the rows in a folder.

    KIND is 'rows', 'targets' or 'summary'.
    """
    def block(kind: str, what: str) -> str:
        name, device = what.split()
        rows = read_rows(folder / f'{name}_{device}.csv')
        if not rows:
            return f'Not measured yet: `python benchmarks/speed/run.py {name} --device {device}`.'
        return (rows_table(rows) if kind == 'rows' else summary_table(rows) if kind == 'summary' else
                targets_table(name, rows))

    return fill_blocks(doc, {kind: partial(block, kind) for kind in ('rows', 'targets', 'summary')})


def measure_part(part: Any, device: str, path: Path, **options: Any) -> list[tuple[str, str, bool]]:
    """Measure a part, with each row in its file as soon as it exists.

    Args:
        part: A module as of :func:`part_module`.
        device: 'cpu' or 'cuda'.
        path: CSV file of the rows.
        **options: Further arguments of ``part.measure``.

    Returns:
        Targets: description, measured value, whether it is reached.
    """
    rows, start = [], time.time()
    print(f'== {path.stem}: {part.__doc__.strip().splitlines()[0]}', flush=True)
    for row in part.measure(device, **options):
        rows.append(row)
        write_rows(path, rows)
        print(f'[{time.time() - start:5.0f} s]', ', '.join(f'{k} {v}' for k, v in row.items() if v != ''), flush=True)
    results = part.targets(read_rows(path))
    for words, measured, reached in results:
        print('reached    ' if reached else 'NOT REACHED', f'{words}: {measured}', flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', metavar='PART',
                        help=f'any of {", ".join(PARTS)}, and on a GPU {", ".join(ON_GPU)}; default: all')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'speed', help='folder of the CSV files')
    parser.add_argument('--render', action='store_true',
                        help='do not measure; only write the present rows into the documents')
    args = parser.parse_args()
    parts = ON_GPU + PARTS if args.device == 'cuda' else PARTS
    if unknown := sorted(set(args.parts) - set(parts)):
        parser.error(f'unknown part {", ".join(unknown)} on {args.device}; choose from {", ".join(parts)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch finds no GPU. Omit --device to measure on the CPU')

    missed = [f'{words}: {measured}' for name in ([] if args.render else args.parts or parts)
              for words, measured, reached in measure_part(part_module(name), args.device,
                                                           args.out / f'{name}_{args.device}.csv') if not reached]
    for doc in DOCS:
        doc.write_text(render(doc.read_text(), args.out))
    part_module('tiles').write(read_rows(args.out / 'tiles_cuda.csv'))
    if missed:
        print(f'\n{len(missed)} targets are not reached:', *missed, sep='\n  ')


if __name__ == '__main__':
    main()
