"""Calibrate the probabilities of a classifier that was trained with the asymmetric loss, and measure the gain.

Predicts the validation set and splits its images in two halves. Temperature and Platt scaling are fitted on one half.
On the other half they are compared with p and with the posterior in closed form, which needs no fit. With "synthetic"
instead of CONFIG, a small network is trained on a task with a known posterior; --cfg-options sets its loss, as in
gamma_neg=2.

With --recall or --precision, writes a checkpoint with thresholds that keep this promise on new images from the source
of the validation set, which must not have been used for training or to choose the checkpoint.
"""
import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmpretrain.models.heads import MultiLabelClsHead

from mmasl.analysis.calibration import (
    LabelledLogits,
    compare_calibration,
    format_range,
    plot_calibration,
    render_comparison,
    synthesize,
)
from mmasl.analysis.guarantees import guarantee_precision, guarantee_recall
from mmasl.apis.dataset_predictions import predict_dataset
from mmasl.apis.model_files import load_checkpoint
from mmasl.errors import ConfigError
from mmasl.evaluation.functional import count_outcomes
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior_threshold, posterior_upper_bound
from mmasl.reproduce.runs import write_rows
from mmasl.utils.checkpoint import inner_model, safe_checkpoint_loading
from mmasl.utils.files import atomic_write
from mmasl.utils.markdown import markdown_table
from mmasl.utils.thresholds import STORED
from mmasl.utils.tools import (
    build_runner,
    building_data,
    check_data,
    exit_on_user_error,
    is_classification,
    load_config,
    load_test_checkpoint,
    make_parser,
    parse_args,
    progress,
    require_file,
    set_dataloader_defaults,
    test_hooks,
)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file or URL; not with "synthetic"')
    parser.add_argument('--out', type=Path, metavar='FILE',
                        help='CSV file for the table (default: calibration.csv in the work dir)')
    parser.add_argument('--plot', type=Path, metavar='FILE',
                        help='reliability diagram, .png or .svg (default: calibration.svg in the work dir)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the splits and the synthetic task (default: 0)')
    promise = parser.add_mutually_exclusive_group()
    promise.add_argument('--recall', type=float, metavar='R',
                         help='find thresholds whose expected recall is at least R, such as 0.95')
    promise.add_argument('--precision', type=float, metavar='P',
                         help='find thresholds whose precision is at least P, such as 0.9, with a confidence 1 - delta')
    parser.add_argument('--delta', type=float, default=0.1,
                        help='largest probability that the promise of --precision fails (default: 0.1)')
    parser.add_argument('--over-all', action='store_true',
                        help='promise the mean over images with one threshold, not the figure of each class')
    parser.add_argument('--save', type=Path, metavar='FILE',
                        help='checkpoint to write with --recall or --precision (default: thresholds.pth in the work '
                        'dir)')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the config and check all flags before the model is built."""
    cfg = load_config(args)
    for name in ('recall', 'precision', 'delta'):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            raise ConfigError(f'--{name} {value} must be between 0 and 1')
    for flag in ('save', 'over_all'):
        if getattr(args, flag) and not (args.recall or args.precision):
            raise ConfigError(f"--{flag.replace('_', '-')} is for thresholds that --recall or --precision promises: "
                              'give one of them')
    if args.launcher != 'none':
        raise ConfigError('tools/calibrate.py runs in one process: leave out --launcher')
    if not is_classification(cfg):
        raise ConfigError(f"{args.config} has default_scope={cfg.get('default_scope')!r}: use a classification config, "
                          "with default_scope='mmpretrain'")
    if cfg.get('val_dataloader') is None:
        raise ConfigError(f'{args.config} has no val_dataloader')
    if not args.checkpoint:
        raise ConfigError(f'the checkpoint is missing: tools/calibrate.py {args.config} CHECKPOINT')
    require_file(args.checkpoint, 'checkpoint')
    cfg.load_from, cfg.resume = args.checkpoint, False
    check_data(cfg, 'val')
    set_dataloader_defaults(cfg, 'val')
    return cfg


def promise(cfg: Config, args: argparse.Namespace) -> None:
    """Write a checkpoint with thresholds that keep a promised recall or precision."""
    runner = build_runner(cfg, test_hooks(args))
    head = getattr(runner.model, 'head', None)
    if not isinstance(head, MultiLabelClsHead):
        raise ConfigError(f'{cfg.filename}: model.head is a {type(head).__name__}. Use a multi-label head of '
                          'MMPretrain or mmasl')
    with building_data(cfg, args.no_check_data):
        loader = runner.val_dataloader
    load_test_checkpoint(runner)
    found = predict_dataset(runner.model, loader, args.amp, progress)
    p, labels = found.logits.sigmoid().numpy(), found.labels.numpy()
    kind, level = ('recall', args.recall) if args.recall else ('precision', args.precision)
    if kind == 'recall':
        guarantee = guarantee_recall(p, labels, level, not args.over_all)
    else:
        guarantee = guarantee_precision(p, labels, level, args.delta, not args.over_all, args.seed)
    safe = ~np.isnan(guarantee.thresholds)
    if not safe.any():
        low, high = guarantee.positives.min(), guarantee.positives.max()
        raise ConfigError(f'--{kind} {level:g} cannot be promised for any class: the {len(labels)} images of '
                          f'val_dataloader have {low} to {high} positives of a class. Ask for less, or calibrate on '
                          'more images')
    others = np.full(len(safe), 0.5)
    if isinstance(head.loss_module, AsymmetricLoss):
        others[:] = posterior_threshold(0.5, **calibration_settings(head.loss_module.cpu())).sigmoid().numpy()
    thresholds = np.where(safe, guarantee.thresholds, others).astype(np.float32)
    print(render_promise(p, labels, thresholds, safe, found.classes))
    without = [name for name, kept in zip(found.classes, safe) if not kept]
    if without:
        print(f'\nNo promise for {len(without)} of {len(safe)} classes, which have too few positives or too many wrong '
              f'predictions; they keep the threshold of the head: {", ".join(without)}')
    checkpoint = load_checkpoint(args.checkpoint)
    checkpoint.get('state_dict', checkpoint)[STORED] = torch.from_numpy(thresholds)
    checkpoint.setdefault('meta', {})['guarantee'] = {
        kind: level, 'of': 'image' if args.over_all else 'class', 'images': len(labels), 'without_promise': without,
        **({'delta': args.delta} if kind == 'precision' else {})}
    content, path = io.BytesIO(), args.save or Path(cfg.work_dir) / 'thresholds.pth'
    torch.save(checkpoint, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content.getvalue())
    print(f'\nCheckpoint with the thresholds: {path}')


def render_promise(p: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, safe: np.ndarray,
                   classes: Sequence[str]) -> str:
    """A table of the classes, with precision and recall on the images of the calibration."""
    tp, predicted, positives = count_outcomes(p >= thresholds, labels)

    def percent(part: int, whole: int) -> str:
        return f'{100 * part / whole:.1f}' if whole else ''

    rows = [(name, 'yes' if kept else 'no', f'{threshold:.4f}', count, percent(hits, chosen), percent(hits, count))
            for name, kept, threshold, count, hits, chosen in zip(classes, safe, thresholds, positives, tp, predicted)]
    return markdown_table(rows, ['class', 'promised', 'threshold of p', 'positives', 'precision here [%]',
                                 'recall here [%]'], aligned=True)


def predict(cfg: Config, args: argparse.Namespace) -> LabelledLogits:
    """Predict the validation set. Hooks may restore parameters of the loss from the checkpoint."""
    runner = build_runner(cfg, test_hooks(args))
    model = inner_model(runner.model)
    loss: Any = getattr(getattr(model, 'head', None), 'loss_module', None)
    if not isinstance(loss, AsymmetricLoss):
        raise ConfigError(f'{cfg.filename}: the loss is {type(loss).__name__}. Calibration in closed form needs '
                          'mmasl.AsymmetricLoss')
    calibration_settings(loss)
    with building_data(cfg, args.no_check_data):
        loader = runner.val_dataloader
    load_test_checkpoint(runner)
    found = predict_dataset(model, loader, args.amp, progress)
    return LabelledLogits(found.logits, found.labels, loss.cpu())


def synthetic_loss(settings: dict[str, Any]) -> AsymmetricLoss:
    try:
        return AsymmetricLoss(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'--cfg-options does not fit AsymmetricLoss: {error}') from None


def write_table(path: Path, rows: list[dict[str, Any]], **common: object) -> None:
    rows = [{key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    write_rows(path, [row | common for row in rows])


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    if args.plot and args.plot.suffix not in ('.png', '.svg'):
        raise ConfigError(f'--plot {args.plot}: give a .png or .svg file')
    if args.config == 'synthetic':
        if args.recall or args.precision:
            raise ConfigError('--recall and --precision need a config and a checkpoint')
        work_dir = Path(args.work_dir or 'work_dirs/calibrate_synthetic')
        data = synthesize(synthetic_loss(args.cfg_options), args.seed, progress=progress)
    else:
        cfg = configure(args)
        if args.recall or args.precision:
            promise(cfg, args)
            return
        work_dir = Path(cfg.work_dir)
        data = predict(cfg, args)
    settings = calibration_settings(data.loss)
    threshold = format_range(posterior_threshold(0.5, **settings).sigmoid())
    bound = format_range(posterior_upper_bound(**settings))
    comparison = compare_calibration(data, args.seed)
    labels = comparison.labels
    share = (labels == 1).sum() / (labels >= 0).sum()

    print(f'\n{data.loss}\nposterior 1/2 at p = {threshold}; the posterior stays below {bound}\n'
          f'{len(labels)} images of {labels.shape[1]} classes, {share:.1%} positive; the other half for fitting\n\n'
          f'{render_comparison(comparison.rows)}\n')
    out, picture = args.out or work_dir / 'calibration.csv', args.plot or work_dir / 'calibration.svg'
    write_table(out, comparison.rows, config=args.config, seed=args.seed, checkpoint=args.checkpoint or '',
                loss=repr(data.loss), threshold=threshold, cap=bound, images=len(labels), classes=labels.shape[1],
                positive=f'{share:.4g}')
    plot_calibration(picture, comparison, settings, f'{args.config}, {len(labels)} images')
    print(f'Table and diagram: {out}, {picture}')


if __name__ == '__main__':
    main()
