"""What a call of the loss costs in Python: forward and backward with the arithmetic stubbed out, so on any machine.

On a GPU the device works while Python prepares the next call, and small batches wait for Python.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.speed.loss import CLASSIFICATION, batch
from benchmarks.speed.measure import in_turn
from mmasl import AsymmetricLoss, asymmetric_loss
from mmasl.ops import functional, torch_impl, triton_impl

SHAPE = 128, 80
CALLS = 100  # of a turn
PARTS = {'function': 'the function, sum, with numbers as parameters',
         'module': 'the module, mean, with avg_factor, as heads call it'}


class Minimal(torch.autograd.Function):
    """The least that a loss with a kept gradient costs: one input, one output, one saved tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, grad: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0], None, None


class NoKernel:
    """In place of a Triton kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    @staticmethod
    def launch(*args: object, **kwargs: object) -> None:
        pass


@contextmanager
def stubbed(implementation: str, grad: Tensor) -> Iterator[None]:
    """An implementation without its arithmetic."""
    value = torch.ones(())
    with ExitStack() as stack:
        change = [(functional, 'pick_implementation', lambda *_: implementation)]
        change += ([(triton_impl, '_kernel', NoKernel()), (triton_impl, '_scale_kernel', NoKernel())]
                   if implementation == 'triton' else
                   [(torch_impl, 'run', lambda *args, **kwargs: (value, grad, None))])
        for owner, name, new in change:
            stack.enter_context(patch.object(owner, name, new))
        yield


def measure(device: str) -> Iterator[dict]:
    """Rows in microseconds of a call, of the fastest block of calls."""
    logits, target = batch(*SHAPE, 'dense', device)
    grad, value = torch.zeros_like(logits), torch.ones((), device=device)
    module = AsymmetricLoss(**CLASSIFICATION).to(device)
    losses: dict[str, Callable[[], Tensor]] = {
        'function': partial(asymmetric_loss, logits, target, **CLASSIFICATION, reduction='sum'),
        'module': lambda: module(logits, target, avg_factor=SHAPE[0])}
    cases = [(implementation, name) for implementation in ('triton', 'eager') for name in losses]

    def call(implementation: str, name: str, backward: bool) -> None:
        with stubbed(implementation, grad):
            for _ in range(CALLS):
                logits.grad = None
                loss = losses[name]()
                if backward:
                    loss.backward()

    def least(backward: bool) -> None:
        for _ in range(CALLS):
            logits.grad = None
            loss = Minimal.apply(logits, grad, value)
            if backward:
                loss.backward()

    calls = {(*case, backward): partial(call, *case, backward) for case in cases for backward in (False, True)}
    calls |= {('minimal', 'autograd.Function', backward): partial(least, backward) for backward in (False, True)}
    times = in_turn(calls, 15, statistic=min)
    for implementation, name in [*cases, ('minimal', 'autograd.Function')]:
        forward, both = (1e6 * times[implementation, name, backward] / CALLS for backward in (False, True))
        yield dict(implementation=implementation, call=name, forward_us=round(forward, 1),
                   forward_and_backward_us=round(both, 1))


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Targets: description, measured value, whether it is reached."""
    times = {(row['implementation'], row['call']): float(row['forward_and_backward_us']) for row in rows}
    minimal = times.pop(('minimal', 'autograd.Function'))
    return [(f'{implementation}, {call}: forward and backward at most 3 x a minimal autograd.Function',
             f'{time:.0f} of {minimal:.0f} us', time <= 3 * minimal) for (implementation, call), time in times.items()]
