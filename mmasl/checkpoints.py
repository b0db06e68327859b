"""Checkpoints: read without executing anything in them, checked against the model, and made to fit where they are of
another layout or of other classes, as those of the official repository and COCO's for VOC."""
import functools
import logging
import os
import os.path as osp
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import BaseLoop, CheckpointLoader, Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.hub import load_state_dict_from_url

from .registry import HOOKS

BACKBONE = 'backbone.timm_model.'
EMBEDDING, OUTPUT = 'head.fc.embedding_generator.0.', 'head.fc.FC.'


# --- nothing in a file is executed

# What getattr may be asked for in a checkpoint: MMEngine keeps methods beside its buffers and schedules.
METHODS = {HistoryBuffer: ('min', 'max', 'current', 'mean'),
           OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear')}


class CheckpointError(ValueError):
    """A checkpoint cannot be used, and the message says which, why and what helps."""


def _attribute(owner: object, name: str) -> Callable:
    """What ``getattr`` means in a checkpoint. With the real one, which MMEngine allows, any code can be executed."""
    for known, names in METHODS.items():
        if owner is known and name in names:
            return getattr(known, name)
    raise UnpicklingError(f'Unsupported attribute: {name} of {owner}')


def _trusted() -> list:
    """What MMEngine's own checkpoints hold beside tensors and plain data: numbers of NumPy, histories, schedules."""
    core: Any = np._core if hasattr(np, '_core') else np.core
    rebuild, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'}
    named = [(entry, f'numpy.{package}.multiarray.{entry.__name__}')  # of NumPy 2 and 1
             for entry in (rebuild, scalar) for package in ('_core', 'core')]
    return [slice, np.ndarray, np.dtype, *dtypes, *named, *METHODS, ConfigDict, (_attribute, 'builtins.getattr')]


TRUSTED = _trusted()


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Load only data, and say what is wrong with a file that holds anything else."""
    # Before torch.load's own argument, which MMEngine and torch.hub set to execute.
    names = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = '1'
    try:
        with torch.serialization.safe_globals(TRUSTED):
            yield
    except (CheckpointError, FileNotFoundError, PermissionError, MemoryError, URLError):
        raise
    except Exception as error:  # a foreign file fails in many ways
        text = ' '.join(str(error).split())
        # Without PyTorch's advice to execute it.
        if unsafe := re.search(r'unsupported (global: GLOBAL|GLOBAL) \S+|Unsupported attribute.{,200}|'
                               r'(Trying to|Can only).{,200}', text, re.IGNORECASE):
            raise CheckpointError(
                f'{path} is refused: loading it could execute what is in it ({unsafe.group()}). Nothing was executed. '
                'If you trust where it comes from, write its weights to a file of their own: torch.save(dict('
                "state_dict=torch.load(FILE, weights_only=False)['state_dict']), NEW)") from None
        raise CheckpointError(f'{path} is no checkpoint, or is damaged ({type(error).__name__}: {text[:200]}): copy or '
                              'download it anew, or take an earlier one') from error
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read_checkpoint(path: str | PathLike, map_location: Any = 'cpu', whole: bool = False) -> dict:
    """What is in a checkpoint, without executing anything; MMEngine's own loader falls back to executing.

    Beside tensors and plain data, checkpoints may hold what MMEngine itself puts there (:data:`TRUSTED`).

    Args:
        path: File, or http(s) URL, which is kept in torch.hub's folder.
        map_location: As in ``torch.load``.
        whole: Whether a file's checksums are compared too, which PyTorch does not do.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is no checkpoint, is damaged, or holds other objects.
    """
    path = str(path)
    with _refusals(path):
        if path.startswith(('http://', 'https://')):
            checkpoint = load_state_dict_from_url(path, map_location=map_location, weights_only=True)
        else:
            file = osp.expanduser(path)
            if not osp.isfile(file):
                raise FileNotFoundError(f'no such checkpoint: {path}')
            if whole and is_zipfile(file):
                with ZipFile(file) as content:
                    if torn := content.testzip():
                        raise BadZipFile(f'{torn} has another checksum')
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    return _only_data(checkpoint, path)


def _only_data(checkpoint: object, path: str) -> dict:
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict of weights')
    if isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)  # Runner.resume would execute it, to look for gpu_ids of MMCV 1
    return checkpoint


@functools.cache
def load_only_data() -> None:
    """From here on, in this process, nothing in a checkpoint is executed, whoever loads it through MMEngine.

    That is all of ``load_from``, ``resume`` and ``init_cfg`` in MMEngine, MMDetection and MMPretrain, from every kind
    of place. (timm itself loads that way.)
    """
    mmengine_checkpoint.get_torch_safe_globals = lambda: TRUSTED  # its own list has getattr
    for prefix, loader in CheckpointLoader._schemes.items():
        CheckpointLoader.register_scheme(prefix, _guard(loader) if prefix else load_from_local, force=True)


def load_from_local(filename: str, map_location: object = None) -> dict:
    """MMEngine's loader of that name, which executes nothing."""
    return read_checkpoint(filename, map_location)


def _guard(loader: Callable) -> Callable:

    @functools.wraps(loader)
    def load(filename: str, *args: Any, **kwargs: Any) -> dict:
        with _refusals(filename):
            return _only_data(loader(filename, *args, **kwargs), filename)

    return load


# --- it must fit


def check_fit(model: nn.Module, checkpoint: dict, path: str, whole: bool = True) -> None:
    """Raise where a model would keep initial weights; MMEngine warns in the log, and goes on with noise.

    Args:
        model: The model, inside its wrappers. Shards of FSDP are not looked at.
        checkpoint: What was loaded.
        path: Its name, for the message.
        whole: Whether all weights must fit, as for a test, and not just any, as for training from them.

    Raises:
        CheckpointError: Weights are missing or have another shape.
    """
    while hasattr(model, 'module') and not isinstance(model, FullyShardedDataParallel):
        model = model.module  # type: ignore[assignment]  # a wrapper's
    if isinstance(model, FullyShardedDataParallel):
        return
    state = {re.sub(r'^module\.', '', key): value for key, value in checkpoint.get('state_dict', checkpoint).items()}
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith('num_batches_tracked')]
    fitting = [key for key, value in state.items() if isinstance(value, Tensor) and isinstance(own.get(key), Tensor)
               and value.shape == own[key].shape]
    other = {key: (tuple(value.shape), tuple(own[key].shape)) for key, value in state.items()
             if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and value.shape != own[key].shape}
    if not whole:
        if fitting or not own:
            return
        raise CheckpointError(f'{path} does not fit the model: none of its weights does. It is of another model '
                              f'(it has {", ".join(list(state)[:3])}; the model has {", ".join(list(own)[:3])})')
    problems = [f'{key} is {theirs} in the checkpoint and {ours} in the model' for key, (theirs, ours) in other.items()]
    problems += [f'{key} is missing' for key in missing]
    if not problems:
        return
    more = f', and {len(problems) - 3} more' if len(problems) > 3 else ''
    meta = checkpoint.get('meta') or {}
    theirs = len((meta.get('dataset_meta') or {}).get('classes') or ())
    ours = {module.num_classes for name, module in model.named_modules()
            if name.endswith('head') and isinstance(getattr(module, 'num_classes', None), int)}
    classes = ''
    if theirs and ours and theirs not in ours:
        classes = (f' The checkpoint is of {theirs} classes, and num_classes of the head is '
                   f'{" and ".join(map(str, sorted(ours)))}.')
    raise CheckpointError(
        f'{path} does not fit the model of the config: {"; ".join(problems[:3])}{more}.{classes} Take the config that '
        'it was trained with, or the head that it has (num_classes); to train from it for other classes, name it in '
        'load_from instead of testing or resuming it, with mmasl.AdaptCheckpointHook to match the classes by name')


class FitCheck(Hook):
    """Refuses checkpoints that do not fit, once other hooks have adapted them. See :func:`check_fit`."""
    priority = 'LOWEST'

    def __init__(self, whole: bool = True) -> None:
        self.whole = whole

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        check_fit(runner.model, checkpoint, str(runner._load_from), self.whole)


# --- other layouts, other classes


def is_official(checkpoint: dict) -> bool:
    """Whether a loaded file is a TResNet of the official repository, or bare weights of its layout."""
    return 'body.conv1.0.weight' in checkpoint.get('model', checkpoint)


def convert_official(checkpoint: dict) -> dict:
    """A checkpoint of the official repository in MMEngine's layout, for an ImageClassifier with TIMMBackbone.

    The backbone's keys become timm's, and InPlaceABN's weights batch norm's, which timm's own filter does. The two
    linear layers of the Open Images head, with nothing between them, become the one that they amount to. The names of
    the classes go where MMEngine keeps them, without quotes around them.

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
    # Many of Open Images' are in quotes, as """Pig's organ soup""" (issue 26 of the official repository).
    names = tuple(str(name).strip('"\' ') for name in checkpoint.get('idx_to_class', {}).values())
    return dict(state_dict=state, meta=dict(dataset_meta=dict(classes=names)))


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
        aliases: Other names that ``target`` classes may have in the checkpoint; one that it has comes first.

    Returns:
        (T, ...), and the target classes that kept their initial row. A name that several classes of the checkpoint have
        is that of none.
    """
    times = Counter(source)
    row_of = {name: row for row, name in enumerate(source) if times[name] == 1}
    aliases = aliases or {}
    rows = [row_of.get(aliases.get(name, name), row_of.get(name)) for name in target]
    found = [i for i, row in enumerate(rows) if row is not None]
    matched = initial.detach().to(weight, copy=True)
    matched[found] = weight[[rows[i] for i in found]]
    return matched, [name for name, row in zip(target, rows) if row is None]


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
