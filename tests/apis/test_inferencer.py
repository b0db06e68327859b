"""The inferencer on a model whose logits are known: a picture's mean colour times 12 - 6, and a class at -1."""
import http.server
import json
import threading
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from matplotlib import font_manager, rcParams
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch.testing import assert_close

from mmasl.apis import inferencer as module
from mmasl.apis import model_files
from mmasl.apis.drawing import as_rgb, draw_labels, find_font, use_font
from mmasl.apis.images import list_images, match_channels
from mmasl.apis.inferencer import MultiLabelInferencer
from mmasl.apis.label_rule import LabelRule, parse_thresholds
from mmasl.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UnreadableImageError
from mmasl.ops import posterior

CLASSES = ('red', 'green', 'blue', 'dim')
COLORS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), white=(255, 255, 255), orange=(255, 140, 0))


@MODELS.register_module()
class PixelBackbone(BaseModule):
    """Gives the image as the feature map."""

    def __init__(self, pretrained: bool = False) -> None:
        super().__init__()
        assert not pretrained, 'would download'

    def forward(self, x):
        return (x, )


def config(head='MultiLabelLinearClsHead', resize=True, loss=None, **kwargs) -> Config:
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    if resize:
        pipeline.insert(1, dict(type='Resize', scale=8))
    return Config(dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier', backbone=dict(type='PixelBackbone'), neck=dict(type='GlobalAveragePooling'),
            head=dict(type=head, num_classes=4, in_channels=3, **kwargs,
                      loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=4., clip=0.05) | (loss or {}))),
        data_preprocessor=dict(mean=[0.] * 3, std=[255.] * 3, to_rgb=True),
        test_dataloader=dict(dataset=dict(type='mmasl.CocoMultiLabel', pipeline=pipeline))))


def state() -> dict:
    weight = torch.zeros(4, 3)
    weight[:3] = 12 * torch.eye(3)
    return {'head.fc.weight': weight, 'head.fc.bias': torch.tensor([-6., -6., -6., -1.])}


def save(path='w.pth', meta=dict(dataset_meta=dict(classes=CLASSES)), weights=None, **more) -> str:
    torch.save(dict(state_dict=weights or state(), meta=meta, **more), path)
    return str(path)


def paint(color, size=(8, 8)) -> np.ndarray:
    """In BGR."""
    return np.full((*size, 3), COLORS[color][::-1], np.uint8)


def logits(color) -> torch.Tensor:
    return torch.tensor([12 * value / 255 - 6 for value in COLORS[color]] + [-1.])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path('images').mkdir()
    for color in COLORS:
        mmcv.imwrite(paint(color), f'images/{color}.png')
    return tmp_path


def build(weights=None, **kwargs) -> MultiLabelInferencer:
    return MultiLabelInferencer(config(**kwargs), weights or save(), device='cpu', show_progress=False)


def found(results) -> list[list[str]]:
    return [record['pred_class'] for record in results['predictions']]


# --- inputs

@pytest.fixture
def server(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01, ))
        thread.start()
        yield f'http://127.0.0.1:{running.server_port}'
        running.shutdown()
        thread.join()


def test_every_kind_of_input_in_one_list(server):
    Path('images/notes.txt').touch()
    Path('images/SHOUT.PNG').write_bytes(Path('images/green.png').read_bytes())
    inputs = ['images/red.png', Path('images/green.png'), f'{server}/images/blue.png', paint('white'),
              np.stack([paint('red'), paint('blue')]), 'images']
    results = build()(inputs, batch_size=4)
    assert found(results) == [
        ['red'], ['green'], ['blue'], ['red', 'green', 'blue'], ['red'], ['blue'],
        ['green'], ['blue'], ['green'], ['red', 'green'], ['red'], ['red', 'green', 'blue']]
    assert [record['img_path'] for record in results['predictions']] == [
        'images/red.png', 'images/green.png', f'{server}/images/blue.png', None, None, None,
        *(f'images/{name}' for name in ('SHOUT.PNG', 'blue.png', 'green.png', 'orange.png', 'red.png', 'white.png'))]


@pytest.mark.parametrize('single', ['images/orange.png', Path('images/orange.png'), paint('orange'), [paint('orange')]],
                         ids=['str', 'path', 'array', 'list'])
def test_one_image_is_a_list_of_one(single):
    record, = build()(single)['predictions']
    assert record['pred_class'] == ['red', 'green']
    assert record['pred_score'] == pytest.approx(logits('orange').sigmoid()[:2].tolist(), abs=1e-6)


def test_images_of_several_sizes_keep_their_order():
    """Without a resize they cannot be stacked, and go through in batches of one size."""
    images = [paint(color, size) for color, size in (
        ('red', (4, 6)), ('green', (5, 5)), ('blue', (4, 6)), ('white', (6, 4)), ('orange', (5, 5)))]
    expected = [['red'], ['green'], ['blue'], ['red', 'green', 'blue'], ['red', 'green']]
    inferencer = build(resize=False)
    for batch_size in (1, 3, 5):
        assert found(inferencer(images, batch_size=batch_size)) == expected
    assert inferencer(images, batch_size=5, return_datasamples=True)['predictions'][3].ori_shape == (6, 4)


def test_the_pipeline_gets_arrays_as_its_loader_gives_them():
    cfg = config()
    cfg.test_dataloader.dataset.pipeline[0].to_float32 = True
    inferencer = MultiLabelInferencer(cfg, save(), 'cpu', show_progress=False)
    array, file = inferencer([paint('orange'), 'images/orange.png'], return_datasamples=True)['predictions']
    assert_close(array.pred_score, file.pred_score, rtol=0, atol=0)
    assert inferencer._load(paint('red'))['img'].dtype == inferencer._load('images/red.png')['img'].dtype == np.float32


@pytest.mark.parametrize('inputs, error, message', [
    ('none.png', DataError, 'no such image or folder: none.png'),
    (['images/red.png', 'none.png'], DataError, 'no such image or folder: none.png'),
    ('empty', DataError, r'the folder empty has no image: files must end in .jpg.*subfolders'),
    ([], DataError, 'the list of images is empty'),
    (np.zeros(8, np.uint8), DataError, r'shape \(8,\) and uint8 is not an image: give \(H, W, 3\)'),
    (np.zeros((0, 8, 3), np.uint8), DataError, r'shape \(0, 8, 3\)'),
    (np.zeros((2, 8, 8, 4), np.uint8), DataError, r'shape \(2, 8, 8, 4\)'),
    (np.zeros((8, 8, 3)), DataError, 'and float64 is not an image'),
    ([None], TypeError, 'NoneType is not an image: give a path'),
], ids=['file', 'second', 'folder', 'nothing', 'grey', 'flat', 'alpha', 'float', 'none'])
def test_inputs_that_are_refused_before_anything_is_predicted(inputs, error, message, monkeypatch):
    Path('empty/sub').mkdir(parents=True)
    Path('empty/notes.txt').touch()
    inferencer = build()
    monkeypatch.setattr(inferencer, 'forward', None)
    with pytest.raises(error, match=message):
        inferencer(inputs)


def test_unreadable_images_do_not_cost_the_others():
    Path('images/a.png').touch()
    Path('images/text.png').write_text('no image')
    Path('images/v.png').write_bytes(Path('images/red.png').read_bytes()[:40])
    with pytest.raises(UnreadableImageError) as caught:
        build()(['images', 'images/red.png'], batch_size=2, out_dir='drawn', out_file='p.json')
    error = caught.value
    assert list(error.reasons) == ['images/a.png', 'images/text.png', 'images/v.png']
    assert str(error).splitlines() == [
        '3 images cannot be read (the results attribute of this error has the others):',
        *(f'  images/{name}.png: the file is truncated or not an image' for name in ('a', 'text', 'v'))]
    # Done, in order, drawn and written.
    assert found(error.results) == [['blue'], ['green'], ['red', 'green'], ['red'], ['red', 'green', 'blue'], ['red']]
    assert len(list(Path('drawn').iterdir())) == 5 and len(json.loads(Path('p.json').read_text())) == 6


def test_a_folder_of_unreadable_images_and_the_call_after_it():
    Path('bad').mkdir()
    Path('bad/x.jpg').write_text('no image')
    inferencer = build()
    with pytest.raises(UnreadableImageError) as caught:
        inferencer('bad')
    assert caught.value.results == dict(predictions=[], visualization=None)
    assert found(inferencer('images/red.png')) == [['red']]


def test_a_url_without_an_image_names_it(server):
    with pytest.raises(UnreadableImageError, match='none.png: HTTPError: HTTP Error 404'):
        build()([f'{server}/none.png'])


# --- decisions

@pytest.mark.parametrize('head', ['MultiLabelLinearClsHead', 'mmasl.MultiLabelLinearClsHead'])
@pytest.mark.parametrize('own', [{}, dict(thr=0.2), dict(topk=3)], ids=['default', 'thr', 'topk'])
def test_without_arguments_the_head_decides(head, own):
    inferencer = build(head=head, **own)
    mmcv.imwrite(paint('orange') // 2 + 60, 'brown.png')
    ours = inferencer(['images/orange.png', 'brown.png'], return_datasamples=True)['predictions']
    heads = [result for batch in inferencer.preprocess([result.img_path for result in ours], batch_size=2)
             for data in batch for result in inferencer.model.test_step(data)]
    for actual, expected in zip(ours, heads, strict=True):
        assert set(actual.pred_label.tolist()) == set(expected.pred_label.tolist())


def sample(*scores, calibrated=None):
    kwargs = {} if calibrated is None else dict(calibrated_score=torch.tensor(calibrated))
    result = DataSample().set_pred_score(torch.tensor(scores))
    for name, value in kwargs.items():
        result.set_field(value, name)
    return result


@pytest.mark.parametrize('thr, topk, expected', [
    (None, None, [3, 1, 0, 2]), (None, 2, [3, 1]), ([0.5, 0.5, 0.5, 0.5], None, [3, 1]),
    ([0.2, 0.5, 0.2, 0.95], None, [1, 0]), ([0.2, 0.5, 0.2, 0.95], 2, [1]), ([1., 1., 1., 1.], None, []),
    ([0., 0., 0., 0.], None, [3, 1, 0, 2])])
def test_rule(thr, topk, expected):
    """With both, the k best are found first, as in the paper's Table 8; p at its threshold passes."""
    rule = LabelRule(None if thr is None else torch.tensor(thr), topk, False)
    assert rule.labels(sample(0.3, 0.5, 0.1, 0.9)).tolist() == expected


def test_rule_of_calibrated_scores():
    one = sample(0.04, 0.99, 0.03, 0.7, calibrated=(0., 0.96, 0., 0.5))
    assert LabelRule(None, None, True).labels(one).tolist() == [1, 3, 0, 2]  # zeros in the order of p
    assert LabelRule(torch.full((4, ), 0.5), None, True).labels(one).tolist() == [1]  # excluding 1/2
    assert LabelRule(torch.zeros(4), None, True).labels(one).tolist() == [1, 3]


@pytest.mark.parametrize('arguments, expected', [
    (dict(thr=0.6), ['red']), (dict(thr=0.5), ['red', 'green']), (dict(thr=[0.5, 0.7, 0.5, 0.1]), ['red', 'dim']),
    (dict(thr={'red': 1.}), ['green']), (dict(thr={'dim': 0.25, 'red': 0.5}), ['red', 'green', 'dim']),
    (dict(topk=1), ['red']), (dict(topk=3), ['red', 'green', 'dim']), (dict(topk=3, thr=0.4), ['red', 'green']),
])
def test_thresholds_and_topk(arguments, expected):
    # p: red 0.998, green 0.64 -> 0.55 below, blue 0.002, dim 0.27
    image = paint('orange')
    image[..., 1] = 132
    assert found(build()(image, **arguments)) == [expected]


def test_a_dict_leaves_the_other_classes_to_the_head():
    assert found(build(thr=0.2)('images/orange.png', thr={'green': 0.9})) == [['red', 'dim']]


@pytest.mark.parametrize('gamma_neg, clip', [(4., 0.05), (2., 0.)])
def test_calibrated_scores(gamma_neg, clip):
    inferencer = build(head='mmasl.MultiLabelLinearClsHead', loss=dict(gamma_neg=gamma_neg, clip=clip))
    z = logits('orange')
    result, = inferencer('images/orange.png', return_datasamples=True)['predictions']
    assert_close(result.calibrated_score, posterior(z, gamma_neg=gamma_neg, clip=clip), rtol=1e-5, atol=1e-6)
    p, q = z.sigmoid()[1], posterior(z, gamma_neg=gamma_neg, clip=clip)[1]  # of green: 0.64, and less
    assert q < p - 0.02
    between = (p + q).item() / 2
    assert found(inferencer('images/orange.png', thr=between)) == [['red']]
    assert found(inferencer('images/orange.png', thr=between, calibrated=False)) == [['red', 'green']]


def test_the_trained_asymmetry_is_restored():
    adapted = dict(gamma_neg=torch.tensor(1.5), clip=torch.tensor(0.02))
    weights = save(adaptive_asymmetry=[adapted | dict(sums=torch.zeros(4), gap=torch.tensor(0.))])
    result, = build(weights, head='mmasl.MultiLabelLinearClsHead')('images/orange.png')['predictions']
    expected = posterior(logits('orange'), gamma_neg=1.5, clip=0.02)
    assert result['calibrated_score'] == pytest.approx(expected[result['pred_label']].tolist(), abs=1e-6)
    assert abs(expected[1] - posterior(logits('orange'), gamma_neg=4., clip=0.05)[1]) > 0.1


@pytest.mark.parametrize('arguments, message', [
    (dict(thr=1.5), r"thr=1.5 of 'red' must be in \[0, 1\]"),
    (dict(thr=float('nan')), r"thr=nan of 'red' must be"),
    (dict(thr=[0.5, 0.5, -0.1, 0.5]), "thr=-0.1 of 'blue' must be"),
    (dict(thr=[0.5, 0.5]), 'thr has 2 values for 4 classes'),
    (dict(thr={'rde': 0.5}), r"thr has unknown classes \['rde'\]: the 4 classes are red, green, blue, dim"),
    (dict(topk=0), 'topk=0 must be from 1 to the 4 classes'),
    (dict(topk=5), 'topk=5 must be'),
    (dict(calibrated=True), r'MultiLabelLinearClsHead with AsymmetricLoss predicts no .*mmasl.MultiLabelLinearClsHead'),
    (dict(out_file='p.pkl'), "out_file='p.pkl': give a .json file"),
    (dict(batch_size=0), 'batch_size'),
    (dict(threshold=0.5), 'threshold'),
], ids=lambda value: None if isinstance(value, str) else '-'.join(map(str, value)))
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()('images', **arguments)


def test_a_threshold_that_no_calibrated_score_exceeds():
    inferencer = build(head='mmasl.MultiLabelLinearClsHead')
    with pytest.raises(ValueError, match="thr=0.97 of 'blue' is never exceeded: .* stay below 0.964"):
        inferencer('images', thr={'blue': 0.97})
    assert found(inferencer('images/blue.png', thr={'blue': 0.97}, calibrated=False)) == [['blue']]
    assert found(inferencer('images/white.png', thr={'blue': 1})) == [['red', 'green']]


@pytest.mark.parametrize('head', ['MultiLabelLinearClsHead', 'mmasl.MultiLabelLinearClsHead'])
def test_thresholds_of_the_checkpoint(head, folder, recwarn):
    """Thresholds of p come before the head's; those of the call come before both. p of orange is 1, 0.643, 0, 0.27."""
    save('thr.pth', meta=dict(dataset_meta=dict(classes=CLASSES), guarantee=dict(recall=0.9)),
         weights=state() | {'head.thresholds': torch.tensor([0.5, 0.64, 0.5, 0.2])})
    inferencer = MultiLabelInferencer(config(head), 'thr.pth', 'cpu', show_progress=False)
    assert inferencer.guarantee == dict(recall=0.9)
    assert not [w for w in recwarn if 'does not have' in str(w.message)]

    def labels(**kwargs):
        return set(inferencer(paint('orange'), **kwargs)['predictions'][0]['pred_class'])

    assert labels() == {'red', 'green', 'dim'} and labels(thr=0.9) == {'red'} and labels(topk=2) == {'red', 'green'}


@pytest.mark.parametrize('values, expected', [
    ([], None), (['0.5'], 0.5), (['red=0.3', 'a=b=.7'], {'red': 0.3, 'a=b': 0.7})])
def test_parse_thresholds(values, expected):
    assert parse_thresholds(values) == expected


@pytest.mark.parametrize('values', [['high'], ['red=high'], ['0.5', '0.6'], ['0.5', 'red=0.3']])
def test_parse_thr_refuses(values):
    with pytest.raises(ValueError, match='NUMBER'):
        parse_thresholds(values)


# --- results

def test_results_as_dicts_samples_and_json():
    inferencer = build(head='mmasl.MultiLabelLinearClsHead')
    records = inferencer('images', batch_size=2, out_file='new/p.json')['predictions']
    assert json.loads(Path('new/p.json').read_text()) == records
    results = inferencer('images', batch_size=5, return_datasamples=True, out_file='samples.json')
    assert json.loads(Path('samples.json').read_text()) == records
    for record, result in zip(records, results['predictions'], strict=True):
        assert isinstance(result, DataSample) and result.img_path == record['img_path']
        assert result.pred_score.shape == result.calibrated_score.shape == (4, )
        assert record['pred_label'] == result.pred_label.tolist()
        assert record['pred_class'] == [CLASSES[label] for label in record['pred_label']]
        assert record['calibrated_score'] == result.calibrated_score[result.pred_label].tolist()


# --- classes

@pytest.mark.parametrize('meta, dataset, expected', [
    (dict(dataset_meta=dict(classes=CLASSES)), dict(metainfo=dict(classes=list('abcd'))), list(CLASSES)),
    (dict(dataset_meta=dict(CLASSES=CLASSES)), {}, list(CLASSES)),
    (dict(CLASSES=CLASSES), {}, list(CLASSES)),
    ({}, dict(metainfo=dict(classes=list('abcd'))), list('abcd')),
    (dict(dataset_meta=dict(classes=None)), dict(classes=list('abcd')), list('abcd')),
    ({}, dict(classes='names.txt'), list('wxyz')),
], ids=['checkpoint', 'upper', 'old', 'metainfo', 'classes', 'file'])
def test_names_of_the_classes(meta, dataset, expected):
    Path('names.txt').write_text('w\nx\ny\nz\n')
    cfg = config()
    cfg.test_dataloader.dataset.update(dataset)
    assert MultiLabelInferencer(cfg, save(meta=meta), 'cpu').classes == expected


def test_names_of_a_data_set_that_has_its_own(monkeypatch):
    from mmasl.datasets.coco import CocoMultiLabel
    monkeypatch.setattr(CocoMultiLabel, 'METAINFO', dict(classes=tuple('klmn')))
    cfg = config()
    cfg.test_dataloader.dataset = dict(type='ConcatLike', dataset=cfg.test_dataloader.dataset)
    assert MultiLabelInferencer(cfg, save(meta={}), 'cpu').classes == list('klmn')


def test_without_names_classes_are_numbers():
    with pytest.warns(UserWarning, match='numbers are used. Set test_dataloader.dataset.metainfo'):
        inferencer = build(save(meta={}))
    assert found(inferencer('images/white.png', thr={'1': 1.})) == [['0', '2']]


# --- models

def test_a_config_is_a_file_a_config_or_a_dict_and_stays_as_it_is():
    cfg, weights = config(), save()
    before = cfg.to_dict()
    cfg.dump('c.py')
    for model in ('c.py', Path('c.py'), cfg, cfg._cfg_dict, cfg.to_dict()):
        inferencer = MultiLabelInferencer(model, Path(weights), 'cpu', show_progress=False)
        assert found(inferencer('images/red.png')) == [['red']]
    assert cfg.to_dict() == before


def test_the_current_scope_stays_as_it_is():
    with DefaultScope.overwrite_default_scope('mmdet'):
        inferencer = build()
        assert DefaultScope.get_current_instance().scope_name == 'mmdet'
        assert found(inferencer('images/red.png')) == [['red']]


def test_nothing_is_downloaded_for_the_backbone():
    cfg = config()
    cfg.model.backbone.pretrained = True
    MultiLabelInferencer(cfg, save(), 'cpu')


def test_official_checkpoints_are_converted(monkeypatch):
    monkeypatch.setattr(model_files, 'is_official', lambda checkpoint: 'official' in checkpoint)
    monkeypatch.setattr(model_files, 'convert_official', lambda checkpoint: checkpoint['official'])
    torch.save(dict(official=dict(state_dict=state(), meta=dict(dataset_meta=dict(classes=CLASSES)))), 'o.pth')
    assert build('o.pth').classes == list(CLASSES)


def change(key, value):
    weights = state()
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    return weights


@pytest.mark.parametrize('classes, dataset, weights, message', [
    (('a', 'b'), {}, state(), 'the checkpoint names 2 classes, but model.head.num_classes is 4'),
    (None, dict(metainfo=dict(classes=list('abc'))), state(),
     'the config names 3 classes, but model.head.num_classes is 4'),
    (CLASSES, {}, change('head.fc.weight', torch.zeros(5, 3)),
     r'w.pth does not fit .*: head.fc.weight is \(5, 3\) in the checkpoint and \(4, 3\) in the model'),
], ids=['checkpoint', 'config', 'shape'])
def test_counts_that_do_not_fit(classes, dataset, weights, message):
    cfg = config()
    cfg.test_dataloader.dataset.update(dataset)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        MultiLabelInferencer(cfg, save(meta=dict(dataset_meta=dict(classes=classes)), weights=weights), 'cpu')


def test_a_head_that_does_not_know_its_number_of_classes():
    """Its logits are the features: here 3, the colours in [0, 1]."""
    cfg = config()
    cfg.model.head = dict(type='MultiLabelClsHead', thr=0.6)
    weights = save(meta=dict(dataset_meta=dict(classes=None)), weights={'unused': torch.zeros(1)})
    with pytest.warns(UserWarning, match='unused'), pytest.raises(
            ValueError, match='the head has no num_classes. Set test_dataloader'):
        MultiLabelInferencer(cfg, weights, 'cpu')
    for classes, expected in ((('r', 'g', 'b'), [['r']]), (CLASSES, None)):
        weights = save(meta=dict(dataset_meta=dict(classes=classes)), weights={'unused': torch.zeros(1)})
        with pytest.warns(UserWarning, match='unused'):
            inferencer = MultiLabelInferencer(cfg, weights, 'cpu', show_progress=False)
        if expected:
            assert found(inferencer('images/red.png')) == expected
        else:
            with pytest.raises(ValueError, match='the model predicts 3 classes, but 4 have names'):
                inferencer('images/red.png')


def test_a_broken_model_is_named():
    inferencer = build(save(weights=change('head.fc.bias', torch.full((4, ), torch.nan))))
    with pytest.raises(NonFiniteError, match='the model predicts NaN for images/red.png'):
        inferencer('images/red.png')
    with pytest.raises(NonFiniteError, match='the model predicts NaN for array 0'):
        inferencer(paint('red'))


class Hostile:

    def __reduce__(self):
        return Path.touch, (Path('owned'), )


def test_a_checkpoint_that_would_execute_is_refused():
    weights = save(optimizer=Hostile())
    with pytest.raises(ValueError, match='w.pth is refused: loading it could execute code'):
        build(weights)
    assert not Path('owned').exists()
    torch.load(weights, weights_only=False)  # it is indeed hostile
    assert Path('owned').exists()


def test_a_hostile_url(server, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', 'hub')
    weights = save('evil.pth', optimizer=Hostile())
    with pytest.raises(ValueError, match='evil.pth is refused'):
        build(f'{server}/{weights}')
    assert not Path('owned').exists()
    assert found(build(f'{server}/{save("fine.pth")}')('images/red.png')) == [['red']]


@pytest.mark.parametrize('model, weights, error', [
    ('none.py', 'w.pth', ConfigError), (None, 'none.pth', CheckpointError)])
def test_missing_files(model, weights, error):
    save()
    with pytest.raises(error, match='none'):
        MultiLabelInferencer(model or config(), weights, 'cpu')


def test_other_models_and_pipelines_are_refused():
    cfg = config()
    cfg.model.head = dict(type='LinearClsHead', num_classes=4, in_channels=3)
    with pytest.raises(ValueError, match='model.head is LinearClsHead: use a multi-label head'):
        MultiLabelInferencer(cfg, save(), 'cpu')
    cfg = config()
    del cfg.test_dataloader.dataset.pipeline[0]
    with pytest.raises(ValueError, match='the test pipeline starts with Resize: it must start with LoadImageFromFile'):
        MultiLabelInferencer(cfg, save(), 'cpu')
    cfg = config()
    cfg.test_dataloader = None
    with pytest.raises(ValueError, match='the config has no test_dataloader'):
        MultiLabelInferencer(cfg, save(), 'cpu')


# --- pictures

def bar_lengths(picture) -> list[float]:
    """Lengths of the bars in the colour of predicted labels, from the top, in pixels."""
    blue = (np.abs(picture.astype(int) - (31, 119, 180)).sum(-1) < 30)
    starts = np.flatnonzero(np.diff(np.r_[0, blue.any(1).astype(int)]) == 1)
    return [blue[start + 5].sum() for start in starts]


def test_a_picture_shows_the_image_and_the_scores():
    inferencer = build()
    picture, = inferencer('images/orange.png', topk=2, return_vis=True)['visualization']
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    # The image in RGB, in the left half.
    left = picture[:, :picture.shape[1] // 2].reshape(-1, 3)
    assert (left == COLORS['orange']).all(1).mean() > 0.2
    first, second = bar_lengths(picture)
    p = logits('orange').sigmoid()
    assert second / first == pytest.approx((p[1] / p[0]).item(), abs=0.02)


@pytest.mark.parametrize('predicted, shown', [(1, 1), (20, 20), (30, 20)])
def test_a_picture_of_many_labels_says_how_many_are_left_out(predicted, shown):
    scores = torch.linspace(0.99, 0.01, 40)
    one = sample(*scores.tolist())
    rule = LabelRule(scores[predicted - 1].expand(40), None, False)
    picture = draw_labels(paint('red'), one.set_pred_label(rule.labels(one)), ['$' * 40] * 40, rule)
    assert len(bar_lengths(picture)) == shown


def test_predicted_labels_come_first_in_a_picture():
    """One threshold each: the second best is predicted and the best is not."""
    one = sample(0.9, 0.8, 0.1)
    rule = LabelRule(torch.tensor([0.95, 0.5, 0.5]), None, False)
    picture = draw_labels(paint('red'), one.set_pred_label(rule.labels(one)), 'abc', rule)
    length, = bar_lengths(picture)
    full = (np.abs(picture.astype(int) - 211).sum(-1) < 10).sum(1).max()  # of 0.9, in grey
    assert length / full == pytest.approx(0.8 / 0.9, abs=0.02)


def test_pictures_of_equal_names_get_different_ones():
    for folder in 'ab':
        mmcv.imwrite(paint('red'), f'{folder}/1.png')
    mmcv.imwrite(paint('blue'), 'a/1.jpg')
    mmcv.imwrite(paint('blue'), 'a/1_1.png')
    inferencer = build()
    inferencer(['a', 'b', paint('red')], out_dir='new/drawn')
    names = {'1', '1_1', '1_1_1', '1_2', 'array_4'}
    assert {path.name for path in Path('new/drawn').iterdir()} == {f'{name}.png' for name in names}
    # Again: the same image has the same name, another array another.
    inferencer(['b/1.png', paint('red')], out_dir='new/drawn')
    assert {path.stem for path in Path('new/drawn').iterdir()} == names | {'array_5'}


def test_pictures_do_not_replace_images(folder, monkeypatch):
    before = Path('images/red.png').read_bytes()
    monkeypatch.setattr(MultiLabelInferencer, 'forward', None)  # not reached
    inferencer = build()
    for inputs, out_dir in (('images', 'images'), ('images/red.png', folder / 'images'), ('images/red.png', 'images/')):
        with pytest.raises(ConfigError, match='is the folder of images/.*.png, which a picture could replace'):
            inferencer(inputs, out_dir=out_dir)
    monkeypatch.chdir('images')
    with pytest.raises(ConfigError, match='is the folder of red.png'):
        inferencer('red.png', out_dir='.')
    assert Path('red.png').read_bytes() == before


def test_pictures_are_shown_and_kept_only_when_asked(monkeypatch):
    shown = []
    monkeypatch.setattr(module.Visualizer, 'show', lambda self, picture, **kwargs: shown.append((picture, kwargs)))
    inferencer = build()
    results = inferencer(['images/red.png', 'images/blue.png'], show=True, wait_time=3)
    assert results['visualization'] is None
    assert [kwargs for _, kwargs in shown] == [dict(win_name='red', wait_time=3), dict(win_name='blue', wait_time=3)]
    assert not list(Path().glob('**/vis*'))
    inferencer('images/red.png', out_dir='drawn')
    written = mmcv.imread('drawn/red.png')[..., ::-1]
    assert_close(np.ascontiguousarray(written), shown[0][0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- grey, depth, class names

@pytest.mark.parametrize('shape', [(6, 4), (6, 4, 1), (6, 4, 3)], ids=str)
@pytest.mark.parametrize('color_type, expected', [('grayscale', (6, 4)), ('color', (6, 4, 3))])
def test_arrays_get_the_channels_of_the_loader(shape, color_type, expected):
    image = np.full(shape, 7, np.uint8)
    image[0, 0] = 200
    found = match_channels(image, color_type)
    assert found.shape == expected and found.reshape(6, 4, -1)[0, 0, 0] == 200 and found.reshape(6, 4, -1)[1, 1, 0] == 7


@pytest.mark.parametrize('image, expected', [
    (np.array([[1, 2]], np.uint8), [[[1] * 3, [2] * 3]]),
    (np.array([[[1, 9], [2, 9]]], np.uint8), [[[1] * 3, [2] * 3]]),
    (np.array([[[1, 2, 3]]], np.uint8), [[[3, 2, 1]]]), (np.array([[[1, 2, 3, 9]]], np.uint8), [[[3, 2, 1]]]),
    (np.array([[0, 1000]], np.uint16), [[[0] * 3, [255] * 3]])], ids=['grey', 'alpha', 'BGR', 'BGRA', '16 bits'])
def test_images_for_drawing(image, expected):
    assert as_rgb(image).tolist() == expected and as_rgb(image).dtype == np.uint8


def test_files_of_a_folder_that_are_left_out_are_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('mmasl.apis.images.print_log', lambda message, *_: said.append(message))
    (tmp_path / 'below').mkdir()
    for name in ('a.JPG', '._a.JPG', '.hidden', 'Thumbs.db', 'b.png', 'below/c.png'):
        (tmp_path / name).touch()
    assert [Path(path).name for path in list_images(tmp_path)] == ['a.JPG', 'b.png']
    assert len(said) == 1 and said[0].endswith('are left out: Thumbs.db, ._a.JPG')


def test_a_font_that_has_the_characters(tmp_path, monkeypatch):
    from fontTools.ttLib import TTFont
    path, characters = font_manager.findfont('DejaVu Sans'), (0x732b, 0x72ac)  # of two Chinese names
    font = TTFont(path)
    for table in font['cmap'].tables:
        if table.isUnicode():
            table.cmap.update(dict.fromkeys(characters, 'A'))
    for record in font['name'].names:
        record.string = 'Wide'
    font.save(tmp_path / 'wide.ttf')
    said = []
    monkeypatch.setattr('mmasl.apis.drawing.print_log', lambda message, *_: said.append(message))
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', [
        x for x in font_manager.fontManager.ttflist if x.name.startswith(('DejaVu', 'Last Resort'))])
    names = tuple(map(chr, characters))
    find_font.cache_clear()
    assert find_font(('dog', 'caf\xe9')) is None and not said
    assert find_font(names) is find_font(names) is None
    assert len(said) == 1 and names[0] in said[0] and 'fonts-noto-cjk' in said[0]
    find_font.cache_clear()
    font_manager.fontManager.addfont(tmp_path / 'wide.ttf')
    assert find_font(names) == 'Wide' and len(said) == 1
    with use_font(names):
        assert rcParams['font.sans-serif'][0] == 'Wide'
    assert rcParams['font.sans-serif'][0] != 'Wide'
    find_font.cache_clear()
