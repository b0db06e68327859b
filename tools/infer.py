"""Predict the labels of images with a multi-label classifier of MMPretrain, or boxes with a detector of MMDetection."""
import argparse
import os.path as osp
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mmcv
import mmengine
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict, DictAction
from rich.console import Console
from rich.progress import track

from mmasl.apis.inferencer import (
    MultiLabelInferencer,
    class_names,
    list_images,
    load_checkpoint,
    load_weights,
    name_picture,
    parse_thr,
    thresholds,
    unreadable_images,
    why_unreadable,
)
from mmasl.errors import UnreadableImageError
from mmasl.utils.tools import is_classification, load_config, parse_args, require_file, require_gpu

DETECTION_THR = 0.3  # as in MMDetection's demo
MOST_LABELS = 8  # of a line of the table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', metavar='image', help='files, folders or URLs')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--thr', action='append', metavar='NUMBER', default=[],
                        help='threshold of all classes, or CLASS=NUMBER for each class that has its own '
                        f"(default: the head's; {DETECTION_THR} for boxes)")
    parser.add_argument('--topk', type=int, metavar='K', help='the K best labels or boxes, with --thr if they pass it')
    parser.add_argument('--calibrated', action='store_true',
                        help='decide by the calibrated score; for models trained with mmasl.AsymmetricLoss')
    parser.add_argument('--out-dir', metavar='FOLDER', help='write pictures of the predictions')
    parser.add_argument('--json', metavar='FILE', help='write the predictions to a .json file')
    parser.add_argument('--device', help='device, as in cuda:0 (default: the best there is)')
    parser.add_argument('--batch-size', type=int, default=1, help='images at a time (default: 1)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in model.head.thr=0.8')
    parser.set_defaults(work_dir=None, amp=False, launcher='none', local_rank=0)
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config that the flags describe, checked as far as is possible without building anything."""
    cfg = load_config(args)
    require_file(args.checkpoint, 'checkpoint')
    with user_errors(ValueError):
        args.thr = parse_thr(args.thr)
    for flag in ('topk', 'batch_size'):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise SystemExit(f"--{flag.replace('_', '-')} {value}: at least 1 is needed")
    if args.json and not args.json.endswith('.json'):
        raise SystemExit(f'--json {args.json}: predictions are written to .json')
    try:
        device = torch.device(args.device or 'cpu')
    except RuntimeError as error:
        raise SystemExit(f'--device {args.device}: {error}') from None
    if device.type == 'cuda':
        require_gpu(f'--device {args.device}')
    if args.calibrated:
        if not is_classification(cfg):
            raise SystemExit(f'--calibrated is for classifiers, and {args.config} is of a detector')
        if '.' not in cfg.model.head.type:  # MMPretrain's head; mmasl's of the same name has the same weights
            cfg.model.head.type = f'mmasl.{cfg.model.head.type}'
    return cfg


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End in the message of an error, without a traceback."""
    try:
        yield
    except kinds as error:
        raise SystemExit(str(error)) from error


def classify(cfg: Config, args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """Predictions as MultiLabelInferencer gives them, and the images that cannot be read with the reasons."""
    with user_errors(ImportError, KeyError, OSError, TypeError, ValueError):
        inferencer = MultiLabelInferencer(cfg, args.checkpoint, args.device, show_progress=sys.stdout.isatty())
    with user_errors(OSError, ValueError):
        try:
            results = inferencer(args.images, batch_size=args.batch_size, thr=args.thr, topk=args.topk,
                                 out_dir=args.out_dir or '')
        except UnreadableImageError as error:
            return error.results['predictions'], error.reasons
    return results['predictions'], {}


def detect(cfg: Config, args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """Predictions of MMDetection's own inferencer in the same form, with ``bboxes`` (x1, y1, x2, y2) in pixels."""
    from mmdet.apis import DetInferencer

    with user_errors(ImportError, KeyError, OSError, TypeError, ValueError):
        images = [str(image) for image in list_images(args.images)]
        # DetInferencer would leave weights that do not fit at random.
        checkpoint = load_checkpoint(args.checkpoint)
        if cfg.model.backbone.get('pretrained') is True:
            cfg.model.backbone.pretrained = False
        cfg.visualizer = ConfigDict(type='mmdet.DetLocalVisualizer')
        inferencer = DetInferencer(cfg, args.checkpoint, args.device, show_progress=False)
        load_weights(inferencer.model, checkpoint, args.checkpoint)
        classes = inferencer.model.dataset_meta['classes']
        number = getattr(getattr(inferencer.model, 'bbox_head', None), 'num_classes', len(classes))
        if number != len(classes):
            source = 'has' if class_names(checkpoint) else 'names no classes, and COCO has'
            raise ValueError(f'{args.checkpoint} {source} {len(classes)}, but model.bbox_head.num_classes is {number}')
        thr = thresholds(DETECTION_THR if args.thr is None else args.thr, classes, DETECTION_THR)
    records: list[dict] = []
    unreadable: dict[str, str] = {}
    names: dict[str, str] = {}
    read = LoadImageFromFile()
    starts = range(0, len(images), args.batch_size)
    for start in track(starts, 'Inference', console=Console(stderr=True), disable=not sys.stderr.isatty()):
        batch = []
        for image in images[start:start + args.batch_size]:
            try:
                read(dict(img_path=image))
                batch.append(image)
            except Exception as error:  # every decoder has its own kinds
                unreadable[image] = why_unreadable(error)
        samples = inferencer(batch, batch_size=max(len(batch), 1), return_datasamples=True)['predictions']
        for image, sample in zip(batch, samples):
            boxes = sample.pred_instances.cpu()
            boxes = boxes[boxes.scores > thr[boxes.labels]]
            sample.pred_instances = boxes = boxes[boxes.scores.argsort(descending=True)[:args.topk]]
            records.append(dict(img_path=image, pred_label=boxes.labels.tolist(),
                                pred_class=[classes[i] for i in boxes.labels], pred_score=boxes.scores.tolist(),
                                bboxes=boxes.bboxes.tolist()))
            if args.out_dir:
                picture, = inferencer.visualize([image], [sample], return_vis=True, pred_score_thr=0.)
                mmcv.imwrite(picture[..., ::-1], osp.join(args.out_dir, f'{name_picture(image, names)}.png'))
    return records, unreadable


def render(records: list[dict]) -> str:
    """A line for each image: its labels with their scores, the best first."""
    width = max((len(record['img_path']) for record in records), default=0)
    lines = []
    for record in records:
        labels = [f'{name} {score:.2f}' for name, score in zip(
            record['pred_class'], record.get('calibrated_score', record['pred_score']))]
        more = [f'and {len(labels) - MOST_LABELS} more'] if len(labels) > MOST_LABELS else []
        lines.append(f"{record['img_path']:{width}}  {', '.join(labels[:MOST_LABELS] + more) or '-'}")
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    records, unreadable = classify(cfg, args) if is_classification(cfg) else detect(cfg, args)
    if args.json:
        mmengine.dump(records, args.json, indent=1)
    print(render(records))
    if unreadable:
        raise SystemExit(str(unreadable_images(unreadable)))


if __name__ == '__main__':
    main()
