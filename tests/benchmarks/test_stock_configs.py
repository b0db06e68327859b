"""benchmarks/stock_configs.py: what it finds, the options it makes and the outcomes it reports; heads that no other test builds."""
import argparse
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import DictAction
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

from mmasl import AsymmetricLoss

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import stock_configs  # noqa: E402
from benchmarks.stock_configs import FAILS, LEFT_OUT, NOT_RUN, WORKS, Family  # noqa: E402
from mmasl.reproduce.runs import read_rows  # noqa: E402

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
    """Options as --cfg-options reads them from a command line."""
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


@pytest.mark.parametrize('config', [
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'dino/dino-4scale_r50_8xb2-12e_coco',
    'pascal_voc/retinanet_r50_fpn_1x_voc0712', 'objects365/retinanet_r50-syncbn_fpn_1350k_objects365v1',
    'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco', 'openimages/retinanet_r50_fpn_32xb2-1x_openimages',
    'v3det/dino-4scale_r50_8xb2_sample1e-3_v3det_36e', 'lad/lad_r50-paa-r101_fpn_2xb8_coco_1x'],
    ids=lambda config: config.split('/')[0])
def test_small(config, tmp_path):
    """Nothing from elsewhere is left in the config, no large image, no GPU."""
    cfg = stock(config)
    cfg.merge_from_dict(typed(stock_configs.small(cfg, tmp_path)))
    assert cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters')) == cfg.train_cfg.val_interval == 1
    assert cfg.optim_wrapper.type == 'OptimWrapper' and cfg.load_from is None
    model = str(cfg.model)
    assert not any(word in model for word in ('Pretrained', 'SyncBN', 'http://', 'https://'))
    for split in ('train', 'val'):
        for path, part in stock_configs.walk(cfg[f'{split}_dataloader']):
            if 'ann_file' in part:
                assert part.data_root.startswith(str(tmp_path)), path
                assert Path(part.data_root, part.ann_file).is_file(), path
                assert Path(part.data_root, part.data_prefix.img).is_dir(), path
            for key in {'scale', 'scales', 'crop_size'} & set(part):
                assert part[key] == stock_configs.shrunk(part[key]), path
    assert cfg.val_evaluator.type == 'OpenImagesMetric' or Path(cfg.val_evaluator.ann_file).is_file()


@pytest.mark.parametrize('size, expected', [
    ((1333, 800), (384, 384)), ([(480, 1333), (512, 1333)], [(384, 384), (384, 384)]), ((0.1, 2.0), (0.1, 2.0)),
    (640, 384), (None, None)], ids=str)
def test_shrunk(size, expected):
    assert stock_configs.shrunk(size) == expected


def test_discover(tmp_path, capsys):
    head = "model = dict(type='FCOS', bbox_head=dict(type='FCOSHead', loss_cls=dict(type='{}', use_sigmoid={})))\n"
    loaders = ("default_scope = 'mmdet'\n"
               "train_dataloader = val_dataloader = dict(dataset=dict(type='{}', data_root='x', ann_file='y'))\n")
    files = {
        'a/plain.py': head.format('FocalLoss', True) + loaders.format('CocoDataset'),
        'a/b/odd.py': head.format('FocalLoss', True) + loaders.format('LVISDataset'),
        'c/other.py': head.format('FocalLoss', True) + loaders.format('CrowdHumanDataset'),
        'd/soft.py': head.format('CrossEntropyLoss', False), 'a/soft.py': head.format('CrossEntropyLoss', False),
        'd/bce.py': head.format('CrossEntropyLoss', True), 'e/none.py': "model = dict(type='SSD')\n",
        'f/broken.py': 'raise ValueError("no good")\n', '_base_/x.py': head.format('FocalLoss', True),
        'g/data.py': 'x = 1\n'}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert stock_configs.discover('mmdet', folder=tmp_path) == [
        Family('mmdet', 'a', 'FCOSHead', ['a/b/odd.py', 'a/plain.py'], {'FocalLoss'}, ['a/b/odd.py', 'a/plain.py']),
        Family('mmdet', 'c', 'FCOSHead', ['c/other.py'], {'FocalLoss'}, [], {'no data made for CrowdHumanDataset'}),
        Family('mmdet', 'd', '', ['d/bce.py', 'd/soft.py'], {'sigmoid CrossEntropyLoss', 'softmax CrossEntropyLoss'}),
        Family('mmdet', 'e', '', ['e/none.py'])]
    assert 'f/broken.py cannot be read: ValueError: no good' in capsys.readouterr().err
    assert [family.name for family in stock_configs.discover('mmdet', ['d'], tmp_path)] == ['d']


def test_the_plainest_config_runs():
    configs = ['f/r50_1x.py', 'f/r101-caffe_2x.py', 'f/s50_1x.py', 'f/l50_1x.py']
    assert Family('mmdet', 'f', 'Head', configs, runnable=configs).config == 'f/s50_1x.py'
    assert Family('mmdet', 'f', 'Head', configs, runnable=configs[1:2]).config == configs[1]


def test_left_out_tells_every_reason():
    row = stock_configs.left_out(Family('mmdet', 'd', '', ['d/x.py'], {'GHMC', 'softmax CrossEntropyLoss'}))
    assert row['outcome'] == LEFT_OUT and row['config'] == ''
    assert row['reason'].startswith('GHMC: it weighs') and '; softmax CrossEntropyLoss: on a softmax' in row['reason']


def run(tmp_path, code, steps=({'loss': 1.5}, ), evaluations=({'coco/bbox_mAP': 0.25}, )):
    """A run whose process is ``code`` and whose log says this."""
    script = [sys.executable, '-c', code]
    done = SimpleNamespace(output='')

    def start(threads):
        done.output = subprocess.run(script, capture_output=True, text=True).stderr
        return subprocess.Popen(script, stderr=subprocess.DEVNULL)

    return SimpleNamespace(work_dir=str(tmp_path / 'run'), start=start, training=lambda: list(steps),
                           evaluations=lambda: list(evaluations), tail=lambda size: done.output[-size:])


@pytest.mark.parametrize('code, log, outcome, told', [
    ('', {}, WORKS, ''), ('', dict(steps=[{'loss': float('nan')}]), FAILS, 'no finite loss'),
    ('', dict(evaluations=[]), FAILS, 'no validation'),
    ('raise ValueError("a | b")', {}, FAILS, 'ValueError: a / b'),
    ('raise SystemExit("Missing data")', {}, FAILS, 'Missing data'),
    ('import os; os.abort()', {}, FAILS, 'exit -6')], ids=str)
def test_attempt(code, log, outcome, told, tmp_path):
    result = stock_configs.attempt(run(tmp_path, code, **log))
    assert result['outcome'] == outcome and told in result['reason'] and result['loss'] in ('1.5', 'nan')
    if outcome == WORKS:
        assert result == dict(outcome=WORKS, loss='1.5', validation='coco/bbox_mAP 0.25', reason='')


def test_attempt_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stock_configs, 'TIMEOUT', 0.1)
    sleeper = run(tmp_path, '')
    sleeper.start = lambda threads: subprocess.Popen(['sleep', '60'])
    sleeper.tail = lambda size: 'Epoch(train)'
    assert stock_configs.attempt(sleeper)['reason'] == 'no end after 0.1 s'


@pytest.mark.parametrize('stock_works', [True, False])
def test_a_failure_is_repeated_with_the_stock_loss(stock_works, tmp_path, monkeypatch):
    runs = []

    def attempt(run):
        runs.append(run.options)
        if stock_works and len(runs) == 2:
            return dict(outcome=WORKS, loss='1', validation='mAP 0', reason='')
        return dict(outcome=FAILS, loss='', validation='', reason='an error')

    monkeypatch.setattr(stock_configs, 'attempt', attempt)
    config = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
    family = Family('mmdet', 'fcos', 'FCOSHead', [config], {'FocalLoss'}, [config])
    row = stock_configs.execute(family, tmp_path, tmp_path)
    assert row['outcome'] == FAILS and row['replaced'] == 'model.bbox_head.loss_cls'
    assert row['reason'] == 'an error; the stock loss ' + ('does not fail' if stock_works else 'fails in the same way')
    assert set(runs[0]) - set(runs[1]) == set(stock_configs.swap(stock(config[:-3])))


def test_unknown_family(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['stock_configs.py', '--family', 'nothing', 'misc'])
    with pytest.raises(SystemExit, match='--family nothing: no folder of configs'):
        stock_configs.main()


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
    # LAD keeps its teacher out of its modules.
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
    """The head alone: its detector needs a language model. It calls its loss with flat scores of the words that count,
    and labels that are shared among the tokens of a class."""
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
    if tokens == 1:  # focal loss focuses soft labels otherwise
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
    """Every row comes out again."""
    cfg = stock(row['config'][:-3], row['package'])
    if why := stock_configs.obstacle(cfg):
        pytest.skip(why)
    data = tmp_path / 'data'
    if importlib.util.find_spec('transformers'):
        stock_configs.make_bert(data / 'bert')
    family = Family(row['package'], row['family'], row['head'], [row['config']], runnable=[row['config']])
    again = stock_configs.execute(family, data, tmp_path)
    assert again['outcome'] == row['outcome'], again['reason']
