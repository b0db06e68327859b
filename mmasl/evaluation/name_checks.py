"""Checks the names that the metrics of an evaluator will report, before there is anything to evaluate.

MMEngine raises for a name that two metrics report, and for a ``save_best`` that none reports, after the first
evaluation: an epoch of training is lost.
"""
import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.evaluator import BaseMetric

from mmasl.errors import ConfigError

# Prefixes of the metrics that read samples of classifiers and write no file.
CLASSIFICATION = ('multi-label', 'single-label', 'accuracy')


def metric_names(metric: BaseMetric, num_classes: int) -> list[str] | None:
    """Names that a metric of a classifier reports, found by evaluating two made-up samples with a copy of it.

    Args:
        metric: The metric, which is not changed.
        num_classes: Number of classes C.

    Returns:
        The names with their prefix; None for other kinds of metrics.
    """
    if type(metric).default_prefix not in CLASSIFICATION:
        return None
    metric = copy.copy(metric)
    metric.results = []
    if getattr(metric, 'bootstrap', 0):
        metric.bootstrap = 1  # draw
    scores = torch.full((num_classes, ), 0.5)
    samples = [dict(pred_score=scores, calibrated_score=scores, pred_label=torch.tensor([0]), num_classes=num_classes,
                    gt_label=torch.tensor([0]), gt_score=torch.full((num_classes, ), label)) for label in (1., 0.)]
    try:
        with _no_logging():
            metric.process(None, samples)
            found = metric.compute_metrics(metric.results)
    except Exception:  # a metric of another kind, whose samples have other fields
        return None
    return [f'{metric.prefix}/{name}' for name in found]


def check_metric_names(metrics: Sequence[BaseMetric], num_classes: int, key: str,
                       save_best: Sequence[str] = ()) -> None:
    """Raise if two metrics report one name, or if no metric reports a name of ``save_best``.

    Args:
        metrics: Metrics of an evaluator. Those whose names are unknown are not compared.
        num_classes: Number of classes of the evaluated data set.
        key: Key of the evaluator in the config, for the message.
        save_best: Names by which checkpoints are selected; 'auto' is the first metric.

    Raises:
        ConfigError: See above.
    """
    found = [metric_names(metric, num_classes) for metric in metrics]
    owners: dict[str, int] = {}
    for place, names in enumerate(found):
        for name in names or ():
            if (other := owners.setdefault(name, place)) != place:
                raise ConfigError(f'{key}.{other} ({type(metrics[other]).__name__}) and {key}.{place} '
                                  f'({type(metrics[place]).__name__}) both report {name}: give one of them a prefix of '
                                  f"its own, such as prefix='{metrics[place].prefix}-2'")
    if None not in found:
        for name in save_best:
            if name not in (*owners, 'auto'):
                some = ', '.join(list(owners)[:8])
                raise ConfigError(f'save_best={name!r} is not reported by {key}: use one of {some}, ...')


@contextmanager
def _no_logging() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
