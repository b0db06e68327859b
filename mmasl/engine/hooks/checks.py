"""Checks for bad data, class mismatches and non-finite values.

tools/train.py and tools/test.py add both hooks to every config. For other tools:

    custom_hooks = [dict(type='mmasl.CheckDataHook'), dict(type='mmasl.CheckFiniteHook')]
"""
import logging
import math
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset
from mmengine.dist import all_reduce
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmasl.datasets.validation import (
    check_same_classes,
    check_samples,
    find_image_fault,
    first_few,
    iter_datasets,
    missing_image_hint,
)
from mmasl.errors import ConfigError, NonFiniteError, UnreadableImageError
from mmasl.evaluation.name_checks import check_metric_names
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.asymmetric_softmax_loss import AsymmetricSoftmaxLoss
from mmasl.registry import HOOKS
from mmasl.utils.config import metainfo_classes
from mmasl.utils.distributed import first_of_all_ranks
from mmasl.utils.runner import built_loop, checkpoint_name

LOSSES = (AsymmetricLoss, AsymmetricSoftmaxLoss)
SAMPLES = 8  # images of each data set that are loaded before a run
HEADS = re.compile(r'(^|\.)(head|bbox_head(\.\d+)?|data_preprocessor)$')


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Checks data sets, heads and losses before a run, and names unreadable images during the run.

    Before the run, every data set of it is checked, and all ranks stop if one finds an error:

    - it makes a batch, its labels are among its classes, and no image file is missing (see :func:`check_samples`);
    - some of its images have the size that the annotation file states, and their 16 bits are not clipped to 8; the
      others are compared when they are loaded, with one warning per data set;
    - training and evaluation have the same classes in the same order;
    - heads, and per-class parameters of mmasl's losses, have as many classes, unless classes are texts that a language
      model reads;
    - no two metrics report one name, and one reports that of ``save_best``, see
      :func:`mmasl.evaluation.name_checks.check_metric_names`.

    An image that cannot be decoded stops the run with its name. With ``skip_unreadable`` a random image of the training
    set replaces it, and warnings name each such image and count them after each epoch. In an evaluation an unreadable
    image is always an error, because the result would be that of other data.

    Args:
        skip_unreadable: Number of unreadable images of a training set to skip, >= 0; one more is an error. Ranks count
            together at the end of each epoch.
        max_samples: Number of samples of each data set to check before the run, evenly spaced; None for all. Ranks
            share them.

    Raises:
        ConfigError: Classes do not fit each other, or no batch can be made.
        DataError: A label or an image file is wrong or missing.
        UnreadableImageError: See above.
    """
    priority = 'VERY_HIGH'

    def __init__(self, skip_unreadable: int = 0, max_samples: int | None = None) -> None:
        if skip_unreadable < 0:
            raise ConfigError(f'skip_unreadable={skip_unreadable} must be a number of images, 0 or more')
        if max_samples is not None and max_samples < 1:
            raise ConfigError(f'max_samples={max_samples} must be a number of samples, 1 or more, or None')
        self.skip_unreadable = skip_unreadable
        self.max_samples = max_samples
        self.skipped: list[tuple[Any, Tensor]] = []  # training sets, and which samples have been skipped

    def before_run(self, runner: Runner) -> None:
        loops = {split: loop for split in ('train', 'val', 'test')
                 if (loop := built_loop(runner, split))}
        save_best = [name for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best
                     for name in hook.key_indicators]
        self._check(runner.model, loops, save_best)
        self._guard_all(loops)
        if 'train' in loops:
            runner.register_hook(_GuardAgain(self, loops))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # A loop by iterations has one epoch.
        if hasattr(runner.train_loop, 'dataloader_iterator') and (runner.iter + 1) % len(runner.train_dataloader) == 0:
            self._count_skipped(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        self._count_skipped(runner)

    def _count_skipped(self, runner: Runner) -> None:
        """Count the skipped images of all ranks, whose workers share no memory and whose warnings are not logged."""
        if not self.skip_unreadable:
            return
        names: list[str] = []
        for dataset, skipped in self.skipped:
            total = skipped.int()
            all_reduce(total, op='max')
            names += [str(dataset.get_data_info(i).get('img_path')) for i in total.nonzero()[:, 0].tolist()]
        if len(names) > self.skip_unreadable:
            raise UnreadableImageError(f'{len(names)} images cannot be read (skip_unreadable={self.skip_unreadable}): '
                                       f'{first_few(names)}. Restore them, or remove them from the annotation file')
        if names:
            runner.logger.warning(f'{len(names)} images of the training set cannot be read and were replaced: '
                                  f'{first_few(names)}')

    def _check(self, model: nn.Module, loops: dict[str, BaseLoop], save_best: Sequence[str]) -> None:
        classes: dict[str, Sequence[str]] = {}
        for split, loop in loops.items():
            key, dataset = f'{split}_dataloader.dataset', loop.dataloader.dataset
            if not len(loop.dataloader):
                raise ConfigError(f'{split}_dataloader makes no batch of the {len(dataset)} images of its data set: '
                                  'lower batch_size or set drop_last=False')
            meta = getattr(dataset, 'metainfo', {})
            parts = {f'{key}.datasets.{i}': part for i, part in enumerate(meta)} if isinstance(meta, list) else {
                key: meta}
            classes |= {place: part['classes'] for place, part in parts.items() if part.get('classes')}
            for inner in iter_datasets(dataset):
                if not isinstance(inner, BaseDataset):
                    continue
                names = metainfo_classes(inner.metainfo)
                check_samples(inner, len(names) if names else None, key, self._spare(split), self.max_samples)
                self._sample_images(inner, key)
            names = metainfo_classes(meta)
            evaluator: Any = getattr(loop, 'evaluator', None)
            if names and type(evaluator) is Evaluator:  # others name their metrics themselves
                check_metric_names(evaluator.metrics, len(names), f'{split}_evaluator',
                                   save_best if split == 'val' else ())
        if not reads_text(model):
            check_same_classes(classes)
        for key, names in classes.items():
            check_class_counts(model, names, key)

    @staticmethod
    def _sample_images(dataset: BaseDataset, key: str) -> None:
        """Load some images before the run. Those that cannot be read are reported when they are needed."""
        loaders = [x for x in getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
                   if isinstance(x, LoadImageFromFile)]
        faults, size = [], len(dataset)
        for index in sorted({size * i // SAMPLES for i in range(SAMPLES)}) if loaders and size else ():
            info = dataset.get_data_info(index)
            try:
                loaded = loaders[0](dict(info))
            except Exception:
                continue
            if loaded and (fault := find_image_fault(loaders[0], info, loaded)):
                faults.append(fault)
        if faults:
            print_log(f'{len(faults)} of {min(SAMPLES, size)} images of {key} that were tried have another size than '
                      f'stated: {faults[0]}', 'current', logging.WARNING)

    def _spare(self, split: str) -> int:
        return self.skip_unreadable if split == 'train' else 0

    def _guard_all(self, loops: dict[str, BaseLoop]) -> None:
        """Wrap every image loader of the pipelines in a :class:`GuardedLoader`, if it is not yet."""
        for split, loop in loops.items():
            for dataset in iter_datasets(loop.dataloader.dataset):
                pipeline: Any = getattr(dataset, 'pipeline', None)
                transforms = getattr(pipeline, 'transforms', ())  # of MMEngine's Compose or MMCV's
                if not any(isinstance(x, LoadImageFromFile) for x in transforms):
                    continue
                known = [skipped for other, skipped in self.skipped if other is dataset]
                skipped = known[0] if known else torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
                warned = torch.zeros(1, dtype=torch.bool).share_memory_()
                if split == 'train' and not known:
                    self.skipped.append((dataset, skipped))
                # Only a BaseDataset replaces a sample whose pipeline returns None.
                spare = self._spare(split) if isinstance(dataset, BaseDataset) else 0
                pipeline.transforms = [
                    GuardedLoader(x, spare, skipped, missing_image_hint(dataset), warned)
                    if isinstance(x, LoadImageFromFile) else x for x in transforms]


class _GuardAgain(Hook):
    """Guards the pipelines that another hook replaces in an epoch, such as MMDetection's PipelineSwitchHook."""
    priority = 'LOWEST'

    def __init__(self, hook: CheckDataHook, loops: dict[str, BaseLoop]) -> None:
        self.hook = hook
        self.loops = loops

    def before_train_epoch(self, runner: Runner) -> None:
        self.hook._guard_all(self.loops)


class GuardedLoader:
    """An image loader that names unreadable files in its errors, or skips some of them.

    Args:
        loader: The loader, called with the dict of a sample, which has ``img_path``.
        limit: Number of files to skip. The loader returns None for them, and MMEngine draws another sample.
        skipped: Which samples have been skipped, bool (number of samples,), in memory shared by the workers.
        hint: What the user can do.
        warned: Whether another size than stated was reported, bool (1,), in memory shared by the workers.
    """

    def __init__(self, loader: LoadImageFromFile, limit: int, skipped: Tensor, hint: str, warned: Tensor) -> None:
        self.loader = loader
        self.limit = limit
        self.skipped = skipped
        self.hint = hint
        self.warned = warned

    def __call__(self, results: dict) -> dict | None:
        info = {key: results.get(key) for key in ('img_path', 'width', 'height')}
        try:
            loaded = self.loader(results)
        except Exception as error:
            path = results.get('img_path')
            message = f'the image {path} cannot be read: {_reason(path, error)}'
            if self.limit:
                known = bool(self.skipped[results['sample_idx']])
                self.skipped[results['sample_idx']] = True
                count = int(self.skipped.sum())
                if count <= self.limit:
                    if not known:
                        print_log(f'{message}; another replaces it ({count} of at most {self.limit})', 'current',
                                  logging.WARNING)
                    return None
                message += f', nor {self.limit} others (skip_unreadable={self.limit})'
            raise UnreadableImageError(f'{message}. {self.hint}') from None
        if loaded and (fault := find_image_fault(self.loader, info, loaded)) and not self.warned:
            self.warned.fill_(True)
            print_log(fault, 'current', logging.WARNING)
        return loaded

    def __repr__(self) -> str:
        return repr(self.loader)


def _reason(path: str | None, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'there is no such file'
    if path and os.path.isfile(path):
        size = os.path.getsize(path)
        return f'its {size:,} bytes are truncated or not an image' if size else 'the file is empty'
    return f'{type(error).__name__}: {error}'


def reads_text(model: nn.Module) -> bool:
    """Whether a detector finds what a text describes, as Grounding DINO and GLIP do. Its ``num_classes`` are slots."""
    return any(path.split('.')[-1] == 'language_model' for path, _ in model.named_modules())


def check_class_counts(model: nn.Module, classes: Sequence[str], key: str) -> None:
    """Raise if a head, or a per-class parameter of its loss, has another number of classes than the data set.

    Args:
        model: The model, whose heads have ``num_classes``.
        classes: Class names of the data set.
        key: Key of the data set in the config, for the message.

    Raises:
        ConfigError: The numbers differ.
    """
    for path, module in model.named_modules() if not reads_text(model) else ():
        losses = {child: loss for child, loss in module.named_children() if isinstance(loss, LOSSES)}
        count = getattr(module, 'num_classes', None)
        if not isinstance(count, int) or path.endswith('rpn_head') or not (losses or HEADS.search(path)):
            continue
        if not losses and not path.endswith('data_preprocessor') and next(module.parameters(), None) is None:
            continue  # nothing in it has a size by classes
        name = path.removeprefix('module.')  # of DDP
        if count != len(classes):
            raise ConfigError(f'model.{name} has num_classes={count}, and {key} has {len(classes)} classes, '
                              f'{first_few(classes)}: set num_classes={len(classes)}, or metainfo=dict(classes=...) of '
                              'the data set')
        for child, loss in losses.items():
            for parameter, values in loss.named_buffers():
                if values.dim() == 1 and len(values) != count:
                    raise ConfigError(f'{parameter} of model.{name}.{child} has {len(values)} values, and {key} has '
                                      f'{count} classes: give one number, or one per class')


@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stops a training whose loss or weights are NaN or infinite, before EMA, a controller or a checkpoint use them.

    The hook reads the loss that MMEngine has already fetched for its log, so it adds no host sync, and checks the
    weights and buffers once before each checkpoint and each test; buffers that are not finite before the run, such as a
    mask of -inf, may stay so. The message counts the non-finite logits of mmasl's losses and
    names their images and classes. All ranks stop with the message of the first one; several processes therefore reduce
    one number in each iteration. MMDetection's CheckInvalidLossHook checks every 50th iteration only, after EMA, and
    its error has no message.

    For the message the hook keeps the logits from the loss to the end of the same iteration. It keeps none if the model
    is compiled, and none in validation or outside of training iterations.

    Raises:
        NonFiniteError: See above.
    """
    priority = 'HIGH'  # after RuntimeInfoHook, which fetches the loss; before mmasl's hooks, EMA and checkpoints

    def __init__(self) -> None:
        self.logits: list[Tensor] | None = None  # None outside of training iterations
        self._registered = False
        self._masks: set[str] = set()  # buffers that are meant to be infinite

    def before_run(self, runner: Runner) -> None:
        self._masks = {name for name, x in runner.model.named_buffers() if not x.isfinite().all()}
        if not self._registered and not (runner.cfg or {}).get('compile'):
            self._registered = True
            for module in runner.model.modules():
                if isinstance(module, LOSSES):
                    module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.logits = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        logits, self.logits = self.logits or [], None
        fetched, what = runner.message_hub.log_scalars, ''
        for name in outputs or ():
            if 'loss' not in name:
                continue
            value = fetched[f'train/{name}'].current() if f'train/{name}' in fetched else float(outputs[name])
            if not math.isfinite(value):
                what = f'{name} is {value}. {describe_logits(logits, data_batch)}'
                break
        if not what and self._saves(runner):
            what = describe_weights(runner.model, self._masks)
        self._stop(runner, what, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        # Checkpoints by epochs follow. A resumed epoch has fewer batches, so their number does not tell its end.
        self._stop(runner, describe_weights(runner.model, self._masks), runner.iter)

    def before_val(self, runner: Runner) -> None:
        self.logits = None  # of an iteration that an exception left

    def before_test(self, runner: Runner) -> None:
        self.logits = None
        if what := first_of_all_ranks(describe_weights(runner.model, self._masks)):
            raise NonFiniteError(f'{what} {checkpoint_name(runner)} is from a diverged training: use an earlier '
                                 'checkpoint')

    def _keep(self, loss: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.logits is not None and loss.training and torch.is_grad_enabled():
            self.logits.append((args[0] if args else kwargs['pred']).detach())

    @staticmethod
    def _saves(runner: Runner) -> bool:
        """Whether a checkpoint by iterations may be written after this one."""
        return runner.iter + 1 == runner.max_iters or any(
            isinstance(hook, CheckpointHook) and not hook.by_epoch
            and hook.every_n_train_iters(runner, hook.interval, hook.save_begin) for hook in runner.hooks)

    @staticmethod
    def _stop(runner: Runner, what: str, iteration: int) -> None:
        """Raise if one of the ranks has found something. All ranks must call this."""
        what = first_of_all_ranks(what)
        if not what:
            return
        record = os.path.join(runner.work_dir, 'last_checkpoint')
        saved = Path(record).read_text().strip() if os.path.exists(record) else ''
        raise NonFiniteError(
            f'epoch {runner.epoch + 1}, iteration {iteration}: {what} Lower the learning rate, clip gradients '
            '(optim_wrapper.clip_grad.max_norm=10), or train without --amp; '
            + (f'{saved} is the last checkpoint, from before it' if saved else 'there is no checkpoint yet'))


def describe_weights(model: nn.Module, masks: Container[str] = ()) -> str:
    """Name the non-finite weights and buffers of a model, but for some buffers; '' if all are finite."""
    tensors = {name: x.detach() for name, x in [*model.named_parameters(), *model.named_buffers()]
               if x.is_floating_point() and name not in masks}
    finite = torch.stack([x.isfinite().all() for x in tensors.values()]).tolist()
    bad = [name for name, good in zip(tensors, finite) if not good]
    return f'{len(bad)} of {len(tensors)} weights are not finite: {first_few(bad)}.' if bad else ''


def describe_logits(logits: Sequence[Tensor], data_batch: object) -> str:
    """Count the non-finite logits, and name their images and classes.

    Args:
        logits: Logits of each call of a loss in one iteration, (..., C).
        data_batch: The batch. Images are named if it has one data sample per row of the logits.

    Returns:
        The description; '' without logits.
    """
    total = sum(x.numel() for x in logits)
    if not total:
        return ''
    logits = [x.reshape(-1, x.shape[-1]) for x in logits if x.numel()]
    bad = [~x.isfinite() for x in logits]
    count = sum(int(x.sum()) for x in bad)
    if not count:
        return (f'All {total:,} logits are finite: a target or a weight is not, or a target is out of range.')
    text = f'{count:,} of {total:,} logits are not finite'
    classes = [str(c) for c in torch.cat([x.any(0).nonzero()[:, 0].cpu() for x in bad]).unique().tolist()]
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    if samples is not None and all(len(x) == len(samples) for x in logits):
        rows = torch.stack([x.any(1).cpu() for x in bad]).any(0).nonzero()[:, 0].tolist()
        names = [getattr(samples[row], 'img_path', f'row {row}') for row in rows]
        text += f', in {len(rows)} of {len(samples)} images ({first_few(names)})'
    return f'{text}, of {len(classes)} of {logits[0].shape[-1]} classes (numbers {first_few(classes)}).'
