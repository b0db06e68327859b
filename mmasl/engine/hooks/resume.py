"""Exact resuming: an interrupted and resumed training equals an uninterrupted one, bit for bit on the CPU.

Checkpoints are written atomically. The random numbers of every batch and every step follow from the seed and the number
of the iteration. Unusable checkpoints raise an error.
"""
import os
import os.path as osp
import random
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast, broadcast_object_list
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import Runner
from mmengine.utils import mkdir_or_exist
from torch.utils.data import DataLoader, IterableDataset

from mmasl.engine.resume_settings import HINT, find_differences
from mmasl.errors import CheckpointError
from mmasl.registry import HOOKS
from mmasl.utils.checkpoint import check_resumable, check_state_dict
from mmasl.utils.files import atomic_write
from mmasl.utils.runner import built_loop, checkpoint_name, is_resuming

BACKEND = 'mmasl.checkpoint'  # name of CheckpointBackend in MMEngine's registry
STATE = 'mmasl_resume'  # key in checkpoints
DATA, STEP, EPOCH, EVALUATION = range(4)  # purposes of random numbers


class CheckpointBackend(LocalBackend):
    """Local files for MMEngine's CheckpointHook, written atomically.

    The hook removes a file before it writes the next one. With ``max_keep_ckpts=1`` a kill in between would leave no
    checkpoint. The file is therefore kept until the next one is written, and deleted at the write that follows, or by
    :meth:`clear`.
    """
    outdated: set[str] = set()  # shared, because MMEngine makes an instance for each file
    replaced: set[str] = set()  # of the outdated ones, those whose successor is written

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        mkdir_or_exist(osp.dirname(filepath))
        self._delete(self.replaced - {str(filepath)})
        atomic_write(filepath, obj)
        self.replaced.update(self.outdated)
        self.outdated.clear()
        self.replaced.discard(str(filepath))

    def remove(self, filepath: str | os.PathLike) -> None:
        self.outdated.add(str(filepath))

    @classmethod
    def clear(cls) -> None:
        """Delete the removed files."""
        cls._delete(cls.outdated | cls.replaced)

    @classmethod
    def _delete(cls, paths: set[str]) -> None:
        for path in paths:
            Path(path).unlink(missing_ok=True)
        cls.outdated -= paths
        cls.replaced -= paths


def seed_draws(*key: int) -> None:
    """Seed Python, NumPy and PyTorch, on the CPU and the CUDA devices in use.

    Args:
        key: Numbers >= 0 that identify the random numbers.
    """
    *words, low, high = np.random.SeedSequence(key).generate_state(6).tolist()
    random.seed(words[0])
    np.random.seed(words)
    # Not torch.manual_seed, which takes half a millisecond without a GPU to record its caller.
    torch.default_generator.manual_seed(low << 32 | high)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(low << 32 | high)


class SeededBatch(list):
    """Indices of a batch that seed the process that iterates over them: the worker that loads the batch."""

    def __init__(self, indices: list, key: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator:
        seed_draws(*self.key)
        return super().__iter__()

    def __reduce__(self) -> tuple:  # list's own would iterate, and seed
        return SeededBatch, (self[:], self.key)


class SeededBatches:
    """A batch sampler that seeds each batch by its number, so that workers need no state.

    Args:
        batches: The batch sampler.

    Attributes:
        key: Seed and rank.
        number: Number of the next batch since the start of the training.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.key: tuple[int, ...] = ()
        self.number = 0
        self._ahead: Any = None

    def __getattr__(self, name: str) -> Any:  # sampler, batch_size and the like
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededBatch]:
        batches, self._ahead = self._ahead or iter(self.batches), None
        for batch in batches:
            number, self.number = self.number, self.number + 1
            yield SeededBatch(batch, (*self.key, DATA, number))

    def skip_batches(self, count: int, epoch: int) -> int:
        """Continue after a number of batches, without loading them.

        Args:
            count: Number of batches to skip.
            epoch: Epoch in which the first of them starts.

        Returns:
            The epoch of the next batch.
        """
        self._set_epoch(epoch)
        self._ahead = iter(self.batches)
        for _ in range(count):
            if next(self._ahead, None) is None:
                epoch += 1
                self._set_epoch(epoch)
                self._ahead = iter(self.batches)
                next(self._ahead)
        return epoch

    def _set_epoch(self, epoch: int) -> None:
        sampler: Any = getattr(self.batches, 'sampler', None)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)


@HOOKS.register_module()
class ResumeHook(Hook):
    """Makes a killed and resumed training equal to an uninterrupted one: same weights, averages, optimizer, schedules
    and metrics, bit for bit on a deterministic device, such as the CPU.

    - Random numbers of the pipeline, the sampler and the model follow from the seed and the number of the iteration.
      They need no saved state and do not depend on the number of workers.
    - After a checkpoint within an epoch, the batches before it are skipped by index.
    - Checkpoints are written atomically, and outdated ones are deleted after the new one exists.
    - All ranks take the buffers of rank 0 when a checkpoint is written, which holds no others.
    - An evaluation that a kill prevented is made on resuming, also after the last epoch: schedules, the best checkpoint
      and early stopping depend on it.
    - Checkpoints with weights alone, or of another model, optimizer or schedule, are refused. So are other settings
      than those of the config, because MMEngine would use the checkpoint's: learning rate, weight decay, milestones,
      classes. A training of another length keeps the schedules of the checkpoint, with a warning.

    ``tools/train.py`` adds the hook to every run. Under other tools, name it in the config.

    Args:
        strict: Whether other settings are refused. Without, a warning names them, and those of the checkpoint are used.

    Raises:
        CheckpointError: See above.

    Example:
        >>> custom_hooks = [dict(type='mmasl.ResumeHook')]
    """
    priority = 'VERY_HIGH'  # other hooks use random numbers too

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.batches: Any = None  # SeededBatches of the training data
        self.key: tuple[int, ...] = ()
        self._done = 0  # batches of the epoch before the checkpoint
        self._evaluated = False  # whether the present weights have been evaluated

    def before_run(self, runner: Runner) -> None:
        register_backend(BACKEND, CheckpointBackend, force=True)
        for hook in runner.hooks:
            places = (str(runner.work_dir), str(getattr(hook, 'out_dir', None)))
            if isinstance(hook, CheckpointHook) and not (hook.backend_args or hook.file_client_args) and not any(
                    '://' in place for place in places):
                hook.backend_args = dict(backend=BACKEND)
        if not built_loop(runner, 'train'):
            return  # a test
        runner.register_hook(_Evaluation(self))
        loader = runner.train_loop.dataloader
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None or isinstance(
                loader.dataset, IterableDataset):
            runner.logger.warning('ResumeHook: the training data has no batches of indices, so a resumed run may see '
                                  'other data than an uninterrupted one')
            return
        if not isinstance(loader.batch_sampler, SeededBatches):
            # DataLoader forbids a new sampler, because its iterator has its own; there is no iterator yet.
            object.__setattr__(loader, 'batch_sampler', SeededBatches(loader.batch_sampler))
        self.batches = loader.batch_sampler

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not is_resuming(runner):
            return
        path = checkpoint_name(runner)
        check_resumable(checkpoint, path)
        check_state_dict(runner.model, checkpoint, path)
        self._check_settings(runner, checkpoint, path)
        saved, now = checkpoint.get(STATE), self._shape(runner)
        self._evaluated = bool(saved and saved['evaluated'])
        if saved is None:
            runner.logger.warning(f'{path} was written without mmasl.ResumeHook: training continues, but with other '
                                  'random numbers than an uninterrupted run')
            return
        then = {name: saved[name] for name in now}
        if then != now:
            runner.logger.warning(f'{path} is of a run with {then} and this one has {now}: training continues, but '
                                  'differs from an uninterrupted run'
                                  + (', and the interrupted epoch starts again' if saved['done'] else ''))
            return
        self._done = saved['done']

    def _check_settings(self, runner: Runner, checkpoint: dict, path: str) -> None:
        differences = find_differences(runner, checkpoint, path)
        others = [str(difference) for difference in differences if not difference.follows]
        if others and self.strict:
            raise CheckpointError(
                f'{path} has other settings than the config, and resuming would use those of the checkpoint:\n  '
                + '\n  '.join(others) + f'\nResume with the settings of the checkpoint, {HINT}. To keep the settings '
                'of the checkpoint in spite of the config, use --no-check-resume (strict=False of mmasl.ResumeHook)')
        if others:
            runner.logger.warning(f'{path} has other settings than the config, and those of the checkpoint are used:'
                                  '\n  ' + '\n  '.join(others))
        if longer := [str(difference) for difference in differences if difference.follows]:
            runner.logger.warning(
                f'{path} is of a training of another length, and its schedules are used. After their end, the last '
                'value remains:\n  ' + '\n  '.join(longer))

    def before_train(self, runner: Runner) -> None:
        seeds = [runner.seed]
        broadcast_object_list(seeds)  # with diff_rank_seed each rank has its own
        self.key = (seeds[0], runner.rank)
        if self.batches is None:
            return
        self.batches.key = self.key
        # Without a seed in the config, MMEngine built the samplers before it read the checkpoint's seed.
        sampler: Any
        for sampler in (self.batches.batches, getattr(self.batches, 'sampler', None)):
            if isinstance(getattr(sampler, 'seed', None), int):
                sampler.seed = seeds[0]
        if is_endless(runner):
            stream = runner.train_loop.dataloader_iterator

            # MMEngine's own skip_iter loads the skipped data, except with some samplers.
            def skip(count: int) -> None:
                stream._epoch = self.batches.skip_batches(count, 0)

            stream.skip_iter = skip

    def before_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        seed_draws(*self.key, EPOCH, loop.iter)
        if self.batches is None:
            return
        self.batches.number = loop.iter
        if self._done:
            self.batches.skip_batches(self._done, loop.epoch)
        self._done = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        CheckpointBackend.clear()  # last_checkpoint names the new one by now
        seed_draws(*self.key, STEP, runner.iter)
        self._evaluated = False

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.by_epoch and (self.is_last_train_iter(
                    runner) or self.every_n_train_iters(runner, hook.interval, hook.save_begin)):
                self._share_buffers(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        self._share_buffers(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        if self.key:  # within a training
            seed_draws(*self.key, EVALUATION, runner.iter)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._evaluated = True  # before CheckpointHook writes the checkpoint again, with the score

    def after_train(self, runner: Runner) -> None:
        CheckpointBackend.clear()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        shape, meta = self._shape(runner), checkpoint['meta']
        # With an endless stream, MMEngine itself skips all batches.
        done = 0 if is_endless(runner) else meta['iter'] - meta['epoch'] * shape['batches']
        checkpoint[STATE] = dict(shape, done=done, evaluated=self._evaluated)

    @staticmethod
    def _share_buffers(runner: Runner) -> None:
        """Give all ranks the buffers of rank 0, which the checkpoint will hold. Those of batch norm differ."""
        if runner.world_size > 1:
            averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
            for model in (runner.model, *averages):
                for buffer in model.buffers():
                    broadcast(buffer)

    def _shape(self, runner: Runner) -> dict[str, int]:
        return dict(batches=0 if self.batches is None else len(self.batches), processes=runner.world_size)


def is_endless(runner: Runner) -> bool:
    """Whether the training loop counts iterations, not epochs."""
    return hasattr(runner.train_loop, 'dataloader_iterator')


class _Evaluation(Hook):
    """Evaluates a resumed run before training, if it was killed between a checkpoint and its evaluation."""
    priority = 'LOWEST'  # after the other hooks are ready

    def __init__(self, resume: ResumeHook) -> None:
        self.resume = resume

    def before_train(self, runner: Runner) -> None:
        loop, resume = runner.train_loop, self.resume
        if not loop.iter or resume._evaluated or resume._done or runner.val_loop is None:
            return
        done, end = (loop.iter, loop.max_iters) if is_endless(runner) else (loop.epoch, loop.max_epochs)
        interval = loop.dynamic_intervals[bisect(loop.dynamic_milestones, done + 1) - 1]
        if done >= loop.val_begin and (done % interval == 0 or done == end):
            runner.val_loop.run()
