"""Calibrate the probabilities of a classifier that was trained with the asymmetric loss, and measure the gain.

Predicts the validation set and splits its images in two halves. Temperature and Platt scaling are fitted on one half.
On the other half they are compared with p and with the posterior in closed form, which needs no fit. With "synthetic"
instead of CONFIG, a small network is trained on a task with a known posterior; --cfg-options sets its loss, as in
gamma_neg=2.
"""
import argparse
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmasl.analysis.calibration import (
    LabelledLogits,
    compare_calibration,
    format_range,
    plot_calibration,
    render_comparison,
    synthesize,
)
from mmasl.apis.dataset_predictions import predict_dataset
from mmasl.errors import ConfigError
from mmasl.models.heads.calibrated_predictions import calibration_settings
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import posterior_threshold, posterior_upper_bound
from mmasl.reproduce.runs import write_rows
from mmasl.utils.checkpoint import safe_checkpoint_loading
from mmasl.utils.tools import (
    build_runner,
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
)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file or URL; not with "synthetic"')
    parser.add_argument('--out', type=Path, metavar='FILE',
                        help='CSV file for the table (default: calibration.csv in the work dir)')
    parser.add_argument('--plot', type=Path, metavar='FILE',
                        help='reliability diagram, .png or .svg (default: calibration.svg in the work dir)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the split and the synthetic task (default: 0)')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the config and check all flags before the model is built."""
    cfg = load_config(args)
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


def predict(cfg: Config, amp: bool = False) -> LabelledLogits:
    """Predict the validation set. Hooks may restore parameters of the loss from the checkpoint."""
    runner = build_runner(cfg)
    loss: Any = getattr(getattr(runner.model, 'head', None), 'loss_module', None)
    if not isinstance(loss, AsymmetricLoss):
        raise ConfigError(f'{cfg.filename}: the loss is {type(loss).__name__}. Calibration in closed form needs '
                          'mmasl.AsymmetricLoss')
    calibration_settings(loss)
    load_test_checkpoint(runner)
    found = predict_dataset(runner.model, runner.val_dataloader, amp, progress)
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
        work_dir = Path(args.work_dir or 'work_dirs/calibrate_synthetic')
        data = synthesize(synthetic_loss(args.cfg_options), args.seed, progress=progress)
    else:
        cfg = configure(args)
        work_dir = Path(cfg.work_dir)
        data = predict(cfg, args.amp)
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
