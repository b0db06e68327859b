"""Calibrate the probabilities of a classifier trained with the asymmetric loss, and measure what that gains.

Predicts the validation set once, and compares on one half of its images, at a threshold of 1/2: p as it is, the
posterior in closed form, which fits nothing, and temperature and Platt scaling, which are fitted on the other half.
With "synthetic" in place of CONFIG it trains a small network for some seconds on a task whose posterior is known, with
the loss of --cfg-options, as in gamma_neg=2.
"""
import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner.amp import autocast
from torch import Tensor, nn

from mmasl import AsymmetricLoss, MultiLabelMetric
from mmasl.evaluation.metrics import Conventions, expected_calibration_error, multilabel_metrics, reliability
from mmasl.models.heads.calibrated_predictions import calibration_settings
from mmasl.ops import inverse_posterior, posterior, posterior_cap
from mmasl.reproduce.runs import write_rows
from mmasl.utils.tools import (
    build_runner,
    check_data,
    is_classification,
    load_config,
    load_weights,
    make_parser,
    parse_args,
    progress,
    require_file,
    set_dataloader_defaults,
)

# Figure: decimals and unit in the table.
FIGURES = {'ECE': (3, ''), 'class-wise ECE': (3, ''), 'Brier': (4, ''), 'error': (4, ''), 'CF1': (1, ' [%]'),
           'OF1': (1, ' [%]')}


class Predictions(NamedTuple):
    """What a model says of N images: logits and labels (1, 0, -1) of shape (N, C), its loss, the posterior if known."""
    logits: Tensor
    labels: Tensor
    loss: nn.Module
    truth: Tensor | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file or URL; none for synthetic')
    parser.add_argument('--out', type=Path, metavar='FILE',
                        help='CSV file of the table (default: calibration.csv in the work dir)')
    parser.add_argument('--plot', type=Path, metavar='FILE',
                        help='reliability diagram, .png or .svg (default: calibration.svg in the work dir)')
    parser.add_argument('--seed', type=int, default=0, help='of the halves, and of the synthetic task (default: 0)')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config that the flags describe, checked as far as is possible without building anything."""
    cfg = load_config(args)
    if args.launcher != 'none':
        raise SystemExit('tools/calibrate.py predicts in one process: run it without --launcher')
    if not is_classification(cfg):
        raise SystemExit(f"{args.config} is no classification config: its default_scope is {cfg.get('default_scope')!r}"
                         ", not 'mmpretrain'")
    if cfg.get('val_dataloader') is None:
        raise SystemExit(f'{args.config} has no val_dataloader')
    if not args.checkpoint:
        raise SystemExit(f'Name the checkpoint: tools/calibrate.py {args.config} CHECKPOINT')
    require_file(args.checkpoint, 'checkpoint')
    cfg.load_from, cfg.resume = args.checkpoint, False
    check_data(cfg, 'val')
    set_dataloader_defaults(cfg, 'val')
    return cfg


@torch.no_grad()
def predict(cfg: Config, amp: bool = False) -> Predictions:
    """Logits and labels of the validation set; hooks see the checkpoint, and may restore parameters of the loss."""
    runner = build_runner(cfg)
    loss: Any = getattr(getattr(runner.model, 'head', None), 'loss_module', None)
    try:
        calibration_settings(loss)
    except (TypeError, ValueError) as error:
        raise SystemExit(f'{cfg.filename}: {error}') from None
    load_weights(runner)
    model, loader = runner.model.eval(), runner.val_dataloader
    labels = MultiLabelMetric()  # reads the labels of samples
    labels.dataset_meta = loader.dataset.metainfo
    logits = []
    for batch in progress(loader, 'predicting'):
        data = model.data_preprocessor(batch, False)
        with autocast(enabled=amp):
            logits.append(model(data['inputs'], mode='tensor').float().cpu())
        labels.process(None, [dict(sample.to_dict(), pred_score=z.sigmoid())
                              for sample, z in zip(data['data_samples'], logits[-1])])
    return Predictions(torch.cat(logits), torch.from_numpy(labels.labels()), loss.cpu())


def synthesize(seed: int, images: int = 20000, classes: int = 10, steps: int = 2000, **settings: Any) -> Predictions:
    """Train on x ~ N(0, 1)^8 with positives of probability sigmoid(3 u.x + (v.x)^2 - 7), u and v unit vectors."""
    try:
        loss = AsymmetricLoss(**settings)
    except (TypeError, ValueError) as error:
        raise SystemExit(f'--cfg-options does not fit AsymmetricLoss: {error}') from None
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
        return Predictions(model(x), y.to(torch.int8), loss, truth)


def compare(predictions: Predictions,
            seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], np.ndarray]:
    """Rows of figures, the probabilities (N/2, C) by method, and their labels; all of the half that fitted nothing."""
    order = torch.randperm(len(predictions.logits), generator=torch.Generator().manual_seed(seed))
    fitted, held_out = order.chunk(2)
    logits, labels = predictions.logits[held_out], predictions.labels[held_out].numpy()
    found = {'p': logits.sigmoid(), 'posterior': posterior(logits, **calibration_settings(predictions.loss))}
    fits = {}
    for name, with_bias in (('temperature scaling', False), ('Platt scaling', True)):
        scale, bias = fit_scaling(predictions.logits[fitted], predictions.labels[fitted], with_bias)
        found[name] = (scale * logits + bias).sigmoid()
        fits[name] = f'sigmoid({scale:.3g} z {bias:+.3g})' if with_bias else f'sigmoid(z / {1 / scale:.3g})'

    rows, scores = [], {name: values.numpy() for name, values in found.items()}
    known = labels >= 0
    for name, values in scores.items():
        report, _ = multilabel_metrics(scores['p'], labels, Conventions(topk=None), calibrated=values)
        figures = {'ECE': report['ECE'], 'class-wise ECE': expected_calibration_error(values, labels, classwise=True),
                   'Brier': np.square(values - labels)[known].mean()}
        if predictions.truth is not None:
            figures['error'] = np.abs(values - predictions.truth[held_out].numpy()).mean()
        rows.append({'method': name, 'fit': fits.get(name, ''), **figures, 'CF1': report['CF1'], 'OF1': report['OF1']})
    return rows, scores, labels


def fit_scaling(logits: Tensor, labels: Tensor, with_bias: bool) -> tuple[float, float]:
    """Scale > 0 and bias of the logits by maximum likelihood of the labels, over all classes together."""
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


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    figures = [name for name in FIGURES if name in rows[0]]
    lines = ['| | ' + ' | '.join(name + FIGURES[name][1] for name in figures) + ' |', '|---' * (len(figures) + 1) + '|']
    for row in rows:
        label = f"{row['method']}, {row['fit']}" if row['fit'] else row['method']
        lines.append(f'| {label} | ' + ' | '.join(f'{row[name]:.{FIGURES[name][0]}f}' for name in figures) + ' |')
    return '\n'.join(lines)


def span(values: Tensor) -> str:
    """A number, or the range of the classes' numbers."""
    low, high = f'{values.min():.3f}', f'{values.max():.3f}'
    return low if low == high else f'{low} to {high}'


def write(path: Path, rows: list[dict[str, Any]], **common: object) -> None:
    rows = [{key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    write_rows(path, [row | common for row in rows])


def plot(path: Path, scores: dict[str, np.ndarray], labels: np.ndarray, settings: dict[str, Any],
         title: str) -> None:
    """The reliability of each method, how many entries are behind it, and the posterior over p."""
    figure, (frequency, counts, curve) = plt.subplots(1, 3, figsize=(13, 4.3), layout='constrained')
    figure.suptitle(title)
    frequency.axline((0, 0), slope=1, color='grey', linewidth=1)
    for number, (name, values) in enumerate(scores.items()):
        count, probability, positives = reliability(values, labels).sum(0)
        filled = count > 0
        count, mean, observed = count[filled], probability[filled] / count[filled], positives[filled] / count[filled]
        frequency.errorbar(mean, observed, 1.96 * np.sqrt(observed * (1 - observed) / count), marker='o', markersize=4,
                           linewidth=1, capsize=2, color=f'C{number}', label=name)
        counts.plot(mean, count, marker='o', markersize=4, linewidth=1, color=f'C{number}', label=name)
    frequency.set(xlabel='predicted probability', ylabel='frequency of positives', title='reliability, 95 % intervals')
    counts.legend(loc='upper center')
    counts.set(xlabel='predicted probability', ylabel='labels', yscale='log', title='labels behind each point')

    p = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1, None]
    classes = max([value.numel() for value in settings.values() if isinstance(value, Tensor)])
    posteriors = posterior(p.logit().expand(-1, classes), **settings)
    threshold = inverse_posterior(0.5, **settings).sigmoid()
    curve.axline((0, 0), slope=1, color='grey', linewidth=1)
    curve.plot(p, posteriors.unique(dim=1), color='C1', linewidth=1)
    curve.axhline(0.5, color='grey', linewidth=1, linestyle=':')
    curve.set(xlabel='p', ylabel='posterior', title=f'posterior 1/2 at p = {span(threshold)}')
    for axis in (frequency, curve):
        axis.set(xlim=(0, 1), ylim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    if args.plot and args.plot.suffix not in ('.png', '.svg'):
        raise SystemExit(f'--plot {args.plot}: give a .png or .svg file')
    if args.config == 'synthetic':
        work_dir = Path(args.work_dir or 'work_dirs/calibrate_synthetic')
        predictions = synthesize(args.seed, **args.cfg_options)
    else:
        cfg = configure(args)
        work_dir = Path(cfg.work_dir)
        predictions = predict(cfg, args.amp)
    settings = calibration_settings(predictions.loss)
    threshold, cap = span(inverse_posterior(0.5, **settings).sigmoid()), span(posterior_cap(**settings))
    rows, scores, labels = compare(predictions, args.seed)
    share = (labels == 1).sum() / (labels >= 0).sum()

    print(f'\n{predictions.loss}\nposterior 1/2 at p = {threshold}; the posterior stays below {cap}\n'
          f'{len(labels)} images of {labels.shape[1]} classes, {share:.1%} positive; as many others for fitting\n\n'
          f'{render(rows)}\n')
    out, picture = args.out or work_dir / 'calibration.csv', args.plot or work_dir / 'calibration.svg'
    write(out, rows, config=args.config, seed=args.seed, checkpoint=args.checkpoint or '', loss=repr(predictions.loss),
          threshold=threshold, cap=cap, images=len(labels), classes=labels.shape[1], positive=f'{share:.4g}')
    plot(picture, scores, labels, settings, f'{args.config}, {len(labels)} images')
    print(f'Table and diagram: {out}, {picture}')


if __name__ == '__main__':
    main()
