"""Report what a config and its training data need from the loss, before training.

Prints label statistics, the gradient of the first batches, a setting to start from, and known problems. --probe also
compares the settings of the ladder on the data, by linear heads on features of the pretrained backbone. Runs on the CPU
and downloads nothing.
"""
import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope

from mmasl.analysis.advice import advise
from mmasl.analysis.label_statistics import WEIGHTS, LabelStatistics
from mmasl.analysis.probe_report import check_config, compare_settings
from mmasl.errors import ConfigError
from mmasl.utils.checkpoint import safe_checkpoint_loading
from mmasl.utils.tools import (
    check_data,
    exit_on_user_error,
    load_config,
    parse_args,
    progress,
    set_dataloader_defaults,
)

MIN_IMAGES = 50  # of the probe


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--batches', type=int, default=4, help='number of training batches to run (default: 4)')
    parser.add_argument('--gpus', type=int, default=1, help='number of GPUs of the planned run (default: 1)')
    parser.add_argument('--plot', metavar='FILE', help='plot the number of labels per class (.png, .svg, .pdf)')
    parser.add_argument('--weights', nargs='+', metavar=('KIND', 'KEY=VALUE'),
                        help=f'add weights by class to the suggestion ({", ".join(WEIGHTS)}), with beta, or '
                        'temperature and cap, as in --weights positive temperature=2 cap=10')
    parser.add_argument('--probe', action='store_true', help='compare the settings of the ladder on the training data')
    parser.add_argument('--probe-images', type=int, default=2000, help='training images to sample (default: 2000)')
    parser.add_argument('--probe-minutes', type=float, default=10, help='time limit of the probe (default: 10)')
    parser.add_argument('--probe-cache', type=Path, default=Path('work_dirs/probe'),
                        help='folder for the features (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in train_dataloader.batch_size=8')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the config, check the flags, and load the data in this process."""
    for flag in ('batches', 'gpus'):
        if getattr(args, flag) < 1:
            raise ConfigError(f'--{flag} {getattr(args, flag)}: give 1 or more')
    if args.probe_images < MIN_IMAGES or args.probe_minutes <= 0:
        raise ConfigError(f'--probe-images {args.probe_images} --probe-minutes {args.probe_minutes:g}: give '
                          f'{MIN_IMAGES} images or more, and more than 0 minutes')
    args.weights = parse_weights(args.weights) if args.weights else None
    if args.plot and not args.plot.endswith(('.png', '.svg', '.pdf')):
        raise ConfigError(f'--plot {args.plot}: give a .png, .svg or .pdf file')
    cfg = load_config(args)
    for key in ('model', 'train_dataloader'):
        if not cfg.get(key):
            raise ConfigError(f'{args.config} has no {key}')
    if args.probe:
        check_config(cfg, args.config)
    check_data(cfg, 'train')
    set_dataloader_defaults(cfg, 'train')
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, pin_memory=False)
    cfg.train_dataloader.pop('prefetch_factor', None)
    if 'data_preprocessor' in cfg:  # as MMEngine's Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


def parse_weights(words: list[str]) -> tuple[str, dict[str, float]]:
    """Kind and options of weights by class. Unknown and impossible ones are refused before the labels are counted."""
    kind, *given = words
    try:
        options = {key: float(value) for key, _, value in (word.partition('=') for word in given)}
    except ValueError:
        raise ConfigError(f'--weights {" ".join(words)}: give options as KEY=NUMBER') from None
    one = np.ones(1, int)
    LabelStatistics(('', ), one, one, one, 0, 'multi-label').loss_weights(kind, **options)
    return kind, options


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """MMEngine logs the initialisation of every single parameter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    report = sys.stdout
    # Libraries print progress; only the report goes to stdout.
    with (only_errors_logged(), redirect_stdout(sys.stderr),
          DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine'))):
        report_parts = advise(cfg, args.config, args.batches, args.gpus, args.plot, args.weights, progress)
        measured = compare_settings(cfg, args.config, args.probe_images, args.probe_minutes, args.probe_cache,
                                    progress) if args.probe else ()
        for paragraph in chain(report_parts, measured):
            print(paragraph, end='\n\n', file=report, flush=True)


if __name__ == '__main__':
    main()
