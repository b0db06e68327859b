"""Compares the settings that a checkpoint restores with those of the config.

PyTorch and MMEngine keep the settings of optimizers and schedules in their state. Resuming therefore replaces the
learning rate, weight decay, milestones and so on of the config without a word.
"""
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from mmasl.errors import CheckpointError
from mmasl.utils.checkpoint import checkpoint_classes
from mmasl.utils.config import metainfo_classes
from mmasl.utils.runner import built_loop

HINT = 'or start from its weights (--cfg-options load_from=CHECKPOINT, without --resume)'
# How PyTorch computes the update, not what it is; newer versions add more.
IMPLEMENTATION = ('foreach', 'fused', 'capturable', 'differentiable', 'params', 'param_names')
# Settings of a schedule that follow from the length of the training.
LENGTHS = ('begin', 'end', 'T_max', 'total_iters', 'total_steps', '_schedule_phases', 'last', 'turn', 'periods')
PROGRESS = ('last_step', 'optimizer', 'verbose')  # arguments of schedules that are no settings
DERIVED = ('total_steps', 'total_iters', '_schedule_phases', 'last', 'turn')  # settings under another name
SCALER = ('growth_factor', 'backoff_factor', 'growth_interval')


class Difference(NamedTuple):
    """A setting that differs.

    Args:
        where: Its place in the config.
        config: Its value by the config.
        checkpoint: Its value in the checkpoint, which would be used.
        follows: Whether it differs because the training has another number of epochs or iterations.
    """
    where: str
    config: Any
    checkpoint: Any
    follows: bool = False

    def __str__(self) -> str:
        return f'{self.where}: {self.checkpoint} in the checkpoint, {self.config} by the config'


def find_differences(runner: Runner, checkpoint: dict, path: str) -> list[Difference]:
    """Find the settings that resuming a checkpoint replaces: of optimizers, loss scalers, schedules, and the classes.

    Args:
        runner: The runner, with its optimizers and schedules built.
        checkpoint: The loaded checkpoint.
        path: Its name for messages.

    Returns:
        The differences.

    Raises:
        CheckpointError: The checkpoint has other optimizers, parameters or schedules, so that resuming would fail.
    """
    return [*_classes(runner, checkpoint), *optimizer_differences(runner.optim_wrapper, checkpoint['optimizer'], path),
            *schedule_differences(runner, checkpoint, path)]


def _classes(runner: Runner, checkpoint: dict) -> Iterator[Difference]:
    loop = built_loop(runner, 'train')
    now = metainfo_classes(getattr(getattr(getattr(loop, 'dataloader', None), 'dataset', None), 'metainfo', {}))
    then = checkpoint_classes(checkpoint)
    if now and then and list(now) != list(then):
        place = next((i for i, (a, b) in enumerate(zip(now, then)) if a != b), min(len(now), len(then)))
        ours, theirs = (repr(names[place]) if place < len(names) else 'none' for names in (now, then))
        yield Difference(f'class {place} of train_dataloader.dataset', ours, theirs)


def optimizer_differences(wrapper: OptimWrapper | OptimWrapperDict, state: Mapping[str, Any], path: str,
                          key: str = 'optim_wrapper') -> Iterator[Difference]:
    """Yield the settings of optimizers and loss scalers that differ.

    A setting with a schedule is compared by its initial value.

    Args:
        wrapper: One optimizer, or several by name.
        state: Its state in the checkpoint.
        path: Name of the checkpoint for messages.
        key: Key of the wrapper in the config.

    Raises:
        CheckpointError: The state is of another optimizer, or of other parameters.
    """
    if isinstance(wrapper, OptimWrapperDict):
        if set(wrapper.keys()) != set(state):
            raise CheckpointError(f'{path} has the optimizers {sorted(state)}, and {key} has {sorted(wrapper.keys())}. '
                                  f'Resume with the optim_wrapper that it was trained with, {HINT}')
        for name, inner in wrapper.items():
            yield from optimizer_differences(inner, state[name], path, f'{key}.{name}')
        return
    groups, saved = getattr(getattr(wrapper, 'optimizer', None), 'param_groups', None), state.get('param_groups')
    if groups is None or saved is None:
        return  # a strategy with a state of its own, such as DeepSpeed's
    if _kinds(groups) != _kinds(saved):
        raise CheckpointError(
            f'{path} has the state of another optimizer than {type(wrapper.optimizer).__name__} over '
            f'{sum(len(group["params"]) for group in groups)} parameters in {len(groups)} groups. Resume with the '
            f'optim_wrapper that it was trained with, {HINT}')
    found: dict[tuple, int] = {}
    for now, then in zip(groups, saved):
        for name in now.keys() & then.keys() - set(IMPLEMENTATION):
            if f'initial_{name}' in now.keys() | then.keys() or name.startswith(('max_', 'min_')):
                continue  # a schedule changes it
            ours, theirs = (_plain(group[name]) for group in (now, then))
            if name == 'betas' and 'initial_momentum' in now.keys() | then.keys():
                ours, theirs = ours[1:], theirs[1:]
            if not _equal(ours, theirs):
                place = (name.removeprefix('initial_'), _text(ours), _text(theirs))
                found[place] = found.get(place, 0) + 1
    for (name, ours, theirs), count in sorted(found.items()):
        some = f' of {count} of {len(groups)} parameter groups' if len(groups) > 1 else ''
        yield Difference(f'{key}.optimizer.{name}{some}', ours, theirs)
    scaler = getattr(wrapper, 'loss_scaler', None)
    if scaler is not None and state.get('loss_scaler'):
        now = scaler.state_dict()
        for name in SCALER:
            if name in now and name in state['loss_scaler'] and now[name] != state['loss_scaler'][name]:
                yield Difference(f'{key}.loss_scale.{name}', now[name], state['loss_scaler'][name])


def _kinds(groups: Sequence[Mapping[str, Any]]) -> list:
    """What identifies an optimizer: the numbers of parameters, and the settings that its algorithm has."""
    names = {'betas', 'momentum', 'alpha', 'rho', 'etas', 'lambd'}
    # A schedule of Adam's beta adds a momentum to its groups.
    return [(len(group['params']), sorted(names & set(group) - ({'momentum'} if 'betas' in group else set())))
            for group in groups]


def schedule_differences(runner: Runner, checkpoint: dict, path: str) -> Iterator[Difference]:
    """Yield the settings of schedules that differ.

    Args:
        runner: The runner, with its schedules built.
        checkpoint: The loaded checkpoint.
        path: Its name for messages.

    Raises:
        CheckpointError: The number or the kinds of the schedules differ.
    """
    schedulers, states = _by_optimizer(runner.param_schedulers), _by_optimizer(checkpoint.get('param_schedulers'))
    counts = [{name: len(group) for name, group in groups.items()} for groups in (schedulers, states)]
    if counts[0] != counts[1]:
        ours, theirs = (sum(count.values()) for count in counts)
        raise CheckpointError(f'param_scheduler has {ours} schedules by the config and {theirs} in {path}. Resume with '
                              f'its param_scheduler, {HINT}')
    for name, group in schedulers.items():
        for number, (scheduler, state) in enumerate(zip(group, states[name])):
            key = '.'.join(filter(None, ('param_scheduler', name, str(number))))
            now = {name: value for name, value in vars(scheduler).items() if name != 'optimizer'}
            if now.keys() != state.keys():
                raise CheckpointError(
                    f'{key} is {type(scheduler).__name__} by the config and another schedule in {path} '
                    f'({", ".join(sorted(now.keys() ^ state.keys()))} differ). Resume with its param_scheduler, {HINT}')
            for setting in _setting_names(type(scheduler)):
                if setting in now and not _equal(_plain(now[setting]), _plain(state[setting])):
                    follows = setting in LENGTHS and _other_length(runner, checkpoint, scheduler.by_epoch)
                    yield Difference(f'{key} ({type(scheduler).__name__}) {setting.lstrip("_")}', _text(now[setting]),
                                     _text(state[setting]), follows)


def _by_optimizer(schedulers: Any) -> dict[str, list]:
    if isinstance(schedulers, Mapping):
        return {name: list(group) for name, group in schedulers.items()}
    return {'': list(schedulers or [])}


def _setting_names(kind: type) -> list[str]:
    """Names of the arguments of a schedule, which it keeps as attributes of the same name."""
    names = [name for base in kind.__mro__ if '__init__' in vars(base)
             for name in inspect.signature(vars(base)['__init__']).parameters]
    return [name for name in dict.fromkeys([*names, *DERIVED]) if name not in ('self', 'args', 'kwargs', *PROGRESS)]


def _other_length(runner: Runner, checkpoint: dict, by_epoch: bool) -> bool:
    """Whether the training is longer or shorter than before, in units of a schedule that kept their length."""
    info = checkpoint.get('message_hub', {}).get('runtime_info', {})
    iters, epochs = info.get('max_iters'), info.get('max_epochs')
    if not iters or not epochs:
        return True  # written without MMEngine's RuntimeInfoHook
    if hasattr(runner.train_loop, 'dataloader_iterator'):  # counts iterations
        return iters != runner.max_iters
    return epochs != runner.max_epochs and (by_epoch or iters * runner.max_epochs == runner.max_iters * epochs)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return ours == theirs


def _text(value: Any) -> str:
    if isinstance(value, Mapping):  # the milestones of MultiStepLR, with their counts
        value = list(value)
    return str(value)
