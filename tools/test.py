"""Test a detector of MMDetection or a classifier of MMPretrain from its config and a checkpoint."""
import argparse
import os.path as osp
from copy import deepcopy

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.registry import METRICS, MODELS

from mmasl.apis.drawing import use_font
from mmasl.datasets.validation import check_annotation_files
from mmasl.errors import ConfigError
from mmasl.utils.checkpoint import safe_checkpoint_loading
from mmasl.utils.config import is_kind, iter_dataset_configs, metainfo_classes
from mmasl.utils.distributed import check_on_main_process
from mmasl.utils.tools import (
    build_runner,
    building_data,
    check_data,
    drop_pretrained,
    exit_on_user_error,
    is_classification,
    load_config,
    make_parser,
    parse_args,
    require_file,
    set_dataloader_defaults,
    test_hooks,
)

SUFFIXES = dict(pred=('.pkl', '.pickle'), metrics=('.json', '.yml', '.yaml', '.pkl', '.pickle'))


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='FILE', help='write the predictions (.pkl) or metrics (.json, .yml, .pkl)')
    parser.add_argument('--out-item', choices=tuple(SUFFIXES), default='pred', help='what --out writes (default: pred)')
    parser.add_argument('--show', action='store_true', help='show the predictions in windows')
    parser.add_argument('--show-dir', metavar='FOLDER', help='write pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS', help='how long a window stays')
    parser.add_argument('--interval', type=int, default=1,
                        help='draw every INTERVAL-th image (classification; detection draws all)')
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation: tta_model and tta_pipeline of the config, or flipping')
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The config of the flags, checked as far as possible without building anything."""
    if args.out and not args.out.endswith(SUFFIXES[args.out_item]):
        raise ConfigError(f"--out {args.out}: {args.out_item} are written to {' or '.join(SUFFIXES[args.out_item])}")
    if args.interval < 1:
        raise ConfigError(f'--interval {args.interval}: give 1 or more')
    cfg = load_config(args)
    if cfg.get('test_dataloader') is None:
        raise ConfigError(f'{args.config} has no test_dataloader')
    require_file(args.checkpoint, 'checkpoint')
    cfg.load_from, cfg.resume = args.checkpoint, False
    drop_pretrained(cfg)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir:
        if args.tta and is_classification(cfg):
            raise ConfigError('MMPretrain cannot draw augmented images: use --show and --show-dir without --tta')
        draw_predictions(cfg, args)
    check_data(cfg, 'test')
    if args.tta:
        enable_tta(cfg)
    set_dataloader_defaults(cfg, 'test')
    return cfg


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ConfigError('--show and --show-dir need default_hooks.visualization in the config')
    folder = args.show_dir and osp.abspath(args.show_dir)
    hook.update(show=args.show, wait_time=args.wait_time)
    if is_classification(cfg):
        hook.update(enable=True, out_dir=folder, interval=args.interval)
    else:
        hook.update(draw=True, test_out_dir=folder)


def enable_tta(cfg: Config) -> None:
    """Wrap the model in ``tta_model`` and replace the pipelines of the test data by ``tta_pipeline``."""
    scope = cfg.get('default_scope')
    datasets = [dataset for _, dataset in iter_dataset_configs(cfg.test_dataloader.dataset, '', scope)]
    dataset, *_ = datasets
    if 'tta_pipeline' not in cfg:
        *head, pack = deepcopy(dataset.pipeline)
        if not is_classification(cfg):  # boxes are flipped back by these
            pack.meta_keys = tuple(dict.fromkeys((*pack.meta_keys, 'flip', 'flip_direction')))
        flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
        cfg.tta_pipeline = [*head, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    if 'tta_model' not in cfg:
        cfg.tta_model = classification_tta(cfg) if is_classification(cfg) else dict(
            type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline


def classification_tta(cfg: Config) -> dict:
    from mmpretrain.models.heads import MultiLabelClsHead
    head = (cfg.model.get('head') or {}).get('type')
    multi_label = is_kind(head, MultiLabelClsHead, MODELS, 'mmpretrain')
    return dict(type='mmasl.MultiLabelTTAModel' if multi_label else 'AverageClsScoreTTA')


@exit_on_user_error()
@safe_checkpoint_loading()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    cfg = configure(args)
    runner = build_runner(cfg, test_hooks(args))
    if not args.no_check_data:
        check_on_main_process(lambda: check_annotation_files(cfg, 'test'))
    with building_data(cfg, args.no_check_data):
        names = metainfo_classes(getattr(runner.test_loop.dataloader.dataset, 'metainfo', {})) or ()
    if args.out and args.out_item == 'pred':
        dump = 'DumpResults' if is_classification(cfg) else 'mmdet.DumpDetResults'
        runner.test_evaluator.metrics.append(METRICS.build(dict(type=dump, out_file_path=args.out)))
    with use_font(names if args.show or args.show_dir else ()):
        metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    main()
