"""Interrupted trainings: what makes a killed and resumed run the run that was not killed, bit for bit on one device.

Checkpoints are written whole or not at all, the draws of every batch and every step follow from the seed and the number
of the iteration alone, and a checkpoint that cannot be gone on from is not gone on from in silence.
"""
import os
import os.path as osp
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast, broadcast_object_list
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from mmengine.utils import mkdir_or_exist
from torch.utils.data import DataLoader

from mmasl.errors import CheckpointError
from mmasl.registry import HOOKS
from mmasl.utils.checkpoint import check_fit, check_resumable
from mmasl.utils.files import write_whole

BACKEND = 'mmasl.checkpoint'  # MMEngine's name for the way that files are written
STATE = 'mmasl_resume'  # of the checkpoint
DATA, STEP, EPOCH = range(3)  # what is drawn for


class CheckpointBackend(LocalBackend):
    """Local files for MMEngine's CheckpointHook.

    They are written whole or not at all, see :func:`write_whole`. What the hook removes, before it writes its
    successor, is kept until :meth:`clear`: with ``max_keep_ckpts=1`` a kill in between would leave nothing.
    """
    outdated: set[str] = set()  # of the process; MMEngine makes an instance for each file

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        mkdir_or_exist(osp.dirname(filepath))
        write_whole(filepath, obj)
        self.outdated.discard(str(filepath))

    def remove(self, filepath: str | os.PathLike) -> None:
        self.outdated.add(str(filepath))

    @classmethod
    def clear(cls) -> None:
        """Remove what was to be removed."""
        while cls.outdated:
            Path(cls.outdated.pop()).unlink(missing_ok=True)


register_backend(BACKEND, CheckpointBackend, force=True)


# --- draws


def seed_draws(*key: int) -> None:
    """Seed Python, NumPy and PyTorch, on the CPU and the CUDA devices in use, from numbers >= 0 that name the draw."""
    *words, low, high = np.random.SeedSequence(key).generate_state(6).tolist()
    random.seed(words[0])
    np.random.seed(words)
    # torch.manual_seed takes half a millisecond without a GPU, to note from where it is called.
    torch.default_generator.manual_seed(low << 32 | high)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(low << 32 | high)


class SeededBatch(list):
    """Indices that seed the draws of whoever iterates over them: the worker, or the process, that loads the batch."""

    def __init__(self, indices: list, key: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator:
        seed_draws(*self.key)
        return super().__iter__()

    def __reduce__(self) -> tuple:  # list's own iterates
        return SeededBatch, (self[:], self.key)


class SeededBatches:
    """A batch sampler whose batches are seeded by their number, so that workers need no state.

    Args:
        batches: The batch sampler.

    Attributes:
        key: Seed and rank.
        number: Of the next batch, from the start of the training.
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

    def pass_over(self, count: int, epoch: int) -> int:
        """Go on after so many batches of a stream that begins at an epoch, without loading any; returns its epoch."""
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
    """Makes a training that is killed and resumed the one that was not killed: same weights, averages, optimizer,
    schedules and metrics, bit for bit where the device computes so (the CPU does).

    - Draws of the pipeline, the sampler and the model follow from the seed and the number of the iteration. No state of
      a generator is needed, nor the same number of workers.
    - Batches that a checkpoint in the middle of an epoch, or of an endless stream, has behind it are passed over by
      index.
    - Checkpoints are written whole or not at all, and an outdated one goes when the new one is there.
    - Of several processes all take the buffers of the first when a checkpoint is written, which has no others.
    - The evaluation that follows a checkpoint is made when the run is resumed, also after the last epoch: schedules,
      the best checkpoint and early stopping depend on it.
    - What cannot be gone on from is refused: weights alone, another model, optimizer or schedule.

    ``tools/train.py`` adds it to every run. Elsewhere, name it in the config.

    Example:
        >>> custom_hooks = [dict(type='mmasl.ResumeHook')]
    """
    priority = 'VERY_HIGH'  # other hooks draw too

    def __init__(self) -> None:
        self.batches: Any = None  # SeededBatches of the training
        self.key: tuple[int, ...] = ()
        self._done = 0  # batches of the epoch that a checkpoint has behind it
        self._evaluated = False  # what has been trained

    def before_run(self, runner: Runner) -> None:
        for hook in runner.hooks:
            places = (str(runner.work_dir), str(getattr(hook, 'out_dir', None)))
            if isinstance(hook, CheckpointHook) and not (hook.backend_args or hook.file_client_args) and not any(
                    '://' in place for place in places):
                hook.backend_args = dict(backend=BACKEND)
        if not isinstance(runner._train_loop, BaseLoop):
            return  # a test
        runner.register_hook(_Evaluation(self))
        loader = runner.train_loop.dataloader
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            runner.logger.warning('ResumeHook: the training data has no batch sampler, so that a resumed run will not '
                                  'see the data that it would have seen')
            return
        if not isinstance(loader.batch_sampler, SeededBatches):
            # Past DataLoader's own guard, as MMDetection's hooks do that change the pipeline; nothing is loaded yet.
            object.__setattr__(loader, 'batch_sampler', SeededBatches(loader.batch_sampler))
        self.batches = loader.batch_sampler

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        path = str(runner._load_from or 'the checkpoint')
        check_resumable(checkpoint, path)
        check_fit(runner.model, checkpoint, path)
        check_optimizer(runner, checkpoint, path)
        check_schedules(runner, checkpoint)
        saved, now = checkpoint.get(STATE), self._shape(runner)
        self._evaluated = bool(saved and saved['evaluated'])
        if saved is None:
            runner.logger.warning(f'{path} was written without mmasl.ResumeHook: training goes on from it, but with '
                                  'other draws than the run would have made')
            return
        then = {name: saved[name] for name in now}
        if then != now:
            runner.logger.warning(f'{path} is of a run with {then} and this one has {now}: it goes on, but not as the '
                                  'run that was not interrupted would have'
                                  + (', and the epoch that was under way starts again' if saved['done'] else ''))
            return
        self._done = saved['done']

    def before_train(self, runner: Runner) -> None:
        seeds = [runner.seed]
        broadcast_object_list(seeds)  # with diff_rank_seed each rank has its own
        self.key = (seeds[0], runner.rank)
        if self.batches is None:
            return
        self.batches.key = self.key
        # MMEngine built the samplers with another seed where the config has none and the checkpoint's is resumed.
        sampler: Any
        for sampler in (self.batches.batches, getattr(self.batches, 'sampler', None)):
            if isinstance(getattr(sampler, 'seed', None), int):
                sampler.seed = seeds[0]
        if is_endless(runner):
            stream = runner.train_loop.dataloader_iterator

            # MMEngine's own way loads what it passes over, but for some samplers.
            def skip(count: int) -> None:
                stream._epoch = self.batches.pass_over(count, 0)

            stream.skip_iter = skip

    def before_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        seed_draws(*self.key, EPOCH, loop.iter)
        if self.batches is None:
            return
        self.batches.number = loop.iter
        if self._done:
            self.batches.pass_over(self._done, loop.epoch)
        self._done = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        CheckpointBackend.clear()  # MMEngine has named the new one in last_checkpoint
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

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._evaluated = True  # before CheckpointHook writes the checkpoint again, with the best score

    def after_train(self, runner: Runner) -> None:
        CheckpointBackend.clear()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        shape, meta = self._shape(runner), checkpoint['meta']
        # Of an endless stream MMEngine passes over all batches.
        done = 0 if is_endless(runner) else meta['iter'] - meta['epoch'] * shape['batches']
        checkpoint[STATE] = dict(shape, done=done, evaluated=self._evaluated)

    @staticmethod
    def _share_buffers(runner: Runner) -> None:
        """Give all ranks the buffers that the checkpoint will have, those of the first; batch norm's differ."""
        if runner.world_size > 1:
            averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
            for model in (runner.model, *averages):
                for buffer in model.buffers():
                    broadcast(buffer)

    def _shape(self, runner: Runner) -> dict[str, int]:
        return dict(batches=0 if self.batches is None else len(self.batches), processes=runner.world_size)


def is_endless(runner: Runner) -> bool:
    """Whether the training is by iterations, and not by epochs."""
    return hasattr(runner.train_loop, 'dataloader_iterator')


class _Evaluation(Hook):
    """Makes the evaluation that MMEngine makes after a checkpoint is written, and not when a run is resumed from it."""
    priority = 'LOWEST'  # once all hooks are ready

    def __init__(self, resume: ResumeHook) -> None:
        self.resume = resume

    def before_train(self, runner: Runner) -> None:
        loop, resume = runner.train_loop, self.resume
        if not loop.iter or resume._evaluated or resume._done or runner.val_loop is None:
            return
        loop._decide_current_val_interval()
        done, end = (loop.iter, loop.max_iters) if is_endless(runner) else (loop.epoch, loop.max_epochs)
        if done >= loop.val_begin and (done % loop.val_interval == 0 or done == end):
            runner.val_loop.run()


def check_optimizer(runner: Runner, checkpoint: dict, path: str) -> None:
    """Raise where the optimizer is another, or is over other parameters."""
    wrapper, saved = runner.optim_wrapper, checkpoint['optimizer'].get('param_groups')
    if isinstance(wrapper, OptimWrapperDict) or not isinstance(wrapper, OptimWrapper) or saved is None:
        return  # several, each of which PyTorch checks
    # Of the settings those that name the algorithm: the others grow with PyTorch's versions.
    now, then = ([(len(group['params']), sorted({'betas', 'momentum', 'alpha', 'rho', 'etas', 'lambd'} & set(group)))
                  for group in groups] for groups in (wrapper.optimizer.param_groups, saved))
    if now != then:
        raise CheckpointError(
            f'{path} has the state of another optimizer than {type(wrapper.optimizer).__name__} over '
            f'{sum(count for count, _ in now)} parameters: resume with the optim_wrapper that it was trained with, or '
            'start from its weights: --cfg-options load_from=CHECKPOINT, without --resume')


def check_schedules(runner: Runner, checkpoint: dict) -> None:
    """Raise where a schedule is another, or of another length.

    A checkpoint restores the end of every schedule. With more epochs than before the learning rate would reach its end
    early and stay there, without a word.
    """
    schedulers, states = runner.param_schedulers or [], checkpoint.get('param_schedulers', [])
    if isinstance(schedulers, dict):
        schedulers, states = (list(chain(*each.values())) for each in (schedulers, states))
    cure = ('Resume with its number of epochs, batch size and number of processes, or start a new run from its '
            'weights: --cfg-options load_from=CHECKPOINT, without --resume.')
    if len(schedulers) != len(states):
        raise CheckpointError(f'param_scheduler has {len(schedulers)} schedules by the config and {len(states)} in the '
                              f'checkpoint. {cure}')
    for scheduler, state in zip(schedulers, states):
        for key in ('end', 'total_steps'):
            now, then = getattr(scheduler, key, None), state.get(key)
            if now != then:
                raise CheckpointError(
                    f'{type(scheduler).__name__} has {key}={now} by the config but {key}={then} in the checkpoint, and '
                    f'the learning rate would follow the checkpoint. {cure}')
