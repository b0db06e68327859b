"""tools/calibrate.py: refusals, and a checkpoint from end to end."""
import csv
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmasl.apis.onnx_export import prepare_classifier
from mmasl.errors import MMASLError
from mmasl.ops import posterior_threshold
from mmasl.utils.tools import parse_args
from tools import calibrate

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
val_dataloader = dict(dataset=dict(type='Data', data_root='.', ann_file='val.json'))
"""


@pytest.mark.parametrize('text, argv, message', [
    ("default_scope = 'mmdet'", ['w.pth'], "c.py has default_scope='mmdet'"),
    (CONFIG + 'val_dataloader = None', ['w.pth'], 'c.py has no val_dataloader'),
    (CONFIG, [], 'the checkpoint is missing: tools/calibrate.py c.py CHECKPOINT'),
    (CONFIG, ['none.pth'], 'No such checkpoint: none.pth'),
    (CONFIG, ['w.pth', '--launcher', 'slurm'], 'leave out --launcher'),
    (CONFIG, ['w.pth', '--recall', '95'], '--recall 95.0 must be between 0 and 1'),
    (CONFIG, ['w.pth', '--save', 'x.pth'], '--save is for thresholds that --recall or --precision promises'),
    (CONFIG, ['w.pth', '--over-all'], '--over-all is for thresholds that --recall or --precision promises'),
    (CONFIG, ['w.pth'], 'Missing data'),
])
def test_refusals(text, argv, message):
    Path('c.py').write_text(text)
    Path('w.pth').touch()
    with pytest.raises(MMASLError, match=message):
        calibrate.configure(parse_args(calibrate.build_parser(), ['c.py', *argv]))


@pytest.mark.parametrize('argv, message', [
    (['--plot', 'a.jpg'], '--plot a.jpg: give a .png or .svg file'),
    (['--recall', '0.9'], '--recall and --precision need a config and a checkpoint'),
    (['--cfg-options', 'gamma=3'], "--cfg-options does not fit AsymmetricLoss: .*'gamma'"),
    (['--cfg-options', 'clip=1'], 'clip=1 must be'),
])
def test_refusals_of_the_synthetic_task(argv, message):
    with pytest.raises(SystemExit, match=message):
        calibrate.main(['synthetic', *argv])


def test_table_of_numbers():
    rows = [{'method': 'p', 'ECE': 0.123451234}, {'method': 'x', 'ECE': 1.}]
    calibrate.write_table(Path('new/t.csv'), rows, config='c.py')
    first, second = csv.DictReader(Path('new/t.csv').read_text().splitlines())
    assert (first['ECE'], first['config'], second['method']) == ('0.123451', 'c.py', 'x')
    assert set(first) >= {'commit', 'date', 'device', 'torch'}


def test_checkpoint(folder, monkeypatch, capsys):
    """A checkpoint whose gamma_neg a hook restores, as adaptive asymmetry does."""
    from mmasl.datasets.digits import DigitScenes
    DigitScenes(train=4, val=10, colors=1).write('digits')
    Path('restore_gamma.py').write_text("""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class RestoreGamma(Hook):
    def after_load_checkpoint(self, runner, checkpoint):
        runner.model.head.loss_module.gamma_neg.fill_(checkpoint['gamma_neg'])
""")
    Path('tiny.py').write_text(f"""
_base_ = {str(ROOT / 'configs/digits/resnet_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), head=dict(num_classes=10), data_preprocessor=dict(num_classes=10))
val_dataloader = dict(batch_size=4, dataset=dict(data_root='digits'))
custom_imports = dict(imports=['mmasl', 'restore_gamma'], allow_failed_imports=False)
custom_hooks = [dict(type='RestoreGamma')]
""")
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile('tiny.py', import_custom_modules=False).model)
    torch.nn.init.constant_(model.head.fc.bias, 0.5)
    torch.save(dict(state_dict=model.state_dict(), gamma_neg=2.), 'w.pth')
    monkeypatch.syspath_prepend(folder)
    calibrate.main('tiny.py w.pth --work-dir w --plot p/d.png'.split())
    assert '5 images of 10 classes' in capsys.readouterr().out and Path('p/d.png').is_file()
    rows = list(csv.DictReader(Path('w/calibration.csv').read_text().splitlines()))
    assert [row['method'] for row in rows] == ['p', 'posterior', 'temperature scaling', 'Platt scaling']
    assert 'gamma_neg=2.0' in rows[0]['loss']
    expected = posterior_threshold(0.5, gamma_neg=2., clip=0.05).sigmoid().item()
    assert float(rows[0]['threshold']) == pytest.approx(expected, abs=1e-3)

    # thresholds with a promise: in the checkpoint, and used by the tools
    calibrate.main('tiny.py w.pth --work-dir w --recall 0.5 --save s/promised.pth'.split())
    text = capsys.readouterr().out
    assert 'Checkpoint with the thresholds: s/promised.pth' in text and '| promised |' in text.replace('  ', '')
    checkpoint = torch.load('s/promised.pth', weights_only=True)
    assert checkpoint['meta']['guarantee'] == dict(
        recall=0.5, of='class', images=10, without_promise=checkpoint['meta']['guarantee']['without_promise'])
    thresholds = checkpoint['state_dict'].pop('head.thresholds')
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in checkpoint['state_dict'].items())
    cfg = Config.fromfile('tiny.py', import_custom_modules=False)
    metadata = prepare_classifier(cfg, 's/promised.pth', [64, 64]).metadata
    assert metadata['pred_score_thr'] == thresholds.tolist() and metadata['guarantee']['recall'] == 0.5
    names = checkpoint['meta']['guarantee']['without_promise']
    assert [name in names for name in (f'red {digit}' for digit in range(10))] == [
        abs(value - expected) < 1e-4 for value in thresholds.tolist()]
    with pytest.raises(SystemExit, match='--precision 0.99 cannot be promised for any class: the 10 images'):
        calibrate.main('tiny.py w.pth --work-dir w --precision 0.99'.split())
    calibrate.main('tiny.py w.pth --work-dir w --recall 0.5 --over-all'.split())
    assert torch.load('w/thresholds.pth', weights_only=True)['meta']['guarantee'] == dict(
        recall=0.5, of='image', images=10, without_promise=[])
