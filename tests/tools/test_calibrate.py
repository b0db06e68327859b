"""tools/calibrate.py: refusals, fits against their definitions, a known posterior, and a checkpoint from end to end."""
import csv
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmasl import AsymmetricLoss
from mmasl.evaluation.metrics import expected_calibration_error
from mmasl.ops import inverse_posterior
from mmasl.utils import tools as cli

ROOT = Path(__file__).parents[2]
spec = spec_from_file_location('tools_calibrate', ROOT / 'tools' / 'calibrate.py')
calibrate = module_from_spec(spec)
spec.loader.exec_module(calibrate)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    return tmp_path


def known_posterior(images=4000, seed=0, **loss):
    """Predictions of a perfect minimiser of the loss: the logits whose posterior is the truth."""
    rng = torch.Generator().manual_seed(seed)
    truth = (2.5 * torch.randn(images, 5, generator=rng, dtype=torch.float64) - 2).sigmoid().clamp(max=0.93)
    loss = AsymmetricLoss(**loss)
    logits = inverse_posterior(truth, loss.gamma_neg, loss.clip, loss.detach_focusing, loss.gamma_pos, loss.alpha)
    labels = torch.bernoulli(truth, generator=rng).to(torch.int8)
    return calibrate.Predictions(logits.float(), labels, loss, truth.float())


# --- refusals

CONFIG = """
default_scope = 'mmpretrain'
model = dict(type='ImageClassifier')
val_dataloader = dict(dataset=dict(type='Data', data_root='.', ann_file='val.json'))
"""


@pytest.mark.parametrize('text, argv, message', [
    ("default_scope = 'mmdet'", ['w.pth'], "c.py is no classification config: its default_scope is 'mmdet'"),
    (CONFIG + 'val_dataloader = None', ['w.pth'], 'c.py has no val_dataloader'),
    (CONFIG, [], 'Name the checkpoint: tools/calibrate.py c.py CHECKPOINT'),
    (CONFIG, ['none.pth'], 'No such checkpoint: none.pth'),
    (CONFIG, ['w.pth', '--launcher', 'slurm'], 'run it without --launcher'),
    (CONFIG, ['w.pth'], 'Missing data'),
])
def test_refusals(text, argv, message):
    Path('c.py').write_text(text)
    Path('w.pth').touch()
    with pytest.raises(SystemExit) as stop:
        calibrate.configure(cli.parse_args(calibrate.build_parser(), ['c.py', *argv]))
    assert message in stop.value.code


@pytest.mark.parametrize('argv, message', [
    (['--plot', 'a.jpg'], '--plot a.jpg: give a .png or .svg file'),
    (['--cfg-options', 'gamma=3'], "--cfg-options does not fit AsymmetricLoss: .*'gamma'"),
    (['--cfg-options', 'clip=1'], '--cfg-options does not fit AsymmetricLoss: clip=1 must be'),
])
def test_refusals_of_the_synthetic_task(argv, message):
    with pytest.raises(SystemExit, match=message):
        calibrate.main(['synthetic', *argv])


# --- fits

def test_platt_scaling_finds_the_maximum_likelihood():
    from sklearn.linear_model import LogisticRegression
    predictions = known_posterior()
    logits, labels = predictions.logits, predictions.labels.clone()
    labels[:, 2] = -1
    scale, bias = calibrate.fit_scaling(logits, labels, True)
    known = labels >= 0
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[known].double()[:, None].numpy(), labels[known].numpy())
    assert [scale, bias] == pytest.approx([theirs.coef_.item(), theirs.intercept_.item()], rel=1e-4)


def test_temperature_scaling_is_stationary_without_bias():
    predictions = known_posterior()
    scale, bias = calibrate.fit_scaling(predictions.logits, predictions.labels, False)
    assert bias == 0
    z, y = predictions.logits.double(), predictions.labels.double()
    around = [F.binary_cross_entropy_with_logits(factor * scale * z, y).item() for factor in (0.99, 1, 1.01)]
    assert around[1] < min(around[0], around[2])


def test_probabilities_that_are_right_need_no_fit():
    """With cross-entropy p is the posterior, and the fits find scale 1 and bias 0."""
    predictions = known_posterior(20000, gamma_neg=0., clip=0.)
    scale, bias = calibrate.fit_scaling(predictions.logits, predictions.labels, True)
    assert scale == pytest.approx(1, abs=0.03) and bias == pytest.approx(0, abs=0.05)
    rows, _, _ = calibrate.compare(predictions)
    assert rows[0]['error'] < 1e-6 and rows[1]['error'] < 1e-6
    assert rows[0]['ECE'] == pytest.approx(rows[1]['ECE'], abs=1e-6) and rows[0]['OF1'] == rows[1]['OF1']


@pytest.mark.parametrize('loss', [
    {}, dict(detach_focusing=True), dict(gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25),
    dict(gamma_neg=[0.5, 1., 2., 3., 4.])
], ids=['asl', 'detached', 'detection', 'classes'])
def test_rows_of_a_known_posterior(loss):
    predictions = known_posterior(**loss)
    rows, scores, labels = calibrate.compare(predictions)
    assert [row['method'] for row in rows] == ['p', 'posterior', 'temperature scaling', 'Platt scaling']
    assert labels.shape == (2000, 5) and all(values.shape == labels.shape for values in scores.values())
    raw, exact, temperature, platt = rows
    assert exact['error'] < 2e-5 < 1e-3 < min(raw['error'], temperature['error'], platt['error'])
    assert exact['Brier'] < min(row['Brier'] for row in (raw, temperature))
    for row, values in zip(rows, scores.values()):
        assert row['ECE'] == expected_calibration_error(values, labels)
        assert row['Brier'] == pytest.approx(((values - labels)**2).mean())


def test_half_of_the_images_fit_and_the_other_half_is_measured():
    predictions = known_posterior()
    _, scores, _ = calibrate.compare(predictions, seed=3)
    measured = {row.tobytes() for row in scores['p']}
    held_out = torch.tensor([row.tobytes() in measured for row in predictions.logits.sigmoid().numpy()])
    assert held_out.sum() == 2000
    scale, bias = calibrate.fit_scaling(predictions.logits[~held_out], predictions.labels[~held_out], True)
    assert np.sort(scores['Platt scaling'].ravel()) == pytest.approx(
        np.sort((scale * predictions.logits[held_out] + bias).sigmoid().numpy().ravel()), abs=1e-5)


def test_ignored_labels_do_not_count():
    predictions = known_posterior()
    labels = predictions.labels.clone()
    labels[:, 4] = -1
    rows, _, _ = calibrate.compare(calibrate.Predictions(predictions.logits, labels, predictions.loss))
    rest, _, _ = calibrate.compare(
        calibrate.Predictions(predictions.logits[:, :4], predictions.labels[:, :4], predictions.loss))
    for row, expected in zip(rows, rest):
        assert 'error' not in row and row['fit'] == expected['fit']
        assert {k: v for k, v in row.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in expected.items() if isinstance(v, float)}, rel=1e-5)


# --- output

def test_table_and_csv():
    rows = [{'method': 'p', 'fit': '', 'ECE': 0.12345, 'class-wise ECE': 0.2, 'Brier': 0.0123456, 'CF1': 91.26,
             'OF1': 90.},
            {'method': 'Platt scaling', 'fit': 'sigmoid(2 z -1)', 'ECE': 0.001, 'class-wise ECE': 0.002, 'Brier': 0.01,
             'CF1': 92., 'OF1': 93.}]
    assert calibrate.render(rows).splitlines() == [
        '| | ECE | class-wise ECE | Brier | CF1 [%] | OF1 [%] |', '|---|---|---|---|---|---|',
        '| p | 0.123 | 0.200 | 0.0123 | 91.3 | 90.0 |',
        '| Platt scaling, sigmoid(2 z -1) | 0.001 | 0.002 | 0.0100 | 92.0 | 93.0 |']
    calibrate.write(Path('new/t.csv'), rows, config='c.py')
    first, second = csv.DictReader(Path('new/t.csv').read_text().splitlines())
    assert (first['ECE'], first['config'], second['fit']) == ('0.12345', 'c.py', 'sigmoid(2 z -1)')
    assert set(first) >= {'commit', 'date', 'device', 'torch'}


@pytest.mark.parametrize('name', ['d.png', 'd.svg'])
def test_diagram_of_classes_that_differ(name):
    predictions = known_posterior(500, gamma_neg=[0.5, 1., 2., 3., 4.])
    _, scores, labels = calibrate.compare(predictions)
    calibrate.plot(Path(name), scores, labels, calibrate.calibration_settings(predictions.loss), 'title')
    assert Path(name).stat().st_size > 10000


def test_span():
    assert calibrate.span(torch.tensor(0.68371)) == '0.684'
    assert calibrate.span(torch.tensor([0.5, 0.68371])) == '0.500 to 0.684'


# --- real runs

def test_synthetic_task():
    predictions = calibrate.synthesize(0, images=4000, classes=4, steps=300)
    (raw, exact, *_), _, labels = calibrate.compare(predictions)
    assert 0.03 < (labels == 1).mean() < 0.08
    assert exact['error'] < 0.1 * raw['error'] and exact['ECE'] < 0.1 * raw['ECE'] and exact['OF1'] > raw['OF1']


def test_checkpoint(folder):
    """A checkpoint whose gamma_neg a hook restores, as adaptive asymmetry does."""
    from mmasl.datasets.digits import DigitScenes
    DigitScenes(train=4, val=10, colors=1).write('digits')
    Path('restore.py').write_text("""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Restore(Hook):
    def after_load_checkpoint(self, runner, checkpoint):
        runner.model.head.loss_module.gamma_neg.fill_(checkpoint['gamma_neg'])
""")
    Path('tiny.py').write_text(f"""
_base_ = {str(ROOT / 'configs/digits/resnet_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), head=dict(num_classes=10))
val_dataloader = dict(batch_size=4, dataset=dict(data_root='digits'))
custom_imports = dict(imports=['mmasl', 'restore'], allow_failed_imports=False)
custom_hooks = [dict(type='Restore')]
""")
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile('tiny.py', import_custom_modules=False).model)
    torch.nn.init.constant_(model.head.fc.bias, 0.5)
    torch.save(dict(state_dict=model.state_dict(), gamma_neg=2.), 'w.pth')
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/calibrate.py', 'tiny.py', 'w.pth', '--work-dir', 'w', '--plot', 'p/d.png'],
        env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(folder)),
        text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '5 images of 10 classes' in done.stdout and Path('p/d.png').is_file()
    rows = list(csv.DictReader(Path('w/calibration.csv').read_text().splitlines()))
    assert [row['method'] for row in rows] == ['p', 'posterior', 'temperature scaling', 'Platt scaling']
    assert 'gamma_neg=2.0' in rows[0]['loss']
    assert float(rows[0]['threshold']) == pytest.approx(inverse_posterior(0.5, 2., 0.05).sigmoid().item(), abs=1e-3)


@pytest.mark.parametrize('name', ['synthetic', 'resnet_asl_digits'])
def test_the_page_shows_what_was_measured(name):
    with open(ROOT / 'benchmarks' / 'calibration' / f'{name}.csv') as file:
        rows = [{key: float(value) if key in calibrate.FIGURES else value for key, value in row.items()}
                for row in csv.DictReader(file)]
    assert calibrate.render(rows) in (ROOT / 'docs' / 'analysis.md').read_text()
