"""tools/export_onnx.py: the file read with onnxruntime and its metadata alone, and what must not be written."""
import csv
import json
import logging
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.testing import assert_close

from mmasl.apis import onnx_export
from mmasl.apis.inferencer import MultiLabelInferencer
from mmasl.apis.onnx_export import Classifier, Exportable, compare_with_torch, export, fixed_shape
from mmasl.apis.tagger import tagger_files
from mmasl.errors import ConfigError
from mmasl.ops import posterior, posterior_log_odds, posterior_threshold
from tools import export_onnx

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

ROOT = Path(__file__).parents[2]
CLASSES = ('red', 'green', 'blue', 'none')
MEAN, STD = [10., 20., 30.], [50., 60., 70.]
CLASSIFIER = f"""
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean={MEAN}, std={STD}, to_rgb=True),
    backbone=dict(type='SteepBackbone'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='MultiLabelLinearClsHead', num_classes=4, in_channels=3,
        loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=[4., 4., 2., 1.], clip=[0.05, 0., 0.05, 0.1])))
test_dataloader = dict(dataset=dict(type='mmasl.CocoMultiLabel', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(12, 8)), dict(type='PackInputs')]))
"""
DETECTOR = f"""
_base_ = {str(ROOT / 'configs/digits/fcos_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=4))
"""


@MODELS.register_module()
class SteepBackbone(torch.nn.Module):
    """Makes logits of any size."""

    def forward(self, x):
        return (8 * x, )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    Path('cls.py').write_text(CLASSIFIER)
    Path('fcos.py').write_text(DETECTOR)
    weight = torch.cat([torch.eye(3), torch.full((1, 3), 0.2)])
    torch.save(dict(state_dict={'head.fc.weight': weight, 'head.fc.bias': torch.tensor([-2., -2., -2., 0.])},
                    meta=dict(dataset_meta=dict(classes=CLASSES))), 'cls.pth')
    return tmp_path


def session(path='m.onnx'):
    running = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return running, {key: json.loads(value) for key, value in running.get_modelmeta().custom_metadata_map.items()}


def test_the_file_alone_predicts_as_the_inferencer(capsys):
    """Images prepared by the metadata, in another batch than those that were exported and checked."""
    export_onnx.main(['cls.py', 'cls.pth', '--out', 'new/m.onnx', '--calibrated', '--thr', 'green=0.9'])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ['pred_score:', 'calibrated_score:']
    assert lines[-1].startswith('new/m.onnx: input (batch, 3, 8, 12), ')
    running, meta = session('new/m.onnx')
    images = [np.random.default_rng(n).integers(0, 2 + 50 * n, (8, 12, 3), dtype=np.uint8) for n in range(5)]
    for n, image in enumerate(images):
        mmcv.imwrite(image, f'{n}.png')
    assert [(x.name, x.shape) for x in running.get_inputs()] == [('input', ['batch', 3, 8, 12])]
    assert [(x.name, x.shape) for x in running.get_outputs()] == [
        ('pred_score', ['batch', 4]), ('calibrated_score', ['batch', 4])]
    assert meta['classes'] == list(CLASSES) and (meta['mean'], meta['std']) == (MEAN, STD)
    assert [step['type'] for step in meta['pipeline']] == ['LoadImageFromFile', 'Resize', 'PackInputs']
    thr = torch.tensor([0.5, 0.9, 0.5, 0.5])
    settings = dict(gamma_neg=torch.tensor([4., 4., 2., 1.]), clip=torch.tensor([0.05, 0., 0.05, 0.1]))
    assert meta['calibrated_score_thr'] == thr.tolist()
    assert meta['pred_score_thr'] == pytest.approx(posterior_threshold(thr, **settings).sigmoid().tolist(), abs=1e-6)
    assert meta['channel_order'] == 'RGB' and meta['input_size'] == [8, 12]
    batch = np.stack([(mmcv.imread(f'{n}.png')[..., ::-1] - np.array(meta['mean'])) / meta['std'] for n in range(5)])
    p, q = running.run(['pred_score', 'calibrated_score'], {'input': batch.transpose(0, 3, 1, 2).astype(np.float32)})

    cfg = Config.fromfile('cls.py')
    cfg.model.head.type = 'mmasl.MultiLabelLinearClsHead'
    results = MultiLabelInferencer(cfg, 'cls.pth', 'cpu', show_progress=False)(
        images, return_datasamples=True, thr={'green': 0.9})['predictions']
    assert p.shape == q.shape == (5, 4)
    assert_close(torch.from_numpy(p), torch.stack([sample.pred_score for sample in results]), rtol=0, atol=1e-5)
    assert_close(torch.from_numpy(q), torch.stack([sample.calibrated_score for sample in results]), rtol=0, atol=1e-5)
    labels = [set(sample.pred_label.tolist()) for sample in results]
    assert len(set(map(frozenset, labels))) > 2  # the images differ
    for scores, name in ((p, 'pred_score_thr'), (q, 'calibrated_score_thr')):
        assert [set(np.flatnonzero(row > meta[name])) for row in scores] == labels


def test_a_stock_head_has_one_output():
    export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx', '--cfg-options', 'model.data_preprocessor.to_rgb=False',
                      'model.data_preprocessor.mean=None'])
    running, meta = session()
    assert [x.name for x in running.get_outputs()] == ['pred_score']
    assert meta['pred_score_thr'] == [0.5] * 4 and not {'topk', 'calibrated_score_thr'} & set(meta)
    assert (meta['channel_order'], meta['mean'], meta['std']) == ('BGR', [0.] * 3, [1.] * 3)


@pytest.mark.parametrize('load, mean, order', [
    (dict(color_type='grayscale'), [7.], 'GRAY'),
    pytest.param(dict(color_type='unchanged'), [7.], 'GRAY', marks=pytest.mark.slow), ({}, [7.], 'RGB')])
def test_grey_images(load, mean, order, monkeypatch):
    """A model of one channel, and one of three channels with the same mean."""
    channels = 3 if order == 'RGB' else 1
    monkeypatch.setattr(SteepBackbone, 'forward', lambda self, x: (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x, ))
    Path('grey.py').write_text(f"_base_ = 'cls.py'\nload = {dict(load, type='LoadImageFromFile')}\n"
                               f"model = dict(data_preprocessor=dict(mean={mean}, std=[5.]))\n"
                               "test_dataloader = dict(dataset=dict(pipeline=[load, dict(type='PackInputs')]))\n")
    export_onnx.main(['grey.py', 'cls.pth', '--out', 'm.onnx', '--shape', '8', '12'])
    running, meta = session()
    assert (meta['channel_order'], meta['mean'], meta['std']) == (order, [7.] * channels, [5.] * channels)
    image = np.random.default_rng(0).integers(0, 40, (8, 12), dtype=np.uint8)
    batch = np.broadcast_to((image - np.float32(7)) / 5, (1, channels, 8, 12))
    p, = running.run(['pred_score'], {'input': batch.astype(np.float32)})
    mmcv.imwrite(image, 'grey.png')
    sample, = MultiLabelInferencer('grey.py', 'cls.pth', 'cpu', show_progress=False)(
        'grey.png', return_datasamples=True)['predictions']
    assert_close(torch.from_numpy(p[0]), sample.pred_score, rtol=0, atol=1e-5)


def test_opset_and_fixed_batch():
    export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx', '--calibrated', '--opset', '20', '--batch', '2'])
    running, _ = session()
    assert running.get_inputs()[0].shape == [2, 3, 8, 12] and running.get_outputs()[1].shape == [2, 4]
    assert {x.domain: x.version for x in onnx.load('m.onnx').opset_import}[''] == 20


def test_an_opset_without_the_operators_is_refused():
    with pytest.raises(SystemExit, match='--opset 9: the exporter of torch .* writes opset 18, .* Give --opset 18'):
        export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx', '--opset', '9'])


def test_a_model_that_makes_the_batch_size_a_constant(monkeypatch):
    """As MMPretrain's Swin transformers do, with int() of a quotient of sizes."""

    def forward(self, x):
        count = int(x.shape[0] * 8 / 8)
        return (8 * x.view(count, 3, 8, 12), )

    monkeypatch.setattr(SteepBackbone, 'forward', forward)
    with pytest.raises(SystemExit, match=r'makes the batch size a constant, forward in .*test_export_onnx.py:\d+: give '
                       '--batch N for a file that takes batches of N images'):
        export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx'])
    assert not Path('m.onnx').exists()
    level = logging.getLogger('torch.fx.experimental.symbolic_shapes').level
    export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx', '--batch', '3'])
    assert session()[0].get_inputs()[0].shape == [3, 3, 8, 12]
    assert logging.getLogger('torch.fx.experimental.symbolic_shapes').level == level


@pytest.mark.slow
def test_a_folder_in_the_layout_of_taggers(capsys):
    """Read as such programs do: labels and thresholds from the CSV file, the input by the steps of the JSON file."""
    from PIL import Image
    export_onnx.main(['cls.py', 'cls.pth', '--out', 'tagger', '--calibrated', '--thr', 'green=0.9'])
    assert sorted(path.name for path in Path('tagger').iterdir()) == [
        'model.onnx', 'preprocess.json', 'selected_tags.csv', 'thresholds.csv']
    running, meta = session('tagger/model.onnx')
    tags = list(csv.DictReader(Path('tagger/selected_tags.csv').read_text().splitlines()))
    assert [tag['name'] for tag in tags] == list(CLASSES) and {tag['category'] for tag in tags} == {'0'}
    assert [float(tag['best_threshold']) for tag in tags] == pytest.approx(meta['pred_score_thr'], rel=1e-5)
    thresholds, = csv.DictReader(Path('tagger/thresholds.csv').read_text().splitlines())
    assert float(thresholds['threshold']) == pytest.approx(np.mean(meta['pred_score_thr']), rel=1e-5)
    resize, to_tensor, normalize = json.loads(Path('tagger/preprocess.json').read_text())['test']
    assert (resize['type'], resize['size'], to_tensor) == ('resize', [8, 12], {'type': 'to_tensor'})
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(resize['size'][::-1])  # of this size already: each resize has its own filter
    x = (np.asarray(image) / 255 - normalize['mean']) / normalize['std']
    p, = running.run(['pred_score'], {'input': x.transpose(2, 0, 1)[None].astype(np.float32)})
    cfg = Config.fromfile('cls.py')
    sample, = MultiLabelInferencer(cfg, 'cls.pth', 'cpu', show_progress=False)(
        pixels[..., ::-1], return_datasamples=True)['predictions']
    assert_close(torch.from_numpy(p[0]), sample.pred_score, rtol=0, atol=1e-4)


@pytest.mark.parametrize('change, message', [
    ({'model.data_preprocessor.to_rgb': False}, 'taggers read RGB images'),
    ({'model.head.topk': 2, 'model.head.thr': None}, 'the head decides by topk=2'),
    ({'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.),
                                           dict(type='Resize', scale=(12, 8)), dict(type='PackInputs')]},
     'RandomFlip of the test pipeline has no equivalent in preprocess.json')])
def test_what_taggers_cannot_read_is_refused(change, message):
    cfg = Config.fromfile('cls.py')
    cfg.merge_from_dict(change)
    with pytest.raises(ConfigError, match=message):
        tagger_files(b'', onnx_export.prepare_classifier(cfg, 'cls.pth').metadata)


@pytest.mark.parametrize('thr, topk, expected', [
    (0.75, None, dict(pred_score_thr=[0.75] * 4)), (None, 2, dict(topk=2))])
def test_thresholds_of_a_stock_head(thr, topk, expected):
    cfg = Config.fromfile('cls.py')
    cfg.model.head.topk = topk
    metadata = onnx_export.prepare_classifier(cfg, 'cls.pth', thr=thr).metadata
    assert {key: metadata[key] for key in ('pred_score_thr', 'topk') if key in metadata} == expected


class Scores(torch.nn.Module):
    """The exported scores of logits, in the place of images."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x):
        return Classifier(lambda images, mode: images.mean((2, 3)), self.settings)(x)


@pytest.mark.parametrize('settings', [
    pytest.param(dict(gamma_neg=2., clip=0., gamma_pos=1., alpha=0.25), marks=pytest.mark.slow),
    pytest.param(dict(gamma_neg=4., clip=0.05, detach_focusing=True), marks=pytest.mark.slow),
    dict(gamma_neg=torch.tensor([0.5, 2., 4.]), clip=torch.tensor([0.05, 0., 0.3]))
], ids=['detection', 'detached', 'classes'])
def test_scores_are_exact_for_all_logits(settings):
    """The exporter's own forms of two functions give NaN for confident logits."""
    z = torch.cat([torch.linspace(-200, 200, 4001), *(sign * torch.logspace(-9, 6, 100) for sign in (-1, 1)),
                   torch.tensor([-88., -103.97, 88.8])])
    file = export(Exportable(Scores(**settings), ['p', 'q'], dict(input_size=[1, 1], mean=[0.] * 3)))
    p, q = onnxruntime.InferenceSession(file).run(None, {'input': z.view(-1, 1, 1, 1).expand(-1, 3, 1, 1).numpy()})
    z = z.double()[:, None].expand(-1, 3)
    assert_close(torch.from_numpy(p), z.sigmoid(), rtol=0, atol=1e-6, check_dtype=False)
    assert_close(torch.from_numpy(q), posterior(z, **settings), rtol=0, atol=2e-6, check_dtype=False)


# --- the check

def test_what_differs_is_not_written(monkeypatch, capsys):
    """Without the exact forms, at confident logits: NaN."""
    monkeypatch.setattr(onnx_export, 'exact_translations', dict)
    monkeypatch.setattr(SteepBackbone, 'forward', lambda self, x: (80 * x, ))
    with pytest.raises(SystemExit, match='exceeds --tolerance 0.0001: no file was written'):
        export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx', '--calibrated'])
    assert 'calibrated_score: largest difference between onnxruntime and PyTorch nan' in capsys.readouterr().out
    assert not Path('m.onnx').exists()


def test_differences_are_of_the_model_that_is_given():
    """Against a module whose outputs are shifted: by 0.25, and by a thousandth of values up to 2000 or so."""

    class Two(torch.nn.Module):

        def __init__(self, shift) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x):
            return x.mean((2, 3)).sigmoid() + 0.25 * self.shift, 255 * x.amax((1, 2, 3)) * (8 + 0.008 * self.shift)

    metadata = dict(input_size=[4, 4], mean=[0.] * 3, std=[255.] * 3)
    original, shifted = (Exportable(Two(shift), ['a', 'b'], metadata) for shift in (0, 1))
    file = export(original)
    assert compare_with_torch(file, original) == pytest.approx(dict(a=0, b=0), abs=1e-6)
    assert compare_with_torch(file, shifted) == pytest.approx(dict(a=0.25, b=0.001), rel=0.01)


# --- input size

@pytest.mark.parametrize('pipeline, flags, expected', [
    ([dict(type='Resize', scale=16)], [], [16, 16]), ([dict(type='Resize', scale=(12, 8))], ['8', '12'], [8, 12]),
    ([], ['20', '24'], [20, 24]),
    ([dict(type='ResizeEdge', scale=20), dict(type='CenterCrop', crop_size=16)], [], [16, 16]),
    ([dict(type='Resize', scale=16)], ['8', '12'], '--shape 8 12: the test pipeline resizes all images to 16 x 16'),
    ([], [], 'images of different sizes, and the exported file takes one: give --shape'),
    ([dict(type='ResizeEdge', scale=20)], ['8', '16'], '--shape 8 16: .* resizes such images to 20 x 40'),
], ids=['square', 'told', 'free', 'crop', 'other', 'untold', 'edge'])
def test_input_size(pipeline, flags, expected):
    cfg = Config.fromfile('cls.py')
    cfg.test_dataloader.dataset.pipeline[1:2] = pipeline
    inferencer = MultiLabelInferencer(cfg, 'cls.pth', 'cpu')
    shape = [int(side) for side in flags] or None
    if isinstance(expected, list):
        assert fixed_shape(inferencer, shape) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            fixed_shape(inferencer, shape)


# --- detection

@pytest.fixture
def detector(folder):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile('fcos.py').model).eval()
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=CLASSES))), 'fcos.pth')
    return model


@pytest.mark.slow
@pytest.mark.parametrize('calibrated', [False, True], ids=['stock', 'calibrated'])
@torch.no_grad()
def test_maps_of_a_detector(calibrated, detector):
    export_onnx.main(['fcos.py', 'fcos.pth', '--out', 'm.onnx', '--shape', '64', '96', *['--calibrated'] * calibrated])
    running, meta = session()
    assert meta['calibrated'] == calibrated
    assert meta['classes'] == list(CLASSES) and meta['strides'] == [[8, 8], [16, 16]]
    assert meta['input_size'] == [64, 96] and meta['test_cfg']['max_per_img'] == 20
    images = torch.rand(5, 3, 64, 96)
    actual = running.run(None, {'input': images.numpy()})
    scores, boxes, centerness = detector(images, mode='tensor')
    if calibrated:
        scores = [posterior_log_odds(x, gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25) for x in scores]
    names = [f'output_{kind}_{level}' for kind in range(3) for level in range(2)]
    assert [x.name for x in running.get_outputs()] == names
    assert_close([torch.from_numpy(x) for x in actual], [*scores, *boxes, *centerness], rtol=1e-4, atol=1e-4)


# --- refusals

@pytest.mark.parametrize('argv, message', [
    (['none.py', 'cls.pth', '--out', 'm.onnx'], 'No such config: none.py'),
    (['cls.py', 'none.pth', '--out', 'm.onnx'], 'No such checkpoint: none.pth'),
    (['cls.py', 'cls.pth', '--out', 'm.pt'], '--out m.pt: give an .onnx file, or a folder for a classifier'),
    (['fcos.py', 'fcos.pth', '--out', 'tagger'], '--out tagger: give an .onnx file'),
    (['cls.py', 'cls.pth', '--out', 'm.onnx', '--batch', '0'], '--batch 0: give 1 or more'),
    (['cls.py', 'cls.pth', '--out', 'm.onnx', '--shape', '0', '8'], '--shape 0 8: give 1 or more'),
    (['cls.py', 'cls.pth', '--out', 'm.onnx', '--thr', 'rde=0.5'], r"thr has unknown classes \['rde'\]"),
    (['fcos.py', 'cls.pth', '--out', 'm.onnx'], 'give --shape HEIGHT WIDTH'),
    (['fcos.py', 'cls.pth', '--out', 'm.onnx', '--thr', '0.5'], '--thr is for classifiers'),
    (['fcos.py', 'cls.pth', '--out', 'm.onnx', '--shape', '64', '64'], 'cls.pth does not fit'),
    (['fcos.py', 'fcos.pth', '--out', 'm.onnx', '--shape', '64', '70'], '--shape 64 70: .* padded to multiples of 32'),
    (['rcnn.py', 'cls.pth', '--out', 'm.onnx', '--shape', '64', '64'], 'FasterRCNN is not a single-stage detector'),
], ids=lambda value: '_'.join(value).replace('--out_m.onnx_', '') if isinstance(value, list) else None)
def test_refusals(argv, message, detector):
    Path('rcnn.py').write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'")
    with pytest.raises(SystemExit, match=message):
        export_onnx.main(argv)
    assert not list(Path().glob('*.onnx'))


def test_what_the_exporter_cannot_do_is_told(monkeypatch):
    monkeypatch.setattr(SteepBackbone, 'forward', lambda self, x: (torch.special.bessel_j0(x), ))
    with pytest.raises(SystemExit, match='cls.py cannot be exported with torch'):
        export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx'])


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit, match=r"onnxruntime.*pip install 'mmasl\[export\]'"):
        export_onnx.main(['cls.py', 'cls.pth', '--out', 'm.onnx'])
