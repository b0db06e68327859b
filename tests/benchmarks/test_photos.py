"""benchmarks/photos: repetitions are paired, labels are removed for training only, and documents follow the rows."""
import math
from collections import Counter
from typing import ClassVar

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
from mmasl.reproduce import experiments
from mmasl.reproduce.results import Results
from mmasl.reproduce.runs import read_rows
from mmasl.utils.statistics import interval


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


class Watched(nn.Linear):
    """Keeps its inputs, weights, and the sigmoid of its biases."""
    seen: ClassVar[list[tuple[torch.Tensor, ...]]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.detach().clone(), self.weight.detach().clone(), self.bias.sigmoid().detach().clone()))
        return super().forward(x)


@pytest.fixture
def watched(monkeypatch) -> type[Watched]:
    """The trained layers are one watched layer."""
    def build(name: str, layers: fine_tuned.Layers, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), Watched(3 * 4, 6))

    monkeypatch.setattr(fine_tuned, 'build', build)
    return Watched


def test_trainings_are_paired_and_resumed(watched, tmp_path, monkeypatch):
    """Every setting sees the same batches, flips and initial weights. Prior and scale are those of the recipe."""
    monkeypatch.setitem(fine_tuned.RECIPES, 'other', fine_tuned.Recipe(prior=0.1, scale=1e-30, weight_decay=0))
    x = torch.randn(200, 3, 2, 2).half()
    maps = dict(train=(x[None], make_features()[1]), test=(x, make_features()[1]))
    found = []
    for setting, recipe in ((frozen.CE, ''), (frozen.ASL, ''), (frozen.ASL, 'other')):
        watched.seen = []
        training = fine_tuned.Training('voc', setting, recipe)
        found.append((fine_tuned.measure(training, 1e-3, 0, maps, fine_tuned.ALL, tmp_path / 'unfinished.pth'),
                      watched.seen))
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
    watched.seen = []
    assert fine_tuned.measure(*arguments) == asl
    assert torch.equal(watched.seen[0][1], second[2 * 3][1]), 'it goes on after the second epoch'


def test_recipes_have_their_images_and_average(watched, tmp_path):
    """Epochs use the drawn images in turn. The average starts with the first step's weights, and is resumed."""
    _, labels = make_features()
    x = torch.arange(4.)[:, None, None, None, None].expand(4, 200, 3, 2, 2).half()

    def train(momentum: float, length: int = 1) -> list[tuple[torch.Tensor, ...]]:
        watched.seen = []
        model = fine_tuned.train(fine_tuned.build('voc', fine_tuned.LAST, 0), frozen.ASL, 1e-2, x, labels,
                                 fine_tuned.LAST, fine_tuned.Recipe(length=length, momentum=momentum),
                                 tmp_path / 'unfinished.pth', f'{momentum}, {length}')
        assert not model.training
        fine_tuned.predict(model, x[0])
        return watched.seen

    steps, epochs = 3, fine_tuned.LAST.epochs
    plain = train(0.)
    assert [image[0, 0].item() for image, *_ in plain[:steps * epochs:steps]] == [0, 1, 2, 3] * 2
    expected = plain[1][1]
    for _, weight, _ in plain[2:steps * epochs + 1]:
        expected = 0.8 * expected + 0.2 * weight
    for _ in range(2):  # the second starts from the finished state
        torch.testing.assert_close(train(0.2)[-1][1], expected)
    assert len(watched.seen) == math.ceil(200 / fine_tuned.BATCH_SIZE) and not torch.equal(plain[-1][1], expected)


def test_maps_of_drawn_images_differ_by_epoch(tmp_path, monkeypatch):
    """Training images are drawn by epoch with the official augmentation, test images are not, at the recipe's size."""
    called = []

    def compute(model, loader, name, layers, epochs=1):
        called.append((name, epochs, loader.dataset.pipeline[1].scale, [one.type for one in loader.dataset.pipeline]))
        return torch.zeros(3 * epochs, 2, 4, 4), torch.zeros(3, 20)

    monkeypatch.setattr(frozen, 'check_data', lambda *args: None)
    monkeypatch.setattr(frozen, 'build', lambda cfg, loader: (None, loader))
    monkeypatch.setattr(fine_tuned, 'compute_maps', compute)
    sizes = {}
    for inputs in (fine_tuned.Inputs(), fine_tuned.Inputs(drawn=True), fine_tuned.Inputs(224)):
        for _ in range(2):  # cached the second time
            maps = fine_tuned.load_maps('voc', '', tmp_path, fine_tuned.LAST, inputs)
        sizes[inputs] = maps['train'][0].shape
        assert maps['test'][0].shape == (3, 2, 4, 4)
    assert sizes[fine_tuned.Inputs()] == sizes[fine_tuned.Inputs(224)] == (1, 3, 2, 4, 4)
    assert sizes[fine_tuned.Inputs(drawn=True)] == (fine_tuned.LAST.epochs, 3, 2, 4, 4)
    assert [one[:3] for one in called] == [
        ('voc_train', 1, 128), ('voc_test', 1, 128), ('voc_train_drawn', fine_tuned.LAST.epochs, 128),
        ('voc_train_224', 1, 224), ('voc_test_224', 1, 224)]
    assert [('RandAugment' in types and 'mmasl.Cutout' in types) for *_, types in called] == [
        False, False, True, False, False]


@pytest.mark.parametrize('best', [1, 3, 6])
def test_learning_rates_are_searched_until_the_neighbours_are_worse(best):
    training, rows = fine_tuned.Training('voc', frozen.CE), []
    while (lr := fine_tuned.next_rate(training, 0, rows)) is not None:
        assert f'{lr:g}' not in {row['lr'] for row in rows}
        score = -abs(fine_tuned.RATES.index(lr) - best)
        rows.append(frozen.describe('voc', frozen.CE) | dict(recipe='', seed='0', lr=f'{lr:g}', mAP=str(score)))
    tried = {float(row['lr']) for row in rows}
    assert {fine_tuned.RATES[place] for place in (best - 1, best, best + 1)} <= tried and len(tried) <= 6
    assert fine_tuned.next_rate(training, 1, rows) == fine_tuned.RATES[best]
    assert fine_tuned.next_rate(training._replace(recipe='other'), 0, rows) == fine_tuned.RATES[best]
    assert fine_tuned.next_rate(training, 0, rows, [fine_tuned.RATES[best], 3e-2]) == 3e-2
    rows += [row | dict(seed='1') for row in rows]
    assert fine_tuned.next_rate(training, 1, rows) is None


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


def test_settings_count_at_their_best_learning_rate(monkeypatch):
    def row(setting, lr, seed, score):
        return frozen.describe('voc', setting) | dict(recipe='', lr=lr, seed=seed, mAP=score)

    rows = [row(frozen.CE, '0.001', '0', '70'), row(frozen.CE, '0.001', '1', '72'), row(frozen.CE, '0.002', '0', '90'),
            row(frozen.ASL, '0.001', '0', '75'), row(frozen.ASL, '0.0006', '0', '60')]
    monkeypatch.setattr(render, 'read_rows', lambda path: rows)
    ce, asl = (frozen.key(row)[1:] for row in (rows[0], rows[-1]))
    assert render.trained_scores('all', 'voc') == {ce: 71, asl: 75}, 'at the rate that both have'
    found = render.agreement({ce: 3., asl: 1.}, render.trained_scores('all', 'voc'))
    assert found == render.Agreement(2, pytest.approx(-1), ce, 4, 0)
    # The searches end: the best rate of seed 0 counts.
    rows += [row(frozen.ASL, '0.002', '0', '74'), row(frozen.CE, '0.003', '0', '60'),
             row(frozen.CE, '0.002', '1', '80')]
    assert render.trained_scores('all', 'voc') == {ce: 85, asl: 75}
    rows.append(row(frozen.ASL, '0.001', '1', '77'))
    assert render.trained_scores('all', 'voc') == {ce: 85, asl: 76}


def test_committed_rows_are_complete():
    rows = read_rows(frozen.ROWS)
    counts = Counter(map(frozen.key, rows))
    assert set(counts.values()) == {frozen.REPETITIONS}
    baselines = {row['data'] for row in rows if frozen.key(row) == frozen.key(frozen.describe(row['data'], frozen.CE))}
    assert baselines == {row['data'] for row in rows}, 'every data set has cross-entropy'
    # The same grid for all, which has gone on by factors of 2.
    steps = [math.log2(float(row['lr']) / TRIALS[0].lr) for row in rows]
    assert steps == pytest.approx([round(step) for step in steps], abs=1e-3) and len(set(steps)) > 3


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


def searched_rate(data: str, *setting: float) -> float:
    """The learning rate of (gamma_pos, gamma_neg, clip) with the gradient of Eq. 8 on frozen features."""
    wanted = frozen.key(frozen.describe(data, Setting(*setting)))
    return next(float(row['lr']) for row in read_rows(frozen.ROWS) if frozen.key(row) == wanted)


CE, MILD, ASL, CONSTANT = (frozen.key(frozen.describe('', setting))[1:] for setting in (
    frozen.CE, fine_tuned.MILD, frozen.ASL, fine_tuned.CONSTANT))


def last_stage(data: str, setting: tuple[str, ...], lr: float) -> float:
    """mAP of a setting with seed 0."""
    return render.scores_by_rate('last', data)[setting][lr][0]


def test_what_the_document_says_of_learning_rates():
    ratios = [searched_rate(data, 0, 4, 0.05) / searched_rate(data, 0, 0, 0) for data in frozen.DATA]
    best = {(data, setting): render.best_rate(render.scores_by_rate('last', data)[setting])
            for data in fine_tuned.SETS for setting in (CE, ASL)}
    ratios += [best[data, ASL] / best[data, CE] for data in fine_tuned.SETS]
    assert (min(ratios), max(ratios)) == pytest.approx((1 / 8, 0.6))
    assert f"{last_stage('voc-60', CE, 1e-3) - last_stage('voc-60', ASL, 1e-3):.1f}" == '5.6'
    assert f"{last_stage('corel5k', ASL, 1e-3) - last_stage('corel5k', CE, 1e-3):.1f}" == '11.6'
    assert all(render.is_searched(render.scores_by_rate('last', data)[setting]) for data, setting in best)


def test_what_the_document_says_of_complete_labels():
    leads = {setting: lead('voc', *setting) for setting in (
        (0, 4, 0.05), (0, 2, 0), (0, 0, 0.05), (2, 2, 0), (1, 4, 0))}
    assert list(leads.values()) == [1, 1, 1, -1, 0]
    asl, ce = columns('voc', 0, 4, 0.05), columns('voc', 0, 0, 0)
    for figure in ('CF1', 'OF1'):
        assert (asl[figure] < ce[figure]).all() and (asl[f'{figure}_calibrated'] > ce[figure]).all()


def test_what_the_document_says_of_missing_labels():
    for data in ('voc-30', 'voc-60', 'digits_hard'):
        leads = {setting: lead(data, *setting) for setting in ((0, 4, 0.05), (0, 0, 0.05), (0, 2, 0), (2, 2, 0))}
        assert list(leads.values()) == [1, 1, 1, -1]
    asl, ce = columns('voc-60', 0, 4, 0.05), columns('voc-60', 0, 0, 0)
    assert 2.5 < asl['CF1'].mean() / ce['CF1'].mean() < 3
    assert asl['CF1_calibrated'].mean() < asl['CF1'].mean()


def test_what_the_document_says_of_a_long_tail():
    assert [lead('corel5k', *setting) for setting in (
        (0, 4, 0.05), (0, 2, 0), (0, 0, 0.05), (2, 2, 0))] == [1, 1, -1, -1]
    asl, ce = columns('corel5k', 0, 4, 0.05), columns('corel5k', 0, 0, 0)
    gains = [asl[group].mean() - ce[group].mean() for group in frozen.GROUPS]
    assert gains == sorted(gains)


def test_what_the_documents_say_of_frozen_features():
    leads = {data: render.against(columns(data, 0, 4, 0.05), columns(data, 0, 0, 0))
             for data in ('voc', 'voc-30', 'voc-60', 'corel5k')}
    page, readme = (' '.join(path.read_text().split()) for path in (render.DOC, frozen.ROOT / 'README.md'))
    for part in ('by {voc} mAP on VOC 2007', 'by {voc-30} and {voc-60} with 30 and 60 %', 'by {corel5k} on Corel-5k'):
        assert part.format(**{data: f'{mean:.1f}' for data, (mean, _) in leads.items()}) in page
    cells = ('{:+.2f} ± {:.2f}'.format(*leads[data]) for data in ('voc', 'voc-60', 'corel5k'))
    assert f'training images | {" | ".join(cells)} |' in readme
    # Half-widths of the delete-d jackknife (Shao and Wu 1989) and of Student's t, in standard deviations of the rows.
    kept, values = frozen.SHARE, np.random.default_rng(0).normal(size=frozen.REPETITIONS)
    wider = 1.96 * math.sqrt(kept / (1 - kept)) * values.std(ddof=1) / interval(values)[1]
    assert f'{wider:.1f} times as wide' in page and 'about five times as wide' in readme


def test_what_the_documents_say_of_the_last_stage():
    page, readme = (' '.join(path.read_text().split()) for path in (render.DOC, frozen.ROOT / 'README.md'))
    leads = {data: render.against_cross_entropy('last', data)[ASL] for data in fine_tuned.SETS}
    assert 'gone on VOC, {voc}, and reversed on Corel-5k, {corel5k}; '.format(**leads) in page
    assert 'three trainings cannot tell, {voc-60}.'.format(**leads) in page
    assert '| also the last stage, 3 trainings | {voc} | {voc-60} | {corel5k} |'.format(**leads) in readme
    for data in fine_tuned.SETS:
        assert {len(render.scores_by_rate('last', data)[one][render.chosen_rates('last', data)[one]])
                for one in (CE, ASL)} == {3}
    mild = [render.trained_scores('last', data) for data in fine_tuned.SETS]
    assert all(scores[MILD] > scores[CE] - 0.1 for scores in mild)
    cf1 = [np.mean([float(row['CF1']) for row in render.trained_rows('last', 'voc-60') if frozen.key(row)[1:] == one
                    and float(row['lr']) == render.chosen_rates('last', 'voc-60')[one]]) for one in (ASL, CE)]
    assert 2.5 < cf1[0] / cf1[1] < 3


def test_what_the_document_says_of_the_probe():
    found = {which: (f'{one.behind:.1f}', one.chosen) for which, one in render.agreements().items()}
    assert f"{render.agreements()['voc', 'last'].behind:.2f}" == '0.33' and found['voc', 'last'][1] == CONSTANT
    assert found['voc-60', 'last'] == ('0.0', CONSTANT)
    assert found['corel5k', 'last'] == ('0.8', ASL)
    searched = render.searched_scores('corel5k')
    assert max(searched, key=lambda one: searched[one]) == CONSTANT
    assert CONSTANT not in render.trained_scores('last', 'corel5k')
    assert found['digits_hard', 'all'][0] == '0.0' and abs(render.agreements()['digits_hard', 'all'].correlation) < 0.1


def test_what_the_document_says_of_the_constant_weight():
    page, readme = (' '.join(path.read_text().split()) for path in (render.DOC, frozen.ROOT / 'README.md'))
    gains, over_eq8 = {}, {}
    for data in frozen.DATA:
        found = render.read_columns(data)
        gains[data] = render.against(found[CONSTANT], found[CE])[0]
        over_eq8[data] = render.against(found[CONSTANT], found[ASL])[0]
    assert (f"{gains['voc-30']:.1f} and {gains['voc-60']:.1f} ahead of cross-entropy with 30 and 60 % of VOC's labels "
            f"removed, and {gains['corel5k']:.1f} on Corel-5k") in page
    missing = [over_eq8[data] for data in ('voc-30', 'voc-60', 'corel5k')]
    assert f'{min(missing):.1f} to {max(missing):.1f} more than with the gradient of Eq. 8' in page
    assert f"{over_eq8['voc']:.1f}" == '-0.1' and f"{over_eq8['digits_hard']:.1f}" == '-0.2'
    cf1 = [f"{render.read_columns('voc')[one]['CF1'].mean():.1f}" for one in (CONSTANT, ASL)]
    assert 'its CF1 on VOC is {}, that of Eq. 8 {}'.format(*cf1) in page
    trained = render.against_cross_entropy('last', 'voc-60')
    assert f'{trained[CONSTANT][1:]} ahead with 60 % removed, the only clear lead there' in page
    clear = [setting for setting, text in trained.items() if '±' in text and
             float(text.split(' ± ')[0]) > float(text.split(' ± ')[1])]
    assert clear == [CONSTANT] and trained[CONSTANT] in readme


def test_what_the_document_says_of_the_whole_network():
    scores, last = (render.trained_scores(layers, 'voc') for layers in ('all', 'last'))
    assert abs(scores[CE] - scores[ASL]) < 0.3 and all(scores[one] < last[one] for one in (CE, ASL))


def test_what_the_document_says_of_reasons():
    found = render.reasons('voc-60')

    def get(figure: str, setting: str, lr: str, recipe: str = '') -> float:
        return found[setting, recipe, lr][figure]

    asl, ce = '(0, 4, 0.05)', '(0, 0, 0)'
    score = get('mAP', asl, '0.001')
    assert abs(get('mAP', asl, '0.001', 'start at p = 0.05') - score) < 0.3
    changed = render.changes('voc-60')
    for recipe in ('loss x 64', 'no weight decay'):
        assert changed[recipe] == pytest.approx(changed[''], abs=0.05)
    lost = [before - after for before, after in zip(changed[''], changed['start at p = 0.05'])]
    assert [f'{value:.1f}' for value in lost] == ['3.7', '9.0']
    assert [f"{get('p_removed', *what):.2f}" for what in (
        (asl, '0.0003'), (f'{asl}, constant weight', '0.0002'), (ce, '0.001'))] == ['0.48', '0.61', '0.10']
    assert [f"{get('gradient_removed', setting, '0.001'):.0f}" for setting in (asl, ce)] == ['19', '19']
    for setting, best, absent, rates in ((asl, '0.0003', '0.25', ('0.001', '0.003')),
                                         (ce, '0.001', '0.01', ('0.002', '0.003'))):
        assert all(get('mAP', setting, best) >= get('mAP', *what[::2]) for what in found if what[:2] == (setting, ''))
        assert 0.595 < get('p_annotated', setting, best) < 0.715
        assert f"{get('p_absent', setting, best):.2f}" == absent
        for lr in rates:
            assert get('p_annotated', setting, lr) > 0.89
            assert 5 < get('mAP', setting, best) - get('mAP', setting, lr) < 16
            assert get('p_removed', setting, lr) < get('p_removed', setting, best)


def test_what_the_documents_say_of_detectors():
    results = Results(frozen.ROOT / 'benchmarks' / 'paper', 'photos')
    scores = {row.label: results.scores(row.trainings[0], 'mAP') for row in experiments.rows('Table 13', 'photos')}
    focal, asl = (list(scores[label].values()) for label in ('FCOS, Focal Loss', 'FCOS, ASL'))
    assert len(focal) == len(asl) == 1
    page, readme = (' '.join((frozen.ROOT / path).read_text().split()) for path in ('docs/reproduce.md', 'README.md'))
    assert f'ASL has {asl[0]:.1f} mAP and focal loss {focal[0]:.1f}, in one training each' in readme
    assert f'in one training each, it is {asl[0] - focal[0]:.1f} mAP ahead' in page
