"""Checkpoints: safe reading, comparison with a model, conversion of other layouts, the checkpoint to resume from."""
import functools
import logging
import os
import os.path as osp
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseTTAModel, PretrainedInit, is_model_wrapper
from mmengine.optim import OneCycleParamScheduler
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.hub import load_state_dict_from_url

from mmasl.errors import CheckpointError
from mmasl.utils.config import is_kind, metainfo_classes

WRAPPERS = ('module.', '_orig_mod.')  # of DDP and AveragedModel, of torch.compile
BACKBONE = 'backbone.timm_model.'
EMBEDDING, OUTPUT = 'head.fc.embedding_generator.0.', 'head.fc.FC.'


# --- safe reading

# MMEngine pickles these methods by getattr, with its histories and one-cycle schedules.
METHODS = {HistoryBuffer: ('min', 'max', 'current', 'mean'),
           OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear')}


def _attribute(owner: object, name: str) -> Callable:
    """Replaces ``getattr`` while unpickling. The real one, which MMEngine allows, is enough to execute any code."""
    for known, names in METHODS.items():
        if owner is known and name in names:
            return getattr(known, name)
    raise UnpicklingError(f'Unsupported attribute: {name} of {owner}')


def _trusted() -> list:
    """The classes that MMEngine's checkpoints hold beside tensors and plain data."""
    core: Any = np._core if hasattr(np, '_core') else np.core
    rebuild, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'}
    named = [(entry, f'numpy.{package}.multiarray.{entry.__name__}')  # names in NumPy 2 and 1
             for entry in (rebuild, scalar) for package in ('_core', 'core')]
    return [slice, np.ndarray, np.dtype, *dtypes, *named, *METHODS, ConfigDict, (_attribute, 'builtins.getattr')]


TRUSTED = _trusted()


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Force ``weights_only`` loading, and turn what fails into CheckpointError.

    Args:
        path: Name of the file for messages.
    """
    # These variables take precedence over the weights_only=False that MMEngine and torch.hub pass.
    names = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = '1'
    try:
        with torch.serialization.safe_globals(TRUSTED):
            yield
    except (CheckpointError, PermissionError, MemoryError, URLError):
        raise
    except FileNotFoundError:
        raise CheckpointError(f'no such checkpoint: {path}. Give the path of an existing file') from None
    except Exception as error:  # a file of another kind fails in many ways
        text = ' '.join(str(error).split())
        # PyTorch's own message recommends executing the file.
        if unsafe := re.search(r'unsupported (global: GLOBAL|GLOBAL) \S+|Unsupported attribute.{,200}|'
                               r'(Trying to|Can only).{,200}', text, re.IGNORECASE):
            raise CheckpointError(
                f'{path} is refused: loading it could execute code ({unsafe.group()}); nothing was executed. If you '
                'trust its source, save its weights to a new file: torch.save(dict(state_dict='
                "torch.load(FILE, weights_only=False)['state_dict']), NEW)") from None
        raise CheckpointError(f'{path} is not a checkpoint or is damaged ({type(error).__name__}: {text[:200]}). Copy '
                              'or download it again, or use an earlier one') from error
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read_checkpoint(path: str | PathLike, map_location: Any = 'cpu', verify: bool = False) -> dict:
    """Read a checkpoint without executing anything in it. MMEngine's loader falls back to full unpickling.

    Beside tensors and plain data, a checkpoint may hold the classes in :data:`TRUSTED`, which MMEngine writes.

    Args:
        path: File, or http(s) URL, which torch.hub caches.
        map_location: As in ``torch.load``.
        verify: Whether to compare the checksums of a file, which ``torch.load`` does not.

    Returns:
        The content, without ``meta.config``.

    Raises:
        CheckpointError: The file does not exist, is not a checkpoint, is damaged, or holds other objects.
    """
    path = str(path)
    with _refusals(path):
        if path.startswith(('http://', 'https://')):
            checkpoint = load_state_dict_from_url(path, map_location=map_location, weights_only=True)
        else:
            file = osp.expanduser(path)
            if verify and is_zipfile(file):
                with ZipFile(file) as content:
                    if torn := content.testzip():
                        raise BadZipFile(f'{torn} has another checksum')
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    return _only_data(checkpoint, path)


def _only_data(checkpoint: object, path: str) -> dict:
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict of '
                              'weights')
    if isinstance(meta := checkpoint.get('meta'), dict):
        meta.pop('config', None)  # Runner.resume executes it to look for gpu_ids of MMCV 1
        if isinstance(parts := meta.get('dataset_meta'), list) and metainfo_classes(parts):
            meta['dataset_meta'] = parts[0]  # of a ConcatDataset; MMDetection's inferencer expects a dict
    if isinstance(state := checkpoint.get('state_dict'), dict):
        checkpoint['state_dict'] = strip_wrappers(state)
        return checkpoint
    return strip_wrappers(checkpoint)


def strip_wrappers(state: dict) -> dict:
    """Remove the prefixes that DDP, torch.compile and averages of weights put before every name of a state dict.

    The ``module.`` of MMPretrain's LoRAModel is part of its names and remains.
    """
    names = [name for name in state if name not in ('n_averaged', 'steps')]
    if not names or all('.lora_' in str(name) for name in names):
        return state
    for prefix in WRAPPERS:
        if all(str(name).startswith(prefix) for name in names):
            stripped = OrderedDict((name.removeprefix(prefix), state[name]) for name in names)
            if metadata := getattr(state, '_metadata', None):  # versions of modules
                vars(stripped)['_metadata'] = {key.removeprefix(prefix): value for key, value in metadata.items()}
            return strip_wrappers(stripped)
    return state


@contextmanager
def safe_checkpoint_loading() -> Iterator[None]:
    """Within this context, MMEngine executes nothing in a checkpoint that it loads.

    This covers ``load_from``, ``resume`` and ``init_cfg`` in MMEngine, MMDetection and MMPretrain, from files and URLs.
    timm loads safely itself. On exit MMEngine's loaders are as before.

    Raises:
        CheckpointError: A checkpoint is loaded that does not exist, is damaged, or holds other objects than data.

    Example:
        >>> with safe_checkpoint_loading():  # doctest: +SKIP
        ...     runner.train()
    """
    schemes = dict(CheckpointLoader._schemes)
    allowed = getattr(mmengine_checkpoint, 'get_torch_safe_globals', None)
    mmengine_checkpoint.get_torch_safe_globals = lambda: TRUSTED  # MMEngine's own list has getattr
    try:
        for prefix, loader in schemes.items():
            CheckpointLoader.register_scheme(prefix, _guard(loader) if prefix else load_from_local, force=True)
        yield
    finally:
        for prefix, loader in schemes.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)
        mmengine_checkpoint.get_torch_safe_globals = allowed


def load_from_local(filename: str, map_location: object = None) -> dict:
    """Replaces MMEngine's loader of this name, whose log shows it."""
    return _with_state_dict(read_checkpoint(filename, map_location))


def _with_state_dict(checkpoint: dict) -> dict:
    """Put bare weights under ``state_dict``, where EMAHook needs them."""
    bare = 'state_dict' not in checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values())
    return dict(state_dict=checkpoint) if bare else checkpoint


def _guard(loader: Callable) -> Callable:

    @functools.wraps(loader)
    def load(filename: str, *args: Any, **kwargs: Any) -> dict:
        with _refusals(filename):
            return _with_state_dict(_only_data(loader(filename, *args, **kwargs), filename))

    return load


# --- comparison with a model


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several devices and for test-time augmentation. MMEngine loads weights into it.

    MMPretrain's LoRAModel is part of the model: its weights have ``module.`` in their names.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module  # type: ignore[assignment]  # a wrapper's
    return model


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers and inside MMPretrain's LoRAModel, whose attributes are those of no classifier."""
    model = unwrap_model(model)
    return inner_model(model.module) if hasattr(model, 'apply_lora') else model  # type: ignore[arg-type]


def state_of(checkpoint: dict) -> dict[str, Any]:
    """The state dict in a loaded file: ``state_dict``, or the file itself."""
    return checkpoint.get('state_dict', checkpoint)


def checkpoint_classes(checkpoint: Mapping) -> Sequence[str] | None:
    """The class names in a checkpoint of MMEngine or of older versions; None without names."""
    meta = checkpoint.get('meta') or {}
    return metainfo_classes(meta.get('dataset_meta') or meta)


def check_state_dict(model: nn.Module, checkpoint: dict, path: str, strict: bool = True) -> None:
    """Raise if weights of a model are missing or have another shape. MMEngine only warns and keeps initial weights.

    Names and shapes are compared. If some differ, the weights are loaded, because models may rename or resize weights
    while they load them.

    Args:
        model: The model, wrapped or not. Shards of FSDP are not compared.
        checkpoint: The loaded checkpoint, with or without ``state_dict``.
        path: Name of the checkpoint for messages.
        strict: Whether all weights must fit, as for a test. Without, one that fits is enough, as to train from them,
            and a warning tells if less than half of the weights fit.

    Raises:
        CheckpointError: Weights are missing or have another shape.
    """
    model = unwrap_model(model)
    if isinstance(model, FullyShardedDataParallel):
        return
    state, own = strip_wrappers(state_of(checkpoint)), model.state_dict()
    problems = {key: problem for key, value in own.items() if (problem := _find_problem(key, value, state))}
    if problems:
        problems = _confirm(model, state, problems)
    if not strict:
        _check_share(own, problems, checkpoint, path)
        return
    if not problems:
        return
    more = f', and {len(problems) - 3} more' if len(problems) > 3 else ''
    count = len(checkpoint_classes(checkpoint) or ())
    heads = {module.num_classes for name, module in model.named_modules()
             if name.endswith('head') and isinstance(getattr(module, 'num_classes', None), int)}
    classes = ''
    if count and heads and count not in heads:
        classes = (f' The checkpoint has {count} classes, and num_classes of the head is '
                   f'{" and ".join(map(str, sorted(heads)))}.')
    hint = _find_nested(state) or ('Use the config that it was trained with. To train from it for other classes, set '
                                   'load_from and mmasl.AdaptCheckpointHook')
    raise CheckpointError(f'{path} does not fit the model of the config: {"; ".join(list(problems.values())[:3])}'
                          f'{more}.{classes} {hint}')


def _find_problem(key: str, value: Any, state: Mapping[str, Any]) -> str:
    found = state.get(key)
    if isinstance(value, Tensor) and isinstance(found, Tensor) and value.shape != found.shape:
        return f'{key} is {tuple(found.shape)} in the checkpoint and {tuple(value.shape)} in the model'
    # Old checkpoints have no num_batches_tracked.
    return f'{key} is missing' if found is None and not key.endswith('num_batches_tracked') else ''


def _confirm(model: nn.Module, state: dict[str, Any], problems: dict[str, str]) -> dict[str, str]:
    """The problems that remain after loading: hooks of modules rename weights, resize them, or do without them."""
    if not any(isinstance(value, Tensor) for value in state.values()):
        return problems
    try:
        remaining = set(model.load_state_dict(state, strict=False).missing_keys)
    except RuntimeError as error:
        wrong = set(re.findall(r'size mismatch for (\S+):', str(error)))
        remaining = wrong | {key for key, problem in problems.items() if problem.endswith('is missing')}
    return {key: problem for key, problem in problems.items() if key in remaining}


def _check_share(own: Mapping[str, Any], problems: dict[str, str], checkpoint: dict, path: str) -> None:
    """Raise if no weight fits; warn if less than half of them fit, by their number of elements."""
    sizes = {key: value.numel() for key, value in own.items()
             if isinstance(value, Tensor) and value.is_floating_point()}
    fitting = {key: size for key, size in sizes.items() if key not in problems}
    if sizes and not fitting:
        raise CheckpointError(f'{path} does not fit the model: no weight has the same name and shape. '
                              f'{describe_misfit(checkpoint, own)}')
    share = sum(fitting.values()) / max(sum(sizes.values()), 1)
    if share < 0.5:
        print_log(f'{path} has only {len(fitting)} of the {len(sizes)} weights of the model ({share:.1%} of their '
                  f'values). The others keep their initial values. {describe_misfit(checkpoint, own)}',
                  'current', logging.WARNING)


def describe_misfit(checkpoint: dict, own: Collection[str], key: str = '') -> str:
    """Name weights of a file and of a model that do not fit, and say how the file can be used if that is known.

    Args:
        checkpoint: The loaded file.
        own: Names of the model's weights.
        key: Key of an ``init_cfg`` in the config that loads the file; '' for ``load_from``.
    """
    state = state_of(checkpoint)
    names = [name for name, value in state.items() if isinstance(value, Tensor)]
    text = f'It has {", ".join(list(map(str, state))[:3])}, and the model has {", ".join(list(own)[:3])}.'
    if nested := _find_nested(state):
        return f'{text} {nested}'
    parts = Counter(name[:place.end()] for name in names for place in re.finditer(r'\.', name)
                    if name[place.end():] in own)
    if key and parts:
        return f'{text} Set {key}.prefix={parts.most_common(1)[0][0]!r}.'
    whole = Counter(name[:place.end()] for name in own for place in re.finditer(r'\.', name)
                    if name[place.end():] in state)
    if whole and not key:
        part = whole.most_common(1)[0][0]
        return (f"{text} It has the weights of model.{part[:-1]}: instead of load_from, set model.{part}init_cfg="
                "dict(type='Pretrained', checkpoint=FILE).")
    if parts:
        return f'{text} The names in the file start with {parts.most_common(1)[0][0]!r}: save them without it.'
    return text


def _find_nested(state: Mapping[str, Any]) -> str:
    """Say under which key a file has its weights, and how to save them alone; '' if they are at its top."""
    if not any(isinstance(value, Tensor) for value in state.values()):
        for name, value in state.items():
            if isinstance(value, dict) and any(isinstance(x, Tensor) for x in value.values()):
                return (f'Its weights are under {name!r}: save them alone, '
                        f'torch.save(torch.load(FILE, weights_only=True)[{name!r}], NEW).')
    return ''


def check_pretrained(model: nn.Module, files: Mapping[str, dict]) -> None:
    """Raise if the weights of a module do not come from the checkpoint of its ``init_cfg``; MMEngine only warns.

    Values are compared, not names, because modules may rename weights while they load them. Constant tensors do not
    count, since any initialisation has them.

    Args:
        model: The model after its ``init_weights``.
        files: Content of the checkpoints by their name in ``init_cfg``.

    Raises:
        CheckpointError: No weight of a module comes from the file.
    """
    for name, module, init_cfg in iter_pretrained(model):
        file, key = init_cfg['checkpoint'], f'model.{name}.init_cfg'.replace('..', '.')
        sizes = {own: value.numel() for own, value in module.named_parameters()
                 if value.device.type != 'meta' and value.numel() > 1 and value.min() != value.max()}
        found = set(_find_values({own: module.get_parameter(own).detach() for own in sizes}, state_of(files[file])))
        if sizes and not found:
            raise CheckpointError(f'{key}: no weight comes from {file}, so training would start from random weights. '
                                  f'{describe_misfit(files[file], module.state_dict(), key)}')
        share = sum(sizes[own] for own in found) / max(sum(sizes.values()), 1)
        if sizes and share < 0.5:
            print_log(f'{key}: only {share:.1%} of the weights come from {file}. The others start from initial '
                      f'values, such as {", ".join([own for own in sizes if own not in found][:3])}.', 'current',
                      logging.WARNING)


def iter_pretrained(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict]]:
    """Yield name, module and ``init_cfg`` of the modules that load a checkpoint when they are initialised."""
    for name, module in model.named_modules():
        cfgs = getattr(module, 'init_cfg', None) or ()
        for init_cfg in [cfgs] if isinstance(cfgs, dict) else cfgs:
            if is_kind(init_cfg.get('type'), PretrainedInit, WEIGHT_INITIALIZERS) and init_cfg.get('checkpoint'):
                yield name, module, init_cfg


def _find_values(own: dict[str, Tensor], state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the tensors that are in a state dict, under any name."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for value in state.values():
        if isinstance(value, Tensor):
            by_shape.setdefault(value.shape, []).append(value)
    for name, value in own.items():
        for other in by_shape.get(value.shape, ()):
            theirs = other.to(value)
            if value.flatten()[:8].equal(theirs.flatten()[:8]) and value.equal(theirs):
                yield name
                break


def load_weights(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Load all weights of a model, and warn about weights that the model does not have.

    Args:
        model: The model.
        checkpoint: As :func:`read_checkpoint` returns it.
        path: Name of the checkpoint for messages.

    Raises:
        CheckpointError: Weights are missing or have another shape.
    """
    check_state_dict(model, checkpoint, path)
    _, unexpected = model.load_state_dict(strip_wrappers(state_of(checkpoint)), strict=False)
    if unexpected:
        names = ', '.join(unexpected[:10]) + ', ...' * (len(unexpected) > 10)
        warnings.warn(f'{path} has {len(unexpected)} weights that the model of the config does not have: {names}',
                      stacklevel=2)


# --- other layouts, other classes


def is_official(checkpoint: dict) -> bool:
    """Whether a loaded file is a TResNet of the official repository, or bare weights in its layout."""
    return 'body.conv1.0.weight' in checkpoint.get('model', state_of(checkpoint))


def convert_official(checkpoint: dict) -> dict:
    """Convert a checkpoint of the official repository to MMEngine's layout, for an ImageClassifier with TIMMBackbone.

    timm's own filter renames the keys of the backbone and turns InPlaceABN into batch norm. The two linear layers of
    the Open Images head, without an activation between them, are multiplied into one. Class names lose their quotes.

    Args:
        checkpoint: The loaded file: a dict with ``model`` and ``idx_to_class``, or bare weights.

    Returns:
        A dict with ``state_dict`` and ``meta.dataset_meta.classes``.

    Raises:
        CheckpointError: A key belongs neither to the body nor to the head.
    """
    from timm.models.tresnet import checkpoint_filter_fn  # detection needs no timm

    state = dict(checkpoint.get('model', state_of(checkpoint)))
    body = {key: state.pop(key) for key in list(state) if key.startswith('body.')}
    if EMBEDDING + 'weight' in state:
        first, second = (
            [state.pop(prefix + name).double() for name in ('weight', 'bias')] for prefix in (EMBEDDING, OUTPUT))
        state['head.fc.weight'] = (second[0] @ first[0]).float()
        state['head.fc.bias'] = (second[0] @ first[1] + second[1]).float()
    if unknown := set(state) - {'head.fc.weight', 'head.fc.bias'}:
        raise CheckpointError(f'{sorted(unknown)[:5]} are not weights of a TResNet of the official repository. Use a '
                              'file of its MODEL_ZOO.md')
    state |= {BACKBONE + key: value for key, value in checkpoint_filter_fn(body, None).items()}
    # Many names of Open Images are quoted, such as """Pig's organ soup""" (issue 26 of the official repository).
    names = tuple(str(name).strip('"\' ') for name in checkpoint.get('idx_to_class', {}).values())
    return dict(state_dict=state, meta=dict(dataset_meta=dict(classes=names)))


def match_rows(weight: Tensor,
               source: Sequence[str],
               target: Sequence[str],
               initial: Tensor,
               aliases: Mapping[str, str] | None = None) -> tuple[Tensor, list[str]]:
    """Sort the rows of a classifier's weight or bias by class name.

    Args:
        weight: (S, ...), one row per ``source`` class.
        source: S class names of the checkpoint.
        target: T class names of the model.
        initial: (T, ...). A class that the checkpoint lacks keeps its row of this tensor.
        aliases: Names in the checkpoint of ``target`` classes. An alias that the checkpoint has takes precedence.

    Returns:
        The rows, (T, ...), and the target classes that kept their initial row. A name that occurs more than once in
        ``source`` is ambiguous and matches no class.
    """
    times = Counter(source)
    row_of = {name: row for row, name in enumerate(source) if times[name] == 1}
    aliases = aliases or {}
    rows = [row_of.get(aliases.get(name, name), row_of.get(name)) for name in target]
    found = [i for i, row in enumerate(rows) if row is not None]
    matched = initial.detach().to(weight, copy=True)
    matched[found] = weight[[rows[i] for i in found]]
    return matched, [name for name, row in zip(target, rows) if row is None]


# --- the checkpoint to resume from


def find_checkpoint(work_dir: str) -> tuple[str | None, dict[str, str]]:
    """Find the checkpoint to resume a run from: the one in ``last_checkpoint``, or else the newest readable one.

    A file that ``last_checkpoint`` names is searched in the work dir first, because the work dir may have moved.

    Args:
        work_dir: Work dir of the run.

    Returns:
        The path, or None, and the reasons why newer checkpoints were skipped, by path.
    """
    record = Path(work_dir, 'last_checkpoint')
    named = record.read_text().strip() if record.is_file() else ''
    first = [Path(work_dir, osp.basename(named)), Path(named)] if named else []
    first = [path for path in first if path.exists()][:1] or first[1:]
    if first and first[0].is_dir():  # DeepSpeed's checkpoints are folders
        return str(first[0]), {}
    folders = {Path(work_dir), *(path.parent for path in first)}
    found = {path for folder in folders for path in folder.glob('*.pth') if not path.name.startswith('best_')}
    others = sorted(found - set(first), key=lambda path: path.stat().st_mtime, reverse=True)
    reasons = {str(record): 'it is empty'} if record.is_file() and not named else {}
    for path in [*first, *others]:
        try:
            check_resumable(read_checkpoint(path, verify=True), str(path))
            return str(path), reasons
        except (CheckpointError, OSError) as error:
            reasons[str(path)] = str(error)
    return None, reasons


def check_resumable(checkpoint: dict, path: str) -> None:
    """Raise if a checkpoint holds weights alone. MMEngine would continue with a new optimizer.

    Args:
        checkpoint: The loaded checkpoint.
        path: Its name for the message.

    Raises:
        CheckpointError: The state of the optimizer or of the run is missing.
    """
    if missing := [key for key in ('meta', 'message_hub', 'optimizer', 'state_dict') if key not in checkpoint]:
        raise CheckpointError(f'{path} cannot be resumed: it has no {" and no ".join(missing)}, as best and published '
                              'checkpoints. Start from its weights (--cfg-options load_from=CHECKPOINT, without '
                              '--resume), or resume another')
