"""benchmarks/speed: the documents show the committed rows, and the timed peers compute the same loss."""
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks.speed import loss, measure, run
from mmasl.ops.reference import asymmetric_loss as reference

ROOT = Path(__file__).parents[2]
SPEED = ROOT / 'benchmarks' / 'speed'


@pytest.mark.parametrize('path', run.DOCS, ids=lambda path: path.stem)
def test_documents_show_the_rows(path):
    assert run.render(path.read_text(), SPEED) == path.read_text(), 'run python benchmarks/speed/run.py --render'


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
    assert '| +2.0%, the stock loss again +1.0%; the losses alone +0.10% | **not reached** |' in text
    assert run.render(text, tmp_path) == text


@pytest.mark.parametrize('form', ['dense', 'labels'])
def test_peers_are_the_same_loss(form, monkeypatch):
    """Every timed ASL has the value and gradient of the equations."""
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


def test_memory_is_the_peak_of_the_tensors():
    x = torch.ones(1000, 1000)
    assert measure.peak_tensor_bytes(lambda: (x + 1).sum(), 'cpu') == pytest.approx(x.nbytes, rel=0.01)
    assert measure.peak_tensor_bytes(lambda: ((x + 1) * (x + 2)).sum(), 'cpu') == pytest.approx(3 * x.nbytes, rel=0.01)
