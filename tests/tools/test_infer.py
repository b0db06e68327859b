"""tools/infer.py: refusals, its table and files for both families, and images that cannot be read."""
import json
import re
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmasl.ops import posterior
from tools import infer

ROOT = Path(__file__).parents[2]
CLASSES = ('red', 'green', 'blue', 'none')
COLORS = dict(black=(0, 0, 0), blue=(0, 0, 255), orange=(255, 140, 0))

# The means of red, green and blue, times 12 and minus 6, are the logits of the first three classes.
CLASSIFIER = f"""
_base_ = {str(ROOT / 'configs/digits/resnet_asl_digits.py')!r}
model = dict(
    backbone=dict(_delete_=True, type='LinearBackbone'),
    head=dict(num_classes=4, in_channels=3, init_cfg=None))
"""
DETECTOR = f"""
_base_ = {str(ROOT / 'configs/digits/fcos_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=4), test_cfg=dict(max_per_img=1000))
"""


@MODELS.register_module()
class LinearBackbone(torch.nn.Module):

    def forward(self, x):
        return (12 * x - 6, )


def classifier_weights() -> dict:
    weight = torch.zeros(4, 3)
    weight[:3] = torch.eye(3)
    return {'head.fc.weight': weight, 'head.fc.bias': torch.tensor([0., 0., 0., -9.])}


def detector_weights() -> dict:
    """Every place of both maps is the centre of boxes 2 strides wide: 'blue', p = 0.95, and 'none', p = 0.5."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        state = MODELS.build(Config.fromfile('fcos.py').model).state_dict()
    for name, bias in (('cls', torch.tensor([-6., -6., 3., 0.])), ('reg', 1.), ('centerness', 20.)):
        state[f'bbox_head.conv_{name}.weight'].zero_()
        state[f'bbox_head.conv_{name}.bias'][:] = bias
    return state


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    Path('images').mkdir()
    for color, rgb in COLORS.items():
        mmcv.imwrite(np.full((64, 64, 3), rgb[::-1], np.uint8), f'images/{color}.png')
    Path('cls.py').write_text(CLASSIFIER)
    Path('fcos.py').write_text(DETECTOR)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=classifier_weights(), meta=meta), 'cls.pth')
    return tmp_path


@pytest.fixture
def detector(folder) -> str:
    torch.save(dict(state_dict=detector_weights(), meta=dict(dataset_meta=dict(classes=CLASSES))), 'fcos.pth')
    return 'fcos.pth'


# --- classification

def test_table_of_a_folder_and_a_file(capsys):
    infer.main(['images', 'images/blue.png', 'cls.py', 'cls.pth', '--device', 'cpu'])
    p = torch.tensor([6., 12 * 140 / 255 - 6]).sigmoid()
    assert capsys.readouterr().out.splitlines()[-4:] == [
        'images/black.png   -', 'images/blue.png    blue 1.00', f'images/orange.png  red {p[0]:.2f}, green {p[1]:.2f}',
        'images/blue.png    blue 1.00']


@pytest.mark.parametrize('flags, expected', [
    (['--thr', '0.7'], ['red']), (['--thr', 'red=1', '--thr', 'green=0.1'], ['green']), (['--topk', '1'], ['red']),
    (['--thr', '0.6', '--topk', '3'], ['red', 'green']), (['--cfg-options', 'model.head.thr=0.7'], ['red'])])
def test_flags_that_decide(flags, expected):
    infer.main(['images/orange.png', 'cls.py', 'cls.pth', '--json', 'p.json', *flags])
    record, = json.loads(Path('p.json').read_text())
    assert record['pred_class'] == expected


def test_calibrated_scores_of_a_stock_head(capsys):
    infer.main(['images/orange.png', 'cls.py', 'cls.pth', '--calibrated', '--json', 'p.json', '--thr', '0.3'])
    q = posterior(torch.tensor([6., 12 * 140 / 255 - 6]), gamma_neg=4., clip=0.05)
    record, = json.loads(Path('p.json').read_text())
    assert record['pred_class'] == ['red', 'green']
    assert record['calibrated_score'] == pytest.approx(q.tolist(), abs=1e-5)
    assert capsys.readouterr().out.splitlines()[-1] == f'images/orange.png  red {q[0]:.2f}, green {q[1]:.2f}'


def test_render_leaves_out_what_is_too_much():
    record = dict(img_path='a.jpg', pred_class=[f'c{i}' for i in range(10)], pred_score=[0.5] * 10)
    shown = ', '.join(f'c{i} 0.50' for i in range(8))
    assert infer.render([record, dict(record, img_path='longer.jpg', pred_class=[])]).splitlines() == [
        f'a.jpg       {shown}, and 2 more', 'longer.jpg  -']
    assert infer.render([]) == ''


# --- detection

def test_boxes(detector, capsys):
    infer.main(['images', 'fcos.py', detector, '--batch-size', '2', '--json', 'p.json', '--out-dir', 'drawn'])
    records = json.loads(Path('p.json').read_text())
    assert [record['img_path'] for record in records] == [f'images/{color}.png' for color in sorted(COLORS)]
    p = torch.tensor([3., 0.]).sigmoid().tolist()
    for record in records:
        count = len(record['bboxes']) // 2
        assert record['pred_class'] == ['blue'] * count + ['none'] * count
        assert record['pred_label'] == [2] * count + [3] * count
        assert record['pred_score'] == pytest.approx([p[0]] * count + [p[1]] * count, abs=1e-5)
        assert [20, 20, 36, 36] in record['bboxes']  # around a place of the map of stride 8
        assert all(0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64 for x1, y1, x2, y2 in record['bboxes'])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f'images/orange.png  blue {p[0]:.2f}, blue')
    assert len(list(Path('drawn').iterdir())) == 3


def test_calibrated_scores_of_a_detector(detector):
    """Through DetInferencer, with the config of the training."""
    infer.main(['images/black.png', 'fcos.py', detector, '--calibrated', '--json', 'p.json'])
    record, = json.loads(Path('p.json').read_text())
    q = posterior(torch.tensor([3., 0.]), gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25)
    assert sorted(set(record['pred_class'])) == ['blue', 'none']
    for name, score in zip(record['pred_class'], record['pred_score']):
        assert score == pytest.approx(q['blue none'.split().index(name)].item(), abs=1e-5)


def test_pictures_have_the_boxes_that_pass(detector):
    """None: the picture is the image, and in its colours."""
    for number, thr in enumerate(('0.99', '0.5')):
        infer.main(['images/orange.png', 'fcos.py', detector, '--thr', thr, '--out-dir', str(number)])
    image, bare, boxes = (mmcv.imread(path) for path in ('images/orange.png', '0/orange.png', '1/orange.png'))
    assert (image == bare).all() and (image != boxes).any(-1).mean() > 0.2


@pytest.mark.parametrize('flags, classes', [
    (['--thr', '0.99'], set()), (['--thr', 'blue=0.96', '--thr', 'none=0.45'], {'none'}), (['--thr', '0.6'], {'blue'})])
def test_thresholds_of_boxes(flags, classes, detector):
    infer.main(['images/black.png', 'fcos.py', detector, '--json', 'p.json', *flags])
    record, = json.loads(Path('p.json').read_text())
    assert set(record['pred_class']) == classes


def test_the_k_best_boxes(detector):
    infer.main(['images/black.png', 'fcos.py', detector, '--json', 'p.json', '--topk', '2'])
    record, = json.loads(Path('p.json').read_text())
    assert len(record['bboxes']) == len(record['pred_label']) == 2


# --- images that cannot be read

@pytest.mark.parametrize('config', ['cls.py', 'fcos.py'])
def test_unreadable_images_are_told_last(config, detector, capsys):
    for name in ('a', 'b'):
        Path(f'images/{name}.jpg').write_text('no image')
    with pytest.raises(SystemExit) as stop:
        infer.main(['images', config, config.replace('.py', '.pth'), '--json', 'p.json', '--out-dir', 'drawn',
                    '--batch-size', '2'])
    assert stop.value.code.splitlines() == [
        '2 images cannot be read:', *(f'  images/{name}.jpg: the file is truncated or not an image' for name in 'ab')]
    assert len(json.loads(Path('p.json').read_text())) == len(list(Path('drawn').iterdir())) == 3
    assert capsys.readouterr().out.count('images/') == 3


# --- refusals

@pytest.mark.parametrize('argv, message', [
    (['images', 'none.py', 'cls.pth'], 'No such config: none.py'),
    (['images', 'cls.py', 'none.pth'], 'No such checkpoint: none.pth'),
    (['none', 'cls.py', 'cls.pth'], 'no such image or folder: none'),
    (['none', 'fcos.py', 'fcos.pth'], 'no such image or folder: none'),
    (['images', 'cls.py', 'fcos.pth'], 'fcos.pth does not fit the model of the config'),
    (['images', 'fcos.py', 'cls.pth'], 'cls.pth does not fit the model of the config'),
    (['images', 'cls.py', 'cls.pth', '--thr', 'high'], r"--thr \['high'\]: give NUMBER or CLASS=NUMBER"),
    (['images', 'cls.py', 'cls.pth', '--thr', '2'], r"thr=2 of 'red' must be in \[0, 1\]"),
    (['images', 'fcos.py', 'fcos.pth', '--thr', '2'], r"thr=2 of 'red' must be in \[0, 1\]"),
    (['images', 'cls.py', 'cls.pth', '--thr', 'rde=0.5'], r"thr has unknown classes \['rde'\]"),
    (['images', 'cls.py', 'cls.pth', '--topk', '0'], '--topk 0: give 1 or more'),
    (['images', 'cls.py', 'cls.pth', '--topk', '9'], 'topk=9 must be from 1 to the 4 classes'),
    (['images', 'cls.py', 'cls.pth', '--batch-size', '0'], '--batch-size 0: give 1 or more'),
    (['images', 'cls.py', 'cls.pth', '--json', 'p.txt'], '--json p.txt: give a .json file'),
    (['images', 'cls.py', 'cls.pth', '--device', 'gpu'], '--device gpu: .*[Ee]xpected one of'),
    (['images', 'rcnn.py', 'fcos.pth', '--calibrated'], 'model FasterRCNN has no bbox_head'),
    (['images', 'cls.py', 'cls.pth', '--cfg-options', 'test_dataloader=None'], 'the config has no test_dataloader'),
], ids=lambda value: '_'.join(value[1:]) if isinstance(value, list) else None)
def test_refusals(argv, message, detector):
    Path('rcnn.py').write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'")
    with pytest.raises(SystemExit) as stop:
        infer.main(argv)
    assert re.search(message, stop.value.code, re.DOTALL), stop.value.code


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr('mmasl.utils.tools.get_device', lambda: 'cpu')
    with pytest.raises(SystemExit, match='--device cuda:0 needs a GPU'):
        infer.main(['images', 'cls.py', 'cls.pth', '--device', 'cuda:0'])


def test_a_detector_with_more_classes_than_names(detector):
    torch.save(dict(state_dict=detector_weights(), meta={}), 'nameless.pth')
    with pytest.raises(SystemExit, match='nameless.pth names no classes, and COCO has 80, but .*num_classes is 4'):
        infer.main(['images', 'fcos.py', 'nameless.pth'])


class Hostile:

    def __reduce__(self):
        return Path.touch, (Path('owned'), )


@pytest.mark.parametrize('name', ['cls', 'fcos'])
def test_checkpoints_that_would_execute_are_refused(name, detector):
    """MMEngine, which DetInferencer loads with, would execute them."""
    checkpoint = torch.load(f'{name}.pth') | dict(optimizer=Hostile())
    torch.save(checkpoint, 'evil.pth')
    with pytest.raises(SystemExit, match='evil.pth is refused: loading it could execute code'):
        infer.main(['images', f'{name}.py', 'evil.pth'])
    assert not Path('owned').exists()


def test_a_detector_does_without_mmpretrain(detector, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmasl.models.heads.calibrated_predictions', None)
    infer.main(['images/black.png', 'fcos.py', detector])
