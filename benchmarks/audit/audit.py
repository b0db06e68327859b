"""Run one suite of facts over every implementation of the loss that can be installed or written from its equations.

Writes benchmarks/audit/audit.csv and the tables of docs/implementations.md. Implementations of focal loss take part
with the settings that they have. Everything runs on the CPU, where mmcv's operator of the focal loss does not.
"""
import argparse
import copy
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.reproduce.runs import read_rows, write_rows
from mmasl.utils.markdown import fill_blocks, markdown_table

ROWS, PAGE = Path(__file__).with_suffix('.csv'), Path(__file__).parents[2] / 'docs' / 'implementations.md'
TOLERANCE, HALF = 1e-3, 2e-2  # largest errors that are right, in float32 and in half precision


class Setting(NamedTuple):
    """Parameters of Eq. 7; ``alpha`` is the weight of positives."""
    gamma_pos: float = 0.
    gamma_neg: float = 4.
    clip: float = 0.05
    alpha: float | None = None


ASL = [Setting(), Setting(1, 4, 0.05), Setting(0, 0, 0.05), Setting(1, 2, 0.2)]
FOCAL = [Setting(2, 2, 0, 0.25), Setting(2, 2, 0, 0.5)]


class Implementation(NamedTuple):
    """A loss to audit.

    Args:
        name: Name in the rows.
        package: Distribution that it is from; '' for one that is written here.
        make: Builds the module from a setting and a reduction.
        settings: Those that it has. The first is used where one is enough.
    """
    name: str
    package: str
    make: Callable[[Setting, str], nn.Module]
    settings: list[Setting]

    def loss(self, setting: Setting | None = None, reduction: str = 'none') -> nn.Module:
        """The module, by default elementwise with the first setting."""
        return self.make(setting or self.settings[0], reduction)


class Equations(nn.Module):
    """Eq. 2, 5 and 7 as they are printed, in the dtype of the logits, with probabilities clamped to ``eps`` before the
    logarithm, as in most code."""

    def __init__(self, setting: Setting, reduction: str, eps: float) -> None:
        super().__init__()
        self.setting, self.reduction, self.eps = setting, reduction, eps

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss of dense targets."""
        gamma_pos, gamma_neg, clip, alpha = self.setting
        p = pred.sigmoid()
        p_m = (p - clip).clamp(min=0)
        positive = (1 - p)**gamma_pos * p.clamp(min=self.eps).log()
        negative = p_m**gamma_neg * (1 - p_m).clamp(min=self.eps).log()
        if alpha is not None:
            positive, negative = alpha * positive, (1 - alpha) * negative
        loss = -target * positive - (1 - target) * negative
        return loss if self.reduction == 'none' else getattr(loss, self.reduction)()


class TorchvisionFocal(nn.Module):
    """torchvision's function as a module."""

    def __init__(self, setting: Setting, reduction: str) -> None:
        super().__init__()
        self.arguments = dict(alpha=setting.alpha, gamma=setting.gamma_pos, reduction=reduction)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss of dense targets."""
        return importlib.import_module('torchvision.ops').sigmoid_focal_loss(pred, target, **self.arguments)


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


IMPLEMENTATIONS = [
    Implementation('mmasl', 'mmasl', lambda s, reduction: AsymmetricLoss(*s[:3], alpha=s.alpha, reduction=reduction),
                   ASL + FOCAL),
    Implementation('equations', '', lambda s, reduction: Equations(s, reduction, 0), ASL + FOCAL),
    Implementation('equations, eps 1e-8', '', lambda s, reduction: Equations(s, reduction, 1e-8), ASL + FOCAL),
    Implementation('timm', 'timm', lambda s, reduction: _class('timm.loss', 'AsymmetricLossMultiLabel')(
        s.gamma_neg, s.gamma_pos, s.clip, reduction=reduction), ASL),
    Implementation('MMPretrain', 'onedl-mmpretrain', lambda s, reduction: _class(
        'mmpretrain.models.losses', 'AsymmetricLoss')(*s[:3], reduction), ASL),
    Implementation('MMPretrain, focal', 'onedl-mmpretrain', lambda s, reduction: _class(
        'mmpretrain.models.losses', 'FocalLoss')(s.gamma_pos, s.alpha, reduction), FOCAL),
    Implementation('MMDetection, focal', 'onedl-mmdetection', lambda s, reduction: _class(
        'mmdet.models.losses', 'FocalLoss')(True, s.gamma_pos, s.alpha, reduction), FOCAL),
    Implementation('torchvision, focal', 'torchvision', TorchvisionFocal, FOCAL)]


def exact(logits: Tensor, target: Tensor, setting: Setting) -> Tensor:
    """Eq. 2, 5 and 7 in float64, in log space, per element."""
    gamma_pos, gamma_neg, clip, alpha = setting
    z, y = logits.double(), target.double()
    p = z.sigmoid()
    beyond = p > clip
    p_m = torch.where(beyond, p - clip, 0.5)
    positive = (gamma_pos * F.logsigmoid(-z)).exp() * F.logsigmoid(z)
    log_rest = torch.log1p(-p_m) if clip else F.logsigmoid(-z)
    negative = torch.where(beyond, p_m**gamma_neg * log_rest, 0.)
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    return -y * positive - (1 - y) * negative


def differentiate(loss: Callable, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Elementwise loss and gradient, in float64."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    return value.detach().double(), torch.autograd.grad(value.sum(), logits)[0].double()


def error(found: Tensor, expected: Tensor) -> float:
    """Largest error, relative to values above 0.01, and to 0.01 below; NaN and infinity where the found ones are."""
    return float(((found.detach() - expected).abs() / expected.abs().clamp(min=0.01)).max())


def grid(high: float, target: float | None = None) -> tuple[Tensor, Tensor]:
    """Logits from -high to high, as positives and as negatives, or with one target."""
    z = torch.linspace(-high, high, 2 * 87 + 1)
    logits = torch.stack([z, z], 1)
    labels = torch.tensor([0., 1.]).expand_as(logits) if target is None else torch.full_like(logits, target)
    return logits, labels.contiguous()


def worst(loss: Implementation, batch: tuple[Tensor, Tensor], which: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest error of the value (0) or the gradient (1) over all settings."""
    logits, target = batch[0].to(dtype), batch[1]
    errors = []
    for setting in loss.settings:
        found = differentiate(loss.loss(setting), logits, target.to(dtype))[which]
        expected = differentiate(partial(exact, setting=setting), logits.float(), target)[which]
        errors.append(error(found, expected))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


Result = tuple[float | str, bool]


def below(value: float, limit: float = TOLERANCE) -> Result:
    """A number that should not exceed a limit."""
    return value, value <= limit


def value(loss: Implementation) -> Result:
    """error of the loss, |z| <= 10"""
    return below(worst(loss, grid(10), 0))


def gradient(loss: Implementation) -> Result:
    """error of the gradient, |z| <= 10"""
    return below(worst(loss, grid(10), 1))


def value_at_extremes(loss: Implementation) -> Result:
    """error of the loss, |z| <= 87"""
    return below(worst(loss, grid(87), 0))


def gradient_at_extremes(loss: Implementation) -> Result:
    """error of the gradient, |z| <= 87"""
    return below(worst(loss, grid(87), 1))


def fractional_gamma(loss: Implementation) -> Result:
    """gradients that are NaN, gamma 0.5 and a margin"""
    if loss.settings[0].clip == 0:
        return '', True
    logits = torch.linspace(-8, 8, 34).view(17, 2)
    _, found = differentiate(loss.loss(Setting(0, 0.5, 0.05)), logits, torch.zeros_like(logits))
    return int(found.isnan().sum()), not found.isnan().any()


def float16(loss: Implementation) -> Result:
    """error of the loss in float16, |z| <= 20"""
    return below(worst(loss, grid(20), 0, torch.float16), HALF)


def bfloat16(loss: Implementation) -> Result:
    """error of the loss in bfloat16, |z| <= 20"""
    return below(worst(loss, grid(20), 0, torch.bfloat16), HALF)


def autocast(loss: Implementation) -> Result:
    """error of the loss under autocast"""
    features, layer = torch.linspace(-20, 20, 81)[:, None], nn.Linear(1, 2)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    target = (torch.arange(162) % 2).float().view(81, 2)
    with torch.autocast('cpu', torch.bfloat16):
        logits = layer(features)
        found = loss.loss()(logits, target)
    return below(error(found.double(), exact(logits.detach(), target, loss.settings[0])), HALF)


def negative_labels(loss: Implementation) -> Result:
    """loss of a label of -1, which is ignored or refused"""
    try:
        found = float(loss.loss()(torch.full((1, 2), 2.), torch.full((1, 2), -1.))[0, 0])
    except Exception as refusal:
        return type(refusal).__name__, True
    return found, found == 0


def soft_labels(loss: Implementation) -> Result:
    """error of the loss of soft labels (Eq. 2)"""
    return below(max(worst(loss, grid(10, y), 0) for y in (0.1, 0.9)))


def one_class(loss: Implementation) -> Result:
    """error of the loss of one class, (N, 1)"""
    logits = torch.linspace(-4, 4, 12)[:, None]
    target = (torch.arange(12) % 2)[:, None]
    return below(error(loss.loss()(logits, target).double(), exact(logits, target, loss.settings[0])))


def background(loss: Implementation) -> Result:
    """error of the loss of labels with the background C"""
    logits = torch.linspace(-4, 4, 12).view(4, 3)
    labels = torch.tensor([0, 3, 2, 3])
    found = loss.loss()(logits, labels)
    return below(error(found.double(), exact(logits, F.one_hot(labels, 4)[:, :3], loss.settings[0])))


def grad_mode(loss: Implementation) -> Result:
    """grad mode after a call"""
    batch = grid(5)
    module = loss.loss()
    with torch.no_grad():
        module(*batch)
        kept = not torch.is_grad_enabled()
    module(*batch)
    kept &= torch.is_grad_enabled()
    return 'kept' if kept else 'changed', kept


def deepcopies(loss: Implementation) -> Result:
    """deepcopy after a training step"""
    module = loss.loss()
    differentiate(module, *grid(5))
    equal = torch.equal(copy.deepcopy(module)(*grid(5)), module(*grid(5)))
    return 'equal' if equal else 'differs', equal


def compiles(loss: Implementation) -> Result:
    """error of the compiled loss and gradient, one graph"""
    torch._dynamo.reset()
    module, batch = loss.loss(), grid(10)
    found = differentiate(torch.compile(module, fullgraph=True), *batch)
    return below(max(error(*pair) for pair in zip(found, differentiate(module, *batch))))


def reductions(loss: Implementation) -> Result:
    """error of sum and mean"""
    batch = grid(5)
    elements = loss.loss()(*batch).double()
    pairs = [(loss.loss(None, name)(*batch), getattr(elements, name)()) for name in ('sum', 'mean')]
    return below(max(error(found.double(), expected) for found, expected in pairs))


def deterministic(loss: Implementation) -> Result:
    """same bits twice, inputs unchanged"""
    logits, target = grid(10)
    before = logits.clone(), target.clone()
    module = loss.loss(None, 'sum')
    twice = [differentiate(module, logits, target) for _ in range(2)]
    same = all(map(torch.equal, *twice)) and torch.equal(logits, before[0]) and torch.equal(target, before[1])
    return 'yes' if same else 'no', same


FACTS: list[Callable[[Implementation], Result]] = [
    value, gradient, value_at_extremes, gradient_at_extremes, fractional_gamma, float16, bfloat16, autocast,
    negative_labels, soft_labels, one_class, background, grad_mode, deepcopies, compiles, reductions, deterministic]


def check(loss: Implementation, fact: Callable[[Implementation], Result]) -> dict[str, str]:
    """One row. An exception is a fact, too."""
    try:
        found, right = fact(loss)
    except ImportError:
        raise
    except Exception as failure:
        found, right = type(failure).__name__, False
    number = f'{found:.2g}' if isinstance(found, (int, float)) else found
    return dict(implementation=loss.name, version=version(loss.package) if loss.package else '', fact=fact.__name__,
                found=number, right=str(int(right)))


def audit(losses: Sequence[Implementation] = IMPLEMENTATIONS) -> Iterator[dict[str, str]]:
    """Rows of all facts of all implementations."""
    for loss in losses:
        for fact in FACTS:
            yield check(loss, fact)


def render(rows: Sequence[dict[str, str]]) -> str:
    """The table: what each implementation gets right, and in bold what not."""
    names = list(dict.fromkeys(row['implementation'] for row in rows))
    found = {(row['fact'], row['implementation']): row for row in rows}

    def cell(row: dict[str, str]) -> str:
        return (row['found'] or '-') if row['right'] == '1' else f'**{row["found"]}**'

    lines = [[fact.__doc__, *(cell(found[fact.__name__, name]) for name in names)] for fact in FACTS]
    right = ['facts that are right', *(str(sum(row['right'] == '1' for row in rows if row['implementation'] == name))
                                       for name in names)]
    return markdown_table([*lines, right], ['fact', *names])


def fill_page(text: str) -> str:
    """The page with the table and the versions of the rows."""
    rows = read_rows(ROWS)
    versions = {row['implementation'].partition(',')[0]: row['version'] for row in rows if row['version']}
    return fill_blocks(text, {
        'audit': lambda _: render(rows),
        'versions': lambda _: f"Versions: torch {rows[0]['torch']}, "
                              f"{', '.join(f'{name} {number}' for name, number in versions.items())}."})


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write_rows(ROWS, list(audit()))
    PAGE.write_text(fill_page(PAGE.read_text()))


if __name__ == '__main__':
    main()
