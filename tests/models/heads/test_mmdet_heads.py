"""Stock MMDetection models, from their stock configs, train with ``mmasl.AsymmetricLoss`` swapped in by config alone.

To be fast, the models have no pre-trained weights, ResNet-18 for ResNet-50, and fewer stacked layers and queries.
"""
import logging
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from mmdet.models.losses import QualityFocalLoss
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope

from mmasl import AsymmetricLoss

# By stock loss, what makes AsymmetricLoss equal to it.
EQUAL = dict(
    CrossEntropyLoss=lambda stock: dict(gamma_pos=0., gamma_neg=0., clip=0.),
    FocalLoss=lambda stock: dict(gamma_pos=stock.gamma, gamma_neg=stock.gamma, clip=0., alpha=stock.alpha),
    QualityFocalLoss=lambda stock: dict(gamma_pos=stock.beta, gamma_neg=stock.beta, clip=0., soft_label='qfl'),
    VarifocalLoss=lambda stock: dict(gamma_pos=1., gamma_neg=stock.gamma, clip=0., soft_label='vfl',
                                     class_weight=stock.alpha, pos_weight=1 / stock.alpha))

SMALL_GRIDS = {'model.mask_head.num_grids': [8, 6, 4, 3, 2]}
# DDOD's deformable convolutions refuse feature maps smaller than their kernel.
THREE_LEVELS = {'model.neck.num_outs': 3, 'model.bbox_head.anchor_generator.strides': [8, 16, 32]}
# name: (stock config, further options)
HEADS = {
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', {}),
    'atss': ('atss/atss_r50_fpn_1x_coco', {}),
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco', {}),
    'fsaf': ('fsaf/fsaf_r50_fpn_1x_coco', {}),
    'foveabox': ('foveabox/fovea_r50_fpn_4xb4-1x_coco', {}),
    'paa': ('paa/paa_r50_fpn_1x_coco', {}),
    'yolof': ('yolof/yolof_r50-c5_8xb8-1x_coco', {}),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco', {}),
    'vfnet': ('vfnet/vfnet_r50_fpn_1x_coco', {}),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco', {}),
    'rtmdet-ins': ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco', {'model.data_preprocessor.pad_mask': True}),
    'tood-early': ('tood/tood_r50_fpn_1x_coco', {}),
    'tood-late': ('tood/tood_r50_fpn_1x_coco', {}),
    'ddod': ('ddod/ddod_r50_fpn_1x_coco', THREE_LEVELS),
    'sabl': ('sabl/sabl-retinanet_r50_fpn_1x_coco', {}),
    'reppoints': ('reppoints/reppoints-moment_r50_fpn_1x_coco', {}),
    'solo': ('solo/solo_r50_fpn_1x_coco', SMALL_GRIDS),
    'decoupled-solo': ('solo/decoupled-solo_r50_fpn_1x_coco', SMALL_GRIDS),
    'solov2': ('solov2/solov2_r50_fpn_1x_coco', SMALL_GRIDS),
    'condinst': ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance', {}),
    'deformable-detr': ('deformable_detr/deformable-detr_r50_16xb2-50e_coco', {}),
    'dino': ('dino/dino-4scale_r50_8xb2-12e_coco', {}),
    'conditional-detr': ('conditional_detr/conditional-detr_r50_8xb2-50e_coco', {}),
    'dab-detr': ('dab_detr/dab-detr_r50_8xb2-50e_coco', {}),
    'ddq-detr': ('ddq/ddq-detr-4scale_r50_8xb2-12e_coco', {}),
    'sparse-rcnn': ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco', {}),
    'pisa': ('pisa/retinanet-r50_fpn_pisa_1x_coco', {}),
    'ga-retinanet': ('guided_anchoring/ga-retinanet_r50_fpn_1x_coco', {}),
    'rpn': ('rpn/rpn_r50_fpn_1x_coco', {}),
    'yolov3': ('yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco', {}),
    'yolox': ('yolox/yolox_tiny_8xb8-300e_coco', {}),
}
MASK_HEADS = ('rtmdet-ins', 'solo', 'decoupled-solo', 'solov2', 'condinst')
FAST = ('fcos', 'atss', 'gfl', 'rtmdet', 'tood-late')
PREDICTING = ('fcos', 'retinanet', 'tood-late', 'rtmdet', 'gfl', 'conditional-detr', 'sparse-rcnn', 'yolox')


@pytest.fixture(autouse=True)
def quiet():
    """MMEngine reports the initialisation of every single parameter."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def walk(cfg, path='model'):
    """Yields every dict in a model config with its dotted path."""
    yield path, cfg
    for key, value in list(cfg.items()):
        children = enumerate(value) if isinstance(value, (list, tuple)) else [('', value)]
        for i, child in children:
            if isinstance(child, dict):
                yield from walk(child, f'{path}.{key}.{i}'.rstrip('.'))


def stock_losses(cfg):
    """The classification losses of a config, by path: what a user would replace."""
    return {path: loss for path, loss in walk(cfg.model) if path.endswith('loss_cls')}


def load(head):
    """The stock config of ``head``, made small."""
    path, options = HEADS[head]
    cfg = get_config(f'mmdet::{path}.py')
    resnet = cfg.model.backbone.type == 'ResNet'
    for path, part in walk(cfg.model):
        small = dict(stacked_convs=1, num_queries=30, num_proposals=30)
        if path.endswith(('encoder', 'decoder')):
            small['num_layers'] = 2
        part.update({key: min(part[key], value) for key, value in small.items() if key in part})
        if part.get('init_cfg') and part.init_cfg.get('type') == 'Pretrained':
            part.init_cfg = None
        if resnet and path.startswith('model.neck') and 'in_channels' in part:
            channels = part.in_channels
            part.in_channels = [c // 4 for c in channels] if isinstance(channels, list) else channels // 4
    if resnet:
        cfg.model.backbone.depth = 18
    if head == 'sparse-rcnn':
        cfg.model.roi_head.update(num_stages=2, stage_loss_weights=[1, 1], bbox_head=cfg.model.roi_head.bbox_head[:2])
    cfg.model.data_preprocessor.batch_augments = None
    cfg.merge_from_dict(options)
    return cfg


def replaced(stock, params):
    """What stands in a user's config in place of the loss ``stock``."""
    kept = {key: stock[key] for key in ('activated', 'reduction', 'loss_weight') if key in stock}
    return dict(_delete_=True, type='mmasl.AsymmetricLoss', use_sigmoid=True, **params, **kept)


def build(cfg, state=None):
    """The model in training mode, with the weights ``state`` if given."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    if state is None:
        model.init_weights()
    else:
        model.load_state_dict(state, strict=True)
    return model.train()


def replaced_modules(cfg, model):
    """Where in ``model`` the losses are that were replaced."""
    names = [name for name, module in model.named_modules() if isinstance(module, AsymmetricLoss)]
    assert len(names) == len(stock_losses(cfg)) > 0
    return names


def inputs(head, *num_items):
    """Images with so many objects; the second is padded, so that some rows have weight 0."""
    shapes = [(3, 128, 128), (3, 64, 128)][:len(num_items)]
    return demo_mm_inputs(len(num_items), shapes, list(num_items), 80, with_mask=head in MASK_HEADS)


def as_dtype(x, dtype):
    if isinstance(x, tuple):
        return tuple(as_dtype(y, dtype) for y in x)
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def step(head, model, losses, data, dtype=torch.float32):
    """One forward and backward pass; returns what is logged, and the calls of the modules named ``losses`` as
    (pred, target), where pred has its gradient. ``dtype`` is what these modules compute in."""
    MessageHub.get_current_instance().update_info('epoch', 0 if head == 'tood-early' else 9)
    calls = []

    def record(module, args):
        if args[0].requires_grad:
            args[0].retain_grad()
            calls.append(args[:2])
        return as_dtype(args, dtype)

    hooks = [model.get_submodule(name).register_forward_pre_hook(record) for name in losses]
    torch.manual_seed(1)
    total, logged = model.parse_losses(model(**model.data_preprocessor(deepcopy(data), True), mode='loss'))
    total.backward()
    for hook in hooks:
        hook.remove()
    # PAA calls its loss for the assignment too, outside the objective.
    return logged, [(pred, target) for pred, target in calls if pred.grad is not None]


def has_positive(pred, target):
    if isinstance(target, tuple):
        target = target[0]
    return bool((target > 0).any() if target.shape == pred.shape else (target < pred.shape[-1]).any())


@pytest.mark.parametrize('head', [
    pytest.param(head, marks=[] if head in FAST else [pytest.mark.slow]) for head in HEADS])
def test_swapped_loss(head):
    """The stock loss is a setting of the asymmetric loss: every loss of the model and every gradient that the
    classification layers receive are the same, with and without objects. The same model then trains with focusing, and
    predicts as the stock model does.

    The stock loss computes in float64: at p = 0.001, the float32 gradient of background in mmdet has 4 correct digits.
    """
    stock_cfg = load(head)
    if 'score_thr' in stock_cfg.model.test_cfg:
        stock_cfg.model.test_cfg.score_thr = 0.
    cfg = deepcopy(stock_cfg)
    for path, stock in stock_losses(stock_cfg).items():
        cfg.merge_from_dict({path: replaced(stock, EQUAL[stock.type](stock))})
    stock_model = build(stock_cfg)
    model = build(cfg, stock_model.state_dict())
    losses = replaced_modules(cfg, model)
    modules = [model.get_submodule(name) for name in losses]
    for module in modules:
        module.probability_sums.enabled = True

    for num_items in (3, 0), (0, ):
        data = inputs(head, *num_items)
        expected, expected_calls = step(head, stock_model, losses, data, torch.float64)
        actual, calls = step(head, model, losses, data)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0, check_dtype=False)
        assert any(has_positive(*call) for call in calls) is any(num_items)
        for (pred, _), (expected_pred, _) in zip(calls, expected_calls, strict=True):
            torch.testing.assert_close(pred.grad, expected_pred.grad, rtol=1e-5, atol=0)
        # Without objects YOLOX does not call its loss, and YOLOv3 calls it with weights of 0.
        check_sums(modules, any(num_items), called=any(num_items) or head not in ('yolox', 'yolov3'))

    for module in modules:
        module.gamma_pos.fill_(1.)
        module.gamma_neg.fill_(2.)
    model.zero_grad()
    logged, calls = step(head, model, losses, inputs(head, 3, 0))
    assert all(value.isfinite() for value in logged.values()), logged
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(pred.grad.any() for pred, _ in calls)
    if head in PREDICTING:
        check_predictions(head, model.eval(), stock_model.eval())


class DETRQualityLoss(AsymmetricLoss, QualityFocalLoss):
    """As docs/loss.md has it."""


@pytest.mark.slow
@pytest.mark.parametrize('head', ['dino', 'deformable-detr'])
def test_quality_in_detr_heads(head):
    """Heads of the DETR family give IoUs to an instance of QualityFocalLoss, and only labels to other losses."""
    stock_cfg = load(head)
    stock = dict(_delete_=True, type='QualityFocalLoss', use_sigmoid=True, beta=2.)
    stock_cfg.merge_from_dict(dict.fromkeys(stock_losses(stock_cfg), stock))
    cfg = deepcopy(stock_cfg)
    for path, loss in stock_losses(stock_cfg).items():
        cfg.merge_from_dict({path: replaced(loss, EQUAL['QualityFocalLoss'](loss)) | dict(type=DETRQualityLoss)})
    stock_model = build(stock_cfg)
    model = build(cfg, stock_model.state_dict())
    losses = replaced_modules(cfg, model)
    data = inputs(head, 3, 0)
    expected, expected_calls = step(head, stock_model, losses, data, torch.float64)
    actual, calls = step(head, model, losses, data)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0, check_dtype=False)
    assert any(isinstance(target, tuple) and target[1].any() for _, target in calls)
    for (pred, _), (expected_pred, _) in zip(calls, expected_calls, strict=True):
        torch.testing.assert_close(pred.grad, expected_pred.grad, rtol=1e-5, atol=0)


def check_sums(modules, positive, called):
    """The sums of probabilities that the losses hand to hooks are within their bounds."""
    sums = sum((module.probability_sums.total for module in modules if module.probability_sums.total is not None),
               torch.zeros(4, 1))
    p_positives, positives, q_negatives, negatives = sums
    assert (0 <= p_positives).all() and (p_positives <= positives + 1e-3).all()
    assert (0 <= q_negatives).all() and (q_negatives <= negatives * (1 + 1e-5)).all()
    assert bool(positives.any()) is positive and bool(q_negatives.any()) is called
    for module in modules:
        module.probability_sums.take()


@torch.no_grad()
def check_predictions(head, model, stock):
    # The focusing step has updated the running statistics of batch normalization.
    model.load_state_dict(stock.state_dict(), strict=True)
    expected, actual = (m.test_step(inputs(head, 3))[0].pred_instances for m in (stock, model))
    assert len(actual)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=0)
    torch.testing.assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=0)


def test_inherited_config(tmp_path):
    """A config as a user writes it."""
    path = tmp_path / 'fcos_asl.py'
    path.write_text("""
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)
model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True, type='mmasl.AsymmetricLoss', use_sigmoid=True,
            gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25, loss_weight=1.)))
""")
    params = dict(gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25)
    expected = get_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')
    expected.merge_from_dict({path: replaced(loss, params) for path, loss in stock_losses(expected).items()})
    assert Config.fromfile(path).model == dict(expected.model, _scope_='mmdet')


def with_loss(head, **loss):
    cfg = load(head)
    cfg.merge_from_dict(dict.fromkeys(stock_losses(cfg), loss))
    return cfg


def test_softmax_is_refused():
    with pytest.raises(ValueError, match='use_sigmoid=False'):
        build(with_loss('fcos', _delete_=True, type='mmasl.AsymmetricLoss', use_sigmoid=False))


def test_use_sigmoid_must_stand_in_the_config():
    """Heads read it there before there is a loss, and add a channel for background without it."""
    cfg = with_loss('fcos', _delete_=True, type='mmasl.AsymmetricLoss')
    assert build(cfg).bbox_head.conv_cls.out_channels == 81
    cfg.model.bbox_head.loss_cls.use_sigmoid = True
    assert build(cfg).bbox_head.conv_cls.out_channels == 80


def test_parameters_of_the_stock_loss_are_refused():
    """Without ``_delete_`` they stay in the config."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        build(with_loss('fcos', type='mmasl.AsymmetricLoss'))


@pytest.mark.parametrize('scope', ['mmdet', 'mmengine'])
def test_bare_name_is_unknown(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert type(MODELS.build(dict(type='mmasl.AsymmetricLoss'))) is AsymmetricLoss
        with pytest.raises(KeyError, match=f'AsymmetricLoss is not in the {scope}::model registry'):
            MODELS.build(dict(type='AsymmetricLoss'))


@pytest.mark.slow
def test_resolves_without_imports_and_without_mmpretrain():
    """In an environment without MMPretrain, MMEngine finds loss and hooks by name alone and loads no other package."""
    code = """
import sys
sys.modules['mmpretrain'] = None
from mmengine.registry import HOOKS, MODELS
print(MODELS.get('mmasl.AsymmetricLoss').__module__, *{'mmdet', 'mmcv', 'torchvision', 'timm'} & set(sys.modules))
print(HOOKS.get('mmasl.ProbabilityGapHook').__name__)
"""
    found = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert found == ['mmasl.models.losses.asymmetric_loss', 'ProbabilityGapHook']
