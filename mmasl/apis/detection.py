"""Predicts boxes with a detector of MMDetection, in the form of :class:`mmasl.apis.inferencer.MultiLabelInferencer`."""
import os.path as osp
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike

import mmcv
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.registry import TRANSFORMS

from mmasl.apis.drawing import choose_name, use_font
from mmasl.apis.images import check_out_dir, describe_read_error, list_images, unreadable_images
from mmasl.apis.model_files import inference_dataset, load_checkpoint
from mmasl.engine.hooks.adaptive_asymmetry import restore_asymmetry
from mmasl.errors import CheckpointError
from mmasl.utils.checkpoint import checkpoint_classes, load_weights
from mmasl.utils.config import resolve_type
from mmasl.utils.thresholds import expand_thresholds
from mmasl.utils.tools import drop_pretrained

DEFAULT_THR = 0.3  # as in MMDetection's demo


def detect(cfg: Config,
           weights: str | PathLike,
           inputs: str | Sequence[str],
           device: str | None = None,
           thr: float | Mapping[str, float] | None = None,
           topk: int | None = None,
           batch_size: int = 1,
           out_dir: str | PathLike = '',
           progress: Callable[[Iterable, str], Iterable] = lambda items, what: items) -> list[dict]:
    """Predict boxes with MMDetection's DetInferencer, after a safe and complete load of the checkpoint.

    Args:
        cfg: Config of the detector.
        weights: Checkpoint: a file or an http(s) URL.
        inputs: Files, folders or URLs of images.
        device: Device, such as 'cuda:0'; None for the best available.
        thr: Thresholds in [0, 1]: a number, or a dict by class name; ``DEFAULT_THR`` otherwise.
        topk: Number of boxes per image at most; None for all.
        batch_size: Images per batch.
        out_dir: Folder for pictures, .png.
        progress: Wraps the batches. Its second argument describes the step.

    Returns:
        A dict per image with ``img_path`` and, in descending order of the scores, ``pred_label``, ``pred_class``,
        ``pred_score`` and ``bboxes`` (x1, y1, x2, y2) in pixels.

    Raises:
        CheckpointError: The checkpoint is unsafe or does not fit the model or its classes.
        ConfigError: A threshold is out of range or names an unknown class, or ``out_dir`` has one of the images.
        DataError: An image or folder does not exist.
        UnreadableImageError: Some images cannot be read. Raised at the end; its ``results`` has the others.
    """
    from mmdet.apis import DetInferencer

    images = [str(image) for image in list_images(inputs)]
    check_out_dir(images, out_dir)
    checkpoint = load_checkpoint(weights)
    drop_pretrained(cfg)
    cfg.test_dataloader.dataset = dataset = inference_dataset(cfg)  # DetInferencer looks into no wrapper
    dataset.pipeline = [name_type(transform, cfg.get('default_scope')) for transform in dataset.pipeline]
    cfg.visualizer = ConfigDict(type='mmdet.DetLocalVisualizer')
    inferencer = DetInferencer(cfg, str(weights), device, show_progress=False)
    load_weights(inferencer.model, checkpoint, str(weights))  # DetInferencer keeps initial weights that do not fit
    restore_asymmetry(inferencer.model, checkpoint)
    classes = inferencer.model.dataset_meta['classes']
    number = getattr(getattr(inferencer.model, 'bbox_head', None), 'num_classes', len(classes))
    if number != len(classes):
        source = 'has' if checkpoint_classes(checkpoint) else 'names no classes, and COCO has'
        raise CheckpointError(f'{weights} {source} {len(classes)}, but model.bbox_head.num_classes is {number}')
    thresholds = expand_thresholds(DEFAULT_THR if thr is None else thr, classes, DEFAULT_THR)
    records: list[dict] = []
    unreadable: dict[str, str] = {}
    names: dict[str, str] = {}
    read = LoadImageFromFile()
    for start in progress(range(0, len(images), batch_size), 'inference'):
        batch = []
        for image in images[start:start + batch_size]:
            try:
                read(dict(img_path=image))
                batch.append(image)
            except Exception as error:  # each decoder has its own kinds
                unreadable[image] = describe_read_error(error)
        samples = inferencer(batch, batch_size=max(len(batch), 1), return_datasamples=True)['predictions']
        for image, sample in zip(batch, samples):
            boxes = sample.pred_instances.cpu()
            boxes = boxes[boxes.scores > thresholds[boxes.labels]]
            sample.pred_instances = boxes = boxes[boxes.scores.argsort(descending=True)[:topk]]
            records.append(dict(img_path=image, pred_label=boxes.labels.tolist(),
                                pred_class=[classes[i] for i in boxes.labels], pred_score=boxes.scores.tolist(),
                                bboxes=boxes.bboxes.tolist()))
            if out_dir:
                with use_font(classes):
                    picture, = inferencer.visualize([image], [sample], return_vis=True, pred_score_thr=0.)
                mmcv.imwrite(picture[..., ::-1], osp.join(out_dir, f'{choose_name(image, names)}.png'))
    if unreadable:
        raise unreadable_images(unreadable, records)
    return records


def name_type(transform: ConfigDict, scope: str | None) -> ConfigDict:
    """Write the class of a transform as a name. DetInferencer splits names, and looks for LoadImageFromFile by its own.
    """
    kind = resolve_type(transform['type'], TRANSFORMS, scope or 'mmdet')
    if isinstance(kind, type) and issubclass(kind, LoadImageFromFile):
        return ConfigDict(transform, type='LoadImageFromFile')
    if isinstance(transform['type'], str):
        return transform
    return ConfigDict(transform, type=f'{kind.__module__}.{kind.__name__}')
