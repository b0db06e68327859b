"""What would spoil a run, found before it starts or before it does harm: hooks for any config, and the tools' errors.

``tools/train.py`` and ``tools/test.py`` add both hooks to every config (:func:`add_checks`); for other tools:

    custom_hooks = [dict(type='mmasl.CheckDataHook'), dict(type='mmasl.CheckFiniteHook')]
"""
import logging
import math
import os
import re
from collections.abc import Sequence
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

from mmasl.datasets.validation import _cure, _few, check_same_classes, check_samples, leaves
from mmasl.errors import UnreadableImageError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.asymmetric_softmax_loss import AsymmetricSoftmaxLoss
from mmasl.registry import HOOKS

LOSSES = (AsymmetricLoss, AsymmetricSoftmaxLoss)
HEADS = re.compile(r'(^|\.)(head|bbox_head(\.\d+)?|data_preprocessor)$')
CHECKS = ('mmasl.CheckDataHook', 'mmasl.CheckFiniteHook')


def add_checks(cfg: Config) -> None:
    """Add the hooks of this module to a config that lacks them."""
    hooks = list(cfg.get('custom_hooks') or [])
    found = {hook.get('type') for hook in hooks if isinstance(hook, dict)}
    cfg.custom_hooks = hooks + [dict(type=name) for name in CHECKS if name not in found]


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
        UnreadableImageError: See above.
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
            raise UnreadableImageError(f'{message}. {self.cure}') from None

    def __repr__(self) -> str:
        return repr(self.loader)


def _reason(path: str | None, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'there is no such file'
    if path and os.path.isfile(path):
        size = os.path.getsize(path)
        return f'its {size:,} bytes are no whole image' if size else 'the file is empty'
    return f'{type(error).__name__}: {error}'


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
