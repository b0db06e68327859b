"""Every config loads and builds, and differs from its sisters and its stock base only where its name says."""
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import METRICS, MODELS, DefaultScope

from mmasl import AsymmetricLoss

ROOT = Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / 'configs').glob('*.py'))}
LOSSES = ('bce', 'focal', 'asl')
GAP_HOOKS = ('mmasl.ProbabilityGapHook', 'mmasl.AdaptiveAsymmetryHook')
STOCK = dict(fcos_focal_coco='mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
             atss_focal_coco='mmdet::atss/atss_r50_fpn_1x_coco.py')
# gamma_pos, gamma_neg, clip, alpha: App. B and H of the paper
SETTINGS = dict(classifier=dict(bce=(0, 0, 0, None), focal=(2, 2, 0, None), asl=(0, 4, 0.05, None)),
                detector=dict(asl=(1, 2, 0, 0.25)))


def load(name: str) -> Config:
    return Config.fromfile(PATHS[name])


def flatten(value: object, key: str = '') -> dict:
    """Dotted key -> leaf; empty containers are leaves too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    flat = {k: v for name, inner in items for k, v in flatten(inner, f'{key}{name}.').items()}
    return flat or {key: value}


def differences(a: Config, b: Config) -> set[str]:
    a, b, absent = flatten(a.to_dict()), flatten(b.to_dict()), object()
    return {key for key in a | b if a.get(key, absent) != b.get(key, absent)}


def without_weights(model: dict) -> dict:
    """A model's config that downloads nothing."""
    if isinstance(model, dict):
        return ConfigDict({key: without_weights(value) for key, value in model.items()
                           if not (key == 'init_cfg' and isinstance(value, dict) and value['type'] == 'Pretrained')})
    return [without_weights(value) for value in model] if isinstance(model, list) else model


def pipelines(dataset: dict) -> list:
    inner = dataset.get('datasets') or [dataset['dataset']] if {'datasets', 'dataset'} & set(dataset) else []
    own = [dataset['pipeline']] if 'pipeline' in dataset else []
    return own + [pipeline for wrapped in inner for pipeline in pipelines(wrapped)]


def loss_name(name: str) -> str | None:
    return next((part for part in name.split('_') if part in LOSSES), None)


def build_model(cfg: Config):
    model = without_weights(cfg.model)
    if 'data_preprocessor' in cfg:  # as mmengine's Runner does
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(model)


@pytest.mark.parametrize('name', PATHS)
def test_builds(name):
    cfg = load(name)
    assert cfg.custom_imports == dict(imports=['mmasl'], allow_failed_imports=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = build_model(cfg)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            steps = pipelines(loader.dataset)
            assert steps
            for pipeline in steps:
                assert len(Compose(pipeline).transforms) == len(pipeline)
        if cfg.default_scope == 'mmpretrain':
            METRICS.build(cfg.val_evaluator)
    head = getattr(model, 'bbox_head', None) or model.head
    assert getattr(head, 'cls_out_channels', head.num_classes) == head.num_classes

    losses = [module for module in model.modules() if isinstance(module, AsymmetricLoss)]
    loss = 'asl' if 'adaptive' in name else loss_name(name)
    expected = SETTINGS['detector' if hasattr(model, 'bbox_head') else 'classifier'].get(loss)
    hooks = [hook.type for hook in cfg.get('custom_hooks') or [] if hook.type in GAP_HOOKS]
    assert len(hooks) == len(losses), 'what trains with the loss logs its gap'
    assert len(losses) == (expected is not None)
    for loss in losses:
        found = [getattr(loss, key).item() for key in ('gamma_pos', 'gamma_neg', 'clip')] + [loss.alpha]
        assert found == pytest.approx(expected)
        written = cfg.model.get('bbox_head', {}).get('loss_cls') or cfg.model.head.loss
        assert 'detach_focusing' in written and written['use_sigmoid'] is True and loss.reduction == 'mean'


def sisters() -> list[tuple[str, str]]:
    """Pairs of configs whose names differ in the loss alone."""
    families = defaultdict(list)
    for name in filter(loss_name, PATHS):
        families[name.replace(f'_{loss_name(name)}_', '_')].append(name)
    assert all(len(names) > 1 for names in families.values()), 'a config without another to compare it with'
    return [(names[0], other) for names in families.values() for other in names[1:]]


@pytest.mark.parametrize('name, other', sisters())
def test_sisters_differ_in_the_loss_alone(name, other):
    different = differences(load(name), load(other))
    assert different
    # On the digits every loss has its own learning rate, from an equal search: benchmarks/digits_lr.csv.
    allowed = {'param_scheduler.eta_max.'} if name.endswith('_digits') else set()
    # Beside MMDetection's own loss there is no gap to log.
    allowed |= {'custom_hooks.0.type.'} if load(other).default_scope == 'mmdet' else set()
    assert all(key.startswith(('model.bbox_head.loss_cls.', 'model.head.loss.')) for key in different - allowed)


@pytest.mark.parametrize('name', [name for name in PATHS if name.endswith('_digits')])
def test_digits_learning_rate_is_the_best_of_its_search(name):
    with open(ROOT / 'benchmarks' / 'digits_lr.csv') as file:
        rows = [row for row in csv.DictReader(file) if row['config'] == name]
    figure = 'bbox_mAP' if name.startswith('fcos') else 'mAP'
    best = max(rows, key=lambda row: float(row[figure]))
    assert load(name).param_scheduler.eta_max == float(best['lr'])
    assert len({row['epochs'] for row in rows}) == 1
    rates = sorted(float(row['lr']) for row in rows)
    assert rates[0] < float(best['lr']) < rates[-1], 'the best lies at the edge of the search'


@pytest.mark.parametrize('name', STOCK)
def test_baseline_is_stock(name):
    stock = Config.fromstring(f'_base_ = {STOCK[name]!r}', file_format='.py')
    assert all(key.startswith('custom_imports.') for key in differences(load(name), stock))


@pytest.mark.parametrize('loss', LOSSES)
def test_voc_differs_from_coco_in_the_data_alone(loss):
    different = differences(load(f'resnet101_{loss}_voc'), load(f'resnet101_{loss}_coco'))
    loaders = {f'{split}_dataloader.dataset' for split in ('train', 'val', 'test')}
    assert {'.'.join(key.split('.')[:2]) for key in different - {'model.head.num_classes.'}} == loaders


def test_recipe_is_the_papers():
    cfg = load('resnet101_asl_coco')
    assert cfg.optim_wrapper.optimizer == dict(type='Adam', lr=2e-4)
    assert cfg.param_scheduler.type == 'OneCycleLR' and cfg.param_scheduler.eta_max == 2e-4
    assert cfg.train_cfg.max_epochs == 60


@pytest.mark.parametrize('split', ('train', 'val', 'test'))
def test_the_whole_image_is_squeezed_to_448_px(split, tmp_path):
    import cv2
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 90:] = 255
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    cfg = load('resnet101_asl_coco')
    pipeline = cfg[f'{split}_dataloader'].dataset.pipeline
    steps = [step for step in pipeline if step.type != 'RandAugment']
    assert (len(steps) < len(pipeline)) == (split == 'train')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        inputs = Compose(steps)(dict(img_path=str(tmp_path / 'image.png'), gt_label=[3]))['inputs']
    assert inputs.shape == (3, 448, 448)
    assert (inputs[..., :330] == 0).all() and (inputs[..., 342:] == 255).all()


def test_classifier_gets_rgb_from_0_to_1():
    import torch
    cfg = load('resnet101_asl_coco')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        preprocessor = MODELS.build(dict(type='ClsDataPreprocessor', **cfg.data_preprocessor))
    bgr = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    rgb = preprocessor(dict(inputs=bgr))['inputs'].flatten()
    torch.testing.assert_close(rgb, torch.tensor([1., 0.2, 0.]))
