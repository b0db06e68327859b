"""Device time of the kernel by elements and warps of a program; the best go to mmasl/ops/triton_tiles.py."""
from collections.abc import Iterator
from functools import partial
from itertools import product
from math import prod
from pathlib import Path

import torch

from benchmarks.speed.loss import CLASSIFICATION, LARGE, REPLAYS, SHAPES, batch, device_graph
from benchmarks.speed.measure import in_turn
from mmasl.ops import triton_impl
from mmasl.ops.torch_impl import Problem
from mmasl.ops.triton_tiles import DEFAULT

SOURCE = Path(triton_impl.__file__).with_name('triton_tiles.py')
GRID = tuple(product((512, 1024, 2048, 4096), (2, 4, 8)))
CASES = [(shape, dtype) for shape in ('FCOS 358400 x 80', '128 x 9605', '128 x 80', '128 x 600')
         for dtype in (torch.float32, torch.bfloat16)]
NOISE = 0.02  # of a time: a setting that gains less than this over the default is not worth a line


def measure(device: str, quick: bool = False) -> Iterator[dict]:
    """Rows of loss and gradient, reduced, as a training step has them; all tiles of a shape take turns.

    Args:
        device: 'cuda', or 'cpu' for Triton's interpreter, whose times say nothing.
        quick: A small shape and two tiles, to see that everything runs.
    """
    for shape, dtype in [('32 x 20', torch.float32)] if quick else CASES:
        rows, classes, form = SHAPES[shape]
        logits, target = batch(rows, classes, form, device)
        parameters = {name: torch.tensor(value, device=device) for name, value in CLASSIFICATION.items()}
        problem = Problem(**dict.fromkeys(Problem._fields) | parameters | dict(
            logits=logits.detach().to(dtype), target=target, detach_focusing=False, reduction='sum',
            soft_label='mixture'))
        calls = {tile: partial(triton_impl.run, problem, tile=tile) for tile in (GRID[:1] if quick else GRID)}
        calls.setdefault(DEFAULT, partial(triton_impl.run, problem, tile=DEFAULT))
        if device == 'cuda':
            times = in_turn({tile: device_graph(call) for tile, call in calls.items()}, 1)
            times = {tile: time / REPLAYS for tile, time in times.items()}
        else:
            times = in_turn(calls, 0.1, 2)
        for (elements, warps), time in times.items():
            yield dict(size='large' if shape in LARGE else 'small', shape=shape, dtype=str(dtype)[6:],
                       architecture=triton_impl.architecture(logits.device),
                       elements=elements, warps=warps, time_us=round(1e6 * time, 3),
                       time_over_default=round(time / times[DEFAULT], 3))


def best(rows: list[dict]) -> dict[tuple[str, str], tuple[int, int]]:
    """The tile with the least geometric mean of time over the default's, by architecture and size."""
    ratios: dict[tuple, dict[tuple, list[float]]] = {}
    for row in rows:
        tile = int(row['elements']), int(row['warps'])
        ratios.setdefault((row['architecture'], row['size']), {}).setdefault(tile, []).append(
            float(row['time_over_default']))
    chosen = {}
    for place, tiles in ratios.items():
        means = {tile: prod(values)**(1 / len(values)) for tile, values in tiles.items()}
        tile = min(means, key=lambda tile: means[tile])
        if means[tile] < 1 - NOISE:
            chosen[place] = tile
    return chosen


def render(rows: list[dict], source: str) -> str:
    """The source of mmasl/ops/triton_tiles.py with the best tiles of the rows."""
    head, _, _ = source.partition('TILES:')
    lines = ''.join(f'    {place!r}: {tile!r},\n' for place, tile in sorted(best(rows).items()))
    return f'{head}TILES: dict[tuple[str, str], tuple[int, int]] = {{' + (f'\n{lines}' if lines else '') + '}\n'


def write(rows: list[dict]) -> None:
    """Write the best tiles into the source."""
    SOURCE.write_text(render(rows, SOURCE.read_text()))


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Targets: description, measured value, whether it is reached."""
    found = [row for row in rows if (int(row['elements']), int(row['warps'])) == triton_impl.TILES.get(
        (row['architecture'], row['size']), DEFAULT)]
    worst = [(row, min(float(other['time_us']) for other in rows
                       if (other['shape'], other['dtype']) == (row['shape'], row['dtype']))) for row in found]
    return [(f"{row['shape']}, {row['dtype']}: the tile in the source at most 5 % slower than the best",
             f"{float(row['time_us']) / least:.2f}", float(row['time_us']) <= 1.05 * least) for row, least in worst]
