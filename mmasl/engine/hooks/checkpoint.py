"""Checkpoints: read without executing anything in them, checked against the model, and made to fit where they are of
another layout or of other classes, as those of the official repository and COCO's for VOC."""
import logging
from collections.abc import Mapping, Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner

from mmasl.errors import CheckpointError
from mmasl.registry import HOOKS
from mmasl.utils.checkpoint import check_fit, convert_official, is_official, match_rows


class FitCheck(Hook):
    """Refuses checkpoints that do not fit, once other hooks have adapted them. See :func:`check_fit`."""
    priority = 'LOWEST'

    def __init__(self, whole: bool = True) -> None:
        self.whole = whole

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        check_fit(runner.model, checkpoint, str(runner._load_from), self.whole)


@HOOKS.register_module()
class AdaptCheckpointHook(Hook):
    """Makes a checkpoint fit before it is loaded, for training from it (``load_from``) or testing it.

    - A file of the official repository gets MMEngine's layout, see :func:`convert_official`.
    - Where the classes of the checkpoint, or their order, differ from those of the data set, the rows of the head go by
      the names. Those of classes that the checkpoint lacks start training as the model has them, with a warning; a test
      is refused. So it is with heads that have more of each class than the rows of a linear layer, as queries.

    Resuming is left alone.

    Args:
        aliases: Names that classes of the data set may have in a checkpoint instead of their own, as in
            ``dict(aeroplane='airplane')`` for VOC from COCO.
        head: Name of the last linear layer.
        by_name: False keeps the rows in their order, for a checkpoint that is known to have the classes of the data set
            in its order under other names.

    Raises:
        KeyError: An alias is no class of the data set.
        CheckpointError: A class that is to be tested is not in the checkpoint, or the head cannot be sorted; or, with
            ``by_name=False``, the checkpoint has another number of classes.
    """
    priority = 'VERY_HIGH'  # before EMAHook, which copies the checkpoint's weights

    def __init__(self, aliases: Mapping[str, str] | None = None, head: str = 'head.fc', by_name: bool = True) -> None:
        self.aliases = dict(aliases or {})
        self.head = head
        self.by_name = by_name

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            return
        if is_official(checkpoint):
            converted = convert_official(checkpoint)
            checkpoint.clear()
            checkpoint.update(converted)
        source = (checkpoint.get('meta', {}).get('dataset_meta') or {}).get('classes')
        target = self._dataset_classes(runner)
        if not source or not target:
            return
        if unknown := self.aliases.keys() - set(target):
            raise KeyError(f'aliases of AdaptCheckpointHook has {sorted(unknown)}, which are none of the classes of '
                           f'the data set: {list(target)}')
        if not self.by_name and len(source) != len(target):
            raise CheckpointError(f'{runner._load_from} has {len(source)} classes and the data set {len(target)}: with '
                                  'by_name=False of AdaptCheckpointHook they must be the same in the same order')
        if self.by_name and tuple(source) != tuple(target):
            self._match_head(runner, checkpoint, source, target)

    def _match_head(self, runner: Runner, checkpoint: dict, source: Sequence[str], target: Sequence[str]) -> None:
        model = runner.model
        while hasattr(model, 'module'):  # of DDP and of test-time augmentation
            model = model.module
        own, state, missing = model.state_dict(), checkpoint['state_dict'], list[str]()
        linear = [key for key in (f'{self.head}.weight', f'{self.head}.bias') if key in state and key in own]
        rows = [key for key in linear if (len(state[key]), len(own[key])) == (len(source), len(target))]
        part = self.head.rpartition('.')[0] + '.'
        others = [key for key in own if key.startswith(part) and key in state and key not in linear
                  and len(target) in own[key].shape]
        others += [key for key in linear if rows and key not in rows]
        if others:
            text = (f'{runner._load_from} has other classes than the data set, or in another order, and {others[0]} '
                    'belongs to classes too, but is not the rows of a linear layer, which mmasl.AdaptCheckpointHook '
                    'sorts by name')
            if not isinstance(runner._train_loop, BaseLoop):
                raise CheckpointError(f'{text}: take the config that it was trained with, and its data')
            print_log(f'{text}: the head starts in the order of the checkpoint', 'current', logging.WARNING)
            return
        for key in rows:
            state[key], missing = match_rows(state[key], source, target, own[key], self.aliases)
        if not missing:
            return
        words = f'{len(missing)} of {len(target)} classes are not in the checkpoint'
        if not isinstance(runner._train_loop, BaseLoop):  # nobody would train their rows
            unused = sorted(set(source) - set(target))
            raise CheckpointError(
                f'{runner._load_from} cannot be tested: {words}: {_listed(missing)}. Of its own, the data set lacks '
                f'{_listed(unused) or "none"}. Take the config of its classes, or say which are the same in aliases of '
                'mmasl.AdaptCheckpointHook; or, if it is known to have the classes of the data set in their order, '
                'under other names, set by_name=False there')
        print_log(f'{words} and start anew: {", ".join(missing[:20])}', 'current', logging.WARNING)

    @staticmethod
    def _dataset_classes(runner: Runner) -> Sequence[str] | None:
        for loop in (runner._train_loop, runner._test_loop, runner._val_loop):
            if isinstance(loop, BaseLoop):  # the others are not built, and need not be
                return getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
        return None


def _listed(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:10])) + ', ...' * (len(names) > 10)
