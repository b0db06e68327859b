"""Calibration methods: fits against their definitions, and a task whose posterior is known."""
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmasl import AsymmetricLoss
from mmasl.analysis.calibration import (
    METRICS,
    LabelledLogits,
    compare_calibration,
    fit_scaling,
    format_range,
    plot_calibration,
    render_comparison,
    synthesize,
)
from mmasl.errors import DataError
from mmasl.evaluation.functional import expected_calibration_error
from mmasl.models.losses.utils import calibration_settings
from mmasl.ops import posterior_threshold

ROOT = Path(__file__).parents[2]


def known_posterior(images=4000, seed=0, **loss):
    """Logits of a model that minimises the loss: their posterior is the truth."""
    rng = torch.Generator().manual_seed(seed)
    truth = (2.5 * torch.randn(images, 5, generator=rng, dtype=torch.float64) - 2).sigmoid().clamp(max=0.93)
    loss = AsymmetricLoss(**loss)
    logits = posterior_threshold(truth, **calibration_settings(loss))
    labels = torch.bernoulli(truth, generator=rng).to(torch.int8)
    return LabelledLogits(logits.float(), labels, loss, truth.float())


def test_platt_scaling_finds_the_maximum_likelihood():
    from sklearn.linear_model import LogisticRegression
    predictions = known_posterior()
    logits, labels = predictions.logits, predictions.labels.clone()
    labels[:, 2] = -1
    scale, bias = fit_scaling(logits, labels, True)
    known = labels >= 0
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[known].double()[:, None].numpy(), labels[known].numpy())
    assert [scale, bias] == pytest.approx([theirs.coef_.item(), theirs.intercept_.item()], rel=1e-4)


def test_temperature_scaling_is_stationary_without_bias():
    predictions = known_posterior()
    scale, bias = fit_scaling(predictions.logits, predictions.labels, False)
    assert bias == 0
    z, y = predictions.logits.double(), predictions.labels.double()
    around = [F.binary_cross_entropy_with_logits(factor * scale * z, y).item() for factor in (0.99, 1, 1.01)]
    assert around[1] < min(around[0], around[2])


def test_probabilities_that_are_right_need_no_fit():
    """With cross-entropy p is the posterior, and the fits find scale 1 and bias 0."""
    predictions = known_posterior(20000, gamma_neg=0., clip=0.)
    scale, bias = fit_scaling(predictions.logits, predictions.labels, True)
    assert scale == pytest.approx(1, abs=0.03) and bias == pytest.approx(0, abs=0.05)
    rows, _, _ = compare_calibration(predictions)
    assert rows[0]['error'] < 1e-6 and rows[1]['error'] < 1e-6
    assert rows[0]['ECE'] == pytest.approx(rows[1]['ECE'], abs=1e-6) and rows[0]['OF1'] == rows[1]['OF1']


@pytest.mark.parametrize('loss', [
    {}, dict(detach_focusing=True), dict(gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25),
    dict(gamma_neg=[0.5, 1., 2., 3., 4.])
], ids=['asl', 'detached', 'detection', 'classes'])
def test_rows_of_a_known_posterior(loss):
    predictions = known_posterior(**loss)
    rows, scores, labels = compare_calibration(predictions)
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
    _, scores, _ = compare_calibration(predictions, seed=3)
    measured = {row.tobytes() for row in scores['p']}
    held_out = torch.tensor([row.tobytes() in measured for row in predictions.logits.sigmoid().numpy()])
    assert held_out.sum() == 2000
    scale, bias = fit_scaling(predictions.logits[~held_out], predictions.labels[~held_out], True)
    assert np.sort(scores['Platt scaling'].ravel()) == pytest.approx(
        np.sort((scale * predictions.logits[held_out] + bias).sigmoid().numpy().ravel()), abs=1e-5)


def test_ignored_labels_do_not_count():
    predictions = known_posterior()
    labels = predictions.labels.clone()
    labels[:, 4] = -1
    rows, _, _ = compare_calibration(LabelledLogits(predictions.logits, labels, predictions.loss))
    rest, _, _ = compare_calibration(
        LabelledLogits(predictions.logits[:, :4], predictions.labels[:, :4], predictions.loss))
    for row, expected in zip(rows, rest):
        assert 'error' not in row and row['fit'] == expected['fit']
        assert {k: v for k, v in row.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in expected.items() if isinstance(v, float)}, rel=1e-5)


def test_diagram_of_classes_that_differ(tmp_path):
    predictions = known_posterior(500, gamma_neg=[0.5, 1., 2., 3., 4.])
    path = tmp_path / 'new' / 'd.svg'
    plot_calibration(path, compare_calibration(predictions), calibration_settings(predictions.loss), 'title')
    assert path.stat().st_size > 10000


def test_range():
    assert format_range(torch.tensor(0.68371)) == '0.684'
    assert format_range(torch.tensor([0.5, 0.68371])) == '0.500 to 0.684'


@pytest.mark.slow
def test_synthetic_task():
    predictions = synthesize(AsymmetricLoss(), 0, images=4000, classes=4, steps=300)
    (raw, exact, *_), _, labels = compare_calibration(predictions)
    assert 0.03 < (labels == 1).mean() < 0.08
    assert exact['error'] < 0.1 * raw['error'] and exact['ECE'] < 0.1 * raw['ECE'] and exact['OF1'] > raw['OF1']


@pytest.mark.parametrize('name', ['synthetic', 'resnet_asl_digits'])
def test_the_page_shows_what_was_measured(name):
    with open(ROOT / 'benchmarks' / 'calibration' / f'{name}.csv') as file:
        rows = [{key: float(value) if key in METRICS else value for key, value in row.items()}
                for row in csv.DictReader(file)]
    assert render_comparison(rows) in (ROOT / 'docs' / 'analysis.md').read_text()


def test_one_image_is_refused():
    data = known_posterior(images=2)
    with pytest.raises(DataError, match='compare on two or more validation images'):
        compare_calibration(LabelledLogits(data.logits[:1], data.labels[:1], data.loss))
