"""Train a detector of MMDetection or a classifier of MMPretrain from its config."""
import argparse
import os.path as osp
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError

from mmengine.config import Config, ConfigDict
from mmengine.model import PretrainedInit
from mmengine.optim import AmpOptimWrapper, OneCycleLR, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, PARAM_SCHEDULERS, WEIGHT_INITIALIZERS

from mmasl.datasets.validation import check_annotation_files
from mmasl.errors import CheckpointError, ConfigError, UnavailableError
from mmasl.utils.checkpoint import find_checkpoint, safe_checkpoint_loading
from mmasl.utils.config import is_kind, resolve_type
from mmasl.utils.distributed import check_on_main_process
from mmasl.utils.tools import (
    build_runner,
    building_data,
    check_data,
    drop_pretrained,
    exit_on_user_error,
    load_config,
    make_parser,
    parse_args,
    require_file,
    require_gpu,
    set_dataloader_defaults,
)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from a checkpoint, or from the last one in the work dir')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by total batch size / auto_scale_lr.base_batch_size')
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument('--no-exact-resume', action='store_true',
                        help='do not add mmasl.ResumeHook, which makes an interrupted and resumed run equal to an '
                        'uninterrupted one')
    parser.add_argument('--no-check-resume', action='store_true',
                        help='resume with the settings of the checkpoint, such as its learning rate and schedules, '
                        'where those of the config differ')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config of the flags, checked as far as possible without building anything."""
    cfg = load_config(args)
    if args.amp:
        enable_amp(cfg.optim_wrapper, cfg.get('default_scope'))
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    set_resume(cfg, args.resume)
    if cfg.get('load_from'):
        require_file(cfg.load_from, 'checkpoint', f': {checkpoint_hint(cfg.load_from, args.config)}')
    for path in () if cfg.resume else pretrained_files(cfg.model):
        require_file(path, 'file of pretrained weights', f': {checkpoint_hint(path, args.config)}, or train from '
                     'scratch with --cfg-options model.backbone.init_cfg=None')
    check_data(cfg, 'train', 'val')
    if is_kind(cfg.optim_wrapper.get('type'), AmpOptimWrapper, OPTIM_WRAPPERS, cfg.get('default_scope')):
        require_gpu("optim_wrapper.type='AmpOptimWrapper'")
    set_dataloader_defaults(cfg, 'train', 'val', 'test')
    return cfg


def checkpoint_hint(checkpoint: str, config: str) -> str:
    """How to get a checkpoint: train the config beside ``config`` whose name is its work dir, if there is one."""
    path = osp.join(osp.dirname(config), osp.basename(osp.dirname(checkpoint)) + '.py')
    return f'train it first (python tools/train.py {path})' if osp.isfile(path) else 'give an existing file'


def enable_amp(optim_wrapper: ConfigDict, scope: str | None = None) -> None:
    kind = optim_wrapper.get('type', 'OptimWrapper')
    if resolve_type(kind, OPTIM_WRAPPERS, scope) is OptimWrapper:
        optim_wrapper.type = 'AmpOptimWrapper'
    elif not is_kind(kind, AmpOptimWrapper, OPTIM_WRAPPERS, scope):
        raise ConfigError('--amp replaces OptimWrapper, but optim_wrapper.type is '
                          f"'{getattr(kind, '__name__', kind)}': remove it")
    optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ConfigError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config: '
                          'the total batch size that its learning rate is for')
    for scheduler in iter_schedulers(cfg.get('param_scheduler')):
        if is_kind(scheduler.get('type'), OneCycleLR, PARAM_SCHEDULERS, cfg.get('default_scope')):
            raise ConfigError('--auto-scale-lr has no effect on OneCycleLR, which takes the learning rate from its '
                              'eta_max: set param_scheduler.eta_max instead')
    cfg.auto_scale_lr.enable = True


def iter_schedulers(schedulers: dict | list | tuple | None) -> Iterator[dict]:
    """The configs in ``param_scheduler``: one, a list, or these by the name of an optimizer."""
    if isinstance(schedulers, dict) and 'type' in schedulers:
        yield schedulers
    elif schedulers:
        for value in schedulers.values() if isinstance(schedulers, dict) else schedulers:
            if isinstance(value, (dict, list, tuple)):
                yield from iter_schedulers(value)


def set_resume(cfg: Config, resume: str | None) -> None:
    """Set ``cfg.load_from`` to the checkpoint to resume; if the work dir has none, print that training starts anew."""
    resume = resume or (cfg.get('resume') and (cfg.get('load_from') or 'auto'))
    if resume == 'auto':
        resume, reasons = find_checkpoint(cfg.work_dir)
        skipped = '\n'.join(f'  {path}: {reason}' for path, reason in reasons.items())
        if resume is None and reasons:
            raise CheckpointError(f'{cfg.work_dir} holds no checkpoint to resume from:\n{skipped}\nName another with '
                                  '--resume CHECKPOINT, or start anew without --resume in another --work-dir.')
        if resume is None:
            print(f'Nothing to resume: {cfg.work_dir} holds no checkpoint. Training starts anew.', file=sys.stderr)
        elif reasons:
            print(f'Resuming from {resume}, the newest readable checkpoint. Skipped:\n{skipped}', file=sys.stderr)
    cfg.resume = bool(resume)
    if resume:
        cfg.load_from = resume
        drop_pretrained(cfg)


def pretrained_files(model: dict | list | tuple) -> Iterator[str]:
    """The checkpoints of all ``init_cfg`` entries in a model's config."""
    for value in model.values() if isinstance(model, dict) else model:
        if isinstance(value, (dict, list, tuple)):
            yield from pretrained_files(value)
    if isinstance(model, dict) and is_kind(model.get('type'), PretrainedInit, WEIGHT_INITIALIZERS):
        yield model['checkpoint']


def automatic_hooks(cfg: Config, args: argparse.Namespace) -> list[str | dict]:
    """The hooks that the flags do not turn off."""
    hooks: list[str | dict] = []
    if not args.no_check_data:
        hooks.append('mmasl.CheckDataHook')
    if not args.no_check_finite:
        hooks.append('mmasl.CheckFiniteHook')
    if not args.no_exact_resume:
        hooks.append(dict(type='mmasl.ResumeHook', strict=not args.no_check_resume))
    # Not strict to train from weights: a head for other classes starts from initial weights.
    hooks.append(dict(type='mmasl.CheckStateDictHook', strict=cfg.resume))
    return hooks


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    with downloads():  # timm downloads when the model is built, others when its weights are initialised
        runner = build_runner(cfg, automatic_hooks(cfg, args))
        if not args.no_check_data:
            check_on_main_process(lambda: check_annotation_files(cfg, 'train', 'val'))
        with building_data(cfg, args.no_check_data):
            runner.train_loop, runner.val_loop  # noqa: B018  # properties that build
        runner.train()


@contextmanager
def downloads() -> Iterator[None]:
    """Raise UnavailableError if pretrained weights cannot be downloaded."""
    try:
        yield
    except Exception as error:
        hub = sys.modules.get('huggingface_hub.errors')  # loaded by timm only
        if not isinstance(error, (URLError, getattr(hub, 'LocalEntryNotFoundError', URLError))):
            raise
        raise UnavailableError(f'Pretrained weights could not be downloaded ({error}): set init_cfg.checkpoint in the '
                               'model to a file, or train from scratch with --cfg-options model.backbone.init_cfg=None '
                               '(model.backbone.pretrained=False for a backbone of timm)') from None


if __name__ == '__main__':
    main()
