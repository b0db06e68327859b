"""What the command-line tools share: flags, configs, checks of files and devices, runners and exits."""
import argparse
import atexit
import inspect
import os
import os.path as osp
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import DATASETS, HOOKS, MODELS, RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.utils import import_modules_from_strings
from rich.console import Console
from rich.progress import track

from mmasl.errors import ConfigError, DataError, DiskFullError, MMASLError, UnavailableError
from mmasl.utils.config import drop_empty_lines, is_kind, iter_dataset_configs, iter_metric_configs, resolve_type
from mmasl.utils.files import is_full

TEST_HOOKS = ('mmasl.CheckDataHook', 'mmasl.CheckFiniteHook', 'mmasl.CheckStateDictHook')


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with the message of an :class:`MMASLError` or of a full disk; other errors keep their traceback.

    MMEngine's errors about an unknown class or argument in a config are shown as messages too. It is a context manager
    and a decorator.

    Raises:
        SystemExit: With the message.

    Example:
        >>> @exit_on_user_error()
        ... def main() -> None:
        ...     ...
    """
    try:
        yield
    except MMASLError as error:
        # A data loader's worker puts its traceback before the message.
        raise SystemExit(str(error).rsplit(f'{type(error).__name__}: ', 1)[-1].strip()) from None
    except (KeyError, TypeError) as error:
        words = str(error.args[0]) if error.args else ''
        if re.search(r'__init__\(\) (got an unexpected keyword|missing \d+ required)', words):
            raise SystemExit(f'{words}. Correct the arguments of this class in the config') from None
        if re.search(r'^.+ is not in the \S+::.+ registry\.', words):
            raise SystemExit(f'{words.split(" More details")[0]} Correct its type in the config, or import its module '
                             'with custom_imports') from None
        raise
    except OSError as error:
        if not is_full(error):
            raise
        folder = osp.dirname(osp.abspath(error.filename)) if error.filename else ''
        raise SystemExit(str(DiskFullError.describe(error, error.filename or 'A file of the run', folder))) from None


# What MMEngine's runners and the tools read at the top of a config.
SETTINGS = (*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters,
            'activation_checkpointing', 'custom_imports', 'efficient_conv_bn_eval', 'find_unused_parameters',
            'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline')
SOURCES = {  # pattern in the path of a missing file: where to download it
    '(train|val)2017': 'COCO 2017: unpack train2017.zip, val2017.zip (http://images.cocodataset.org/zips/) and\n'
            '  annotations_trainval2017.zip (http://images.cocodataset.org/annotations/) in data/coco/.',
    '(train|val)2014': 'COCO 2014: unpack train2014.zip, val2014.zip (http://images.cocodataset.org/zips/) and\n'
            '  annotations_trainval2014.zip (http://images.cocodataset.org/annotations/) in data/coco/.',
    'VOC2007': 'VOC 2007: unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar\n'
               '  (http://host.robots.ox.ac.uk/pascal/VOC/voc2007/) in data/; they create data/VOCdevkit/VOC2007/.',
    'nus_wide': 'NUS-WIDE: images and the list of labels and splits that the official repository links to\n'
                '  (https://github.com/Alibaba-MIIL/ASL), in data/nus_wide/.',
    'open_images': 'Open Images: image labels and class lists of\n'
                   '  https://storage.googleapis.com/openimages/web/download.html, in data/open_images/.',
    'nybg2020': 'Herbarium 2020: https://www.kaggle.com/c/herbarium-2020-fgvc7/data, in data/nybg2020/.'}
NO_DOWNLOAD = ('Without any download: make demo; or python tools/make_digits.py data/digits, then train\n'
               '  configs/digits/fcos_asl_digits.py or configs/digits/resnet_asl_digits.py.')


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that tools/train.py and tools/test.py share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help="folder of logs and checkpoints (default: the config's, or work_dirs/NAME)")
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision; needs a GPU')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, such as model.bbox_head.loss_cls.gamma_neg=3; '
                        'a list is key="[a,b]", without spaces')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    parser.add_argument('--no-check-data', action='store_true',
                        help='do not check annotation files, images, labels and class counts before the run')
    parser.add_argument('--no-check-finite', action='store_true',
                        help='do not stop at a loss or weights that are NaN or infinite')
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags; exits with usage if a value of ``--cfg-options`` is not KEY=VALUE."""
    try:
        return parser.parse_args(argv)
    except ValueError:  # DictAction splits at '='
        parser.error('every value of --cfg-options must be KEY=VALUE')


def load_config(args: argparse.Namespace) -> Config:
    """Load the config of the shared flags. ``--amp`` is only checked, because each tool enables it differently.

    Args:
        args: Flags of :func:`make_parser`.

    Raises:
        ConfigError: The config does not exist, or ``--cfg-options`` does not fit it.
        UnavailableError: ``--amp`` without a GPU.
    """
    require_file(args.config, 'config')
    if args.amp:
        require_gpu('--amp')
    cfg = Config.fromfile(args.config)
    merge_options(cfg, args.cfg_options, args.config)
    for name, value in cfg.items():
        if name.endswith(('_dataloader', '_evaluator')):
            _expand_user(value)
        if name.endswith('_dataloader') and isinstance(value, dict) and isinstance(value.get('dataset'), dict):
            for _, dataset in iter_dataset_configs(value['dataset'], name, cfg.get('default_scope')):
                for place in (dataset, dataset.get('metainfo')):
                    if isinstance(place, dict) and 'classes' in place:
                        place['classes'] = drop_empty_lines(place['classes'], expand_user=place is dataset)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


def merge_options(cfg: Config, options: dict[str, Any], path: str) -> None:
    """Merge ``--cfg-options`` into a config.

    A new key is an error if it is no setting of MMEngine's runners at the top, or nearly equals one beside it below,
    unless the options replace the ``type`` of its dict. A new list is given by the numbers of its entries, as in
    ``custom_hooks.0.type=EMAHook``. Modules of ``custom_imports`` are imported; MMEngine imports those of files only.

    Args:
        cfg: The config, changed in place.
        options: Values by keys with dots.
        path: File of the config, for the messages.

    Raises:
        ConfigError: A key is misspelt, a value is the text of a dict, or the options do not fit the config.
    """
    lists = set()
    for option, value in options.items():
        if re.search(r'\bdict\(', str(value)):  # MMEngine reads numbers, texts and lists of them
            raise ConfigError(f'--cfg-options {option}: {value} would stay text, because these values cannot be dicts. '
                              f'Set its keys one by one, as in {option}.type=..., and those of a new list by their '
                              f'numbers, as in {option}.0.type=...')
        node: Any = cfg
        parts = option.split('.')
        for place, part in enumerate(parts):
            if isinstance(node, (dict, Config)) and part not in node:
                known = list(node) if place else [*SETTINGS, *node]
                close = get_close_matches(part, known, 1, 0.85 if place else 0.7)
                if place and {'.'.join([*parts[:place], key]) for key in ('type', '_delete_')} & set(options):
                    close = []  # the dict of another class
                if close != [part] and (close if place else part not in known):
                    hint = f'Did you mean {".".join([*parts[:place], *close])}?' if close else 'Check its spelling.'
                    raise ConfigError(f'--cfg-options {option}: {path} has no {".".join(parts[:place + 1])}, and '
                                      f'setting it would change nothing. {hint}')
                lists |= {'.'.join(parts[:i]) for i in range(place + 1, len(parts)) if parts[i].isdecimal()}
                break
            try:
                node = node[int(part) if isinstance(node, (list, tuple)) else part]
            except (IndexError, KeyError, TypeError, ValueError):
                break  # MMEngine's message follows
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise ConfigError(f'--cfg-options does not fit {path}: {error}. Check the keys and indices') from None
    except AttributeError:  # MMEngine merges dicts into the entries of a list
        raise ConfigError(f'--cfg-options {" ".join(options)}: entries of a list in {path} can be changed by their '
                          'numbers only if they are dicts, and only key by key. Give the whole list') from None
    for option in lists:
        *parents, last = option.split('.')
        node = cfg
        for part in parents:
            node = node[int(part) if isinstance(node, (list, tuple)) else part]
        if isinstance(node[last], dict) and all(key.isdecimal() for key in node[last]):
            node[last] = [node[last][key] for key in sorted(node[last], key=int)]
    if any(option.startswith('custom_imports.') for option in options):
        try:
            import_modules_from_strings(**cfg.custom_imports)
        except ImportError as error:
            raise ConfigError(f'--cfg-options custom_imports: {error}. Correct the name, or set PYTHONPATH to the '
                              'folder of the module') from None


def _expand_user(config: Any) -> None:
    """Expand ``~`` in the paths of data sets and evaluators, which MMDetection does not."""
    for value in config if isinstance(config, (list, tuple)) else config.values() if isinstance(config, dict) else ():
        _expand_user(value)
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, str) and value.startswith('~/'):
            config[key] = osp.expanduser(value)


def is_classification(cfg: Config) -> bool:
    """Whether a config is MMPretrain's: by its ``default_scope``, or by the class of its model if it has none.

    Pure Python configs need no scope. All other configs are handled as detection.
    """
    scope = cfg.get('default_scope')
    if scope in ('mmpretrain', 'mmdet'):
        return scope == 'mmpretrain'
    model = cfg.get('model') or {}
    while isinstance(model.get('module'), dict):  # of LoRA and of test-time augmentation
        model = model['module']
    found = resolve_type(model.get('type'), MODELS, scope)
    return any(base.__module__.startswith('mmpretrain.') for base in getattr(found, '__mro__', ()))


def set_dataloader_defaults(cfg: Config, *splits: str) -> None:
    """Set what MMPretrain's own tools set in dataloaders, unless the config does; without workers, no worker settings.

    Detection keeps MMEngine's defaults, because its images differ in size and cannot be collated into one tensor.
    PyTorch refuses ``persistent_workers`` and ``prefetch_factor`` with ``num_workers=0``.

    Args:
        cfg: The config, changed in place.
        splits: Of 'train', 'val' and 'test'.
    """
    for loader in filter(None, (cfg.get(f'{split}_dataloader') for split in splits)):
        if loader.get('num_workers') == 0:
            loader.pop('persistent_workers', None)
            loader.pop('prefetch_factor', None)
        if is_classification(cfg):
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', get_device() == 'cuda')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def drop_pretrained(cfg: Config) -> None:
    """Do not load the weights of a timm backbone that a checkpoint replaces. A checkpoint of LoRAModel has no others.
    """
    for part in _replaced_parts(cfg.model, cfg.get('default_scope')):
        if part.get('pretrained') is True:
            part['pretrained'] = False
        if part.get('checkpoint_path'):
            part['checkpoint_path'] = ''


def _replaced_parts(model: Any, scope: str | None) -> Iterator[dict]:
    if isinstance(model, dict):
        if 'type' in model:
            if hasattr(resolve_type(model['type'], MODELS, scope), 'apply_lora'):
                return
            yield model
        model = model.values()
    elif not isinstance(model, (list, tuple)):
        return
    for value in model:
        yield from _replaced_parts(value, scope)


def require_file(path: str, what: str, hint: str = '') -> None:
    """Raise ConfigError if a local file does not exist. URLs and ``torchvision://`` names pass.

    Args:
        path: The file.
        what: What it is, for the message.
        hint: How to get it, appended to the message.
    """
    if '://' not in path and not osp.isfile(osp.expanduser(path)):
        raise ConfigError(f'No such {what}: {path} (relative paths start at {os.getcwd()}){hint}')


def require_gpu(what: str) -> None:
    """Raise UnavailableError if PyTorch finds no GPU, which ``what`` needs."""
    if get_device() in ('cpu', 'mps'):
        raise UnavailableError(f'{what} needs a GPU, and PyTorch finds none on this machine: run without it')


def check_data(cfg: Config, *splits: str) -> None:
    """Raise if files or folders of the data do not exist.

    A comment ``# Made by: COMMAND`` of the config that names the folder of missing data is shown as well.

    Args:
        cfg: The config.
        splits: Of 'train', 'val' and 'test'.

    Raises:
        DataError: With all missing paths, their keys in the config and where to get them.
    """
    missing: dict[str, str] = {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        entries = list(iter_dataset_configs(
            loader.dataset, f'{split}_dataloader.dataset', cfg.get('default_scope'))) if loader else []
        paths = {path_key: path for key, dataset in entries
                 for path_key, path in _dataset_paths(dataset, key, cfg.get('default_scope'))}
        paths |= {f'{key}.ann_file': metric['ann_file']
                  for key, metric in iter_metric_configs(cfg.get(f'{split}_evaluator'), f'{split}_evaluator')
                  if isinstance(metric.get('ann_file'), str) and not metric.get('backend_args')}
        missing |= {key: path for key, path in paths.items()
                    if '://' not in path and not osp.exists(osp.expanduser(path))}
    if missing:
        hints = [hint for mark, hint in SOURCES.items() if re.search(mark, ' '.join(missing.values()))]
        roots = {str(folder) for path in missing.values() for folder in (Path(path), *Path(path).parents)}
        made_by = dict.fromkeys(re.findall('^# Made by: (.+)$', cfg.text, re.MULTILINE))
        hints += [f'Made by: {command}' for command in made_by if roots & set(command.split())]
        raise DataError('\n'.join([
            f'Missing data (relative paths start at {os.getcwd()}):',
            *(f'  {path}   <- {key}' for key, path in missing.items()), *hints,
            'If the data are elsewhere, link them here (ln -s), or set their place:',
            '  --cfg-options train_dataloader.dataset.data_root=PATH.',
            NO_DOWNLOAD]))


def _dataset_paths(dataset: dict, key: str, scope: str | None) -> Iterator[tuple[str, str]]:
    """(config key, path) of the files and folders of a data set."""
    if dataset.get('backend_args'):
        return
    root, prefix = str(dataset.get('data_root') or ''), dataset.get('data_prefix')
    parts: dict[str, Any] = {'ann_file': dataset.get('ann_file')}
    if dataset.get('split') and not dataset.get('image_set_path') and _reads_image_sets(dataset, scope):
        parts['data_root'] = osp.join('ImageSets', 'Main', f"{dataset['split']}.txt")
    parts |= {f'data_prefix.{k}': v for k, v in prefix.items()} if isinstance(prefix, dict) else {
        'data_prefix': prefix}
    parts = {k: v for k, v in parts.items() if isinstance(v, str) and v}
    if not parts and root and not _downloads(dataset, scope):
        parts = {'data_root': ''}
    for name, part in parts.items():
        yield f'{key}.{name}', osp.join(root, part)


def _downloads(dataset: dict, scope: str | None) -> bool:
    """Whether a data set downloads its files itself, as CIFAR10 does."""
    kind = resolve_type(dataset.get('type'), DATASETS, scope)
    return isinstance(kind, type) and 'download' in inspect.signature(kind).parameters


def _reads_image_sets(dataset: dict, scope: str | None) -> bool:
    """Whether a data set has the layout of Pascal VOC, as MMPretrain reads it."""
    kind = resolve_type(dataset.get('type'), DATASETS, scope)
    module = sys.modules.get('mmpretrain.datasets')
    return isinstance(kind, type) and module is not None and issubclass(kind, module.VOC)


def add_hooks(cfg: Config, *hooks: str | dict) -> None:
    """Add hooks to ``custom_hooks`` of a config, except those that it already has, also as a derived class.

    Args:
        cfg: The config, changed in place.
        hooks: Types, or configs of hooks.
    """
    own, scope = list(cfg.get('custom_hooks') or []), cfg.get('default_scope')
    present = [hook for hook in (*own, *(cfg.get('default_hooks') or {}).values()) if hook is not None]
    kinds = [hook['type'] if isinstance(hook, dict) else type(hook) for hook in present]
    added = [dict(type=hook) if isinstance(hook, str) else hook for hook in hooks]
    cfg.custom_hooks = own + [hook for hook in added if not any(
        is_kind(kind, HOOKS.get(hook['type']), HOOKS, scope) for kind in kinds)]


def test_hooks(args: argparse.Namespace) -> list[str]:
    """The hooks of a test that the flags of :func:`make_parser` do not turn off."""
    off = {'mmasl.CheckDataHook': args.no_check_data, 'mmasl.CheckFiniteHook': args.no_check_finite}
    return [hook for hook in TEST_HOOKS if not off.get(hook)]


def build_runner(cfg: Config, hooks: Sequence[str | dict] = TEST_HOOKS) -> Runner:
    """Build the runner of a config; on the CPU with gloo if ``--launcher pytorch`` finds no GPU.

    Args:
        cfg: The config, whose ``launcher`` is set.
        hooks: Hooks that are added to those of the config, see :func:`add_hooks`.

    Raises:
        ConfigError: ``--launcher pytorch`` without torchrun.
        UnavailableError: Another launcher without a GPU.
    """
    if cfg.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ConfigError('--launcher pytorch needs torchrun: use tools/dist_train.sh or tools/dist_test.sh')
    if cfg.launcher != 'none' and get_device() == 'cpu':
        if cfg.launcher != 'pytorch':
            require_gpu(f'--launcher {cfg.launcher}')
        # MMEngine would select a GPU for each process.
        torch.distributed.init_process_group('gloo')
        atexit.register(torch.distributed.destroy_process_group)  # otherwise its threads may abort the exit
        cfg.setdefault('model_wrapper_cfg', dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
    add_hooks(cfg, *hooks)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


@contextmanager
def building_data(cfg: Config, no_check_data: bool | None = None) -> Iterator[None]:
    """Turn any error of stock data sets, samplers and evaluators while they are built into a ConfigError.

    Files that mmasl reads itself have messages of their own. An error of another class says at least what it is about.

    Args:
        cfg: The config.
        no_check_data: The flag of :func:`make_parser`; True keeps the traceback, for those who develop a data set. None
            if the tool does not have the flag.

    Raises:
        ConfigError: The data cannot be built.
    """
    try:
        yield
    except (MMASLError, URLError):
        raise
    except Exception as error:
        if no_check_data:
            raise
        hint = '' if no_check_data is None else '; --no-check-data shows the traceback'
        raise ConfigError(f'The data of {cfg.filename or "the config"} cannot be built: {type(error).__name__}: '
                          f'{error}. Correct the config or its files{hint}') from error


def load_test_checkpoint(runner: Runner) -> None:
    """Load the checkpoint of a test as ``runner.test()`` does, without testing."""
    runner.call_hook('before_run')  # EMAHook copies the model here
    runner.load_or_resume()


def progress(items: Iterable, what: str) -> Iterable:
    """Iterate over items with a progress bar on stderr."""
    return track(items, what, console=Console(stderr=True))
