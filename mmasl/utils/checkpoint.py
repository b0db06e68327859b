"""TODO."""
import functools
import os
import os.path as osp
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.hub import load_state_dict_from_url

from mmasl.errors import CheckpointError

BACKBONE = 'backbone.timm_model.'
EMBEDDING, OUTPUT = 'head.fc.embedding_generator.0.', 'head.fc.FC.'


# --- nothing in a file is executed

# What getattr may be asked for in a checkpoint: MMEngine keeps methods beside its buffers and schedules.
METHODS = {HistoryBuffer: ('min', 'max', 'current', 'mean'),
           OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear')}


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


def find_checkpoint(work_dir: str) -> tuple[str | None, dict[str, str]]:
    """The checkpoint to resume a run from: the one that ``last_checkpoint`` names, or else the newest that can be read.

    A named file is looked for in the work dir first, which may have been moved.

    Args:
        work_dir: The run's work dir.

    Returns:
        The path, or None; and why newer ones, or all, were passed over, by path.
    """
    record = Path(work_dir, 'last_checkpoint')
    named = record.read_text().strip() if record.is_file() else ''
    first = [Path(work_dir, osp.basename(named)), Path(named)] if named else []
    first = [path for path in first if path.exists()][:1] or first[1:]
    if first and first[0].is_dir():  # of DeepSpeed
        return str(first[0]), {}
    folders = {Path(work_dir), *(path.parent for path in first)}
    found = {path for folder in folders for path in folder.glob('*.pth') if not path.name.startswith('best_')}
    others = sorted(found - set(first), key=lambda path: path.stat().st_mtime, reverse=True)
    reasons = {str(record): 'it is empty'} if record.is_file() and not named else {}
    for path in [*first, *others]:
        try:
            check_resumable(read_checkpoint(path, whole=True), str(path))
            return str(path), reasons
        except (CheckpointError, OSError) as error:
            reasons[str(path)] = str(error)
    return None, reasons


def check_resumable(checkpoint: dict, path: str) -> None:
    """Raise where a checkpoint holds weights alone: MMEngine would go on with a new optimizer."""
    if missing := [key for key in ('meta', 'message_hub', 'optimizer', 'state_dict') if key not in checkpoint]:
        raise CheckpointError(f'{path} cannot be resumed: it has no {" and no ".join(missing)}, as the best and the '
                              'published ones. Start from its weights, --cfg-options load_from=CHECKPOINT without '
                              '--resume, or resume another')
