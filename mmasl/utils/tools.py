"""What tools/train.py and tools/test.py share: flags, the config behind them, and checks before anything is built.

A mistake of the user ends in ``SystemExit`` with a message that names it and its cure, without a traceback.
"""
import argparse
import atexit
import dis
import os
import os.path as osp
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track

from mmasl.datasets.digits import DigitScenes
from mmasl.engine.hooks.checkpoint import FitCheck
from mmasl.engine.hooks.checks import add_checks
from mmasl.errors import DiskFullError, UnreadableImageError
from mmasl.reproduce.experiments import digits_of
from mmasl.utils.checkpoint import load_only_data
from mmasl.utils.files import is_full


@contextmanager
def plain_errors() -> Iterator[None]:
    """End in SystemExit with the message where mmasl itself raised the error: a traceback would add nothing to it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UnreadableImageError):
            # From the process of a data loader it comes with that process's traceback.
            raise SystemExit(str(error).rsplit(f'{UnreadableImageError.__name__}: ', 1)[-1].strip()) from None
        if not _raised_by_mmasl(error):
            raise
        raise SystemExit(str(error.args[0]) if len(error.args) == 1 else str(error)) from None


def _raised_by_mmasl(error: BaseException) -> bool:
    """Whether a ``raise`` of this package, and not a call in it, was the origin."""
    trace: Any = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (Path(code.co_filename).is_relative_to(Path(__file__).parents[1])
            and code.co_code[trace.tb_lasti] == dis.opmap['RAISE_VARARGS'])


SOURCES = {  # pattern in the path of a missing file: where to get it
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
NO_DOWNLOAD = ('Without any download: make demo; or python tools/make_digits.py data/digits, then\n'
               '  configs/digits/fcos_asl_digits.py (detection) or configs/digits/resnet_asl_digits.py (classification).')
DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')  # these fetch their files themselves


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of both tools."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help="folder of logs and checkpoints (default: the config's, or work_dirs/NAME)")
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision; needs a GPU')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', default={},
                        help='override settings of the config, as in model.bbox_head.loss_cls.gamma_neg=3; '
                        'a list is key="[a,b]", without spaces')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, with a message where an override is not KEY=VALUE."""
    try:
        return parser.parse_args(argv)
    except ValueError:  # DictAction splits at '='
        parser.error('every value of --cfg-options must be KEY=VALUE')


def load_config(args: argparse.Namespace) -> Config:
    """The config of the shared flags; ``--amp`` is only checked, since training and testing switch it differently.

    From here on nothing in a checkpoint is executed.
    """
    load_only_data()
    require_file(args.config, 'config')
    if args.amp:
        require_gpu('--amp')
    cfg = Config.fromfile(args.config)
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (KeyError, TypeError) as error:
        raise SystemExit(f'--cfg-options does not fit {args.config}: {error}') from None
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


def is_classification(cfg: Config) -> bool:
    """Whether a config is MMPretrain's; every other scope is handled as detection."""
    return cfg.get('default_scope') == 'mmpretrain'


def set_dataloader_defaults(cfg: Config, *splits: str) -> None:
    """What MMPretrain's own tools add to dataloaders, where nothing is set.

    Detection keeps mmengine's defaults: its images differ in size and cannot be collated into one tensor.
    """
    for loader in (cfg.get(f'{split}_dataloader') for split in splits if is_classification(cfg)):
        if loader is not None:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', get_device() == 'cuda')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def drop_pretrained(cfg: Config) -> None:
    """Leave out the download of a timm backbone's weights, which a checkpoint replaces."""
    if cfg.model.get('backbone', {}).get('pretrained') is True:
        cfg.model.backbone.pretrained = False


def require_file(path: str, what: str, cure: str = '') -> None:
    """Exit if a local file does not exist; URLs and ``torchvision://`` names pass."""
    if '://' not in path and not osp.isfile(osp.expanduser(path)):
        raise SystemExit(f'No such {what}: {path} (relative paths start at {os.getcwd()}){cure}')


def require_gpu(what: str) -> None:
    """Exit if there is no GPU, which something needs."""
    if get_device() in ('cpu', 'mps'):
        raise SystemExit(f'{what} needs a GPU, and PyTorch finds none on this machine: run without it')


def check_data(cfg: Config, *splits: str) -> None:
    """Exit if data that a run needs is missing, with all missing paths and where to get them."""
    missing: dict[str, str] = {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        paths = dict(_dataset_paths(loader.dataset, f'{split}_dataloader.dataset')) if loader else {}
        paths |= _evaluator_paths(cfg.get(f'{split}_evaluator'), f'{split}_evaluator')
        missing |= {key: path for key, path in paths.items()
                    if '://' not in path and not osp.exists(osp.expanduser(path))}
    if missing:
        cures = [cure for mark, cure in SOURCES.items() if re.search(mark, ' '.join(missing.values()))]
        roots = dict.fromkeys(str(folder) for path in missing.values() for folder in (Path(path), *Path(path).parents))
        cures += [f'Digits: {make_digits(root, digits)}' for root in roots if (digits := digits_of(root))]
        raise SystemExit('\n'.join([
            f'Missing data (relative paths start at {os.getcwd()}):',
            *(f'  {path}   <- {key}' for key, path in missing.items()), *cures,
            'Data in another place: link it to this one (ln -s), or give its place to tools/train.py, as in',
            '  --cfg-options train_dataloader.dataset.data_root=PATH.',
            NO_DOWNLOAD]))


def make_digits(root: str, digits: DigitScenes) -> str:
    """The command that writes some digits."""
    usual = DigitScenes(single=digits.single, labels_per_image=1.) if digits.single else DigitScenes()
    values = {field.name: getattr(digits, field.name) for field in fields(DigitScenes)}
    flags = [f'--{name.replace("_", "-")} {value}' for name, value in values.items() if value != getattr(usual, name)]
    return ' '.join([f'python tools/make_digits.py {root}', *['--single'] * digits.single, *flags])


def _dataset_paths(dataset: dict, key: str) -> Iterator[tuple[str, str]]:
    """(config key, path) of the files and folders of a dataset, and of those that it wraps."""
    if isinstance(dataset.get('datasets'), (list, tuple)):
        for number, inner in enumerate(dataset['datasets']):
            yield from _dataset_paths(inner, f'{key}.datasets.{number}')
    elif isinstance(dataset.get('dataset'), dict):
        yield from _dataset_paths(dataset['dataset'], f'{key}.dataset')
    elif not dataset.get('backend_args'):
        root, prefix, kind = str(dataset.get('data_root') or ''), dataset.get('data_prefix'), str(dataset.get('type'))
        parts: dict[str, Any] = {'ann_file': dataset.get('ann_file')}
        if kind.endswith(('VOC', 'VOCMultiLabel')) and dataset.get('split') and not dataset.get('image_set_path'):
            parts['data_root'] = osp.join('ImageSets', 'Main', f"{dataset['split']}.txt")
        parts |= {f'data_prefix.{k}': v for k, v in prefix.items()} if isinstance(prefix, dict) else {
            'data_prefix': prefix}
        parts = {k: v for k, v in parts.items() if isinstance(v, str) and v}
        if not parts and root and kind not in DOWNLOADING:
            parts = {'data_root': ''}
        for name, part in parts.items():
            yield f'{key}.{name}', osp.join(root, part)


def _evaluator_paths(evaluator: dict | list | None, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(evaluator, (list, tuple)):
        for number, inner in enumerate(evaluator):
            yield from _evaluator_paths(inner, f'{key}.{number}')
    elif evaluator and isinstance(evaluator.get('ann_file'), str) and not evaluator.get('backend_args'):
        yield f'{key}.ann_file', evaluator['ann_file']


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, on the CPU with gloo where ``--launcher pytorch`` finds no GPU."""
    if cfg.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise SystemExit('--launcher pytorch needs torchrun: use tools/dist_train.sh or tools/dist_test.sh')
    if cfg.launcher != 'none' and get_device() == 'cpu':
        if cfg.launcher != 'pytorch':
            require_gpu(f'--launcher {cfg.launcher}')
        # mmengine would select a GPU for each process.
        torch.distributed.init_process_group('gloo')
        atexit.register(torch.distributed.destroy_process_group)  # else its threads may abort the exit
        cfg.setdefault('model_wrapper_cfg', dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
    add_checks(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def progress(items: Iterable, what: str) -> Iterable:
    """The items, with a bar on the error stream while they are gone through."""
    return track(items, what, console=Console(stderr=True))


@contextmanager
def faults(work_dir: str) -> Iterator[None]:
    """End in a message alone where mmasl refuses something, such as a checkpoint or an image, or the disk is full."""
    try:
        with plain_errors():
            yield
    except OSError as error:
        if not is_full(error):
            raise
        raise SystemExit(str(error if isinstance(error, DiskFullError) else DiskFullError.describe(
            error, error.filename or 'A file of the run', work_dir))) from None


def load_weights(runner: Runner) -> None:
    """Load the checkpoint of a test, all of which must fit, as ``runner.test()`` would."""
    runner.register_hook(FitCheck())
    with faults(runner.work_dir):
        runner.call_hook('before_run')  # EMAHook copies the model here
        runner.load_or_resume()
