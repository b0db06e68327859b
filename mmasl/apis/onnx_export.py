"""Exports classifiers and single-stage detectors to ONNX, and compares the file with PyTorch."""
import json
import logging
import re
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmasl.apis.inferencer import MultiLabelInferencer
from mmasl.apis.model_files import config_classes, inference_dataset, load_checkpoint
from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry
from mmasl.errors import ConfigError
from mmasl.models.calibrated_dense_head import CalibratedDenseHead
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior, posterior_threshold
from mmasl.utils.checkpoint import checkpoint_classes, load_weights
from mmasl.utils.tools import drop_pretrained

BATCHES = (1, 3)  # images per batch in the comparison of a dynamic batch size
TRACED = 2  # images in the batch that the graph of a dynamic batch size is traced with


class Exportable(NamedTuple):
    """A module to export.

    Args:
        module: Module of normalised images (N, K, H, W), of K channels, that returns a tuple of tensors.
        outputs: Names of the outputs.
        metadata: What a reader of the file needs: see :func:`describe`.
    """
    module: nn.Module
    outputs: list[str]
    metadata: dict[str, Any]


class Classifier(nn.Module):
    """Computes p and, with ``settings`` of the loss, the calibrated score of normalised images (N, K, H, W)."""

    def __init__(self, model: nn.Module, settings: dict[str, Any] | None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the scores, each (N, C)."""
        logits = self.model(images, mode='tensor')
        scores = logits.sigmoid()
        return (scores, ) if self.settings is None else (scores, posterior(logits, **self.settings))


class FeatureMaps(nn.Module):
    """Computes the maps of a detector's head as one flat tuple; a calibrated head gives calibrated logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of normalised images (N, K, H, W)."""
        maps, head = self.model(images, mode='tensor'), self.model.bbox_head
        if isinstance(head, CalibratedDenseHead):
            maps = head.calibrate(maps[0]), *maps[1:]
        return tuple(tree_leaves(maps))


def prepare_classifier(cfg: Config, weights: str | PathLike, shape: list[int] | None = None,
                       thr: float | dict[str, float] | None = None) -> Exportable:
    """Prepare a multi-label classifier for :func:`export`.

    Its outputs are ``pred_score`` and, with a head of mmasl, ``calibrated_score``.

    Args:
        cfg: Config of the classifier.
        weights: Checkpoint: a file or an http(s) URL.
        shape: Height and width of the images; None for the size that the test pipeline produces.
        thr: Thresholds for the metadata; None for the head's.

    Raises:
        ConfigError: See :class:`mmasl.apis.inferencer.MultiLabelInferencer` and :func:`fixed_shape`.
    """
    inferencer = MultiLabelInferencer(cfg, weights, 'cpu', show_progress=False)
    rule = inferencer.make_rule(thr)
    metadata = describe(inferencer.model, inferencer.classes, fixed_shape(inferencer, shape),
                        inference_dataset(cfg).pipeline)
    if inferencer.thresholds is not None and rule.thr is inferencer.thresholds:
        metadata['guarantee'] = inferencer.guarantee
    if rule.topk is not None:
        metadata['topk'] = rule.topk
    if not inferencer.calibrates:
        if rule.thr is not None:
            metadata['pred_score_thr'] = rule.thr.tolist()
        return Exportable(Classifier(inferencer.model, None), ['pred_score'], metadata)
    settings = calibration_settings(inferencer.model.head.loss_module)
    if rule.thr is not None and not rule.calibrated:
        metadata['pred_score_thr'] = rule.thr.tolist()
    elif rule.thr is not None:
        metadata['calibrated_score_thr'] = rule.thr.tolist()
        metadata['pred_score_thr'] = posterior_threshold(rule.thr, **settings).sigmoid().tolist()
    return Exportable(Classifier(inferencer.model, settings), ['pred_score', 'calibrated_score'], metadata)


def fixed_shape(inferencer: MultiLabelInferencer, shape: list[int] | None) -> list[int]:
    """Find the input size of a classifier.

    Args:
        inferencer: The classifier.
        shape: The requested height and width.

    Returns:
        Height and width that the test pipeline produces, or ``shape`` if they depend on the image.

    Raises:
        ConfigError: The pipeline does not produce ``shape``, or ``shape`` is needed.
    """
    images = [np.zeros((*side, 3), np.uint8) for side in ((96, 128), (640, 300), shape or (64, 64))]
    found = []
    for image in images:
        batch, = inferencer.preprocess([image]).collate_fn([(0, image)])
        found.append(list(inferencer.model.data_preprocessor(batch)['inputs'].shape[-2:]))
    if found[0] == found[1]:
        if shape not in (None, found[0]):
            raise ConfigError(f'--shape {shape[0]} {shape[1]}: the test pipeline resizes all images to {found[0][0]} x '
                              f'{found[0][1]}. Leave out --shape or change the pipeline')
        return found[0]
    if not shape:
        raise ConfigError('the test pipeline produces images of different sizes, and the exported file takes one: give '
                          '--shape HEIGHT WIDTH')
    if found[2] != shape:
        raise ConfigError(f'--shape {shape[0]} {shape[1]}: the test pipeline resizes such images to {found[2][0]} x '
                          f'{found[2][1]}; give that size')
    return shape


def prepare_detector(cfg: Config, weights: str | PathLike, shape: list[int]) -> Exportable:
    """Prepare a single-stage detector of MMDetection for :func:`export`.

    The outputs are named by their place in what the head returns: ``output_KIND_LEVEL``.

    Args:
        cfg: Config of the detector.
        weights: Checkpoint: a file or an http(s) URL.
        shape: Height and width of the images.

    Raises:
        ConfigError: It is another kind of detector, or ``shape`` is not a multiple of the padding.
        CheckpointError: The checkpoint does not fit the model.
    """
    from mmdet.models import SingleStageDetector

    drop_pretrained(cfg)
    checkpoint = load_checkpoint(weights)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    if not isinstance(model, SingleStageDetector):
        raise ConfigError(f'{type(model).__name__} is not a single-stage detector of MMDetection: only those can be '
                          'exported')
    load_weights(model, checkpoint, str(weights))
    restore_asymmetry(model, checkpoint)
    step = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    if any(side % step for side in shape):
        raise ConfigError(f'--shape {shape[0]} {shape[1]}: images are padded to multiples of {step}; give multiples of '
                          'it')
    classes = checkpoint_classes(checkpoint) or config_classes(cfg)
    metadata = describe(model, classes, shape, inference_dataset(cfg).pipeline)
    metadata['test_cfg'] = cfg.model.get('test_cfg')
    metadata['calibrated'] = isinstance(model.bbox_head, CalibratedDenseHead)
    if hasattr(model.bbox_head, 'prior_generator'):
        metadata['strides'] = [list(stride) for stride in model.bbox_head.prior_generator.strides]
    with torch.no_grad():
        outputs = model.eval()(_blank(1, metadata), mode='tensor')
    names = [f'output_{kind}_{level}' for kind, maps in enumerate(outputs) for level in range(len(tree_leaves(maps)))]
    return Exportable(FeatureMaps(model), names, metadata)


def describe(model: Any, classes: Sequence[str] | None, shape: list[int], pipeline: list) -> dict[str, Any]:
    """Collect the metadata: classes, input_size, channel_order, mean and std of each channel, and the test pipeline."""
    normaliser = model.data_preprocessor
    to_rgb = getattr(normaliser, 'to_rgb', False) or getattr(normaliser, '_channel_conversion', False)
    mean, std = (value.flatten() for value in (normaliser.mean, normaliser.std)) if getattr(
        normaliser, '_enable_normalize', False) else (torch.zeros(1), torch.ones(1))
    color_type = pipeline[0].get('color_type', 'color')
    loaded = 1 if color_type.startswith('grayscale') or (color_type == 'unchanged' and len(mean) == 1) else 3
    mean, std, _ = torch.broadcast_tensors(mean, std, torch.empty(loaded))
    return dict(classes=classes, input_size=shape, mean=mean.tolist(), std=std.tolist(), pipeline=pipeline,
                channel_order='GRAY' if len(mean) == 1 else 'RGB' if to_rgb else 'BGR')


def _blank(count: int, metadata: dict[str, Any]) -> Tensor:
    return torch.zeros(count, len(metadata['mean']), *metadata['input_size'])


def export(exportable: Exportable, opset: int | None = None, batch: int | None = None) -> bytes:
    """Export to ONNX. The values of the metadata are JSON.

    Args:
        exportable: What to export.
        opset: Version of the ONNX operators; None for that of the exporter.
        batch: Number of images in a batch; None for any number.

    Raises:
        ConfigError: The model does not work with every batch size, or cannot be expressed in this opset.
        torch.onnx.OnnxExporterError: The exporter does not support the model.
    """
    metadata = exportable.metadata
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PyTorch's own code
        program: Any = torch.onnx.export(
            _trace(exportable, batch), (_blank(batch or TRACED, metadata), ),
            input_names=['input'], output_names=exportable.outputs, dynamic_shapes=_dynamic(batch), opset_version=opset,
            custom_translation_table=exact_translations(), dynamo=True, verbose=False)
    found = program.model.opset_imports['']
    if opset not in (None, found):
        raise ConfigError(f'--opset {opset}: the exporter of torch {torch.__version__} writes opset {found}, and some '
                          f'of its operators have no equivalent in opset {opset}. Give --opset {found}')
    program.model.metadata_props.update(
        {key: json.dumps(value, default=str) for key, value in metadata.items() if value is not None})
    return program.model_proto.SerializeToString()


def _dynamic(batch: int | None) -> tuple | None:
    return None if batch else ({0: torch.export.Dim('batch')}, )


def _trace(exportable: Exportable, batch: int | None) -> torch.export.ExportedProgram | nn.Module:
    """Trace the graph. The module is returned as it is if this fails, for the exporter to describe the error.

    Raises:
        ConfigError: The batch size should be free, and the model fixes it.
    """
    module, guards = exportable.module.eval(), _Guards()
    images = _blank(batch or TRACED, exportable.metadata)
    try:
        with guards:
            return torch.export.export(module, (images, ), dynamic_shapes=_dynamic(batch), strict=False)
    except torch._dynamo.exc.UserError as error:
        if 'Constraints violated' not in str(error):
            return module
        where = f', {guards.places[0]}' if guards.places else ''
        raise ConfigError(f'the code of the model makes the batch size a constant{where}: give --batch N for a file '
                          'that takes batches of N images') from error
    except Exception:
        return module


class _Guards(logging.Handler):
    """Collects the places in the code that make a dynamic size a constant, from PyTorch's log of a trace."""
    LOGGER = logging.getLogger('torch.fx.experimental.symbolic_shapes')

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.places: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r'\[guard added\] \((.+?) in (\w+)\)', record.getMessage()):
            self.places.append(f'{found[2]} in {found[1]}')

    def __enter__(self) -> None:
        self.before = self.LOGGER.level, self.LOGGER.propagate, self.LOGGER.handlers[:]
        self.LOGGER.setLevel(logging.INFO)
        self.LOGGER.propagate, self.LOGGER.handlers = False, [self]

    def __exit__(self, *_: object) -> None:
        level, self.LOGGER.propagate, self.LOGGER.handlers = self.before
        self.LOGGER.setLevel(level)


def exact_translations() -> dict:
    """Exact forms of logsigmoid and expm1. The exporter's own forms, log(sigmoid(x)) and exp(x) - 1, round to log(0)
    and 0 at confident logits, and the calibrated score would be NaN."""
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


@torch.no_grad()
def compare_with_torch(file: bytes, exportable: Exportable, batches: Sequence[int] = BATCHES) -> dict[str, float]:
    """Compare onnxruntime with PyTorch on noise, in batches of several sizes.

    Args:
        file: Result of :func:`export`.
        exportable: Its argument.
        batches: Images in each batch.

    Returns:
        Largest difference of each output. It is relative to the largest value of the output if that is above 1.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    rng = torch.Generator().manual_seed(0)
    metadata, module = exportable.metadata, exportable.module.eval()
    mean, std = (torch.tensor(metadata[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    found = {output.name: 0. for output in session.get_outputs()}
    for size in batches:
        images = (torch.randint(256, (size, len(mean), *metadata['input_size']), generator=rng) - mean) / std
        actual = session.run(None, {'input': images.numpy()})
        for name, ours, theirs in zip(found, actual, [output.numpy() for output in module(images)], strict=True):
            # NaN stays NaN and fails every tolerance.
            found[name] = np.maximum(found[name], np.abs(ours - theirs).max() / max(1, np.abs(theirs).max()))
    return {name: float(value) for name, value in found.items()}
