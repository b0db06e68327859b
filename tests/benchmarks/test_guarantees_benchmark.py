"""benchmarks/guarantees/guarantees.py: its tuned thresholds and summary, and the page against its rows."""
import numpy as np
import pytest
import torch

from benchmarks.guarantees import guarantees
from mmasl.evaluation.functional import roc_auc
from mmasl.reproduce.runs import read_rows

SCORES = np.array([[0.9], [0.8], [0.7], [0.6], [0.5], [0.4]])
LABELS = np.array([[1], [1], [0], [1], [0], [1]], np.int8)


@pytest.mark.parametrize('kind, level, expected', [
    ('recall', 0.5, 0.8), ('recall', 0.75, 0.6), ('recall', 0.76, 0.4), ('precision', 0.75, 0.6),
    ('precision', 1., 0.8), ('precision', 0.5, 0.4)])
def test_tuned_thresholds(kind, level, expected):
    assert guarantees.tune(kind, level, SCORES, LABELS).tolist() == [expected]


def test_the_threshold_of_the_best_f1():
    assert guarantees.tune_f1(SCORES, LABELS).tolist() == [0.4]  # 0.8, 0.75, 0.67 and 0.4 from 0.4, 0.6, 0.8 and 0.9 on
    assert np.isnan(guarantees.tune_f1(SCORES, 0 * LABELS)).all()


def test_figures_of_classes_and_images():
    found = guarantees.by_class(np.array([0.6]), SCORES, LABELS)
    assert found.tolist() == [[0.75], [0.75]]
    assert np.isnan(guarantees.by_class(np.array([np.nan]), SCORES, LABELS)).all()
    scores, labels = np.array([[0.9, 0.8], [0.9, 0.1], [0.1, 0.9]]), np.array([[1, 0], [1, 1], [0, 0]])
    assert guarantees.by_image(np.array([0.5, 0.5]), scores, labels).tolist() == [[0.75], [0.5]]


def test_summary():
    figures = np.array([[[0.9, 0.7], [0.5, 0.5]], [[0.8, np.nan], [0.7, np.nan]]])
    assert guarantees.summarize(figures, 'recall', 0.85) == dict(
        share='75.00', recall='80.00', precision='56.67', lowest='85.00', below='66.67')


def test_the_page_shows_what_was_measured():
    text = guarantees.PAGE.read_text()
    assert guarantees.fill_page(text) == text
    rows = read_rows(guarantees.ROWS)
    assert len(rows) == len(guarantees.PROMISES) * 4 * len({row['data'] for row in rows})
    # The means over splits keep what conformal risk control promises, up to the error of 1,000 splits.
    for row in rows:
        if row['kind'] == 'recall' and 'promised' in row['method']:
            assert float(row['lowest']) >= 100 * float(row['level']) - 0.05


def test_predictions_from_frozen_features(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    y = (x[:, :2] > 0.5).to(torch.int8)
    monkeypatch.setitem(guarantees.frozen.SOURCES, 'voc', guarantees.frozen.Source('', folds=2, epochs=20))
    logits, labels = guarantees.predict_frozen('voc', dict(train=(x[:200], y[:200]), test=(x[200:], y[200:])))
    assert logits.shape == (100, 2) and (labels == y[200:].numpy()).all()
    assert roc_auc(logits, labels).min() > 0.95
