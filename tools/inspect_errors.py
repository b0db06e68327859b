"""Look at the errors of a multi-label classifier: one HTML page, made from its predictions on the test set.

It shows the classes, the most confident mistakes, which may be wrong labels, the threshold curves and what is confused.
"""
import argparse
import csv
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner.amp import autocast
from mmpretrain.models.heads import MultiLabelClsHead
from rich.console import Console

from mmasl import MultiLabelMetric
from mmasl.analysis.error_page import Results, analyse_errors, candidates, render
from mmasl.models.heads.calibrated_predictions import calibration_settings
from mmasl.ops import posterior_cap
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


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', type=Path, metavar='FILE', help='the page (default: errors.html in the work dir)')
    parser.add_argument('--candidates', type=Path, metavar='FILE', help='write suspected wrong labels to a CSV file')
    parser.add_argument('--top', type=int, default=60, metavar='N', help='mistakes of each kind to draw (default: 60)')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config that the flags describe, checked as far as is possible without building anything."""
    if args.top < 0:
        raise SystemExit(f'--top {args.top} must be 0 or more')
    cfg = load_config(args)
    if args.launcher != 'none':
        raise SystemExit('tools/inspect_errors.py predicts in one process: run it without --launcher')
    if not is_classification(cfg):
        raise SystemExit(f"{args.config} is no classification config: its default_scope is {cfg.get('default_scope')!r}"
                         ", not 'mmpretrain'")
    if cfg.get('test_dataloader') is None:
        raise SystemExit(f'{args.config} has no test_dataloader')
    require_file(args.checkpoint, 'checkpoint')
    cfg.load_from, cfg.resume = args.checkpoint, False
    check_data(cfg, 'test')
    set_dataloader_defaults(cfg, 'test')
    args.out = args.out or Path(cfg.work_dir) / 'errors.html'
    for flag, path in (('--out', args.out), ('--candidates', args.candidates)):
        if path is not None:
            make_folder(flag, path)
    return cfg


def make_folder(flag: str, path: Path) -> None:
    """The folder of a file that is to be written; a mistake in its name should not wait for the predictions."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f'{flag} {path}: {error}') from None
    if path.is_dir():
        raise SystemExit(f'{flag} {path} is a folder: name a file')


@torch.no_grad()
def predict(cfg: Config, amp: bool = False) -> tuple[Results, str]:
    """Logits and labels of the test set, and the loss in words; hooks see the checkpoint, as in tools/calibrate.py."""
    runner = build_runner(cfg)
    head = getattr(runner.model, 'head', None)
    if not isinstance(head, MultiLabelClsHead):
        raise SystemExit(f'{cfg.filename}: {type(head).__name__} is no multi-label head as MultiLabelLinearClsHead is')
    load_weights(runner)
    model, loader = runner.model.eval(), runner.test_dataloader
    report = MultiLabelMetric()  # reads and checks labels
    report.dataset_meta = loader.dataset.metainfo
    batches, images = [], []
    for batch in progress(loader, 'predicting'):
        data = model.data_preprocessor(batch, False)
        with autocast(enabled=amp):
            batches.append(model(data['inputs'], mode='tensor').float().cpu())
        try:
            report.process(None, [dict(sample.to_dict(), pred_score=z.sigmoid())
                                  for sample, z in zip(data['data_samples'], batches[-1])])
        except ValueError as error:
            raise SystemExit(f'{cfg.filename}: {error}') from None
        images += [sample.get('img_path') or '' for sample in data['data_samples']]
    if not batches:
        raise SystemExit(f'{cfg.filename}: test_dataloader gives no images')
    logits = torch.cat(batches).numpy()
    labels = report.labels()
    classes = loader.dataset.metainfo.get('classes') or map(str, range(logits.shape[1]))
    try:
        settings = calibration_settings(head.loss_module.cpu())
        posterior_cap(**settings)
    except (TypeError, ValueError):  # another loss, or alpha of 0 or 1
        settings = None
    return Results(logits, labels, images, list(classes), settings), str(head.loss_module)


def data_set(cfg: Config) -> str:
    """The test set in words."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return ' '.join(str(dataset[key]) for key in ('type', 'data_root', 'ann_file', 'split') if dataset.get(key))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    results, loss = predict(cfg, args.amp)
    Console(stderr=True).print(f'counting the errors in {results.labels.size:,} labels')
    try:
        errors = analyse_errors(results, args.top)
    except ValueError as error:
        raise SystemExit(f'{args.config}: {error}') from None
    facts = {'config': args.config, 'checkpoint': args.checkpoint, 'data set': data_set(cfg), 'loss': loss}
    if args.cfg_options:
        facts['options'] = ' '.join(f'{key}={value}' for key, value in args.cfg_options.items())
    page = render(errors, results, facts, args.top, progress)
    args.out.write_text(page, encoding='utf-8', errors='replace')
    _, predicted, positives = errors.counts
    tp = errors.counts[0].sum()
    print(f'\n{predicted.sum() - tp:,} labels wrongly predicted and {positives.sum() - tp:,} missed, of '
          f'{(results.labels >= 0).sum():,}\nPage: {args.out}')
    if args.candidates:
        rows = candidates(errors, results)
        with args.candidates.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            writer = csv.DictWriter(file, ['image', 'class', 'label', 'p', 'posterior', 'beyond_p_star', 'gradient'],
                                    lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        print(f'Suspected labels: {args.candidates}, {len(rows):,}')


if __name__ == '__main__':
    main()
