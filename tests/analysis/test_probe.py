"""mmasl.analysis.probe: heads that train side by side are those of a plain loop; figures and search."""
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from mmasl import AsymmetricLoss
from mmasl.analysis import probe
from mmasl.analysis.gradient import Setting
from mmasl.analysis.probe import INIT_STD, Trial, fit_heads, score, search
from mmasl.evaluation.functional import PRESETS, average_precision, multilabel_metrics
from mmasl.ops import posterior

ASL = Setting(0, 4, 0.05)
TRIALS = (Trial(1e-2, 0.), Trial(3e-2, 2.))


def make_data(count: int = 60, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels that a linear head can learn, with some noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    z = x @ torch.randn(5, classes, generator=generator) - 1 + torch.randn(count, classes, generator=generator)
    return x, (z > 0).to(torch.int8)


@pytest.mark.parametrize('setting', [ASL, Setting(2, 2, 0, 0.25, detach_focusing=True)], ids=str)
def test_heads_are_those_of_a_plain_loop(setting):
    x, y = make_data()
    y[0, 0] = -1
    rows = torch.stack([torch.arange(40), torch.arange(20, 60)])
    labels = torch.stack([y, y.flip(0)])
    weights, biases = fit_heads(x, labels, rows, setting, TRIALS, epochs=3, batch_size=16, seed=3)
    assert weights.shape == (2, 2, 5, 3) and biases.shape == (2, 2, 1, 3)
    for place, trial in enumerate(TRIALS):
        generator = torch.Generator().manual_seed(3)
        start = [INIT_STD * torch.randn(2, 5, 3, generator=generator) for _ in TRIALS][place]
        orders = [[row[torch.randperm(40, generator=generator)] for row in rows] for _ in range(3)]
        for subset in range(2):
            head = nn.Linear(5, 3)
            head.load_state_dict(dict(weight=start[subset].T, bias=torch.zeros(3)))
            optimizer = torch.optim.AdamW([dict(params=[head.weight], weight_decay=trial.weight_decay),
                                           dict(params=[head.bias], weight_decay=0)], lr=trial.lr)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, trial.lr, 6, cycle_momentum=False)
            loss = AsymmetricLoss(**asdict(setting), reduction='sum', ignore_index=-1)
            for epoch in orders:
                for batch in epoch[subset][:32].split(16):  # an incomplete batch is left out
                    optimizer.zero_grad()
                    (loss(head(x[batch]), labels[subset, batch].float()) / 16).backward()
                    optimizer.step()
                    schedule.step()
            torch.testing.assert_close(weights[place, subset], head.weight.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(biases[place, subset, 0], head.bias, rtol=1e-4, atol=1e-5)


def test_figures_are_those_of_the_metric():
    z = 3 * torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1))
    y = (z + torch.randn(z.shape, generator=torch.Generator().manual_seed(2)) > 2).to(torch.int8)
    y[0, 0, 0] = -1
    found = score(z, y, ASL)
    for place in range(2):
        p = z[place].double().sigmoid().numpy()
        known = posterior(z[place].double(), **asdict(ASL)).numpy()
        plain, ap = multilabel_metrics(p, y[place].numpy(), PRESETS['paper'])
        calibrated, _ = multilabel_metrics(p, y[place].numpy(), PRESETS['paper'], calibrated=known)
        np.testing.assert_allclose(found.ap[place], ap)
        assert found.map[place] == pytest.approx(plain['mAP'])
        assert (found.cf1[place], found.of1[place]) == pytest.approx((plain['CF1'], plain['OF1']))
        assert (found.cf1_calibrated[place], found.of1_calibrated[place]) == pytest.approx(
            (calibrated['CF1'], calibrated['OF1']))
    assert (found.cf1 != found.cf1_calibrated).any()


def test_search_selects_by_images_that_the_heads_have_not_seen(monkeypatch):
    x, y = make_data(62)
    seen: list[tuple[torch.Tensor, Sequence[Trial]]] = []
    fit = probe.fit_heads
    monkeypatch.setattr(probe, 'fit_heads', lambda x, y, rows, setting, trials, **kwargs: (
        seen.append((rows, trials)), fit(x, y, rows, setting, trials, **kwargs))[1])
    best, scores = search(x, y, ASL, (Trial(1e-4, 0.), Trial(1e-3, 0.)), folds=4, epochs=5, seed=1)
    rows = seen[0][0]
    unseen = [sorted(set(range(62)) - set(row.tolist())) for row in rows]
    # Two images do not fill a fold; nobody sees them.
    assert rows.shape == (4, 45) and len(set(sum(unseen, []))) == 62
    spare = set.intersection(*map(set, unseen))
    held_out = [sorted(set(fold) - spare) for fold in unseen]
    assert len(spare) == 2 and sorted(sum(held_out, [])) == sorted(set(range(62)) - spare)
    expected = {}
    for same, trials in seen:
        assert torch.equal(same, rows)
        for trial, *pair in zip(trials, *fit(x, y, rows, ASL, trials, epochs=5, seed=1), strict=True):
            expected[trial] = np.array([
                100 * np.nanmean(average_precision((x[fold] @ weight + bias).numpy(), y[fold].numpy()))
                for fold, weight, bias in zip(held_out, *pair)])
    means = {trial.lr: values.mean() for trial, values in expected.items()}
    assert means[best.lr] == max(means.values()) > means[1e-3] + 1, 'the grid ends too early'
    assert {best.lr / 2, 2 * best.lr} < set(means) and max(means) == 2 * best.lr and sum(
        len(trials) for _, trials in seen) == len(means), 'it goes on until neither is better, and repeats none'
    np.testing.assert_allclose(scores.map, expected[best], rtol=1e-6)
