"""Write one HTML page about the errors of a multi-label classifier on its test set.

The page shows metrics of each class, threshold curves, confused pairs of classes, and the most confident errors, which
may be wrong labels.
"""
import argparse
import csv
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmpretrain.models.heads import MultiLabelClsHead
from rich.console import Console

from mmasl.analysis.error_analysis import Predictions, analyse_errors, list_suspects
from mmasl.analysis.error_page import render_error_page
from mmasl.apis.dataset_predictions import predict_dataset
from mmasl.apis.model_files import load_checkpoint
from mmasl.errors import ConfigError
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior_upper_bound
from mmasl.utils.checkpoint import inner_model, safe_checkpoint_loading
from mmasl.utils.config import iter_dataset_configs
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
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', type=Path, metavar='FILE', help='HTML file (default: errors.html in the work dir)')
    parser.add_argument('--candidates', type=Path, metavar='FILE', help='CSV file for labels that may be wrong')
    parser.add_argument('--top', type=int, default=60, metavar='N',
                        help='number of false positives and of false negatives to show (default: 60)')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the config and check all flags before the model is built."""
    if args.top < 0:
        raise ConfigError(f'--top {args.top}: give 0 or more')
    cfg = load_config(args)
    if args.launcher != 'none':
        raise ConfigError('tools/inspect_errors.py runs in one process: leave out --launcher')
    if not is_classification(cfg):
        raise ConfigError(f"{args.config} has default_scope={cfg.get('default_scope')!r}: use a classification config, "
                          "with default_scope='mmpretrain'")
    if cfg.get('test_dataloader') is None:
        raise ConfigError(f'{args.config} has no test_dataloader')
    require_file(args.checkpoint, 'checkpoint')
    cfg.load_from, cfg.resume = args.checkpoint, False
    check_data(cfg, 'test')
    set_dataloader_defaults(cfg, 'test')
    args.out = args.out or Path(cfg.work_dir) / 'errors.html'
    for flag, path in (('--out', args.out), ('--candidates', args.candidates)):
        if path is not None:
            prepare_output(flag, path)
    return cfg


def prepare_output(flag: str, path: Path) -> None:
    """Create the folder of an output file, before the time for the predictions is spent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'{flag} {path}: {error}') from None
    if path.is_dir():
        raise ConfigError(f'{flag} {path} is a folder: name a file')


def predict(cfg: Config, args: argparse.Namespace) -> tuple[Predictions, str]:
    """Predict the test set. Returns the predictions and the description of the loss."""
    runner = build_runner(cfg, test_hooks(args))
    model = inner_model(runner.model)
    head: Any = getattr(model, 'head', None)
    if not isinstance(head, MultiLabelClsHead):
        raise ConfigError(f'{cfg.filename}: model.head is a {type(head).__name__}. Use a multi-label head, such as '
                          'MultiLabelLinearClsHead')
    with building_data(cfg, args.no_check_data):
        loader = runner.test_dataloader
    load_test_checkpoint(runner)  # hooks may restore parameters of the loss
    found = predict_dataset(model, loader, args.amp, progress)
    try:
        settings = calibration_settings(head.loss_module.cpu())
        posterior_upper_bound(**settings)
    except (TypeError, ValueError):  # another loss, or alpha of 0 or 1
        settings = None
    thresholds = load_checkpoint(cfg.load_from).get('state_dict', {}).get(STORED)
    predictions = Predictions(found.logits.numpy(), found.labels.numpy(), found.images, found.classes, settings,
                              None if thresholds is None else thresholds.numpy())
    return predictions, str(head.loss_module)


def describe_dataset(cfg: Config) -> str:
    entries = iter_dataset_configs(cfg.test_dataloader.dataset, '', cfg.get('default_scope'))
    return ', '.join(' '.join(str(getattr(dataset[key], '__name__', dataset[key])) for key in (
        'type', 'data_root', 'ann_file', 'split') if dataset.get(key)) for _, dataset in entries)


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    predictions, loss = predict(cfg, args)
    Console(stderr=True).print(f'counting the errors in {predictions.labels.size:,} labels')
    errors = analyse_errors(predictions, args.top)
    facts = {'config': args.config, 'checkpoint': args.checkpoint, 'data set': describe_dataset(cfg), 'loss': loss}
    if args.cfg_options:
        facts['options'] = ' '.join(f'{key}={value}' for key, value in args.cfg_options.items())
    page = render_error_page(errors, predictions, facts, args.top, progress)
    args.out.write_text(page, encoding='utf-8', errors='replace')
    tp, predicted, positives = errors.counts.sum(1)
    print(f'\n{predicted - tp:,} false positives and {positives - tp:,} false negatives in '
          f'{(predictions.labels >= 0).sum():,} labels\nPage: {args.out}')
    if args.candidates:
        rows = list_suspects(errors, predictions)
        with args.candidates.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            writer = csv.DictWriter(file, ['image', 'class', 'label', 'p', 'posterior', 'beyond_p_star', 'gradient'],
                                    lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        print(f'Labels that may be wrong: {args.candidates}, {len(rows):,}')


if __name__ == '__main__':
    main()
