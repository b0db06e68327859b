"""benchmarks/weights/weights.py: its rows on a small set, paired repetitions, and the page against its rows."""
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.weights import weights as study
from mmasl.analysis.probe import Trial
from mmasl.reproduce.runs import read_rows
from mmasl.utils.statistics import interval


def make_features(count: int = 200, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    return x, (2 * x[:, :classes] - torch.arange(classes) > 0).to(torch.int8)


@pytest.fixture
def rows(monkeypatch) -> dict[str, list[dict]]:
    """Rows by loss and weights, and in 'seen' the arguments of every training."""
    monkeypatch.setattr(study, 'TRIALS', (Trial(1e-5, 0.), Trial(1e-2, 0.)))
    seen, fit = [], study.fit
    monkeypatch.setattr(study, 'fit', lambda *args, **kwargs: (seen.append((args, kwargs)), fit(*args, **kwargs))[1])
    features = dict(train=make_features(), test=make_features())
    return {'seen': seen} | {f'{loss}, {weights}': list(study.measure('d', loss, weights, features, epochs=20))
                             for loss, weights in (('cross-entropy', 'none'), ('ASL', 'negatives / positives'))}


def test_rows_of_a_small_set(rows):
    seen = rows.pop('seen')
    trainings = len(seen) // 2
    assert trainings == 2 * study.SEARCH_FOLDS + study.FOLDS
    for (first, named), (second, again) in zip(seen[:trainings], seen[trainings:]):  # the same images and seeds
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and named == again
    assert [len(args[0]) for args, _ in seen[-study.FOLDS:]] == [160] * study.FOLDS
    _, labels = make_features()
    expected = (1 - labels).sum(0) / labels.sum(0).clamp(min=1)
    torch.testing.assert_close(seen[-1][0][2]['pos_weight'], expected)
    for found in rows.values():
        assert {row['lr'] for row in found} == {'0.01'}, 'the better trial'
        for row in found:
            values = [float(row[figure]) for figure in study.FIGURES]
            assert np.isfinite(values).all() and values[0] > 70
    ce, asl = rows.values()
    assert all(row['CF1'] == row['CF1_calibrated'] for row in ce) and any(
        row['CF1'] != row['CF1_calibrated'] for row in asl)


def test_the_page_shows_what_was_measured():
    text = study.PAGE.read_text()
    assert study.fill_page(text) == text, 'run benchmarks/weights/weights.py'
    counts = Counter((row['data'], row['loss'], row['weights']) for row in read_rows(study.ROWS))
    assert counts == {(data, loss, weights): study.FOLDS for data, loss in {key[:2] for key in counts}
                      for weights in study.WEIGHTS}
    assert all(row['commit'] for row in read_rows(study.ROWS))


def gain(data: str, loss: str, weights: str, figure: str) -> tuple[float, float]:
    columns = study.read_columns(data)
    return interval(columns[loss, weights][figure] - columns[loss, 'none'][figure])


def test_what_the_page_says_of_the_digits():
    _, inverse, effective, odds, root = study.WEIGHTS
    for loss, weights in itertools.product(study.LOSSES, (inverse, effective)):
        for figure, least in (('mAP', 0.65), ('rare', 2.15)):
            mean, half = gain('digits', loss, weights, figure)
            assert mean > max(half, least)
    mean, half = gain('digits', 'cross-entropy', odds, 'mAP')
    assert mean <= half
    assert gain('digits', 'ASL', root, 'mAP')[0] > 0.65 > gain('digits', 'cross-entropy', root, 'mAP')[0]
    assert all(gain('digits', *key, 'CF1_tuned')[0] < 0.55 for key in itertools.product(study.LOSSES, study.WEIGHTS))
    found = {weights: {figure: values.mean() for figure, values in column.items()}
             for (loss, weights), column in study.read_columns('digits').items() if loss == 'ASL'}
    assert [round(found[weights]['CF1'], 1) for weights in ('none', odds)] == [79.9, 51.7]
    assert round(found[odds]['CF1_calibrated'], 1) == 25.6
    assert all(abs(found[weights]['CF1_calibrated'] - found[weights]['CF1_tuned']) < 0.5
               for weights in ('none', inverse, effective))


def test_what_the_page_says_of_corel5k():
    gains = {key: gain('corel5k', *key, 'mAP') for key in study.read_columns('corel5k')}
    _, inverse, effective, odds, root = study.WEIGHTS
    for key in (('cross-entropy', inverse), ('cross-entropy', effective), ('cross-entropy', odds), ('ASL', odds)):
        mean, half = gains[key]
        assert mean + half < 0 and mean < -2.35
    for key in (('cross-entropy', root), ('ASL', inverse), ('ASL', effective)):
        mean, half = gains[key]
        assert abs(mean) <= half
    for figure, least in (('mAP', 2.5), ('CF1_tuned', 2.05)):
        mean, half = gain('corel5k', 'ASL', root, figure)
        assert mean > least > half
    ce = study.read_columns('corel5k')['cross-entropy', 'none']
    assert [round(ce[figure].mean(), 1) for figure in ('CF1', 'CF1_tuned')] == [19.8, 31.3]
