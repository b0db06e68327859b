"""Train a detector of MMDetection or a classifier of MMPretrain from its config."""
import argparse
import os.path as osp
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError

from mmengine.config import Config, ConfigDict

from mmasl.datasets.validation import check_coco_files
from mmasl.engine.hooks.checkpoint import FitCheck
from mmasl.engine.hooks.resume import ResumeHook
from mmasl.utils.checkpoint import find_checkpoint
from mmasl.utils.tools import (
    build_runner,
    check_data,
    drop_pretrained,
    faults,
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
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config that the flags describe, checked as far as is possible without building anything."""
    cfg = load_config(args)
    if args.amp:
        enable_amp(cfg.optim_wrapper)
    elif cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        require_gpu("optim_wrapper.type='AmpOptimWrapper'")
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    set_resume(cfg, args.resume)
    if cfg.get('load_from'):
        require_file(cfg.load_from, 'checkpoint', f': {maker(cfg.load_from, args.config)}')
    for path in pretrained_files(cfg.model):
        require_file(path, 'file of pretrained weights', f': {maker(path, args.config)}, or leave it out with '
                     '--cfg-options model.backbone.init_cfg=None')
    check_data(cfg, 'train', 'val')
    set_dataloader_defaults(cfg, 'train', 'val', 'test')
    return cfg


def maker(checkpoint: str, config: str) -> str:
    """How to come by a checkpoint: the config beside ``config`` whose work dir it lies in, if there is one."""
    path = osp.join(osp.dirname(config), osp.basename(osp.dirname(checkpoint)) + '.py')
    return f'train it first (python tools/train.py {path})' if osp.isfile(path) else 'name a file that is there'


def enable_amp(optim_wrapper: ConfigDict) -> None:
    if optim_wrapper.get('type', 'OptimWrapper') not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise SystemExit(f"--amp replaces OptimWrapper, but optim_wrapper.type is '{optim_wrapper.type}'")
    optim_wrapper.type = 'AmpOptimWrapper'
    optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SystemExit('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config: '
                         'the total batch size that its learning rate is meant for')
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]:
        if str(scheduler.get('type')).startswith('OneCycle'):
            raise SystemExit('--auto-scale-lr has no effect on OneCycleLR, which takes the learning rate from its '
                             'eta_max: set param_scheduler.eta_max instead')
    cfg.auto_scale_lr.enable = True


def set_resume(cfg: Config, resume: str | None) -> None:
    """Name the checkpoint to resume from in ``cfg.load_from``; without one in the work dir, start anew and say so."""
    resume = resume or (cfg.get('resume') and (cfg.get('load_from') or 'auto'))
    if resume == 'auto':
        resume, reasons = find_checkpoint(cfg.work_dir)
        passed = '\n'.join(f'  {path}: {reason}' for path, reason in reasons.items())
        if resume is None and reasons:
            raise SystemExit(f'{cfg.work_dir} holds no checkpoint to resume from:\n{passed}\nName another with '
                             '--resume CHECKPOINT, or start anew without --resume, best in another --work-dir.')
        if resume is None:
            print(f'Nothing to resume: {cfg.work_dir} holds no checkpoint. Training starts anew.', file=sys.stderr)
        elif reasons:
            print(f'Resuming from {resume}, the newest checkpoint that can be read. Passed over:\n{passed}',
                  file=sys.stderr)
    cfg.resume = bool(resume)
    if resume:
        cfg.load_from = resume
        drop_pretrained(cfg)


def pretrained_files(model: dict | list | tuple) -> Iterator[str]:
    """Checkpoints that ``init_cfg`` entries anywhere in a model's config name."""
    for value in model.values() if isinstance(model, dict) else model:
        if isinstance(value, (dict, list, tuple)):
            yield from pretrained_files(value)
    if isinstance(model, dict) and model.get('type') == 'Pretrained':
        yield model['checkpoint']


def main(argv: list[str] | None = None) -> None:
    cfg = configure(parse_args(build_parser(), argv))
    with downloads():  # timm's are made where the model is built, the others' where its weights are initialised
        runner = build_runner(cfg)
        if not any(isinstance(hook, ResumeHook) for hook in runner.hooks):
            runner.register_hook(ResumeHook())
        if not cfg.resume:
            runner.register_hook(FitCheck(whole=False))  # a head for other classes starts anew
        with faults(cfg.work_dir):
            check_coco_files(cfg, 'train', 'val')
            runner.train()


@contextmanager
def downloads() -> Iterator[None]:
    """End in a message alone where pretrained weights are out of reach."""
    try:
        yield
    except Exception as error:
        hub = sys.modules.get('huggingface_hub.errors')  # there only with timm, which downloads by it
        if not isinstance(error, (URLError, getattr(hub, 'LocalEntryNotFoundError', URLError))):
            raise
        raise SystemExit(f'Pretrained weights could not be downloaded ({error}): set init_cfg.checkpoint in the model '
                         'to a file, or train from scratch with --cfg-options model.backbone.init_cfg=None '
                         '(model.backbone.pretrained=False for a backbone of timm)') from None


if __name__ == '__main__':
    main()
