"""Export a model to ONNX with a dynamic batch, and check it against PyTorch with onnxruntime.

A multi-label classifier gives pred_score, which is p, and with a head of mmasl calibrated_score. A single-stage
detector gives the maps of its head; decoding boxes from them and suppressing overlaps is left to who reads them.
Classes, thresholds, input size and normalisation are in the metadata of the file.
"""
import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmasl.apis.inferencer import (
    MultiLabelInferencer,
    class_names,
    inference_data,
    load_checkpoint,
    load_weights,
    parse_thr,
)
from mmasl.ops import inverse_posterior, posterior
from mmasl.utils.tools import is_classification, load_config, parse_args, require_file

# Of images in a check: other numbers than the graph was traced with.
BATCHES = (1, 3)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', type=Path, metavar='FILE', required=True, help='the .onnx file to write')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='size of the images (default: that of the test pipeline, where it is fixed)')
    parser.add_argument('--thr', action='append', metavar='NUMBER', default=[],
                        help='threshold for the metadata: of all classes, or CLASS=NUMBER for each that has its own '
                        "(default: the head's)")
    parser.add_argument('--calibrated', action='store_true',
                        help='with calibrated_score; for models trained with mmasl.AsymmetricLoss')
    parser.add_argument('--tolerance', type=float, default=1e-4,
                        help='largest difference between onnxruntime and PyTorch, for values beyond 1 relative to the '
                        'largest of them (default: 1e-4)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in model.head.thr=0.8')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config that the flags describe, checked as far as is possible without building anything."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'mmasl[export]'") from None
    cfg = load_config(args)
    require_file(args.checkpoint, 'checkpoint')
    if args.out.suffix != '.onnx':
        raise SystemExit(f'--out {args.out}: give an .onnx file')
    if args.shape and min(args.shape) < 1:
        raise SystemExit(f"--shape {' '.join(map(str, args.shape))}: sides are at least 1")
    if not is_classification(cfg):
        if args.calibrated or args.thr:
            raise SystemExit(f'--calibrated and --thr are for classifiers, and {args.config} is of a detector')
        if not args.shape:
            raise SystemExit('Detectors take images of any size, and the exported file takes one: give --shape HEIGHT '
                             'WIDTH')
    elif args.calibrated and '.' not in cfg.model.head.type:  # mmasl's head of the same name has the same weights
        cfg.model.head.type = f'mmasl.{cfg.model.head.type}'
    return cfg


class Classifier(nn.Module):
    """The scores of a batch of normalised images: p, and the calibrated score with the loss's ``settings``."""

    def __init__(self, model: nn.Module, settings: dict[str, Any] | None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(images, mode='tensor')
        scores = logits.sigmoid()
        return (scores, ) if self.settings is None else (scores, posterior(logits, **self.settings))


class Maps(nn.Module):
    """The maps of a detector's head in one flat tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self.model(images, mode='tensor')))


def prepare_classifier(cfg: Config, args: argparse.Namespace) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """The module to export, the names of its outputs, and the metadata."""
    from mmasl.models.heads.calibrated_predictions import calibration_settings

    inferencer = MultiLabelInferencer(cfg, args.checkpoint, 'cpu', show_progress=False)
    rule = inferencer.make_rule(parse_thr(args.thr))
    metadata = describe(inferencer.model, inferencer.classes, fixed_shape(inferencer, args.shape),
                        inference_data(cfg).pipeline)
    if rule.topk is not None:
        metadata['topk'] = rule.topk
    if not inferencer.calibrates:
        if rule.thr is not None:
            metadata['pred_score_thr'] = rule.thr.tolist()
        return Classifier(inferencer.model, None), ['pred_score'], metadata
    settings = calibration_settings(inferencer.model.head.loss_module)
    if rule.thr is not None:
        metadata['calibrated_score_thr'] = rule.thr.tolist()
        metadata['pred_score_thr'] = inverse_posterior(rule.thr, **settings).sigmoid().tolist()
    return Classifier(inferencer.model, settings), ['pred_score', 'calibrated_score'], metadata


def fixed_shape(inferencer: MultiLabelInferencer, asked: list[int] | None) -> list[int]:
    """Height and width of what the model gets from the test pipeline; ``asked`` where those depend on the image."""
    images = [np.zeros((*side, 3), np.uint8) for side in ((96, 128), (640, 300), asked or (64, 64))]
    found = []
    for image in images:
        batch, = inferencer.preprocess([image]).collate_fn([(0, image)])
        found.append(list(inferencer.model.data_preprocessor(batch)['inputs'].shape[-2:]))
    if found[0] == found[1]:
        if asked not in (None, found[0]):
            raise SystemExit(f'--shape {asked[0]} {asked[1]}: the test pipeline makes all images {found[0][0]} x '
                             f'{found[0][1]}; leave it out, or change the pipeline')
        return found[0]
    if not asked:
        raise SystemExit('The test pipeline gives images of different sizes, and the exported file takes one: give '
                         '--shape HEIGHT WIDTH')
    if found[2] != asked:
        raise SystemExit(f'--shape {asked[0]} {asked[1]}: the model gets such images as {found[2][0]} x {found[2][1]}; '
                         'give that')
    return asked


def prepare_detector(cfg: Config, args: argparse.Namespace) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """As for a classifier. Outputs are named by their place in what the head returns: ``output_KIND_LEVEL``."""
    from mmdet.models import SingleStageDetector

    if cfg.model.get('backbone', {}).get('pretrained') is True:
        cfg.model.backbone.pretrained = False
    checkpoint = load_checkpoint(args.checkpoint)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    if not isinstance(model, SingleStageDetector):
        raise SystemExit(f'{type(model).__name__} is no single-stage detector of MMDetection: what it does between its '
                         'stages cannot be exported with the stock tools')
    load_weights(model, checkpoint, args.checkpoint)
    step = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    if any(side % step for side in args.shape):
        raise SystemExit(f'--shape {args.shape[0]} {args.shape[1]}: images are padded to multiples of {step}; give '
                         'such')
    dataset = inference_data(cfg)
    classes = class_names(checkpoint) or (dataset.get('metainfo') or {}).get('classes')
    metadata = describe(model, classes, args.shape, dataset.pipeline)
    metadata['test_cfg'] = cfg.model.get('test_cfg')
    if hasattr(model.bbox_head, 'prior_generator'):
        metadata['strides'] = [list(stride) for stride in model.bbox_head.prior_generator.strides]
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(1, 3, *args.shape), mode='tensor')
    names = [f'output_{kind}_{level}' for kind, maps in enumerate(outputs) for level in range(len(tree_leaves(maps)))]
    return Maps(model), names, metadata


def describe(model: Any, classes: Sequence[str] | None, shape: list[int], pipeline: list) -> dict[str, Any]:
    """What a reader needs to feed the model."""
    normaliser = model.data_preprocessor
    to_rgb = getattr(normaliser, 'to_rgb', False) or getattr(normaliser, '_channel_conversion', False)
    normalised = getattr(normaliser, '_enable_normalize', False)
    return dict(classes=classes, input_size=shape, channel_order='RGB' if to_rgb else 'BGR',
                mean=normaliser.mean.flatten().tolist() if normalised else [0.] * 3,
                std=normaliser.std.flatten().tolist() if normalised else [1.] * 3, pipeline=pipeline)


def translations() -> dict:
    """Exact forms of two functions that the exporter writes as log(sigmoid(x)) and exp(x) - 1.

    Those round to log(0) and 0 at confident logits, and the calibrated score would be NaN there.
    """
    from onnxscript import opset18

    op: Any = opset18

    def number(value: float, like: Any) -> Any:
        return op.CastLike(op.Constant(value_float=value), like)

    def log_sigmoid(x: Any) -> Any:
        return op.Neg(op.Softplus(op.Neg(x)))

    def expm1(x: Any) -> Any:
        half, size = op.Mul(x, number(0.5, x)), op.Abs(x)
        near = op.Mul(op.Mul(number(2., x), op.Sinh(half)), op.Exp(half))
        far = op.Sub(op.Exp(x), number(1., x))
        # Half of the smallest numbers is 0.
        return op.Where(op.Less(size, number(1e-10, x)), x, op.Where(op.Less(size, number(1., x)), near, far))

    return {torch.ops.aten.log_sigmoid.default: log_sigmoid, torch.ops.aten.expm1.default: expm1}


def export(module: nn.Module, outputs: list[str], metadata: dict[str, Any]) -> bytes:
    """The ONNX file of a module of (N, 3, H, W) images; metadata is JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PyTorch's own code
        program: Any = torch.onnx.export(
            module.eval(), (torch.zeros(2, 3, *metadata['input_size']), ), input_names=['input'], output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim('batch')}, ), custom_translation_table=translations(), dynamo=True,
            verbose=False)
    program.model.metadata_props.update(
        {key: json.dumps(value, default=str) for key, value in metadata.items() if value is not None})
    return program.model_proto.SerializeToString()


@torch.no_grad()
def differences(file: bytes, module: nn.Module, metadata: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each output between onnxruntime and PyTorch, on noise in batches of several sizes.

    For values beyond 1 it is relative to the largest of them.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    rng = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(metadata[key]).view(3, 1, 1) for key in ('mean', 'std'))
    found = {output.name: 0. for output in session.get_outputs()}
    for size in BATCHES:
        images = (torch.randint(256, (size, 3, *metadata['input_size']), generator=rng) - mean) / std
        actual = session.run(None, {'input': images.numpy()})
        for name, ours, theirs in zip(found, actual, [output.numpy() for output in module(images)], strict=True):
            # NaN stays NaN, and fails every tolerance.
            found[name] = np.maximum(found[name], np.abs(ours - theirs).max() / max(1, np.abs(theirs).max()))
    return {name: float(value) for name, value in found.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    prepare = prepare_classifier if is_classification(cfg) else prepare_detector
    try:
        module, outputs, metadata = prepare(cfg, args)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    try:
        file = export(module, outputs, metadata)
    except torch.onnx.OnnxExporterError as error:
        raise SystemExit(f'{args.config} does not export with torch {torch.__version__}: {error}') from error
    found = differences(file, module.eval(), metadata)
    print('\n'.join(f'{name}: onnxruntime and PyTorch differ by {value:.2g} at most' for name, value in found.items()))
    if not all(value <= args.tolerance for value in found.values()):
        raise SystemExit(f'That is more than --tolerance {args.tolerance:g}: nothing was written')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(file)
    height, width = metadata['input_size']
    print(f'{args.out}: input (batch, 3, {height}, {width}), {len(file) / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
