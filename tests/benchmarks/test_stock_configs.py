"""The swap of stock losses by --cfg-options, and the rows of benchmarks/stock_configs.csv."""
import argparse
import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import DictAction
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

from benchmarks import stock_configs
from benchmarks.stock_configs import FAILS, LEFT_OUT, NOT_RUN, WORKS, Family
from mmasl import AsymmetricLoss
from mmasl.reproduce.runs import read_rows

ROWS = read_rows(stock_configs.ROWS)
KEY = ('package', 'family', 'head', 'config')
RESNET18 = {'model.backbone.depth': 18, 'model.neck.in_channels': [64, 128, 256, 512]}
# Heads that tests/models/heads/test_mmdet_heads.py does not have: config, further options, number of replaced losses.
HEADS = {
    'LADHead': ('lad/lad_r50-paa-r101_fpn_2xb8_coco_1x', RESNET18 | {
        'model.teacher_backbone.depth': 18, 'model.teacher_neck.in_channels': [64, 128, 256, 512]}, 2),
    'RetinaSepBNHead': ('nas_fpn/retinanet_r50_fpn_crop640-50e_coco', RESNET18, 1),
    'DecoupledSOLOLightHead': ('solo/decoupled-solo-light_r50_fpn_3x_coco', RESNET18 | {
        'model.mask_head.num_grids': [8, 6, 4, 3, 2]}, 1),
    'FCOSHead as RPN': ('faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco', RESNET18, 1),
}


@pytest.fixture(autouse=True)
def quiet():
    """MMEngine reports the initialisation of every single parameter."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def stock(config, package='mmdet'):
    return stock_configs.load(stock_configs.config_folder(package) / f'{config}.py')


def typed(options):
    """Options as --cfg-options parses them."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(['--cfg-options', *(f'{key}={value}' for key, value in options.items())]).cfg_options


def test_document_shows_the_rows():
    text = stock_configs.DOC.read_text()
    assert stock_configs.render(text, ROWS) == text, 'run python benchmarks/stock_configs.py --render'


def test_rows():
    assert {row['outcome'] for row in ROWS} <= {WORKS, FAILS, NOT_RUN, LEFT_OUT}
    assert len({tuple(row[name] for name in KEY) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert bool(row['reason']) is (row['outcome'] != WORKS), row
        assert bool(row['validation']) is (row['outcome'] == WORKS), row
        assert row['loss'] or row['outcome'] != WORKS, row
        assert all((stock_configs.ROOT / path).is_file() for path in re.findall(r'tests/\S+\.py', row['reason'])), row


def test_swap_replaces_every_loss_and_nothing_else():
    cfg, expected = stock('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco'), stock('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco')
    for head in expected.model.roi_head.bbox_head:
        assert head.loss_cls == dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0)
        head.loss_cls = dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=1, gamma_neg=2, clip=0,
                             alpha=0.25, loss_weight=2.0)
    expected.custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)
    options = stock_configs.swap(cfg)
    cfg.merge_from_dict(typed(options))
    assert cfg.to_dict() == expected.to_dict()
    assert not stock_configs.stock_losses(cfg)


def test_swap_keeps_what_is_not_focal():
    cfg = stock('tood/tood_r50_fpn_1x_coco')
    cfg.custom_imports = dict(imports=['others'])
    cfg.merge_from_dict(typed(stock_configs.swap(cfg)))
    assert cfg.custom_imports == dict(imports=['others', 'mmasl'], allow_failed_imports=False)
    head = cfg.model.bbox_head
    assert (head.initial_loss_cls.type, head.loss_cls.type) == ('mmasl.AsymmetricLoss', 'QualityFocalLoss')
    assert head.initial_loss_cls.activated is True


def test_swap_of_a_classifier():
    cfg = stock('resnet/resnet50_8xb32-mixup_in1k', 'mmpretrain')
    assert cfg.model.head.loss.use_soft
    cfg.merge_from_dict(typed(stock_configs.swap(cfg)))
    assert cfg.model.head.loss == dict(type='mmasl.AsymmetricLoss', gamma_pos=0, gamma_neg=4, clip=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('head', HEADS)
def test_training_step(head):
    config, options, count = HEADS[head]
    cfg = stock(config)
    cfg.model.data_preprocessor.batch_augments = None
    pretrained = {f'{path}.init_cfg': None for path, part in stock_configs.walk(cfg.model, 'model')
                  if 'Pretrained' in str(part.get('init_cfg'))}
    cfg.merge_from_dict(typed(stock_configs.swap(cfg) | pretrained | options))
    if 'teacher_ckpt' in cfg.model:
        cfg.model.teacher_ckpt = None
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    model.init_weights()
    # LAD's teacher is not among its modules.
    parts = [*model.modules(), *(model.teacher_model.modules() if head == 'LADHead' else [])]
    assert sum(isinstance(part, AsymmetricLoss) for part in parts) == count
    data = demo_mm_inputs(2, [(3, 128, 128), (3, 64, 128)], [3, 0], 80, with_mask='SOLO' in head)
    model.train()
    total, logged = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    total.backward()
    assert all(value.isfinite() for value in logged.values()), logged
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('tokens', [1, 2])
def test_grounding_dino_head(tokens):
    """The head without its detector, which needs a language model.

    The head calls its loss with the flat scores of the words of a class. The tokens of a class share its label.
    """
    cfg = stock('grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco')
    shared = dict(train_cfg=cfg.model.train_cfg, num_pred_layer=1, as_two_stage=True)
    focal = cfg.model.bbox_head | shared
    options = stock_configs.swap(cfg) | {'model.bbox_head.loss_cls.gamma_pos': 2}
    cfg.merge_from_dict(typed(options))
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 256, generator=rng).requires_grad_()
    boxes = torch.rand(2, 20, 4, generator=rng)
    text = torch.arange(256) < 6
    maps = torch.zeros(2, 256)
    maps[0, :tokens] = maps[1, 3:3 + tokens] = 1 / tokens
    truth = [InstanceData(bboxes=torch.tensor([[8., 8., 60., 60.], [20., 4., 90., 50.]]), labels=torch.tensor([0, 1]),
                          positive_maps=maps, text_token_mask=text.expand(2, -1)) for _ in range(2)]
    losses, grads = [], []
    for head_cfg in (focal, cfg.model.bbox_head | shared):
        with DefaultScope.overwrite_default_scope('mmdet'):
            head = MODELS.build(head_cfg)
        head.text_masks = text[:6].expand(2, -1)
        losses.append(head.loss_by_feat_single(logits, boxes, truth, [dict(img_shape=(128, 128))] * 2)[0])
        grads.append(torch.autograd.grad(losses[-1], logits)[0])
    assert isinstance(head.loss_cls, AsymmetricLoss)
    assert grads[1].isfinite().all() and grads[1][..., :6].all() and not grads[1][..., 6:].any()
    if tokens == 1:  # focal loss treats soft labels differently
        torch.testing.assert_close(losses[1], losses[0].squeeze(), rtol=1e-5, atol=0)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_rows_have_every_family():
    found = {(family.package, family.name, family.head, family.config if family.head else '')
             for package in stock_configs.PACKAGES for family in stock_configs.discover(package)}
    assert {tuple(row[name] for name in KEY) for row in ROWS} >= found


@pytest.mark.slow
@pytest.mark.parametrize('row', [row for row in ROWS if row['outcome'] in (WORKS, FAILS)],
                         ids=lambda row: f"{row['family']}-{Path(row['config']).stem}-{row['head']}")
def test_outcome(row, tmp_path):
    """Every row is reproduced."""
    cfg = stock(row['config'][:-3], row['package'])
    if why := stock_configs.unavailable_reason(cfg):
        pytest.skip(why)
    data = tmp_path / 'data'
    if importlib.util.find_spec('transformers'):
        stock_configs.make_bert(data / 'bert')
    family = Family(row['package'], row['family'], row['head'], [row['config']], runnable=[row['config']])
    again = stock_configs.execute(family, data, tmp_path)
    assert again['outcome'] == row['outcome'], again['reason']
