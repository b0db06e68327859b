"""benchmarks/calibration/detectors.py: its figures on cases by hand, and the page against its rows."""
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from benchmarks.calibration import detectors
from mmasl.reproduce.runs import read_rows


def test_matches():
    """Each box is found once, by the highest score; another class and too small an overlap are wrong."""
    truth = InstanceData(bboxes=torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30]]), labels=torch.tensor([0, 1]))
    boxes = InstanceData(bboxes=torch.tensor([[0., 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 10], [20, 24, 30, 34]]),
                         labels=torch.tensor([0, 0, 1, 1]), scores=torch.tensor([.4, .3, .9, .8]))
    assert detectors.match(boxes, truth).tolist() == [True, False, False, False]
    boxes.bboxes[3, 1:] = torch.tensor([22., 30, 32])
    assert detectors.match(boxes, truth).tolist() == [True, False, False, True]
    assert detectors.match(boxes, truth[:0]).tolist() == [False] * 4


def test_figures_of_detections():
    scores, hits = np.array([.2, .9, .8, .8]), np.array([True, True, False, True])
    found = detectors.of_detections(scores, hits, positives=4, carried=.85)
    assert found == pytest.approx({
        'count': 4, 'positive': .75, 'ECE': (.8 + .1 + .6) / 4, 'F1_0.3': 400 / 7, 'F1_0.5': 400 / 7, 'F1_carried': 40.,
        'F1': 75., 'threshold': .2})


def test_figures_of_locations():
    """Of two classes, three locations, one of them ignored, and background."""

    class Half:

        def calibrate(self, logits):
            return (logits.sigmoid() / 2).logit()

    logits = torch.tensor([[.8, .01], [.4, .2], [.5, .5]]).logit()
    calls = [(logits[:1], torch.tensor([0])), (logits[1:], torch.tensor([2, 1]), torch.tensor([1., 0.]))]
    found = detectors.of_locations(calls, Half(), 0.05)
    assert found['p'] == pytest.approx(dict(
        count=4, positive=.25, ECE=(.2 + .01 + .4 + .2) / 4, Brier=(.04 + .0001 + .16 + .04) / 4, candidates=3,
        candidate_ECE=.8 / 3))
    assert found['posterior']['ECE'] == pytest.approx((.6 + .005 + .2 + .1) / 4)
    assert found['posterior']['candidates'] == 3


def test_the_page_shows_what_was_measured():
    text = detectors.PAGE.read_text()
    assert detectors.fill_page(text) == text
    rows = read_rows(detectors.ROWS)
    assert [row['setting'] for row in rows] == [name for name in detectors.SETTINGS for _ in range(6)]
    at = {tuple(row[key] for key in ('setting', 'kind', 'score')): row for row in rows}
    for name in detectors.SETTINGS:
        p, posterior = (at[name, 'location', score] for score in detectors.SCORES)
        assert 10 * float(posterior['candidate_ECE']) < float(p['candidate_ECE'])
        p, posterior = (at[name, 'without factor', score] for score in detectors.SCORES)
        assert (p['AP'], p['F1'], p['count']) == (posterior['AP'], posterior['F1'], posterior['count'])
        assert float(posterior['threshold']) > float(posterior['F1']) / 200
        p, posterior = (at[name, 'detection', score] for score in detectors.SCORES)
        assert float(posterior['threshold']) < float(posterior['F1']) / 200
        assert float(posterior['F1']) > float(p['F1']) and float(posterior['ECE']) < float(p['ECE'])
    lost = {score: float(row['F1']) - float(row['F1_carried']) for score in detectors.SCORES
            for row in [at['FCOS, ASL (0, 4)', 'detection', score]]}
    assert lost == pytest.approx(dict(p=5.2, posterior=0.1), abs=0.06)
