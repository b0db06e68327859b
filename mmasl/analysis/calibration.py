"""Compares ways to calibrate a classifier: the posterior in closed form, temperature scaling and Platt scaling."""
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmasl.errors import DataError
from mmasl.evaluation.functional import Conventions, expected_calibration_error, multilabel_metrics, reliability
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior, posterior_threshold
from mmasl.utils.markdown import markdown_table

# Decimals and unit of each metric in the table.
METRICS = {'ECE': (3, ''), 'class-wise ECE': (3, ''), 'Brier': (4, ''), 'error': (4, ''), 'CF1': (1, ' [%]'),
           'OF1': (1, ' [%]')}


class LabelledLogits(NamedTuple):
    """Logits of a model with the labels of N images.

    Args:
        logits: (N, C).
        labels: int8 (N, C): 1 positive, 0 negative, -1 ignored.
        loss: The :class:`mmasl.AsymmetricLoss` that the model was trained with.
        truth: The true probabilities of a synthetic task, (N, C); None if unknown.
    """
    logits: Tensor
    labels: Tensor
    loss: nn.Module
    truth: Tensor | None = None


class Comparison(NamedTuple):
    """Calibration of several methods on the half of the images that no method was fitted on.

    Args:
        rows: Metrics of each method, with the keys ``method``, ``fit`` and those of ``METRICS``.
        scores: Probabilities by method, (N / 2, C).
        labels: Labels of these images, (N / 2, C).
    """
    rows: list[dict[str, Any]]
    scores: dict[str, np.ndarray]
    labels: np.ndarray


def synthesize(loss: AsymmetricLoss, seed: int, images: int = 20000, classes: int = 10, steps: int = 2000,
               progress: Callable[[Iterable, str], Iterable] = lambda items, what: items) -> LabelledLogits:
    """Train a small network on a task with a known posterior.

    Inputs are x ~ N(0, 1)^8. Positives have probability sigmoid(3 u.x + (v.x)^2 - 7) with random unit vectors u and v
    for each class.

    Args:
        loss: The loss to train with.
        seed: Seed of task and network.
        images: Number of images to predict.
        classes: Number of classes.
        steps: Number of optimiser steps.
        progress: Wraps the steps. Its second argument describes them.
    """
    rng = torch.Generator().manual_seed(seed)
    u, v = F.normalize(torch.randn(2, 8, classes, generator=rng), dim=1)

    def sample(count: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(count, 8, generator=rng)
        truth = (3 * x @ u + (x @ v)**2 - 7).sigmoid()
        return x, truth, torch.bernoulli(truth, generator=rng)

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, classes))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in progress(range(steps), 'training'):
        x, _, y = sample(1024)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    x, truth, y = sample(images)
    with torch.no_grad():
        return LabelledLogits(model(x), y.to(torch.int8), loss, truth)


def compare_calibration(data: LabelledLogits, seed: int = 0) -> Comparison:
    """Fit temperature and Platt scaling on one half of the images, and compare all methods on the other half.

    Args:
        data: Logits and labels.
        seed: Seed of the split.

    Raises:
        DataError: There are fewer than two images.
    """
    if len(data.logits) < 2:
        raise DataError('one image cannot be split: compare on two or more validation images')
    order = torch.randperm(len(data.logits), generator=torch.Generator().manual_seed(seed))
    fitted, held_out = order.chunk(2)
    logits, labels = data.logits[held_out], data.labels[held_out].numpy()
    found = {'p': logits.sigmoid(), 'posterior': posterior(logits, **calibration_settings(data.loss))}
    fits = {}
    for name, with_bias in (('temperature scaling', False), ('Platt scaling', True)):
        scale, bias = fit_scaling(data.logits[fitted], data.labels[fitted], with_bias)
        found[name] = (scale * logits + bias).sigmoid()
        fits[name] = f'sigmoid({scale:.3g} z {bias:+.3g})' if with_bias else f'sigmoid(z / {1 / scale:.3g})'

    rows, scores = [], {name: values.numpy() for name, values in found.items()}
    known = labels >= 0
    for name, values in scores.items():
        report, _ = multilabel_metrics(scores['p'], labels, Conventions(topk=None), calibrated=values)
        row = {'ECE': report['ECE'], 'class-wise ECE': expected_calibration_error(values, labels, classwise=True),
               'Brier': np.square(values - labels)[known].mean()}
        if data.truth is not None:
            row['error'] = np.abs(values - data.truth[held_out].numpy()).mean()
        rows.append({'method': name, 'fit': fits.get(name, ''), **row, 'CF1': report['CF1'], 'OF1': report['OF1']})
    return Comparison(rows, scores, labels)


def fit_scaling(logits: Tensor, labels: Tensor, with_bias: bool) -> tuple[float, float]:
    """Fit a scale > 0, and a bias, of the logits by maximum likelihood over all classes together.

    Args:
        logits: (N, C).
        labels: (N, C): 1, 0 or -1.
        with_bias: Whether to fit a bias (Platt scaling), or to keep it 0 (temperature scaling).

    Returns:
        Scale and bias.
    """
    known = labels >= 0
    logits, labels = logits[known].double(), labels[known].double()
    log_scale, bias = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([log_scale, bias] if with_bias else [log_scale], max_iter=200,
                                  tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(log_scale.exp() * logits + bias, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale.exp().item(), bias.item()


def render_comparison(rows: list[dict[str, Any]]) -> str:
    """Format the rows of a :class:`Comparison` as a Markdown table."""
    names = [name for name in METRICS if name in rows[0]]
    return markdown_table(
        ([f"{row['method']}, {row['fit']}" if row['fit'] else row['method'],
          *(f'{row[name]:.{METRICS[name][0]}f}' for name in names)] for row in rows),
        ['', *(name + METRICS[name][1] for name in names)])


def format_range(values: Tensor) -> str:
    """Format a number, or the range of the numbers of the classes."""
    low, high = f'{values.min():.3f}', f'{values.max():.3f}'
    return low if low == high else f'{low} to {high}'


def plot_calibration(path: Path, comparison: Comparison, settings: dict[str, Any], title: str) -> None:
    """Plot the reliability of each method, the number of labels in each bin, and the posterior over p.

    Args:
        path: File, .png or .svg.
        comparison: Result of :func:`compare_calibration`.
        settings: Parameters of the loss, as :func:`mmasl.ops.posterior` takes them.
        title: Title of the figure.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (frequency, counts, curve) = plt.subplots(1, 3, figsize=(13, 4.3), layout='constrained')
    figure.suptitle(title)
    frequency.axline((0, 0), slope=1, color='grey', linewidth=1)
    for number, (name, values) in enumerate(comparison.scores.items()):
        count, probability, positives = reliability(values, comparison.labels).sum(0)
        filled = count > 0
        count, mean, observed = count[filled], probability[filled] / count[filled], positives[filled] / count[filled]
        frequency.errorbar(mean, observed, 1.96 * np.sqrt(observed * (1 - observed) / count), marker='o', markersize=4,
                           linewidth=1, capsize=2, color=f'C{number}', label=name)
        counts.plot(mean, count, marker='o', markersize=4, linewidth=1, color=f'C{number}', label=name)
    frequency.set(xlabel='predicted probability', ylabel='frequency of positives', title='reliability, 95 % intervals')
    counts.legend(loc='upper center')
    counts.set(xlabel='predicted probability', ylabel='labels', yscale='log', title='number of labels in each bin')

    p = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1, None]
    classes = max([value.numel() for value in settings.values() if isinstance(value, Tensor)])
    posteriors = posterior(p.logit().expand(-1, classes), **settings)
    threshold = posterior_threshold(0.5, **settings).sigmoid()
    curve.axline((0, 0), slope=1, color='grey', linewidth=1)
    curve.plot(p, posteriors.unique(dim=1), color='C1', linewidth=1)
    curve.axhline(0.5, color='grey', linewidth=1, linestyle=':')
    curve.set(xlabel='p', ylabel='posterior', title=f'posterior 1/2 at p = {format_range(threshold)}')
    for axis in (frequency, curve):
        axis.set(xlim=(0, 1), ylim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
