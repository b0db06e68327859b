"""The losses themselves: forward and backward, time and memory, beside what others offer for the same."""
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.measure import in_turn, peak_tensor_bytes
from mmasl import AsymmetricLoss, AsymmetricSoftmaxLoss
from mmasl.ops.reference import asymmetric_loss as reference

CLASSIFICATION: dict[str, Any] = dict(gamma_pos=0., gamma_neg=4., clip=0.05)
DETECTION: dict[str, Any] = dict(gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25)
SOFTMAX: dict[str, Any] = dict(gamma_pos=1., gamma_neg=4., smoothing=0.1)
# 22,400 points of an 800 x 1344 image on FCOS's five levels, 16 images; about 1 % of an image's points are positive.
SHAPES = {
    '32 x 20': (32, 20, 'dense'),
    '128 x 80': (128, 80, 'dense'),
    '256 x 80': (256, 80, 'dense'),
    '128 x 600': (128, 600, 'dense'),
    '128 x 9605': (128, 9605, 'dense'),
    '64 x 32000 softmax': (64, 32000, 'softmax'),
    'FCOS 358400 x 80': (16 * 22400, 80, 'labels'),
}
SMALL, LARGE = list(SHAPES)[:4], list(SHAPES)[4:]
QUICK = {'32 x 20': (32, 20, 'dense'), '400 x 80': (400, 80, 'labels')}  # to see that everything runs
OURS = 'mmasl'
REPLAYS = 10  # calls in one CUDA graph, so that starting it does not count


def naive(logits: Tensor, target: Tensor, gamma_pos: float, gamma_neg: float, clip: float, alpha: float | None = None,
          detach: bool = False) -> Tensor:
    """Eq. 7 as the official code's operations: clamped logarithms of both parts, one power, autograd for the rest."""
    p = logits.sigmoid()
    rest = (1 - p + clip).clamp(max=1)
    loss = target * p.clamp(min=1e-8).log() + (1 - target) * rest.clamp(min=1e-8).log()
    with torch.set_grad_enabled(not detach):
        weight = (1 - p * target - rest * (1 - target))**(gamma_pos * target + gamma_neg * (1 - target))
    if alpha is not None:
        weight = weight * (alpha * target + (1 - alpha) * (1 - target))
    return -(loss * weight).sum()


def naive_in_place(logits: Tensor, target: Tensor, gamma_pos: float, gamma_neg: float, clip: float) -> Tensor:
    """The same in the order of the official "Optimized" form, in place where autograd allows it."""
    rest_target = 1 - target
    p = logits.sigmoid()
    rest = 1 - p
    if clip:
        rest = rest.add(clip).clamp(max=1)
    loss = target * p.clamp(min=1e-8).log()
    loss.add_(rest_target * rest.clamp(min=1e-8).log())
    p = p * target
    rest = rest * rest_target
    loss *= (1 - p - rest).pow(gamma_pos * target + gamma_neg * rest_target)
    return -loss.sum()


def naive_softmax(logits: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float) -> Tensor:
    """The official single-label form as a chain of its operations."""
    log_p = logits.log_softmax(-1)
    target = torch.zeros_like(logits).scatter_(1, labels[:, None], 1)
    p = log_p.exp() * target
    rest = (1 - log_p.exp()) * (1 - target)
    weight = (1 - p - rest)**(gamma_pos * target + gamma_neg * (1 - target))
    target = target * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(target * (log_p * weight)).sum()


def naive_focal(logits: Tensor, target: Tensor, gamma: float = 2., alpha: float = 0.25) -> Tensor:
    p = logits.sigmoid()
    weight = (alpha * target + (1 - alpha) * (1 - target)) * ((1 - p) * target + p * (1 - target))**gamma
    return (F.binary_cross_entropy_with_logits(logits, target, reduction='none') * weight).sum()


def peers(form: str, classes: int, device: str) -> dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]]:
    """Losses by (name, kind): kind is 'asl' for what competes, and else the loss that it replaces."""
    def one_hot(labels: Tensor) -> Tensor:
        return F.one_hot(labels, classes + 1)[:, :classes].float()

    if form == 'softmax':
        from timm.loss import AsymmetricLossSingleLabel
        timm = AsymmetricLossSingleLabel(gamma_pos=1, gamma_neg=4, eps=0.1)
        compiled_softmax = torch.compile(naive_softmax)
        return {
            (OURS, 'asl'): AsymmetricSoftmaxLoss(**SOFTMAX, reduction='sum').to(device),
            ('naive', 'asl'): lambda z, y: naive_softmax(z, y, **SOFTMAX),
            ('timm', 'asl'): timm,
            ('torch.compile of naive', 'asl'): lambda z, y: compiled_softmax(z, y, **SOFTMAX),
            ('cross-entropy', 'ce'): lambda z, y: F.cross_entropy(z, y, reduction='sum', label_smoothing=0.1),
        }

    from torchvision.ops import sigmoid_focal_loss
    compiled = torch.compile(naive)
    setting = DETECTION if form == 'labels' else CLASSIFICATION
    dense = one_hot if form == 'labels' else lambda y: y
    calls: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
        (OURS, 'asl'): AsymmetricLoss(**setting, reduction='sum').to(device),
        (f'{OURS}, focusing detached', 'asl'): AsymmetricLoss(
            **setting, detach_focusing=True, reduction='sum').to(device),
        ('naive', 'asl'): lambda z, y: naive(z, dense(y), **setting),
        ('naive, focusing detached', 'asl'): lambda z, y: naive(z, dense(y), **setting, detach=True),
        ('torch.compile of naive', 'asl'): lambda z, y: compiled(z, dense(y), **setting),
        ('torch.compile of naive, focusing detached', 'asl'): lambda z, y: compiled(
            z, dense(y), **setting, detach=True),
        ('torchvision focal', 'focal'): lambda z, y: sigmoid_focal_loss(z, dense(y), reduction='sum'),
        ('BCE with logits', 'bce'): lambda z, y: F.binary_cross_entropy_with_logits(z, dense(y), reduction='sum'),
    }
    if form == 'dense':
        from mmpretrain.models.losses import AsymmetricLoss as MMPretrain
        from timm.loss import AsymmetricLossMultiLabel
        calls |= {
            ('naive in place', 'asl'): lambda z, y: naive_in_place(z, y, **CLASSIFICATION),
            ('timm', 'asl'): AsymmetricLossMultiLabel(4, 0, 0.05, reduction='sum'),
            ('timm, focusing detached', 'asl'): AsymmetricLossMultiLabel(
                4, 0, 0.05, disable_torch_grad_focal_loss=True, reduction='sum'),
            ('mmpretrain', 'asl'): MMPretrain(0., 4., 0.05, reduction='sum'),
        }
    else:
        calls[('mmdet focal in PyTorch', 'focal')] = lambda z, y: naive_focal(z, dense(y))
        if device == 'cuda' and find_spec('mmcv._ext'):
            from mmcv.ops import sigmoid_focal_loss as mmcv_focal
            calls[('mmcv focal', 'focal')] = lambda z, y: mmcv_focal(z, y, 2., 0.25, None, 'sum')
    return calls


def batch(rows: int, classes: int, form: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).mul_(2).to(device).requires_grad_()
    if form == 'dense':
        return logits, (torch.rand(rows, classes, generator=generator) < 0.03).float().to(device)
    labels = torch.randint(classes, (rows, ), generator=generator)
    if form == 'labels':
        labels[torch.rand(rows, generator=generator) > 0.01] = classes
    return logits, labels.to(device)


def measure(device: str, quick: bool = False) -> Iterator[dict]:
    """Rows of one shape after the other, on a GPU the large ones first.

    Args:
        device: 'cpu' or 'cuda'.
        quick: Small shapes and few calls, to see that everything runs.
    """
    copy_bandwidth = _copy_bandwidth() if device == 'cuda' else None
    for shape in QUICK if quick else [*LARGE, *SMALL] if device == 'cuda' else SHAPES:
        rows, classes, form = QUICK[shape] if quick else SHAPES[shape]
        torch._dynamo.reset()
        logits, target = batch(rows, classes, form, device)
        calls = {name: partial(_step, loss, logits, target) for name, loss in peers(form, classes, device).items()}
        memory = {name: peak_tensor_bytes(partial(_without_gradient, call, logits), device)
                  for name, call in calls.items()}
        errors = _errors(calls, logits, target, form)
        if device == 'cuda':
            graphs = in_turn({name: device_graph(call) for name, call in calls.items()}, 3, statistic=_quantiles)
            wall = in_turn(calls, 2, statistic=_quantiles)
        elif quick:
            times = in_turn(calls, 0.1)
        else:
            times = (in_turn(calls, 15, statistic=min, repeat=20) if shape in SMALL else in_turn(calls, 20))
        for name, kind in calls:
            row: dict[str, Any] = dict(shape=shape, loss=name, kind=kind)
            if copy_bandwidth:
                low, time, high = (x / REPLAYS for x in graphs[name, kind])
                wall_low, with_host, wall_high = wall[name, kind]
                ours, must_move = graphs[OURS, 'asl'][1] / REPLAYS, 2 * logits.nbytes + target.nbytes
                share: Any = round(must_move / time / copy_bandwidth, 3)
            else:
                time = with_host = times[name, kind]
                ours, share = times[OURS, 'asl'], ''
            row |= dict(
                time_ms=_ms(time), time_with_host_ms=_ms(with_host), time_over_ours=round(time / ours, 2),
                memory_in_gradients=round(memory[name, kind] / logits.nbytes, 2),
                share_of_copy_bandwidth=share, largest_error_of_gradient=errors.get((name, kind), ''))
            if copy_bandwidth:
                row |= dict(time_p20_ms=_ms(low), time_p80_ms=_ms(high), time_with_host_p20_ms=_ms(wall_low),
                            time_with_host_p80_ms=_ms(wall_high))
            yield row


def _quantiles(times: list[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    return np.quantile(times, (0.2, 0.5, 0.8)).tolist()


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def _step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor | None:
    logits.grad = None
    loss(logits, target).backward()
    return logits.grad


def _without_gradient(call: Callable[[], object], logits: Tensor) -> None:
    """Else the call would begin by freeing the gradient of the one before."""
    call()
    logits.grad = None


def _errors(calls: dict, logits: Tensor, target: Tensor, form: str) -> dict[tuple[str, str], str]:
    """Largest difference from the gradient of Eq. 7 in float64 by autograd, over its largest element; first rows."""
    if form == 'softmax':
        return {}
    setting, rows = (DETECTION if form == 'labels' else CLASSIFICATION), slice(0, 4096)
    z = logits[rows].detach().double().requires_grad_()
    y = F.one_hot(target[rows], z.shape[1] + 1)[:, :-1] if form == 'labels' else target[rows]
    errors = {}
    for (name, kind), call in calls.items():
        if kind == 'asl':
            found = call()[rows]
            expected, = torch.autograd.grad(reference(z, y, **setting, detach_focusing='detached' in name).sum(), z)
            errors[name, kind] = f'{((found - expected).abs().max() / expected.abs().max()).item():.1e}'
    return errors


def device_graph(call: Callable[[], object]) -> Callable[[], None]:
    """The calls as one CUDA graph: what the device needs, without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    return graph.replay


def _copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28, device='cuda')
    into = torch.empty_like(source)
    time = in_turn({'copy': device_graph(lambda: into.copy_(source))}, 2)['copy'] / REPLAYS
    return 2 * source.nbytes / time


def contestants(rows: list[dict], shape: str) -> tuple[dict, list[dict], list[dict]]:
    """Rows of a shape: ours, other eager ASL, and those that torch.compile makes."""
    rows = [row for row in rows if row['shape'] == shape and row['kind'] == 'asl']
    others = [row for row in rows if not row['loss'].startswith(OURS)]
    compiled = [row for row in others if 'compile' in row['loss']]
    return next(row for row in rows if row['loss'] == OURS), [row for row in others if row not in compiled], compiled


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """What docs/speed.md promises of the loss, on the device that the rows are from."""
    results = []
    measured = {row['shape'] for row in rows}
    for shape in [shape for shape in SMALL if shape in measured]:
        ours, eager, _ = contestants(rows, shape)
        on_gpu = ours['share_of_copy_bandwidth'] != ''
        results.append(_faster(ours, eager, 1, 'with host overhead, ' * on_gpu +
                               'never slower than the fastest eager ASL', 'time_with_host_ms'))
    for shape in [shape for shape in LARGE if shape in measured]:
        ours, eager, compiled = contestants(rows, shape)
        on_gpu = ours['share_of_copy_bandwidth'] != ''
        results.append(_faster(ours, eager, 8 if on_gpu else 3,
                               f'at least {8 if on_gpu else 3} x faster than the fastest eager ASL'))
        results.append(_faster(ours, compiled, 1 if on_gpu else 1 / 1.1,
                               'never slower than torch.compile' + ('' if on_gpu else ' by more than 10 %')))
        extra = float(ours['memory_in_gradients'])
        results.append((f"{shape}: extra memory at most the gradient's", f'{extra:.2f} gradients', extra <= 1.05))
        if on_gpu:
            if mmcv := [row for row in rows if (row['shape'], row['loss']) == (shape, 'mmcv focal')]:
                results.append(_faster(ours, mmcv, 1, "never slower than mmcv's focal kernel"))
            share = float(ours['share_of_copy_bandwidth'])
            results.append((f'{shape}: at least 85 % of the copy bandwidth', f'{share:.0%}', share >= 0.85))
        else:
            # of the eager ASL that is most frugal, which is harder than of the fastest
            least = min(float(row['memory_in_gradients']) for row in eager)
            results.append((f'{shape}: at most a quarter of the peak extra memory',
                            f'{extra:.2f} of {least:.2f} gradients', extra <= least / 4))
    return results


def _faster(ours: dict, others: list[dict], times: float, words: str,
            column: str = 'time_ms') -> tuple[str, str, bool]:
    """The target to be ``times`` as fast as the fastest of others."""
    best = min(others, key=lambda row: float(row[column]))
    ratio = float(best[column]) / float(ours[column])
    return f"{ours['shape']}: {words}", f"{ratio:.2f} x ({best['loss']})", ratio >= times
