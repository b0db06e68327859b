"""benchmarks/speed/run.py: its flags, its rendering, that docs/speed.md shows the committed rows, and what it judges."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks.speed import loss, measure, run, step
from mmasl.ops.reference import asymmetric_loss as reference

ROOT = Path(__file__).parents[2]
SPEED = ROOT / 'benchmarks' / 'speed'


@pytest.mark.parametrize('path', run.DOCS, ids=lambda path: path.stem)
def test_documents_show_the_rows(path):
    assert run.render(path.read_text(), SPEED) == path.read_text(), 'run python benchmarks/speed/run.py --render'


@pytest.mark.parametrize('flags, message', [
    (['speed'], 'no part speed: the parts are loss, kernel'),
    (['--device', 'cuda'], 'torch sees no GPU here')], ids=str)
def test_bad_flags(flags, message):
    if 'cuda' in flags and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    done = subprocess.run([sys.executable, 'benchmarks/speed/run.py', *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_render(tmp_path):
    doc = ('a\n<!-- a comment -->\n<!-- rows: step cpu -->\nold\n<!-- end -->\nb\n'
           '<!-- targets: step cpu -->\n<!-- end -->\nc')
    assert 'Not measured yet: `python benchmarks/speed/run.py step --device cpu`' in run.render(doc, tmp_path)
    (tmp_path / 'step_cpu.csv').write_text(
        'model,loss,step_ms,step_over_stock,difference_of_losses_over_step,empty,commit,date,torch,device\n'
        'R,bce,100,1,0,,abc,2026-01-01,2.11,CPU\nR,asl,102,1.02,0.001,,abc,2026-01-01,2.11,CPU\n'
        'R,bce again,101,1.01,,,abc,2026-01-01,2.11,CPU\n')
    text = run.render(doc, tmp_path)
    assert text.startswith('a\n<!-- a comment -->\n') and text.endswith('\nc') and 'old' not in text
    assert '| R | asl | 102 | 1.02 | 0.001 |' in text and '| empty' not in text
    assert 'CPU, torch 2.11, commit abc, 2026-01-01.' in text
    assert '| +2.0%, the stock loss again +1.0%; by the losses alone +0.10% | **not reached** |' in text
    assert run.render(text, tmp_path) == text


@pytest.mark.parametrize('form', ['dense', 'labels'])
def test_peers_are_the_same_loss(form, monkeypatch):
    """What is timed against each other has the value and gradient of the equations."""
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    logits, target = loss.batch(40, 7, form, 'cpu')
    setting = loss.DETECTION if form == 'labels' else loss.CLASSIFICATION
    dense = target if form == 'dense' else (target[:, None] == torch.arange(7)).float()
    for (name, kind), call in loss.peers(form, 7, 'cpu').items():
        value = call(logits, target)
        if kind == 'asl':
            expected = reference(logits, dense, **setting, detach_focusing='detached' in name).sum()
            assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
            assert_close(torch.autograd.grad(value, logits)[0].double(),
                         torch.autograd.grad(expected, logits)[0].double(), rtol=1e-3, atol=1e-5)
        else:
            assert value.isfinite() and torch.autograd.grad(value, logits)[0].abs().sum() > 0


def test_softmax_peers_are_the_same_loss(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    logits, target = loss.batch(40, 7, 'softmax', 'cpu')
    calls = loss.peers('softmax', 7, 'cpu')
    values = {name: call(logits, target) for (name, kind), call in calls.items() if kind == 'asl'}
    values['timm'] = values['timm'] * 40  # a mean
    for value in values.values():
        assert_close(value, values['naive'], rtol=1e-4, atol=1e-4)


def rows(ours_ms, share='', mcv=False):
    names = [('mmasl', 'asl', ours_ms, 1.), ('naive', 'asl', 9., 12.), ('torch.compile of naive', 'asl', 4., 2.)]
    names += [('mmcv focal', 'focal', 2., 1.)] if mcv else []
    return [dict(shape=shape, loss=name, kind=kind, time_ms=str(time), memory_in_gradients=str(memory),
                 share_of_copy_bandwidth=share if name == 'mmasl' else '') for shape in loss.LARGE
            for name, kind, time, memory in names]


@pytest.mark.parametrize('values, expected', [
    ((3.,), [True, True, True]), ((4.2,), [False, True, True]), ((4.5,), [False, False, True]),
    ((1.1, '0.9', True), [True] * 5), ((2.1, '0.8', True), [False, True, False, False, True])], ids=str)
def test_targets_of_the_loss(values, expected):
    assert [reached for *_, reached in loss.targets(rows(*values))] == expected * len(loss.LARGE)


def test_targets_of_the_step():
    judged = step.targets([
        dict(model='R', loss='bce'), dict(model='R', loss='bce again', step_over_stock='0.99'),
        dict(model='R', loss='asl', step_over_stock='1.009', difference_of_losses_over_step='0.0')])
    assert [reached for *_, reached in judged] == [True]


def test_memory_is_what_tensors_hold_at_most():
    x = torch.ones(1000, 1000)
    assert measure.peak_tensor_bytes(lambda: (x + 1).sum(), 'cpu') == pytest.approx(x.nbytes, rel=0.01)
    assert measure.peak_tensor_bytes(lambda: ((x + 1) * (x + 2)).sum(), 'cpu') == pytest.approx(3 * x.nbytes, rel=0.01)


def test_a_process_of_its_own():
    result = measure.in_process('import json\nx = bytearray(2**26)\nprint(json.dumps(dict(length=len(x))))')
    assert result['length'] == 2**26 < result['peak_rss_bytes'] < 2**28
    with pytest.raises(RuntimeError, match='ZeroDivisionError'):
        measure.in_process('1 / 0')
