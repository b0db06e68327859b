"""tools/inspect_errors.py: refusals, and a checkpoint from end to end against what tools/test.py measures."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmasl.errors import MMASLError
from mmasl.utils.tools import parse_args
from tools import inspect_errors
from tools import test as test_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    return tmp_path


# --- refusals

CONFIG = """
default_scope = 'mmpretrain'
model = dict(type='ImageClassifier')
test_dataloader = dict(dataset=dict(type='Data', data_root='.', ann_file='test.json'))
"""


@pytest.mark.parametrize('text, argv, message', [
    ("default_scope = 'mmdet'", ['w.pth'], "c.py has default_scope='mmdet'"),
    (CONFIG + 'test_dataloader = None', ['w.pth'], 'c.py has no test_dataloader'),
    (CONFIG, ['none.pth'], 'No such checkpoint: none.pth'),
    (CONFIG, ['w.pth', '--launcher', 'slurm'], 'leave out --launcher'),
    (CONFIG, ['w.pth', '--top', '-1'], '--top -1: give 0 or more'),
    (CONFIG, ['w.pth'], 'Missing data'),
    (CONFIG.replace('test.json', 'c.py'), ['w.pth', '--out', 'w.pth/a.html'], '--out w.pth/a.html: '),
    (CONFIG.replace('test.json', 'c.py'), ['w.pth', '--candidates', '.'], '--candidates . is a folder: name a file'),
])
def test_refusals(text, argv, message):
    Path('c.py').write_text(text)
    Path('w.pth').touch()
    with pytest.raises(MMASLError, match=message):
        inspect_errors.configure(parse_args(inspect_errors.build_parser(), ['c.py', *argv]))


# --- real runs

@pytest.fixture
def tiny() -> None:
    """tiny.py, the digits with a small head of logits that differ, and w.pth."""
    from mmasl.datasets.digits import DigitScenes
    DigitScenes(train=4, val=12, colors=1).write('digits')
    Path('tiny.py').write_text(f"""
_base_ = {str(ROOT / 'configs/digits/resnet_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), head=dict(type='mmasl.MultiLabelLinearClsHead', num_classes=10))
data_preprocessor = dict(num_classes=10)
test_dataloader = dict(batch_size=5, dataset=dict(data_root='digits'))
test_evaluator = dict(type='mmasl.MultiLabelMetric', calibrated=True, topk=None)
custom_imports = dict(imports=['mmasl', 'restore'], allow_failed_imports=False)
custom_hooks = [dict(type='Restore')]
""")
    Path('restore.py').write_text("""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module(force=True)
class Restore(Hook):
    def after_load_checkpoint(self, runner, checkpoint):
        runner.model.head.loss_module.gamma_neg.fill_(checkpoint['gamma_neg'])
""")
    rng = torch.Generator().manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        state = MODELS.build(Config.fromfile('tiny.py', import_custom_modules=False).model).state_dict()
    state['head.fc.weight'] = 40 * torch.randn(10, 128, generator=rng)
    torch.save(dict(state_dict=state, gamma_neg=2.), 'w.pth')


def test_checkpoint(tiny, folder, monkeypatch):
    """The figures are those of a test run, and a hook restores gamma_neg as adaptive asymmetry does."""
    monkeypatch.syspath_prepend(folder)
    inspect_errors.main('tiny.py w.pth --work-dir w --candidates out/c.csv --top 9'.split())
    page = Path('w/errors.html').read_text()
    assert 'mmasl.CocoMultiLabel digits' in page and 'gamma_neg=2.0' in page and page.count('<img src="data:') > 9

    monkeypatch.setattr(sys, 'argv', 'test.py tiny.py w.pth --work-dir w --out m.json --out-item metrics'.split())
    test_tool.main()
    metrics = json.loads(Path('m.json').read_text())
    assert metrics['multi-label/CF1'] > 1
    for name in ('mAP', 'CP', 'CR', 'CF1', 'OP', 'OR', 'OF1'):
        assert f'<th scope="row">{name}</th><td data-v="{metrics[f"multi-label/{name}"]:.6g}">' in page

    rows = list(csv.DictReader(Path('out/c.csv').read_text().splitlines()))
    annotations = json.loads(Path('digits/annotations/instances_val.json').read_text())
    names = {category['id']: category['name'] for category in annotations['categories']}
    files = {image['id']: image['file_name'] for image in annotations['images']}
    labels = {(files[x['image_id']], names[x['category_id']]) for x in annotations['annotations']}
    assert {row['label'] for row in rows} == {'0', '1'} and 'beyond_p_star' in rows[0]
    for row in rows:
        assert ((Path(row['image']).name, row['class']) in labels) == (row['label'] == '1')
    wrong = [float(row['p']) for row in rows if row['label'] == '0']
    assert wrong == sorted(wrong, reverse=True) and len(rows) >= 18


def test_another_loss_has_no_posterior(tiny, capsys):
    loss = 'model.head.loss._delete_=True model.head.loss.type=CrossEntropyLoss model.head.loss.use_sigmoid=True'
    text = Path('tiny.py').read_text().replace('mmasl.MultiLabelLinear', 'MultiLabelLinear').split('custom_imports')[0]
    Path('tiny.py').write_text(text)
    inspect_errors.main(['tiny.py', 'w.pth', '--out', 'e.html', '--cfg-options', *loss.split()])
    page = Path('e.html').read_text()
    assert 'no posterior in closed form' in page and 'beyond p*' not in page and 'CrossEntropyLoss' in page
    assert 'Page: e.html' in capsys.readouterr().out


@pytest.mark.parametrize('options, message', [
    (['model.head.type=LinearClsHead', 'model.head.loss.type=CrossEntropyLoss', 'model.head.loss._delete_=True'],
     'model.head is a LinearClsHead'),
    (['model.head.num_classes=9'], 'model.head has num_classes=9, and test_dataloader.dataset has 10 classes'),
])
def test_models_that_do_not_fit(tiny, folder, monkeypatch, options, message):
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit, match=message):
        inspect_errors.main(['tiny.py', 'w.pth', '--cfg-options', *options])


def test_a_diverged_model(tiny, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    state = torch.load('w.pth')
    state['state_dict']['head.fc.weight'] = torch.full((10, 128), np.nan)
    torch.save(state, 'w.pth')
    with pytest.raises(SystemExit, match='(?i)nan'):
        inspect_errors.main(['tiny.py', 'w.pth'])
