"""Predict the labels of images with a multi-label classifier of MMPretrain, or boxes with a detector of MMDetection."""
import argparse
import sys

import mmengine
import torch
from mmengine.config import Config, DictAction

from mmasl.apis import detection
from mmasl.apis.images import unreadable_images
from mmasl.apis.inferencer import MultiLabelInferencer
from mmasl.apis.label_rule import parse_thresholds
from mmasl.apis.model_files import use_calibrated_head
from mmasl.errors import ConfigError, UnreadableImageError
from mmasl.utils.checkpoint import safe_checkpoint_loading
from mmasl.utils.tools import (
    exit_on_user_error,
    is_classification,
    load_config,
    parse_args,
    progress,
    require_file,
    require_gpu,
)

LINE_LABELS = 8  # per printed line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', metavar='image', help='files, folders or URLs')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--thr', action='append', metavar='NUMBER', default=[],
                        help='threshold of all classes; or CLASS=NUMBER, repeated, for single classes (default: the '
                        f"head's thresholds; {detection.DEFAULT_THR} for boxes)")
    parser.add_argument('--topk', type=int, metavar='K',
                        help='keep the K labels or boxes with the highest scores; with --thr, those that pass it')
    parser.add_argument('--calibrated', action='store_true',
                        help='predict and apply thresholds to calibrated scores, for models trained with '
                        'mmasl.AsymmetricLoss, and dense detectors trained with FocalLoss')
    parser.add_argument('--out-dir', metavar='FOLDER', help='write pictures of the predictions to this folder')
    parser.add_argument('--json', metavar='FILE', help='write the predictions to this .json file')
    parser.add_argument('--device', help='device, such as cuda:0 (default: the best available)')
    parser.add_argument('--batch-size', type=int, default=1, help='images per batch (default: 1)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in model.head.thr=0.8')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the config and check all flags before the model is built."""
    cfg = load_config(args)
    require_file(args.checkpoint, 'checkpoint')
    args.thr = parse_thresholds(args.thr)
    for flag in ('topk', 'batch_size'):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: give 1 or more")
    if args.json and not args.json.endswith('.json'):
        raise ConfigError(f'--json {args.json}: give a .json file')
    try:
        device = torch.device(args.device or 'cpu')
    except RuntimeError as error:
        raise ConfigError(f'--device {args.device}: {error}') from None
    if device.type == 'cuda':
        require_gpu(f'--device {args.device}')
    if args.calibrated:
        use_calibrated_head(cfg)
    return cfg


def classify(cfg: Config, args: argparse.Namespace) -> list[dict]:
    inferencer = MultiLabelInferencer(cfg, args.checkpoint, args.device, show_progress=sys.stdout.isatty())
    try:
        return inferencer(args.images, batch_size=args.batch_size, thr=args.thr, topk=args.topk,
                          out_dir=args.out_dir or '')['predictions']
    except UnreadableImageError as error:
        error.results = error.results['predictions']
        raise


def detect(cfg: Config, args: argparse.Namespace) -> list[dict]:
    return detection.detect(cfg, args.checkpoint, args.images, args.device, args.thr, args.topk, args.batch_size,
                            args.out_dir or '', progress)


def render(records: list[dict]) -> str:
    """Format one line per image: its labels and scores, in descending order."""
    width = max((len(record['img_path']) for record in records), default=0)
    lines = []
    for record in records:
        labels = [f'{name} {score:.2f}' for name, score in zip(
            record['pred_class'], record.get('calibrated_score', record['pred_score']))]
        more = [f'and {len(labels) - LINE_LABELS} more'] if len(labels) > LINE_LABELS else []
        lines.append(f"{record['img_path']:{width}}  {', '.join(labels[:LINE_LABELS] + more) or '-'}")
    return '\n'.join(lines)


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    unreadable: dict[str, str] = {}
    try:
        records = classify(cfg, args) if is_classification(cfg) else detect(cfg, args)
    except UnreadableImageError as error:
        records, unreadable = error.results, error.reasons
    if args.json:
        mmengine.dump(records, args.json, indent=1)
    print(render(records))
    if unreadable:
        raise unreadable_images(unreadable)


if __name__ == '__main__':
    main()
