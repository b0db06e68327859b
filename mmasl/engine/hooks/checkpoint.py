"""Checks and adapts checkpoints while they are loaded."""
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader, Runner

from mmasl.engine.hooks.checks import reads_text
from mmasl.errors import CheckpointError, ConfigError
from mmasl.registry import HOOKS
from mmasl.utils.checkpoint import (
    check_pretrained,
    check_state_dict,
    checkpoint_classes,
    convert_official,
    describe_misfit,
    is_official,
    iter_pretrained,
    match_rows,
    state_of,
    strip_wrappers,
    unwrap_model,
)
from mmasl.utils.config import metainfo_classes
from mmasl.utils.runner import built_loop, checkpoint_name, is_resuming, loads_checkpoint
from mmasl.utils.thresholds import STORED


@HOOKS.register_module()
class CheckStateDictHook(Hook):
    """Refuses checkpoints that do not fit the model or the classes, after other hooks have adapted them.

    MMEngine only warns, and continues with initial weights. tools/test.py adds the hook, tools/train.py with
    ``strict=False`` unless it resumes. The hook also checks the checkpoints of ``init_cfg``. A resumed run does not
    load those, because its checkpoint has all weights.

    A class at another place in the checkpoint than in the data set is refused too, because labels would be those of
    other classes. Classes with other names are only warned of. :class:`AdaptCheckpointHook` replaces this check.

    Args:
        strict: Whether all weights must fit, as for a test. Without, one that fits is enough, as to train from them; a
            warning tells if less than half of the weights fit, or if classes are at other places.

    Raises:
        CheckpointError: A class is at another place. See also :func:`mmasl.utils.checkpoint.check_state_dict` and
            :func:`mmasl.utils.checkpoint.check_pretrained`.
    """
    priority = 'LOWEST'

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.files: dict[str, dict] = {}  # checkpoints of init_cfg, from before_run to before_train

    def before_run(self, runner: Runner) -> None:
        if not built_loop(runner, 'train'):
            return  # a test does not initialise weights
        model = unwrap_model(runner.model)
        for name, module, init_cfg in list(iter_pretrained(model)):
            if is_resuming(runner):
                setattr(module, 'init_cfg', None)  # noqa: B010  # of a BaseModule
                continue
            file, key = init_cfg['checkpoint'], f'model.{name}.init_cfg'.replace('..', '.')
            if file not in self.files:
                self.files[file] = CheckpointLoader.load_checkpoint(file, map_location='cpu')
            prefix = (init_cfg.get('prefix') or '').rstrip('.')
            names, own = state_of(self.files[file]), module.state_dict()
            if prefix and not any(weight.startswith(f'{prefix}.') for weight in names):
                hint = 'Leave it out: the names fit without one.' if any(weight in own for weight in names) else (
                    describe_misfit(self.files[file], own, key))
                raise CheckpointError(f'{key}.prefix={init_cfg["prefix"]!r}: no weight in {file} has this prefix. '
                                      f'{hint}')

    def before_train(self, runner: Runner) -> None:
        files, self.files = self.files, {}
        if runner.iter == 0 and not loads_checkpoint(runner):
            check_pretrained(unwrap_model(runner.model), files)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        check_state_dict(runner.model, checkpoint, checkpoint_name(runner), self.strict)
        state = strip_wrappers(state_of(checkpoint))  # MMEngine removes no other prefix than module.
        if all(name.startswith('module.') for name in unwrap_model(runner.model).state_dict()):
            state = {f'module.{name}': value for name, value in state.items()}  # and would remove that of LoRAModel
        if 'state_dict' in checkpoint:
            checkpoint['state_dict'] = state
        if classes := checkpoint_classes(checkpoint):
            self._check_classes(runner, list(map(str, classes)))

    def _check_classes(self, runner: Runner, source: list[str]) -> None:
        target = list(map(str, dataset_classes(runner) or ()))
        if is_resuming(runner) or reads_text(unwrap_model(runner.model)) or any(
                isinstance(hook, AdaptCheckpointHook) for hook in runner.hooks):
            return
        if len(source) != len(target) or source == target:  # a head of another size does not fit, or starts anew
            return
        place = next(i for i, pair in enumerate(zip(source, target)) if pair[0] != pair[1])
        text = (f'class {place} is {source[place]!r} in {checkpoint_name(runner)} and {target[place]!r} in the data '
                'set')
        known, times = set(target), Counter(source + target)
        if moved := [a for a, b in zip(source, target) if a != b and a in known and times[a] == 2]:
            text += f', and {_listed(moved)} {"is" if len(moved) == 1 else "are"} at another place'
            if self.strict:
                raise CheckpointError(f"{text}. Add dict(type='mmasl.AdaptCheckpointHook') to custom_hooks to sort the "
                                      'head by class name, or use the classes that it was trained with')
        print_log(f'{text}. The head keeps the order of the checkpoint', 'current', logging.WARNING)


@HOOKS.register_module()
class AdaptCheckpointHook(Hook):
    """Adapts a checkpoint to the model before it is loaded, to train from it (``load_from``) or to test it.

    - A file of the official repository is converted to MMEngine's layout, see :func:`convert_official`.
    - If the classes of the checkpoint and of the data set, or their order, differ, the rows of the head are sorted by
      class name. When training, classes that the checkpoint lacks keep their initial rows, with a warning. A test of
      such classes is refused. Heads with per-class parameters other than linear rows, such as queries, cannot be
      sorted: training starts from them as they are, and a test is refused.

    A resumed checkpoint is not changed.

    Args:
        aliases: Names in the checkpoint of classes of the data set, such as ``dict(aeroplane='airplane')`` for VOC from
            COCO.
        head: Name of the last linear layer.
        by_name: False keeps the order of the rows, for a checkpoint whose classes are those of the data set in the same
            order under other names.

    Raises:
        ConfigError: An alias is not a class of the data set.
        CheckpointError: A class to test is not in the checkpoint, the head cannot be sorted, or, with
            ``by_name=False``, the numbers of classes differ.
    """
    priority = 'VERY_HIGH'  # before EMAHook, which copies the checkpoint's weights

    def __init__(self, aliases: Mapping[str, str] | None = None, head: str = 'head.fc', by_name: bool = True) -> None:
        self.aliases = dict(aliases or {})
        self.head = head
        self.by_name = by_name

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if is_resuming(runner):
            return
        if is_official(checkpoint):
            converted = convert_official(checkpoint)
            checkpoint.clear()
            checkpoint.update(converted)
        source, target = checkpoint_classes(checkpoint), dataset_classes(runner)
        if not source or not target:
            return
        if unknown := self.aliases.keys() - set(target):
            raise ConfigError(f'aliases of AdaptCheckpointHook has {sorted(unknown)}, which are not classes of the '
                              f'data set: {_listed(target)}')
        if not self.by_name and len(source) != len(target):
            raise CheckpointError(f'{checkpoint_name(runner)} has {len(source)} classes and the data set '
                                  f'{len(target)}. by_name=False of AdaptCheckpointHook needs the same classes in the '
                                  'same order')
        if self.by_name and tuple(source) != tuple(target):
            self._match_head(runner, checkpoint, source, target)

    def _match_head(self, runner: Runner, checkpoint: dict, source: Sequence[str], target: Sequence[str]) -> None:
        model, name = unwrap_model(runner.model), checkpoint_name(runner)
        training = built_loop(runner, 'train') is not None
        own, state, missing = model.state_dict(), checkpoint['state_dict'], list[str]()
        linear = [key for key in (f'{self.head}.weight', f'{self.head}.bias') if key in state and key in own]
        rows = [key for key in linear if (len(state[key]), len(own[key])) == (len(source), len(target))]
        part = self.head.rpartition('.')[0] + '.'
        others = [key for key in own if key.startswith(part) and key in state and key not in linear
                  and len(target) in own[key].shape]
        others += [key for key in linear if rows and key not in rows]
        if others:
            text = (f'{name} has other classes than the data set, or another order, and {others[0]} has per-class '
                    'parameters other than linear rows, which mmasl.AdaptCheckpointHook cannot sort by name')
            if not training:
                raise CheckpointError(f'{text}. Use the config and the data that it was trained with')
            print_log(f'{text}: the head starts in the order of the checkpoint', 'current', logging.WARNING)
            return
        if STORED in state:
            state[STORED], _ = match_rows(state[STORED], source, target, state[STORED].new_full((len(target), ), 0.5),
                                          self.aliases)
        for key in rows:
            state[key], missing = match_rows(state[key], source, target, own[key], self.aliases)
        if not missing:
            return
        words = f'{len(missing)} of {len(target)} classes are not in the checkpoint'
        if not training:  # their rows would stay random
            unused = sorted(set(source) - set(target))
            raise CheckpointError(
                f'{name} cannot be tested: {words}: {_listed(missing)}; it has {_listed(unused) or "none"} that the '
                'data set lacks. Use the config of its classes, name equal classes in aliases of '
                'mmasl.AdaptCheckpointHook, or set by_name=False there if only the names differ')
        print_log(f'{words} and start from initial weights: {", ".join(missing[:20])}', 'current', logging.WARNING)


def dataset_classes(runner: Runner) -> Sequence[str] | None:
    """The class names of the data set that is trained with or tested; None without names."""
    for split in ('train', 'test', 'val'):
        if loop := built_loop(runner, split):
            return metainfo_classes(getattr(loop.dataloader.dataset, 'metainfo', {}))
    return None


def _listed(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:10])) + ', ...' * (len(names) > 10)
