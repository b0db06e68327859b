"""mmasl/reproduce/experiments.py: every row of the paper has its training, and the trainings are what the rows say."""
import os.path as osp
from dataclasses import fields, replace
from pathlib import Path

import pytest
from mmengine.config import Config

from benchmarks.adaptive import sweep_asymmetry
from mmasl.reproduce import load
from mmasl.reproduce.experiments import (
    ALPHAS,
    CONVERGENCE,
    IMBALANCE,
    KINDS,
    MARGINS,
    MISSING_LABELS,
    OWN,
    PRETRAINING,
    Loss,
    Training,
    digits_of,
    items,
    rows,
)

ROOT = Path(__file__).parents[2]
ALL = [(data, item) for data in ('real', 'digits') for item in items(data)]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def loss_of(training: Training) -> Loss:
    """What the config and its overrides set."""
    cfg = Config.fromfile(training.path)
    cfg.merge_from_dict(dict(training.options))
    loss, hook = cfg.model.head.loss, (cfg.get('custom_hooks') or [{}])[0]
    values = {field.name: loss.get(field.name) for field in fields(Loss) if field.name != 'target'}
    return Loss(**values, target=hook.get('target') if 'Adaptive' in hook.get('type', '') else None)


def test_all_tables_and_figures_are_there():
    named = {entry.item for entry in load()}
    assert set(items('real')) == named
    assert {f'Fig. {n}' for n in range(4, 10)} | {'Table 2', 'Table 3', 'Table 13', *OWN} <= set(items('digits'))


@pytest.mark.parametrize('data, item', ALL, ids=str)
def test_every_row_has_a_command(data, item):
    found = rows(item, data)
    labels = [row.label for row in found]
    assert len(set(labels)) == len(labels)
    for row in found:
        assert row.trainings or row.command.startswith('python tools/')
        assert not (row.cited and row.trainings)
        for training in row.trainings:
            assert osp.exists(training.path), f'{item}, {row.label}'


def test_no_number_of_the_authors_is_lost():
    """Every number that the paper's authors measured, and that is a score, stands in a row with its training."""
    shown = {entry for item in items('real') for row in rows(item, 'real') for entry in row.entries if row.trainings}
    scores = {entry for entry in load() if entry.source == 'ours' and entry.value is not None
              and entry.item not in ('Table 1', 'Fig. 2', 'Fig. 3')}
    assert scores <= shown
    assert not any(row.entries for item in items('real') for row in rows(item, 'real')
                   if row.trainings and row.trainings[0].released)  # these are of other models
    cited = {entry for item in items('real') for row in rows(item, 'real') for entry in row.entries if row.cited}
    assert cited == {entry for entry in load() if entry.source == 'cited'}


def test_cited_rows_are_not_trained():
    assert all(entry.source == 'ours' for data, item in ALL for row in rows(item, data) if row.trainings
               for entry in row.entries)


def stated(row) -> list[tuple[str, float]]:
    """gamma_pos, gamma_neg and clip that the paper states for a row."""
    names = ('gamma_pos', 'gamma_neg', 'clip', 'target')
    return [(name, getattr(entry, name)) for entry in row.entries for name in names if getattr(entry, name) is not None]


@pytest.mark.parametrize('data', ['real', 'digits'])
@pytest.mark.parametrize('item', ['Table 2', 'Table 3', 'Fig. 4', 'Fig. 5', 'Fig. 7', 'Fig. 9'])
def test_trainings_have_the_paper_s_settings(item, data):
    checked = 0
    for row in rows(item, data):
        if len(row.trainings) == 1:
            loss = loss_of(row.trainings[0])
            for name, value in stated(row):
                assert getattr(loss, name) == value, f'{row.label}: {name}'
                checked += 1
    assert checked >= 2


@pytest.mark.parametrize('data, pattern', [('real', 'tresnet-l_paper_{}_coco'), ('digits', 'resnet_{}_digits_paper')])
def test_kinds_are_those_of_the_configs(data, pattern):
    for kind, loss in KINDS.items():
        training = Training(pattern.format(kind))
        if osp.exists(training.path):
            assert loss_of(training) == loss, training.path


def test_sweeps():
    alphas = next(row for row in rows('Table 2', 'real') if row.label == 'FL + linear weighting').trainings
    assert [loss_of(training).alpha for training in alphas] == list(ALPHAS) and (ALPHAS[0], ALPHAS[-1]) == (0.5, 0.95)
    margins = {row.x: loss_of(row.trainings[0]) for row in rows('Fig. 7', 'digits') if row.series == 'gamma 2'}
    assert margins == {margin: Loss(2., 2., margin) for margin in MARGINS}
    sixth = [(row, loss_of(row.trainings[0])) for row in rows('Fig. 6', 'real') if row.x is not None]
    assert all(loss == Loss(row.x, float(row.series.split()[1])) for row, loss in sixth)


def test_shared_trainings_are_one():
    """Cross-entropy is trained once for Fig. 4, 5, 7 and 8, Table 2's ASL once with Fig. 8's and missing labels'."""
    def of(item, label):
        return next(row.trainings for row in rows(item, 'digits') if row.label == label)
    assert of('Fig. 5', 'gamma 0') == of('Fig. 4', 'Cross-entropy') == of('Fig. 7', 'gamma 0, margin 0')
    assert of('Fig. 5', 'gamma 0') == of('Fig. 8', 'ResNet-18, Cross-entropy') == of(MISSING_LABELS, 'CE, 30% missing')
    assert of('Table 2', 'Focusing + Probability margin (ASL)') == of(MISSING_LABELS, 'ASL, 30% missing')
    names = [training.name for item in items('digits') for row in rows(item, 'digits') for training in row.trainings]
    trainings = {training for item in items('digits') for row in rows(item, 'digits') for training in row.trainings}
    assert len(set(names)) == len(trainings)


@pytest.mark.parametrize('item, setting, values', [
    (MISSING_LABELS, 'missing', (0., 0.15, 0.3, 0.45, 0.6)), (IMBALANCE, 'labels_per_image', (1.25, 2.5, 5.))])
def test_points_of_a_figure_differ_in_the_data_alone(item, setting, values):
    found = rows(item, 'digits')
    assert [(row.series, row.x) for row in found] == [(name, x) for name in ('CE', 'focal', 'ASL') for x in values]
    usual = digits_of('data/digits_hard')
    for row in found:
        cfg = Config.fromfile(row.trainings[0].path)
        cfg.merge_from_dict(dict(row.trainings[0].options))
        roots = {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')}
        assert len(roots) == 1 and digits_of(roots.pop()) == replace(usual, **{setting: row.x})
        assert all('data_root' in key for key, _ in row.trainings[0].options)
    assert not rows(item, 'real')


def test_convergence_changes_the_epochs_alone():
    found = rows(CONVERGENCE, 'digits')
    assert {(row.series, row.x) for row in found} == {(name, x) for name in ('CE', 'focal', 'ASL') for x in (4, 8, 16)}
    for row in found:
        cfg = Config.fromfile(row.trainings[0].path)
        cfg.merge_from_dict(dict(row.trainings[0].options))
        assert cfg.train_cfg.max_epochs == row.x and 'total_steps' not in cfg.param_scheduler  # one cycle over all
        assert all(key == 'train_cfg.max_epochs' for key, _ in row.trainings[0].options)


def test_pretraining_changes_the_start_alone():
    found = rows(PRETRAINING, 'digits')
    assert [(row.series, row.x) for row in found] == [(name, x) for name in ('CE', 'focal', 'ASL') for x in (0, 6, 24)]
    for row in found:
        cfg = Config.fromfile(row.trainings[0].path)
        cfg.merge_from_dict(dict(row.trainings[0].options))
        assert all(key.startswith('model.backbone.init_cfg') for key, _ in row.trainings[0].options)
        if row.x == 0:
            assert cfg.model.backbone.init_cfg is None
            continue
        checkpoint = Path(cfg.model.backbone.init_cfg.checkpoint)
        glyphs = Config.fromfile(f'configs/digits/{checkpoint.parent.name}.py')
        assert checkpoint.name == f'epoch_{row.x}.pth' and glyphs.train_cfg.max_epochs == row.x


def test_the_digits_roots_are_those_of_their_makers():
    assert digits_of('data/digits_hard/') == sweep_asymmetry.DIGITS
    assert digits_of('data/coco/') is None


def test_command():
    training = Training('resnet_asl_digits_paper', (('model.head.loss.clip', 0.), ('model.head.loss.gamma_neg', 2.)))
    assert training.command == ('python tools/train.py configs/digits/resnet_asl_digits_paper.py --cfg-options '
                                'model.head.loss.clip=0 model.head.loss.gamma_neg=2')
    assert training.name == 'resnet_asl_digits_paper_clip0_gamma_neg2'


def test_every_released_checkpoint_is_evaluated_beside_its_tables():
    stating = {path.stem: path for path in (ROOT / 'configs').glob('*/*.py') if Config.fromfile(path).get('released')}
    found = {training.config: training for item in items('real') for row in rows(item, 'real')
             for training in row.trainings if training.released}
    assert set(found) == set(stating)
    for name, training in found.items():
        assert training.command == (f'python tools/test.py {stating[name].relative_to(ROOT)} '
                                    f'{Config.fromfile(training.path).released.checkpoint}')
