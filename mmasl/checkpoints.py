"""Checkpoints of another layout, or of other classes: those of the official repository, and COCO's for VOC."""
import logging
from collections.abc import Mapping, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from torch import Tensor

from .registry import HOOKS

BACKBONE = 'backbone.timm_model.'
EMBEDDING, OUTPUT = 'head.fc.embedding_generator.0.', 'head.fc.FC.'


def is_official(checkpoint: dict) -> bool:
    """Whether a loaded file is a TResNet of the official repository, or bare weights of its layout."""
    return 'body.conv1.0.weight' in checkpoint.get('model', checkpoint)


def convert_official(checkpoint: dict) -> dict:
    """A checkpoint of the official repository in MMEngine's layout, for an ImageClassifier with TIMMBackbone.

    The backbone's keys become timm's, and InPlaceABN's weights batch norm's, which timm's own filter does. The two
    linear layers of the Open Images head, with nothing between them, become the one that they amount to. The names of
    the classes go where MMEngine keeps them.

    Args:
        checkpoint: What ``torch.load`` gives: a dict with ``model`` and ``idx_to_class``, or bare weights.

    Raises:
        KeyError: A key belongs neither to the body nor to the head.
    """
    from timm.models.tresnet import checkpoint_filter_fn  # detection needs no timm

    state = dict(checkpoint.get('model', checkpoint))
    body = {key: state.pop(key) for key in list(state) if key.startswith('body.')}
    if EMBEDDING + 'weight' in state:
        first, second = (
            [state.pop(prefix + name).double() for name in ('weight', 'bias')] for prefix in (EMBEDDING, OUTPUT))
        state['head.fc.weight'] = (second[0] @ first[0]).float()
        state['head.fc.bias'] = (second[0] @ first[1] + second[1]).float()
    if unknown := set(state) - {'head.fc.weight', 'head.fc.bias'}:
        raise KeyError(f'no TResNet of the official repository has {sorted(unknown)[:5]}')
    state |= {BACKBONE + key: value for key, value in checkpoint_filter_fn(body, None).items()}
    names = checkpoint.get('idx_to_class', {}).values()
    return dict(state_dict=state, meta=dict(dataset_meta=dict(classes=tuple(str(name).strip("'") for name in names))))


def match_rows(weight: Tensor,
               source: Sequence[str],
               target: Sequence[str],
               initial: Tensor,
               aliases: Mapping[str, str] | None = None) -> tuple[Tensor, list[str]]:
    """Rows of a classifier's weight or bias in the order of other classes.

    Args:
        weight: (S, ...), one row for each of the ``source`` classes.
        source, target: Names of the classes of the checkpoint, S, and of the model, T.
        initial: (T, ...), whose rows stay where the checkpoint has no class of that name.
        aliases: The checkpoint's names of ``target`` classes that are called otherwise there.

    Returns:
        (T, ...), and the target classes that kept their initial row.
    """
    row_of = {name: row for row, name in enumerate(source)}
    rows = [row_of.get((aliases or {}).get(name, name)) for name in target]
    found = [i for i, row in enumerate(rows) if row is not None]
    matched = initial.detach().to(weight, copy=True)
    matched[found] = weight[[rows[i] for i in found]]
    return matched, [name for name, row in zip(target, rows) if row is None]


@HOOKS.register_module()
class AdaptCheckpointHook(Hook):
    """Makes a checkpoint fit before it is loaded, for training from it (``load_from``) or testing it.

    - A file of the official repository gets MMEngine's layout, see :func:`convert_official`.
    - Where the classes of the checkpoint, or their order, differ from those of the data set, the rows of the head go by
      the names; those of classes that the checkpoint lacks stay as the model has them, with a warning.

    Resuming is left alone.

    Args:
        aliases: The checkpoint's names of classes that the data set calls otherwise, as in
            ``dict(aeroplane='airplane')`` for VOC from COCO.
        head: Name of the last linear layer.

    Raises:
        KeyError: An alias is no class of the data set.
    """
    priority = 'VERY_HIGH'  # before EMAHook, which copies the checkpoint's weights

    def __init__(self, aliases: Mapping[str, str] | None = None, head: str = 'head.fc') -> None:
        self.aliases = dict(aliases or {})
        self.head = head

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
        if tuple(self.aliases.get(name, name) for name in target) == tuple(source):
            return
        self._match_head(runner, checkpoint, source, target)

    def _match_head(self, runner: Runner, checkpoint: dict, source: Sequence[str], target: Sequence[str]) -> None:
        model = runner.model
        while hasattr(model, 'module'):  # of DDP and of test-time augmentation
            model = model.module
        own, state, missing = model.state_dict(), checkpoint['state_dict'], []
        for key in (f'{self.head}.weight', f'{self.head}.bias'):
            if key in state and key in own and len(state[key]) == len(source) and len(own[key]) == len(target):
                state[key], missing = match_rows(state[key], source, target, own[key], self.aliases)
        if missing:
            print_log(f'{len(missing)} of {len(target)} classes are not in the checkpoint and start anew: '
                      f'{", ".join(missing[:20])}', 'current', logging.WARNING)

    @staticmethod
    def _dataset_classes(runner: Runner) -> Sequence[str] | None:
        for loop in (runner._train_loop, runner._test_loop, runner._val_loop):
            if isinstance(loop, BaseLoop):  # the others are not built, and need not be
                return getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
