"""Dense heads with calibrated scores: values against the minimum of the loss, and the stock heads beside them."""
import copy
import pickle

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch.testing import assert_close

from mmasl import CalibratedDenseHead, posterior, posterior_log_odds
from mmasl.errors import ConfigError

CLASSES = 3
FOCAL = dict(type='FocalLoss', use_sigmoid=True, gamma=2., alpha=0.25)
ASL = dict(type='mmasl.AsymmetricLoss', use_sigmoid=True, gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25)
BY_CLASS = ASL | dict(gamma_neg=[1., 2., 4.], alpha=[.25, .5, .9], pos_weight=[8., 1., .2], class_weight=[3., 1., 2.])
CODER = dict(type='DeltaXYWHBBoxCoder', target_stds=[.1, .1, .2, .2])
ANCHORS = dict(type='AnchorGenerator', ratios=[1.], octave_base_scale=2, scales_per_octave=1, strides=[8, 16])
HEADS = {
    'FCOSHead': dict(strides=[8, 16], regress_ranges=((-1, 20), (20, 1e8)), norm_cfg=None),
    'ATSSHead': dict(anchor_generator=ANCHORS, bbox_coder=CODER, norm_cfg=None, loss_bbox=dict(type='GIoULoss'),
                     train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1)),
    'RetinaHead': dict(
        anchor_generator=ANCHORS | dict(ratios=[.5, 2.]),
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.4, min_pos_iou=0),
                       allowed_border=-1, pos_weight=-1)),
}
TEST = ConfigDict(nms_pre=-1, min_bbox_size=0, score_thr=0., nms=dict(type='nms', iou_threshold=.5), max_per_img=50)
INFO = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64), batch_input_shape=(64, 64))


@pytest.fixture(scope='module', autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def build(head, loss, calibrated=True, **kwargs):
    torch.manual_seed(0)
    kind = dict(type='mmasl.CalibratedDenseHead', head_type=head) if calibrated else dict(type=head)
    return MODELS.build(ConfigDict(num_classes=CLASSES, in_channels=8, feat_channels=8, stacked_convs=1, loss_cls=loss,
                                   test_cfg=TEST, **HEADS.get(head, {}), **kind) | kwargs)


def inputs(images=2):
    """Feature maps, large enough for a spread of the scores, and boxes of the images."""
    torch.manual_seed(1)
    maps = [3 * torch.randn(images, 8, side, side) for side in (8, 4)]
    truth = InstanceData(bboxes=torch.tensor([[4., 4., 24., 24.], [30., 20., 62., 60.]]), labels=torch.tensor([0, 2]))
    samples = [DetDataSample(metainfo=INFO, gt_instances=truth) for _ in range(images)]
    return maps, samples


@pytest.mark.parametrize('loss', [FOCAL, FOCAL | dict(gamma=3., alpha=.6), ASL, BY_CLASS],
                         ids=['focal', 'other focal', 'ASL', 'by class'])
def test_the_minimum_of_the_expected_loss(loss):
    """Labels that are positive with probability pi: the logit of the least expected loss gets the score pi."""
    head = build('RetinaHead', loss)
    z = torch.linspace(-20, 20, 200001, dtype=torch.float64)[:, None].expand(-1, CLASSES)
    for_positive, for_negative = (head.loss_cls(z, torch.full_like(z, y), reduction_override='none') for y in (1, 0))
    pi = torch.tensor([.02, .3, .5, .8, .97], dtype=torch.float64)
    best = torch.stack([z[(x * for_positive + (1 - x) * for_negative).argmin(0), 0] for x in pi])  # (5, C)
    maps = best.T.reshape(1, CLASSES, 5, 1).repeat(1, 2, 1, 4)  # 2 anchors, 5 x 4 places
    found, = head.calibrate([maps])
    assert_close(found.sigmoid(), pi.view(1, 1, 5, 1).expand_as(maps), rtol=0, atol=3e-4)
    assert_close(head.calibrate(best[None]).sigmoid(), pi[None, :, None].expand(1, 5, CLASSES), rtol=0, atol=3e-4)


def test_the_numbers_of_the_page():
    """docs/analysis.md: the posterior of p = 0.5, and that of the usual score_thr for focal loss."""
    for gamma_pos, gamma_neg, expected in ((2., 2., 0.75), (1., 2., 0.68), (0., 4., 0.41)):
        found = posterior(torch.zeros(1), gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=0., alpha=0.25)
        assert found.item() == pytest.approx(expected, abs=5e-3)
    low = posterior(torch.tensor([0.05]).logit(), gamma_pos=2., gamma_neg=2., clip=0., alpha=0.25)
    assert low.item() == pytest.approx(0.001, abs=5e-4)


@pytest.mark.parametrize('loss', [FOCAL, ASL], ids=['focal', 'ASL'])
@pytest.mark.parametrize('name', HEADS)
def test_heads_beside_the_stock_ones(name, loss):
    """Training and weights are the stock head's; of the predictions, the scores change, and centerness does not."""
    head, stock = build(name, loss), build(name, loss, calibrated=False)
    assert isinstance(head, type(stock)) and isinstance(head, CalibratedDenseHead)
    stock.load_state_dict(head.state_dict())
    maps, samples = inputs()
    for key, value in stock.loss(maps, samples).items():
        assert_close(head.loss(maps, samples)[key], value, rtol=0, atol=0)

    settings = dict(gamma_pos=1. if loss is ASL else 2., gamma_neg=2., clip=0., alpha=.25)
    # Before non-maximum suppression, boxes are in the order of the scores of the classes. Maps after two are factors.
    one_kind = dict(batch_img_metas=[sample.metainfo for sample in samples], with_nms=False)
    with torch.no_grad():
        outputs = stock.eval()(maps)
        plain, scaled = (stock.predict_by_feat(*outputs[:kinds], **one_kind) for kinds in (2, None))
        found, product = (head.eval().predict_by_feat(*outputs[:kinds], **one_kind) for kinds in (2, None))
        boxes = head.predict(maps, samples)
    for p, factors, calibrated, all_ in zip(plain, scaled, found, product):
        expected = posterior(p.scores.double().logit(), **settings)
        assert expected.min() < 0.01 and expected.max() > 0.9, 'the scores do not spread'
        assert_close(calibrated.scores.double(), expected, rtol=1e-4, atol=1e-6)
        assert calibrated.labels.equal(p.labels) and calibrated.bboxes.equal(p.bboxes)
        assert factors.scores.equal(p.scores) == (name == 'RetinaHead')
        assert_close(all_.scores, calibrated.scores * factors.scores / p.scores)
    assert all(len(one) and one.scores.max() > 0.2 for one in boxes)


def test_parameters_of_the_loss_count_when_it_predicts():
    """As AdaptiveAsymmetryHook moves them; a copy, as of EMA, has its own."""
    head = build('FCOSHead', ASL)
    other, maps = copy.deepcopy(head), [torch.randn(2, CLASSES, 4, 4)]
    head.loss_cls.gamma_neg.fill_(5)
    for one, gamma in ((head, 5.), (other, 2.)):
        expected = posterior_log_odds(maps[0], gamma_pos=1., gamma_neg=gamma, clip=0., alpha=.25)
        assert_close(one.calibrate(maps)[0], expected)


@pytest.mark.parametrize('name', HEADS)
def test_a_head_is_pickled(name):
    """As torch.save of a whole detector and a spawned process do."""
    head, maps = build(name, ASL), [torch.randn(2, CLASSES, 4, 4)]
    head.loss_cls.gamma_neg.fill_(5)
    for other in (pickle.loads(pickle.dumps(head)), copy.copy(head), copy.deepcopy(head)):
        assert type(other) is type(head) and isinstance(other, CalibratedDenseHead)
        assert_close(dict(other.state_dict()), dict(head.state_dict()))
        assert_close(other.calibrate(maps), head.calibrate(maps))


@pytest.mark.parametrize('name', HEADS)
def test_half_precision_and_a_margin(name):
    """As in inference under autocast: the scores are float32, and 0 below the margin."""
    head = build(name, ASL | dict(gamma_pos=0., clip=0.05)).eval()
    maps, samples = inputs()
    with torch.no_grad():
        outputs = tuple([level.half() for level in kind] for kind in head(maps))
        found = head.predict_by_feat(*outputs, batch_img_metas=[sample.metainfo for sample in samples], rescale=False)
        expected = posterior_log_odds(outputs[0][0].float(), gamma_pos=0., gamma_neg=2., clip=0.05, alpha=.25)
    assert all(len(boxes) and boxes.scores.dtype == torch.float32 for boxes in found)
    log_odds = head.calibrate(outputs[0])[0]
    assert_close(log_odds, expected)
    assert (log_odds == -torch.inf).any() and log_odds.isfinite().any()


@pytest.mark.parametrize('head, loss, kwargs, message', [
    ('FCOSHead', dict(type='CrossEntropyLoss', use_sigmoid=False), {}, 'CrossEntropyLoss has no posterior'),
    ('FCOSHead', dict(type='mmasl.AsymmetricLoss', clip=0.), {}, 'takes a softmax, .*: set use_sigmoid=True'),
    ('GFLHead', dict(type='QualityFocalLoss', use_sigmoid=True), dict(anchor_generator=ANCHORS, norm_cfg=None),
     'QualityFocalLoss has no posterior'),
    ('FCOSHead', FOCAL | dict(activated=True), {}, r'FocalLoss\(activated=True\): the head predicts probabilities'),
    ('FCOSHead', FOCAL | dict(alpha=1.), {}, 'alpha=1.0 leaves one kind of label without weight'),
    ('FCOSHead', ASL | dict(ignore_index=-1, weight_unannotated=1., gamma_unannotated=7.), {},
     'gamma_unannotated=7.0 has no posterior'),
    ('FreeAnchorRetinaHead', FOCAL, {}, 'head_type=FreeAnchorRetinaHead: FreeAnchorRetinaHead has a loss of its own'),
    ('CenterNetHead', FOCAL, {}, 'head_type=CenterNetHead: its predict_by_feat does not take class logits first'),
    ('NoHead', FOCAL, {}, "head_type='NoHead' is not a head of MMDetection"),
    (None, FOCAL, {}, 'head_type=None is not a head'),
], ids=lambda value: str(value) if isinstance(value, str) and ' ' not in value else None)
def test_refusals(head, loss, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build(head, loss, **kwargs)
