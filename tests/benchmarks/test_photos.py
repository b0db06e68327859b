"""benchmarks/photos: repetitions are paired, labels are removed for training only, and documents follow the rows."""
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch import nn

from benchmarks.photos import fine_tuned, frozen, render
from mmasl.analysis.gradient import Setting
from mmasl.analysis.probe import TRIALS
from mmasl.reproduce.runs import read_rows


def make_features(count: int = 200, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    z = 2 * x @ torch.randn(8, classes, generator=generator) - torch.arange(classes)
    return x, (z > 0).to(torch.int8)


@pytest.fixture
def measured(monkeypatch) -> dict[str, list[dict]]:
    """Rows of two settings without and with missing labels, and what the heads were trained on."""
    monkeypatch.setitem(frozen.SOURCES, 'voc', frozen.Source('', epochs=2))
    monkeypatch.setattr(frozen, 'REPETITIONS', 3)
    seen = []
    fit = frozen.fit_heads
    monkeypatch.setattr(frozen, 'fit_heads', lambda x, y, rows, *args, **kwargs: (
        seen.append((y, rows)), fit(x, y, rows, *args, **kwargs))[1])
    features = dict(train=make_features(), test=make_features())
    found = {name: [list(frozen.measure(name, setting, features)) for setting in (frozen.CE, frozen.ASL)]
             for name in ('voc', 'voc-60')}
    return found | dict(seen=seen)


def test_repetitions_are_paired(measured):
    (complete, first), (same, second), (missing, third), (again, fourth) = measured['seen']
    assert first.shape == (3, 160) and all(len(set(row.tolist())) == 160 for row in first)
    for rows in (second, third, fourth):
        assert torch.equal(first, rows)
    _, labels = make_features()
    assert torch.equal(complete, same) and all(torch.equal(one, labels) for one in complete)
    assert torch.equal(missing, again)
    assert ((missing == 1) <= (labels == 1)).all()
    kept = (missing.sum((1, 2)) / labels.sum()).tolist()
    assert kept == pytest.approx([0.4] * 3, abs=0.1) and not torch.equal(missing[0], missing[1])


def test_rows_have_the_groups_of_classes(measured):
    for rows in (*measured['voc'], *measured['voc-60']):
        assert [row['repetition'] for row in rows] == [0, 1, 2]
        for row in rows:  # equal groups of 2 of 6 classes
            values = [float(row[group]) for group in frozen.GROUPS]
            assert float(row['mAP']) == pytest.approx(np.mean(values), abs=0.05)
    ce, asl = measured['voc']
    assert {row['CF1'] for row in ce} == {row['CF1_calibrated'] for row in ce}
    assert any(row['CF1'] != row['CF1_calibrated'] for row in asl)


def test_remove_labels_keeps_ignored_ones():
    labels = torch.tensor([1, 0, -1], dtype=torch.int8).repeat(100, 1)
    removed = frozen.remove_labels(labels, 0.5, 0)
    assert (removed[:, 1:] == labels[:, 1:]).all() and 20 < removed[:, 0].sum() < 80


@pytest.mark.slow
def test_trained_layers_are_the_end_of_the_classifier():
    """On their inputs, the trained layers return the features of the classifier."""
    cfg = Config.fromfile(frozen.ROOT / 'configs/photos/efficientnet-lite0_bce_voc.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(cfg.model, data_preprocessor=dict(
            type='ClsDataPreprocessor', **cfg.data_preprocessor)))
        model.init_weights()
    samples = [DataSample().set_gt_label([place]) for place in range(2)]
    batch = dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples)
    features, = model.eval().extract_feat(model.data_preprocessor(batch)['inputs'])
    for layers, share in ((fine_tuned.LAST, 0.3), (fine_tuned.ALL, 1)):
        maps, labels = fine_tuned.compute_maps(model, [batch], 'images', layers)
        assert torch.equal(labels, torch.eye(2, 20, dtype=torch.int8))
        trained = fine_tuned.build('voc', layers, seed=0).eval()
        torch.testing.assert_close(trained[:-1](maps.float()), features, rtol=1e-2, atol=1e-2)  # maps are float16
        assert fine_tuned.predict(trained, maps).shape == (2, 20)
        count, total = (sum(weight.numel() for weight in one.parameters()) for one in (trained, model))
        assert count / total == pytest.approx(share, abs=0.02), 'as the document says'


def test_trainings_are_paired_and_resumed(tmp_path, monkeypatch):
    """Every setting sees the same batches, flips and initial weights. Prior and scale are those of the recipe."""
    class Watched(nn.Linear):
        def forward(self, x):
            seen.append((x.detach().clone(), self.weight.detach().clone(), self.bias.sigmoid().detach().clone()))
            return super().forward(x)

    def build(name, layers, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), Watched(3 * 4, 6))

    monkeypatch.setattr(fine_tuned, 'build', build)
    monkeypatch.setitem(fine_tuned.RECIPES, 'other', fine_tuned.Recipe(prior=0.1, scale=1e-30, weight_decay=0))
    x = torch.randn(200, 3, 2, 2).half()
    maps = dict(train=(x, make_features()[1]), test=(x, make_features()[1]))
    found = []
    for setting, recipe in ((frozen.CE, ''), (frozen.ASL, ''), (frozen.ASL, 'other')):
        seen: list[tuple[torch.Tensor, ...]] = []
        training = fine_tuned.Training('voc', setting, recipe)
        found.append((fine_tuned.measure(training, 1e-3, 0, maps, fine_tuned.ALL, tmp_path / 'unfinished.pth'), seen))
    (ce, first), (asl, second), (_, third) = found
    count = 3 * fine_tuned.ALL.epochs
    assert all(torch.equal(one[0], same[0]) for one, same in zip(first[:count], second[:count], strict=True))
    assert torch.equal(first[0][1], second[0][1]) and not torch.equal(first[count][1], second[count][1])
    assert first[0][2].tolist() == [0.5] * 6 and third[0][2].tolist() == pytest.approx([0.1] * 6)
    torch.testing.assert_close(third[count][1], third[0][1])  # the gradient is far below AdamW's epsilon
    assert set(ce) == set(asl) == {'mAP', 'CF1', 'OF1', 'CF1_calibrated', 'OF1_calibrated'}
    assert ce['CF1'] == ce['CF1_calibrated'] and asl['CF1'] != asl['CF1_calibrated']
    images = torch.cat([one[0] for one in first[:count]])[:, None]
    straight = (images == x.float().flatten(1)).all(-1).any(-1)
    assert (straight | (images == x.float().flip(-1).flatten(1)).all(-1).any(-1)).all()
    assert 0.4 < straight.float().mean() < 0.6

    # Interrupted in the third epoch, and repeated.
    arguments = fine_tuned.Training('voc', frozen.ASL), 1e-3, 0, maps, fine_tuned.ALL, tmp_path / 'again.pth'
    images_of, left = fine_tuned.images_of, iter(range(8))
    with monkeypatch.context() as patch:
        patch.setattr(fine_tuned, 'images_of', lambda *args: (next(left), images_of(*args))[1])
        with pytest.raises(StopIteration):
            fine_tuned.measure(*arguments)
    seen.clear()
    assert fine_tuned.measure(*arguments) == asl
    assert torch.equal(seen[0][1], second[2 * 3][1]), 'it goes on after the second epoch'


def test_label_shares():
    """Against the equations: a negative of cross-entropy has p, a positive 1 - p."""
    z = torch.tensor([[2., -1., 0.5], [-3., 0., 1.]])
    complete, labels = torch.tensor([[1, 0, 1], [0, 0, 1]]), torch.tensor([[1, 0, 0], [0, 0, 1]])
    p = z.double().sigmoid()
    kinds = ((1 - p[0, 0] + 1 - p[1, 2]), p[0, 2], p[0, 1] + p[1, 0] + p[1, 1])
    found = fine_tuned.label_shares(z, complete, labels, frozen.CE)
    for kind, size in zip(fine_tuned.KINDS, kinds):
        assert float(found[f'gradient_{kind}']) == pytest.approx(100 * (size / sum(kinds)).item(), rel=1e-3)
    assert float(found['p_removed']) == pytest.approx(p[0, 2].item(), rel=1e-3)


def test_best_learning_rate_is_one_that_all_settings_have(monkeypatch):
    def row(setting, lr, seed, score):
        return frozen.describe('voc', setting) | dict(recipe='', lr=lr, seed=seed, mAP=score)

    rows = [row(frozen.CE, '1', '0', '70'), row(frozen.CE, '1', '1', '72'), row(frozen.CE, '2', '0', '90'),
            row(frozen.ASL, '1', '0', '75'), row(frozen.ASL, '3', '0', '60')]
    monkeypatch.setattr(render, 'read_rows', lambda path: rows)
    trained = render.trained_scores('all', 'voc')
    ce, asl = (frozen.key(row)[1:] for row in (rows[0], rows[-1]))
    assert trained == {ce: 71, asl: 75}
    found = render.agreement({ce: 3., asl: 1.}, trained)
    assert found == render.Agreement(2, pytest.approx(-1), ce, 4, 0)


def test_committed_rows_are_complete():
    rows = read_rows(frozen.ROWS)
    counts = Counter(map(frozen.key, rows))
    assert set(counts.values()) == {frozen.REPETITIONS}
    baselines = {row['data'] for row in rows if frozen.key(row) == frozen.key(frozen.describe(row['data'], frozen.CE))}
    assert baselines == {row['data'] for row in rows}, 'every data set has cross-entropy'
    # The same grid for all.
    assert {row['lr'] for row in rows} <= {f'{trial.lr:g}' for trial in TRIALS}


def test_tables_are_those_of_the_rows():
    text = render.DOC.read_text()
    assert render.page(text) == text, 'run benchmarks/photos/render.py'


def columns(data: str, *setting: float) -> render.Column:
    """Figures of (gamma_pos, gamma_neg, clip) with the gradient of Eq. 8."""
    return render.read_columns(data)[frozen.key(frozen.describe('', Setting(*setting)))[1:]]


def lead(data: str, *setting: float) -> int:
    """1 if a setting is ahead of cross-entropy in mAP, -1 if behind, 0 if the interval contains 0."""
    mean, half = render.against(columns(data, *setting), columns(data, 0, 0, 0))
    return 0 if abs(mean) <= half else int(np.sign(mean))


def test_what_the_document_says_of_complete_labels():
    leads = {setting: lead('voc', *setting) for setting in (
        (0, 4, 0.05), (0, 2, 0), (0, 0, 0.05), (2, 2, 0), (1, 4, 0))}
    assert list(leads.values()) == [1, 1, 1, -1, 0]
    rates = {row['gamma_neg']: float(row['lr']) for row in read_rows(frozen.ROWS)
             if row['data'] == 'voc' and row['gradient'] == 'Eq. 8'
             and (row['gamma_pos'], row['gamma_neg'], row['clip']) in (('0', '0', '0'), ('0', '4', '0.05'))}
    assert rates['4'] == min(trial.lr for trial in TRIALS) < rates['0']
    asl, ce = columns('voc', 0, 4, 0.05), columns('voc', 0, 0, 0)
    for figure in ('CF1', 'OF1'):
        assert (asl[figure] < ce[figure]).all() and (asl[f'{figure}_calibrated'] > ce[figure]).all()


def test_what_the_document_says_of_missing_labels():
    leads = {setting: lead('voc-60', *setting) for setting in ((0, 4, 0.05), (0, 0, 0.05), (0, 2, 0))}
    assert list(leads.values()) == [-1, -1, 1]
    asl, ce = columns('voc-60', 0, 4, 0.05), columns('voc-60', 0, 0, 0)
    assert 2.5 < asl['CF1'].mean() / ce['CF1'].mean() < 3
    assert asl['CF1_calibrated'].mean() < asl['CF1'].mean()


def test_what_the_document_says_of_a_long_tail():
    assert (lead('corel5k', 0, 4, 0.05), lead('corel5k', 2, 2, 0)) == (1, -1)
    asl, ce = columns('corel5k', 0, 4, 0.05), columns('corel5k', 0, 0, 0)
    gains = [asl[group].mean() - ce[group].mean() for group in frozen.GROUPS]
    assert gains == sorted(gains)
    assert asl['mAP'].mean() - ce['mAP'].mean() > columns('voc', 0, 4, 0.05)['mAP'].mean() - columns(
        'voc', 0, 0, 0)['mAP'].mean()


def test_what_the_readme_says():
    readme = (frozen.ROOT / 'README.md').read_text()
    for data in ('voc', 'corel5k', 'voc-60'):
        mean, half = render.against(columns(data, 0, 4, 0.05), columns(data, 0, 0, 0))
        assert f'{mean:+.2f} ± {half:.2f}' in readme


def test_what_the_document_says_of_trained_layers():
    ce, asl = (frozen.key(frozen.describe('', setting))[1:] for setting in (frozen.CE, frozen.ASL))
    at_rate = {(row['data'], row['lr'], frozen.key(row)[1:]): float(row['mAP'])
               for row in read_rows(fine_tuned.LAST.rows) if not row['recipe']}
    assert at_rate['voc', '0.0003', asl] > at_rate['voc', '0.0003', ce]
    assert all(at_rate['voc', rate, asl] < at_rate['voc', rate, ce] for rate in ('0.001', '0.003'))
    best = render.trained_scores('last', 'voc')
    assert 0 < best[ce] - best[asl] < 1
    assert at_rate['voc-60', '0.001', ce] - at_rate['voc-60', '0.001', asl] > 5
    found = render.agreements()['voc', 'frozen features', 'last stage']
    assert found.behind > 0.3 and found.chosen == asl
    whole = render.agreements()['voc', 'frozen features', 'whole network']
    assert f'{whole.behind:.1f}' == '0.1' and whole.chosen == asl


def test_what_the_documents_say_of_the_whole_network():
    ce, asl = (next(row for row in read_rows(fine_tuned.ALL.rows) if row['data'] == 'voc' and frozen.key(
        frozen.describe('voc', setting)) == frozen.key(row)) for setting in (frozen.CE, frozen.ASL))
    readme = ' '.join((frozen.ROOT / 'README.md').read_text().split())
    assert f"does not tell them apart: {float(ce['mAP']):.1f} and {float(asl['mAP']):.1f} mAP" in readme
    assert 0 < float(ce['mAP']) - float(asl['mAP']) < 0.15
    focal, = (row for row in read_rows(fine_tuned.ALL.rows) if row['data'] == 'voc' and row['gamma_pos'] == '2')
    assert 0.85 < float(asl['mAP']) - float(focal['mAP']) < float(ce['mAP']) - float(focal['mAP']) < 1.05
    last = {row['gamma_neg']: float(row['mAP']) for row in read_rows(fine_tuned.LAST.rows)
            if row['data'] == 'voc' and row['lr'] == ce['lr'] and not row['recipe']}
    for row in (ce, asl):
        assert float(row['mAP']) < last[row['gamma_neg']]
    for figure in ('CF1', 'OF1'):
        assert float(asl[figure]) < float(ce[figure]) - 4
        assert abs(float(asl[f'{figure}_calibrated']) - float(ce[figure])) < 1


def test_what_the_document_says_of_reasons():
    found = {change: rows[0] for change, rows in render.reasons('voc-60').items()}
    asl, ce = found['(0, 4, 0.05)', ''], found['(0, 0, 0)', '']
    score = float(asl['mAP'])
    for change in (('(0, 4, 0.05), constant weight', ''), ('(0, 4, 0.05)', 'start at p = 0.05')):
        assert abs(float(found[change]['mAP']) - score) < 0.3
    assert float(ce['mAP']) - score > 5
    assert [f"{float(row['gradient_removed']):.0f}" for row in (asl, ce)] == ['19', '19']
    assert [f"{float(row['p_annotated']):.2f}" for row in (asl, ce)] == ['0.94', '0.60']
    slow, = (row for row in render.trained_rows('last', 'voc-60')
             if frozen.key(row) == frozen.key(ce) and row['lr'] == '0.0003')
    assert f"{float(slow['p_annotated']):.2f}" == '0.25' and 9.5 < float(ce['mAP']) - float(slow['mAP']) < 10.5
