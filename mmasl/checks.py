"""What would spoil a run, found before it starts or before it does harm: hooks for any config, and the tools' errors.

``tools/train.py`` and ``tools/test.py`` add both hooks to every config (:func:`add_checks`); for other tools:

    custom_hooks = [dict(type='mmasl.CheckDataHook'), dict(type='mmasl.CheckFiniteHook')]
"""
import dis
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop
from torch import Tensor, nn

from .losses import AsymmetricLoss
from .registry import HOOKS
from .softmax_loss import AsymmetricSoftmaxLoss

LOSSES = (AsymmetricLoss, AsymmetricSoftmaxLoss)
HEADS = re.compile(r'(^|\.)(head|bbox_head(\.\d+)?|data_preprocessor)$')
CHECKS = ('mmasl.CheckDataHook', 'mmasl.CheckFiniteHook')


class UnreadableImage(OSError):
    """An image file that cannot be decoded; the message names it and the cure."""


def add_checks(cfg: Config) -> None:
    """Add the hooks of this module to a config that lacks them."""
    hooks = list(cfg.get('custom_hooks') or [])
    found = {hook.get('type') for hook in hooks if isinstance(hook, dict)}
    cfg.custom_hooks = hooks + [dict(type=name) for name in CHECKS if name not in found]


@contextmanager
def plain_errors() -> Iterator[None]:
    """End in SystemExit with the message where mmasl itself raised the error: a traceback would add nothing to it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UnreadableImage):
            # From the process of a data loader it comes with that process's traceback.
            raise SystemExit(str(error).rsplit(f'{UnreadableImage.__name__}: ', 1)[-1].strip()) from None
        if not _raised_by_mmasl(error):
            raise
        raise SystemExit(str(error.args[0]) if len(error.args) == 1 else str(error)) from None


def _raised_by_mmasl(error: BaseException) -> bool:
    """Whether a ``raise`` of this package, and not a call in it, was the origin."""
    trace: Any = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (Path(code.co_filename).is_relative_to(Path(__file__).parent)
            and code.co_code[trace.tb_lasti] == dis.opmap['RAISE_VARARGS'])


# ---------------------------------------------------------------------------------------------- before training starts

@HOOKS.register_module()
class CheckDataHook(Hook):
    """Compares data sets, heads and losses before a run starts, and names images that cannot be read while it runs.

    Before the run, for every data set of it:

    - it makes a batch, its labels lie among its classes, and no image file is missing (see :func:`check_samples`);
    - training and evaluation name their classes alike, in one order;
    - heads, and the parameters per class of mmasl's losses, are for as many classes.

    An image that cannot be decoded ends the run with its name. With ``skip_unreadable`` another image of the training
    set, drawn at random, takes its place; each is named in a warning, and so is their number after each pass. In an
    evaluation it is an error nevertheless, for the result would be that of other data.

    Args:
        skip_unreadable: How many unreadable images of a training set, >= 0, to do without; one more is an error.

    Raises:
        ValueError, FileNotFoundError: Something does not fit; the message names the place and the cure.
        UnreadableImage: See above.
    """
    priority = 'VERY_HIGH'

    def __init__(self, skip_unreadable: int = 0) -> None:
        if skip_unreadable < 0:
            raise ValueError(f'skip_unreadable={skip_unreadable} must be a number of images, 0 or more')
        self.skip_unreadable = skip_unreadable
        self.skipped: list[Tensor] = []

    def before_run(self, runner: Runner) -> None:
        classes = {}
        for split in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{split}_loop')
            if not isinstance(loop, BaseLoop):
                continue
            key, dataset = f'{split}_dataloader.dataset', loop.dataloader.dataset
            if not len(loop.dataloader):
                raise ValueError(f'{split}_dataloader makes no batch of the {len(dataset)} images of its data set: '
                                 'lower batch_size or set drop_last=False, and check ann_file, filter_cfg and indices')
            names = getattr(dataset, 'metainfo', {}).get('classes')
            if names is not None:
                classes[key] = names
            for inner in leaves(dataset):
                spare = 0 if inner.test_mode else self.skip_unreadable
                if is_main_process():
                    check_samples(inner, names and len(names), key, spare)
                self._guard(inner, spare)
        check_same_classes(classes)
        for key, names in classes.items():
            check_class_counts(runner.model, names, key)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # After each pass over the data, whether the loop goes by epochs or not.
        if self.skip_unreadable and (runner.iter + 1) % len(runner.train_dataloader) == 0 and (
                count := sum(int(x.sum()) for x in self.skipped)):
            runner.logger.warning(f'{count} images of the training set cannot be read, and others take their place; '
                                  'the warnings above name them')

    def _guard(self, dataset: BaseDataset, spare: int) -> None:
        """Put a :class:`GuardedLoader` around every loader of the pipeline."""
        pipeline = getattr(dataset, 'pipeline', None)
        if isinstance(pipeline, Compose):
            skipped = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
            self.skipped.append(skipped)
            pipeline.transforms = [
                GuardedLoader(x, spare, skipped, _cure(dataset)) if type(x) is LoadImageFromFile else x
                for x in pipeline.transforms]


def _cure(dataset: BaseDataset) -> str:
    cure = 'Get what is missing, or remove it from the annotation file'
    return cure if dataset.test_mode else (
        f"{cure}; to train without up to N images, custom_hooks=[dict(type='mmasl.CheckDataHook', skip_unreadable=N)]")


class GuardedLoader:
    """An image loader whose errors name the file and the cure, and that may skip files.

    Args:
        loader: The loader, called with a sample's dict with ``img_path``.
        limit: Number of files to skip, as None, which makes MMEngine draw another sample.
        skipped: Which have been, bool (number of samples,), in memory that the workers share.
        cure: What the user can do.
    """

    def __init__(self, loader: LoadImageFromFile, limit: int, skipped: Tensor, cure: str) -> None:
        self.loader = loader
        self.limit = limit
        self.skipped = skipped
        self.cure = cure

    def __call__(self, results: dict) -> dict | None:
        try:
            return self.loader(results)
        except Exception as error:
            path = results.get('img_path')
            message = f'the image {path} cannot be read: {_reason(path, error)}'
            if self.limit:
                known = bool(self.skipped[results['sample_idx']])
                self.skipped[results['sample_idx']] = True
                count = int(self.skipped.sum())
                if count <= self.limit:
                    if not known:
                        print_log(f'{message}; another takes its place ({count} of at most {self.limit})', 'current',
                                  logging.WARNING)
                    return None
                message += f', nor {self.limit} others (skip_unreadable={self.limit})'
            raise UnreadableImage(f'{message}. {self.cure}') from None

    def __repr__(self) -> str:
        return repr(self.loader)


def _reason(path: str | None, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'there is no such file'
    if path and os.path.isfile(path):
        size = os.path.getsize(path)
        return f'its {size:,} bytes are no whole image' if size else 'the file is empty'
    return f'{type(error).__name__}: {error}'


def leaves(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets that wrappers such as RepeatDataset and ConcatDataset hold, or the data set itself."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    elif isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        for inner in dataset.datasets:
            yield from leaves(inner)
    elif hasattr(dataset, 'dataset'):
        yield from leaves(dataset.dataset)


def check_class_counts(model: nn.Module, classes: Sequence[str], key: str) -> None:
    """Raise ValueError where a head, or a parameter per class of its loss, is for another number of classes.

    Args:
        model: With heads that have ``num_classes``.
        classes: Names of the data set's classes.
        key: Of the data set in the config, for the message.
    """
    for path, module in model.named_modules():
        losses = {child: loss for child, loss in module.named_children() if isinstance(loss, LOSSES)}
        count = getattr(module, 'num_classes', None)
        if not isinstance(count, int) or path.endswith('rpn_head') or not (losses or HEADS.search(path)):
            continue
        name = path.removeprefix('module.')  # of DDP
        if count != len(classes):
            raise ValueError(f'model.{name} has num_classes={count}, and {key} has {len(classes)} classes, '
                             f'{_few(classes)}: set num_classes={len(classes)}, or metainfo=dict(classes=...) of the '
                             'data set')
        for child, loss in losses.items():
            for parameter, values in loss.named_buffers():
                if values.dim() == 1 and len(values) != count:
                    raise ValueError(f'{parameter} of model.{name}.{child} has {len(values)} values, and {key} has '
                                     f'{count} classes: give one number, or one per class')


def check_same_classes(classes: dict[str, Sequence[str]]) -> None:
    """Raise ValueError where two data sets (config key: class names) do not have the same classes in one order."""
    (first, ours), *rest = classes.items() if classes else [(None, ())]
    for key, other in rest:
        for index, (a, b) in enumerate(zip_longest(ours, other, fillvalue='no class')):
            if a != b:
                raise ValueError(f'class {index} is {a!r} in {first} and {b!r} in {key}, so that one would be '
                                 'evaluated as the other: give both the same metainfo=dict(classes=[...])')


def check_samples(dataset: BaseDataset, num_classes: int | None, key: str, spare: int = 0) -> None:
    """Raise for the first label that is no class, and for image files that do not exist.

    The folders are listed once each; images of another file system than the local one, and those of
    :class:`mmasl.OpenImages`, of which there may be nine million, are left to the loaders.

    Args:
        dataset: The data set.
        num_classes: Of the data set; None: labels are not looked at.
        key: Of the data set in the config, for the message.
        spare: Number of images that may be missing.
    """
    if type(dataset).__module__ == 'mmasl.datasets.open_images':
        return  # which has checked its labels while reading
    listed, missing = {}, []
    for info in map(dataset.get_data_info, range(len(dataset))):
        path = info.get('img_path')
        labels = torch.as_tensor(info['gt_label'] if info.get('gt_label') is not None else []).reshape(-1)
        if num_classes and ((labels < 0) | (labels >= num_classes)).any():
            raise ValueError(f'{path} in {key} has gt_label={info["gt_label"]}, and there are {num_classes} classes: '
                             f'labels lie in 0 ... {num_classes - 1}')
        if not isinstance(path, str) or ':' in path.split('/')[0]:
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else ()
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        message = f'{len(missing)} of {len(dataset)} images of {key} are missing, the first is {missing[0]}'
        if len(missing) > spare:
            raise FileNotFoundError(f'{message}. {_cure(dataset)}')
        print_log(f'{message}; others take their place', 'current', logging.WARNING)


def _few(values: Iterable, count: int = 5) -> str:
    values = list(values)
    return ', '.join(map(str, values[:count])) + (', ...' if len(values) > count else '')


# ------------------------------------------------------------------------------------- the files of MMDetection's COCO

def check_coco_files(cfg: Config, *splits: str) -> None:
    """Raise or warn where MMDetection's CocoDataset would leave out or mix up annotations without a word.

    Its labels are numbered by the classes that the file has, in the file's order, so that a class that is missing, or
    another order, shifts names. Each file is read once more than without this check.

    Args:
        cfg: Of a run; its ``CocoDataset`` entries are looked at, those in wrappers too.
        splits: Of 'train', 'val' and 'test'.

    Raises:
        ValueError: A file is damaged, of other classes, lists an id twice or annotates what it does not list.
    """
    for split in splits if is_main_process() else ():
        loader = cfg.get(f'{split}_dataloader')
        for key, dataset in _coco_entries(loader['dataset'], f'{split}_dataloader.dataset') if loader else ():
            classes = (dataset.get('metainfo') or {}).get('classes')
            path = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            if not os.path.isfile(path):
                continue
            check_coco_file(path, classes, key, {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {})
            evaluators = cfg.get(f'{split}_evaluator') or ()
            for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
                other = evaluator.get('ann_file') or ''
                if os.path.isfile(other) and not os.path.samefile(path, other):
                    _check_evaluator(path, other, f'{split}_evaluator.ann_file')


def _check_evaluator(path: str, other: str, key: str) -> None:
    (images, names), (known, found) = ((
        {image['id'] for image in content['images']}, [category['name'] for category in content['categories']])
        for content in (json.loads(Path(file).read_bytes()) for file in (path, other)))
    if images - known or names != found:
        raise ValueError(f'{key}={other} lacks {len(images - known)} of the {len(images)} images of {path}, whose '
                         'predictions it is to judge, or has other categories: give both the same file')


def _coco_entries(dataset: dict, key: str) -> Iterator[tuple[str, dict]]:
    for number, inner in enumerate(dataset.get('datasets') or ()):
        yield from _coco_entries(inner, f'{key}.datasets.{number}')
    if isinstance(dataset.get('dataset'), dict):
        yield from _coco_entries(dataset['dataset'], f'{key}.dataset')
    if dataset.get('type') in ('CocoDataset', 'mmdet.CocoDataset'):
        yield key, dataset


def check_coco_file(path: str, classes: Sequence[str] | None, key: str, filter_cfg: dict) -> None:
    """Check one file, see :func:`check_coco_files`; warns of boxes that CocoDataset leaves out, with their number.

    Args:
        path: The annotation file.
        classes: ``metainfo.classes`` of the data set; None for COCO's 80.
        key: Of the data set in the config, for the message.
        filter_cfg: Of the data set: ``min_size`` and ``filter_empty_gt``.
    """
    if classes is None:
        from mmdet.datasets import CocoDataset
        classes = CocoDataset.METAINFO['classes']
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f'{path} is not a whole JSON file ({error}): get it again') from None
    lacks = {'images', 'annotations', 'categories'} - set(content if isinstance(content, dict) else ())
    if lacks:
        raise ValueError(f'{path} is no COCO instances file: it lacks {sorted(lacks)}. Give instances_*.json')
    check_entries(content, path, dict(images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
                                      annotations=('id', 'image_id', 'category_id')))
    names = [category['name'] for category in content['categories']]
    if absent := [name for name in classes if name not in names]:
        raise ValueError(f'{len(absent)} of the {len(classes)} classes of {key} are not in {path}: {_few(absent)}. The '
                         f'labels of the others would be shifted. The file has {_few(names)}: set '
                         'metainfo=dict(classes=(...)) to names of the file, in its order')
    order = [name for name in names if name in set(classes)]
    if order != list(classes):
        index = next(i for i, (a, b) in enumerate(zip(order, classes)) if a != b)
        raise ValueError(f'class {index} of {key} is {classes[index]!r} and that of {path} is {order[index]!r}, and '
                         'CocoDataset numbers classes by the file: give metainfo=dict(classes=(...)) in its order')
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    known = {category['id']: category['name'] in classes for category in content['categories']}
    annotated: set[int] = set()
    left_out: dict[str, list] = {}
    for ann in content['annotations']:
        for name, ids in (('image_id', sizes), ('category_id', known)):
            if ann.get(name) not in ids:
                raise ValueError(f'annotation {ann["id"]} in {path} has the unknown {name} {ann.get(name)}, and '
                                 'CocoDataset would leave it out: correct it or remove it')
        if known[ann['category_id']]:
            annotated.add(ann['image_id'])
        box = ann.get('bbox')
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f'annotation {ann["id"]} in {path} has bbox={box}: give [x, y, width, height] in pixels')
        (x, y, w, h), (width, height) = box, sizes[ann['image_id']]
        fault = ('not finite' if not all(map(math.isfinite, box)) else
                 'narrower than a pixel' if w < 1 or h < 1 else
                 'outside of their image' if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0) else
                 'of area 0' if ann.get('area', 1) <= 0 else None)
        if fault:
            left_out.setdefault(fault, []).append(ann['id'])
    if not any(min(size) >= filter_cfg.get('min_size', 0)
               and (image in annotated or not filter_cfg.get('filter_empty_gt')) for image, size in sizes.items()):
        raise ValueError(f'none of the {len(sizes)} images in {path} is left for {key} by '
                         f'filter_cfg={dict(filter_cfg)}: correct filter_cfg, or metainfo.classes')
    for fault, numbers in left_out.items():
        print_log(f'{len(numbers)} of {len(content["annotations"])} boxes in {path} are {fault} and are left out '
                  f'(annotations {_few(numbers)})', 'current', logging.WARNING)


def check_entries(content: dict, path: str, keys: dict[str, Sequence[str]]) -> None:
    """Raise ValueError where an entry of a COCO file lacks a key, or an id or a file name stands there twice.

    Args:
        content: The file's.
        path: Of the file, for the message.
        keys: What every entry of a list must have, such as ``dict(images=('id', 'file_name'))``.
    """
    for group, wanted in keys.items():
        what = dict(images='image', categories='category', annotations='annotation')[group]
        for number, entry in enumerate(content[group]):
            for key in wanted:
                if key not in entry:
                    raise ValueError(f'{path}: entry {number} of {group}, {str(entry)[:80]}, has no {key}: get the '
                                     'file again')
        for key, words in (('id', 'id'), ('file_name', 'file')):
            if key in wanted:
                refuse_repeats([entry[key] for entry in content[group]], f'{path} lists {what} {words}')


def refuse_repeats(values: Iterable, where: str) -> None:
    """Raise ValueError for the value that stands there most often, if that is more than once."""
    value, times = max(Counter(values).items(), key=lambda item: item[1], default=(None, 0))
    if times > 1:
        raise ValueError(f'{where} {value!r} {times} times')


# ------------------------------------------------------------------------------------------------------ while training

@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stops a training whose loss or weights are no longer finite, before EMA, a controller or a checkpoint take them.

    It looks at the loss that MMEngine has fetched for its log, so that no step waits for the device a second time, and
    at the weights once before each checkpoint and each test. The message says how many logits of mmasl's losses are
    not finite, and of which images and classes. MMDetection's CheckInvalidLossHook looks at every 50th iteration only,
    after EMA, and its error has no message.

    The logits of a step are kept until its end for that, unless the model is compiled.

    Raises:
        FloatingPointError: See above.
    """
    priority = 'HIGH'  # after RuntimeInfoHook, which fetches the loss; before the hooks of mmasl, EMA and checkpoints

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self._registered = False

    def before_run(self, runner: Runner) -> None:
        if not self._registered and not (runner.cfg or {}).get('compile'):
            self._registered = True
            for module in runner.model.modules():
                if isinstance(module, LOSSES):
                    module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, loss: nn.Module, args: tuple, kwargs: dict) -> None:
        if loss.training and torch.is_grad_enabled():
            self.logits.append((args[0] if args else kwargs['pred']).detach())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        logits, self.logits = self.logits, []
        fetched = runner.message_hub.log_scalars
        for name in outputs or ():
            if 'loss' not in name:
                continue
            value = fetched[f'train/{name}'].current() if f'train/{name}' in fetched else float(outputs[name])
            if not math.isfinite(value):
                self._stop(runner, f'{name} is {value}. {describe_logits(logits, data_batch)}')
        if self._saves(runner, batch_idx) and (what := describe_weights(runner.model)):
            self._stop(runner, what)

    def before_test(self, runner: Runner) -> None:
        if what := describe_weights(runner.model):
            raise FloatingPointError(f'{what} The training that wrote {runner._load_from} diverged: take an earlier '
                                     'checkpoint')

    @staticmethod
    def _saves(runner: Runner, batch_idx: int) -> bool:
        """Whether a checkpoint may be written after this iteration."""
        if runner.iter + 1 == runner.max_iters or batch_idx + 1 == len(runner.train_dataloader):
            return True
        return any(isinstance(hook, CheckpointHook) and not hook.by_epoch
                   and hook.every_n_train_iters(runner, hook.interval) for hook in runner.hooks)

    @staticmethod
    def _stop(runner: Runner, what: str) -> None:
        record = os.path.join(runner.work_dir, 'last_checkpoint')
        saved = Path(record).read_text().strip() if os.path.exists(record) else ''
        raise FloatingPointError(
            f'epoch {runner.epoch + 1}, iteration {runner.iter + 1}: {what} No checkpoint has taken it. '
            'Lower the learning rate, clip gradients (optim_wrapper.clip_grad.max_norm=10), or train without --amp; '
            + (f'{saved} is the last checkpoint, from before it' if saved else 'there is no checkpoint yet'))


def describe_weights(model: nn.Module) -> str:
    """Which weights of a model are not finite; '' where all are."""
    tensors = {name: x.detach() for name, x in [*model.named_parameters(), *model.named_buffers()]
               if x.is_floating_point()}
    finite = torch.stack([x.isfinite().all() for x in tensors.values()]).tolist()
    bad = [name for name, good in zip(tensors, finite) if not good]
    return f'{len(bad)} of {len(tensors)} weights are not finite: {_few(bad)}.' if bad else ''


def describe_logits(logits: Sequence[Tensor], data_batch: object) -> str:
    """How many logits are not finite, and of which images and classes.

    Args:
        logits: Of every call of a loss in this step, (..., C).
        data_batch: The batch; images are named where it has one data sample a row of the logits.
    """
    total = sum(x.numel() for x in logits)
    if not total:
        return ''
    logits = [x.reshape(-1, x.shape[-1]) for x in logits if x.numel()]
    bad = [~x.isfinite() for x in logits]
    count = sum(int(x.sum()) for x in bad)
    if not count:
        return (f'All {total:,} logits are finite: a target or a weight is not, or a target is out of its range, which '
                'is NaN on an accelerator and an error on the CPU.')
    text = f'{count:,} of {total:,} logits are not finite'
    classes = [str(c) for c in torch.cat([x.any(0).nonzero()[:, 0].cpu() for x in bad]).unique().tolist()]
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    if samples is not None and all(len(x) == len(samples) for x in logits):
        rows = torch.stack([x.any(1).cpu() for x in bad]).any(0).nonzero()[:, 0].tolist()
        names = [getattr(samples[row], 'img_path', f'row {row}') for row in rows]
        text += f', in {len(rows)} of {len(samples)} images ({_few(names)})'
    return f'{text}, of {len(classes)} of {logits[0].shape[-1]} classes (numbers {_few(classes)}).'
