"""Export a model to ONNX, with a dynamic batch size unless --batch is given, and compare it with PyTorch.

A multi-label classifier has the outputs pred_score (p) and, with a head of mmasl, calibrated_score. A single-stage
detector has the maps of its head, without box decoding and non-maximum suppression. Classes, thresholds, input size and
normalisation are in the metadata of the file.
"""
import argparse
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

from mmasl.apis.label_rule import parse_thresholds
from mmasl.apis.model_files import use_calibrated_head
from mmasl.apis.onnx_export import (
    BATCHES,
    compare_with_torch,
    export,
    prepare_classifier,
    prepare_detector,
)
from mmasl.apis.tagger import tagger_files
from mmasl.errors import ConfigError, UnavailableError
from mmasl.utils.checkpoint import safe_checkpoint_loading
from mmasl.utils.tools import exit_on_user_error, is_classification, load_config, parse_args, require_file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', type=Path, metavar='FILE', required=True,
                        help='.onnx file to write; or, for a classifier, a folder for model.onnx, selected_tags.csv, '
                        'preprocess.json and thresholds.csv, which programs for taggers read')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='size of the images (default: the size that the test pipeline produces, if it is fixed)')
    parser.add_argument('--opset', type=int, metavar='N',
                        help="version of the ONNX operators that your runtime reads (default: the exporter's)")
    parser.add_argument('--batch', type=int, metavar='N',
                        help='fix the number of images in a batch (default: any number)')
    parser.add_argument('--thr', action='append', metavar='NUMBER', default=[],
                        help='threshold of all classes for the metadata; or CLASS=NUMBER, repeated, for single classes '
                        "(default: the head's thresholds)")
    parser.add_argument('--calibrated', action='store_true',
                        help='add calibrated_score, or calibrate the class logits of a detector; needs a model trained '
                        'with mmasl.AsymmetricLoss, or a dense detector trained with FocalLoss')
    parser.add_argument('--tolerance', type=float, default=1e-4,
                        help='largest difference between onnxruntime and PyTorch, relative if values exceed 1 '
                        '(default: 1e-4)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in model.head.thr=0.8')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the config and check all flags before the model is built."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"{error}: pip install 'mmasl[export]'") from None
    cfg = load_config(args)
    require_file(args.checkpoint, 'checkpoint')
    if args.out.suffix != '.onnx' and (args.out.suffix or not is_classification(cfg)):
        raise ConfigError(f'--out {args.out}: give an .onnx file, or a folder for a classifier')
    for flag in ('opset', 'batch'):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f'--{flag} {value}: give 1 or more')
    if args.shape and min(args.shape) < 1:
        raise ConfigError(f"--shape {' '.join(map(str, args.shape))}: give 1 or more")
    if not is_classification(cfg):
        if args.thr:
            raise ConfigError(f'--thr is for classifiers, and {args.config} is a detector')
        if not args.shape:
            raise ConfigError('Detectors take images of any size, and the exported file takes one: give --shape HEIGHT '
                              'WIDTH')
    if args.calibrated:
        use_calibrated_head(cfg)
    return cfg


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    if is_classification(cfg):
        exportable = prepare_classifier(cfg, args.checkpoint, args.shape, parse_thresholds(args.thr))
    else:
        exportable = prepare_detector(cfg, args.checkpoint, args.shape)
    try:
        file = export(exportable, args.opset, args.batch)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f'{args.config} cannot be exported with torch {torch.__version__}: {error}') from error
    found = compare_with_torch(file, exportable, [args.batch] if args.batch else BATCHES)
    print('\n'.join(f'{name}: largest difference between onnxruntime and PyTorch {value:.2g}'
                    for name, value in found.items()))
    if not all(value <= args.tolerance for value in found.values()):
        raise ConfigError(f'The difference exceeds --tolerance {args.tolerance:g}: no file was written')
    contents = {args.out: file} if args.out.suffix else {
        args.out / name: content for name, content in tagger_files(file, exportable.metadata).items()}
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    height, width = exportable.metadata['input_size']
    channels = len(exportable.metadata['mean'])
    print(f"{args.out}: input ({args.batch or 'batch'}, {channels}, {height}, {width}), {len(file) / 1e6:.1f} MB")


if __name__ == '__main__':
    main()
