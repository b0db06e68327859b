"""A training step of a classifier of 100,000 labels with its loss, whole and a chunk of classes at a time.

The gradients of the parameters, which are as large either way, have a column of their own.
"""
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmasl.ops import asymmetric_loss, linear_asymmetric_loss

from .measure import in_turn, peak_tensor_bytes

ROWS, CLASSES, LABELS_PER_ROW = 64, 100_000, 10
CHUNK_SIZES = (256, 1024, 4096, 16384)
PLAIN, CHUNKED = 'plain', 'chunked'
SIZE = 4096  # that the targets are about
MIB = 2**20


def measure(device: str) -> Iterator[dict]:
    """Rows of plain and chunked steps, for long and short features, in float32 and under autocast."""
    for dimension, precision in ((2048, 'float32'), (512, 'float32'), (2048, 'bfloat16 autocast')):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(ROWS, dimension, generator=generator)
        weight = torch.randn(CLASSES, dimension, generator=generator).div_(dimension**0.5)
        inputs = [x.to(device).requires_grad_() for x in (features, weight, torch.zeros(CLASSES))]
        dense = (torch.rand(ROWS, CLASSES, generator=generator) < LABELS_PER_ROW / CLASSES).float().to(device)
        variants = [(PLAIN, CLASSES, 'dense')]
        variants += [(CHUNKED, size, 'dense') for size in (CHUNK_SIZES if precision == 'float32' else (SIZE, ))]
        variants += [(CHUNKED, SIZE, 'sparse')]
        steps = {}
        for variant in variants:
            name, size, form = variant
            target = dense if form == 'dense' else dense.to_sparse()
            loss = whole_loss if name == PLAIN else partial(linear_asymmetric_loss, scale=1 / ROWS, chunk_size=size)
            steps[variant] = partial(step, loss, inputs, target, torch.autocast(
                device, torch.bfloat16, enabled=precision != 'float32'))
        times = in_turn(steps)
        gradients = sum(x.numel() * x.element_size() for x in inputs[1:])
        for (name, size, form), run in steps.items():
            peak = peak_tensor_bytes(run, device)
            yield dict(precision=precision, features=dimension, rows=ROWS, classes=CLASSES, classifier=name,
                       chunk_size=size, target=form, time_ms=1e3 * times[name, size, form],
                       peak_mib=peak / MIB, of_parameter_gradients_mib=gradients / MIB,
                       extra_mib=(peak - gradients) / MIB)


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Time and memory of chunks of ``SIZE`` classes against the plain step."""
    results = []
    for row in rows:
        if (row['classifier'], int(row['chunk_size']), row['target']) != (CHUNKED, SIZE, 'dense'):
            continue
        case = f"{row['precision']}, {row['features']} features"
        plain, = (x for x in rows if x['classifier'] == PLAIN and
                  (x['precision'], x['features']) == (row['precision'], row['features']))
        time, extra = (float(row[k]) / float(plain[k]) for k in ('time_ms', 'extra_mib'))
        results += [
            (f'{case}: chunked at most 1.05 of the time of plain', f'{time:.2f}', time <= 1.05),
            (f'{case}: beside the gradients of the parameters, chunked at most a third of the memory of plain',
             f'{extra:.2f}', extra <= 1 / 3)]
    return results


def whole_loss(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return asymmetric_loss(F.linear(features, weight, bias), target, reduction='sum', scale=1 / ROWS)


def step(loss: Callable, inputs: list[Tensor], target: Tensor, autocast: torch.autocast) -> None:
    with autocast:
        value = loss(*inputs, target)
    value.backward()
    for x in inputs:
        x.grad = None
