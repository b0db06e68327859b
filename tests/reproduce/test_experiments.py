"""Every row of the paper has its training, and each training has the settings of its row."""
import os.path as osp
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest

from benchmarks.adaptive import sweep_asymmetry
from mmasl.reproduce import load
from mmasl.reproduce.experiments import (
    ALPHAS,
    ASL,
    CE,
    CONVERGENCE,
    FOCAL,
    IMBALANCE,
    KINDS,
    MARGINS,
    MISSING_LABELS,
    OWN,
    PRETRAINING,
    ROOT,
    Loss,
    Training,
    digits_of,
    items,
    rows,
)

ALL = [(data, item) for data in ('real', 'photos', 'digits') for item in items(data)]


def loss_of(training: Training) -> Loss:
    """The loss that the config and its overrides set."""
    loss, hook = training.cfg.model.head.loss, (training.cfg.get('custom_hooks') or [{}])[0]
    values = {field.name: loss.get(field.name) for field in fields(Loss) if field.name != 'target'}
    return Loss(**values, target=hook.get('target') if 'Adaptive' in hook.get('type', '') else None)


def test_all_tables_and_figures_have_rows():
    assert set(items('real')) == {entry.item for entry in load()}
    assert {f'Fig. {n}' for n in range(4, 10)} | {'Table 2', 'Table 3', 'Table 13', *OWN} <= set(items('digits'))


def test_photos_are_trained_on_train_and_evaluated_on_val():
    assert items('photos') == ['Table 2', 'Table 9', 'Table 13', 'Fig. 8', MISSING_LABELS]
    for item in items('photos'):
        for row in rows(item, 'photos'):
            cfg = row.trainings[0].cfg
            train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
            if item == 'Table 13':
                assert train.pipeline[2].scale == val.pipeline[1].scale == (208, 128)
                assert [osp.basename(one.ann_file) for one in (train, val)] == ['train.txt', 'val.txt']
                assert row.trainings[0].name.endswith('_scale208x128')
                assert 'train_dataloader.dataset.pipeline.2.scale=(208,128)' in shlex.split(row.trainings[0].command)
                continue
            assert train.pipeline[1].scale == val.pipeline[1].scale == 128
            if 'Corel' not in row.label:
                assert (train.split, val.split) == ('train', 'val') and train.pipeline[3].share == (row.x or 0)
            assert not row.trainings[0].placement('photos', 1)
    named = {row.label: loss_of(row.trainings[0]) for row in rows('Table 9', 'photos')}
    assert named == {'CE': CE, 'Focal Loss': FOCAL, 'ASL': ASL}
    assert [entry.value for row in rows('Table 9', 'photos') for entry in row.entries] == [93.2, 93.8, 94.6]


def test_every_row_has_a_command():
    for data, item in ALL:
        found = rows(item, data)
        labels = [row.label for row in found]
        assert len(set(labels)) == len(labels)
        for row in found:
            assert row.trainings or row.command.startswith('python tools/')
            assert not (row.cited and row.trainings)
            assert all((ROOT / training.path).exists() for training in row.trainings), f'{item}, {row.label}'
            assert all(entry.source == 'ours' for entry in row.entries if row.trainings)


def test_no_number_is_lost():
    """Every score of the paper's authors stands in a row with a training, every cited number in one without."""
    found = [row for item in items('real') for row in rows(item, 'real')]
    shown = {entry for row in found if row.trainings for entry in row.entries}
    scores = {entry for entry in load() if entry.source == 'ours' and entry.value is not None
              and entry.item not in ('Table 1', 'Fig. 2', 'Fig. 3')}
    assert scores <= shown
    assert not any(row.entries for row in found if row.trainings and row.trainings[0].released)  # other models
    cited = {entry for row in found if row.cited for entry in row.entries}
    assert cited == {entry for entry in load() if entry.source == 'cited'}


@pytest.mark.parametrize('data', ['real', 'digits'])
@pytest.mark.parametrize('item', ['Table 2', 'Table 3', 'Fig. 4', 'Fig. 5', 'Fig. 7', 'Fig. 9'])
def test_trainings_have_the_settings_of_the_paper(item, data):
    checked = 0
    for row in rows(item, data):
        if len(row.trainings) == 1:
            loss = loss_of(row.trainings[0])
            for entry in row.entries:
                for name in ('gamma_pos', 'gamma_neg', 'clip', 'target'):
                    if (value := getattr(entry, name)) is not None:
                        assert getattr(loss, name) == value, f'{row.label}: {name}'
                        checked += 1
    assert checked >= 2


@pytest.mark.parametrize('pattern, count', [('tresnet-l_paper_{}_coco', 7), ('resnet_{}_digits_paper', 4)])
def test_kinds_are_those_of_the_configs(pattern, count):
    known = {path.stem for path in (ROOT / 'configs').rglob('*.py')}
    found = {kind: Training(pattern.format(kind)) for kind in KINDS if pattern.format(kind) in known}
    assert len(found) == count
    for kind, training in found.items():
        assert loss_of(training) == KINDS[kind], training.path


def test_sweeps():
    alphas = next(row for row in rows('Table 2', 'real') if row.label == 'FL + linear weighting').trainings
    assert [loss_of(training).alpha for training in alphas] == list(ALPHAS) and (ALPHAS[0], ALPHAS[-1]) == (0.5, 0.95)
    margins = {row.x: loss_of(row.trainings[0]) for row in rows('Fig. 7', 'digits') if row.series == 'gamma 2'}
    assert margins == {margin: Loss(2., 2., margin) for margin in MARGINS}
    sixth = [(row, loss_of(row.trainings[0])) for row in rows('Fig. 6', 'real') if row.x is not None]
    assert all(loss == Loss(row.x, float(row.series.split()[1])) for row, loss in sixth)


def test_rows_share_trainings():
    """Fig. 4, 5, 7 and 8 share cross-entropy; Table 2, Fig. 8 and the missing labels share ASL."""
    def of(item, label):
        return next(row.trainings for row in rows(item, 'digits') if row.label == label)
    assert of('Fig. 5', 'gamma 0') == of('Fig. 4', 'Cross-entropy') == of('Fig. 7', 'gamma 0, margin 0')
    assert of('Fig. 5', 'gamma 0') == of('Fig. 8', 'ResNet-18, Cross-entropy') == of(MISSING_LABELS, 'CE, 30% missing')
    assert of('Table 2', 'Focusing + Probability margin (ASL)') == of(MISSING_LABELS, 'ASL, 30% missing')
    trainings = {training for item in items('digits') for row in rows(item, 'digits') for training in row.trainings}
    assert len({training.name for training in trainings}) == len(trainings)


@pytest.mark.parametrize('item, setting, values', [
    (MISSING_LABELS, 'missing', (0., 0.15, 0.3, 0.45, 0.6)), (IMBALANCE, 'labels_per_image', (1.25, 2.5, 5.))])
def test_points_of_a_figure_differ_only_in_the_data(item, setting, values):
    found = rows(item, 'digits')
    assert [(row.series, row.x) for row in found] == [(name, x) for name in ('CE', 'focal', 'ASL') for x in values]
    usual = digits_of('data/digits_hard')
    for row in found:
        training, = row.trainings
        roots = training.data_roots | {training.cfg.test_dataloader.dataset.data_root}
        assert len(roots) == 1 and digits_of(roots.pop()) == replace(usual, **{setting: row.x})
        assert all('data_root' in key for key, _ in training.options)
    assert not rows(item, 'real')


def test_convergence_changes_only_the_epochs():
    found = rows(CONVERGENCE, 'digits')
    assert {(row.series, row.x) for row in found} == {(name, x) for name in ('CE', 'focal', 'ASL') for x in (4, 8, 16)}
    for row in found:
        training, = row.trainings
        assert training.cfg.train_cfg.max_epochs == row.x
        assert 'total_steps' not in training.cfg.param_scheduler  # one cycle over all epochs
        assert all(key == 'train_cfg.max_epochs' for key, _ in training.options)


def test_pretraining_changes_only_the_initial_checkpoint():
    found = rows(PRETRAINING, 'digits')
    assert [(row.series, row.x) for row in found] == [(name, x) for name in ('CE', 'focal', 'ASL') for x in (0, 6, 24)]
    for row in found:
        training, = row.trainings
        assert all(key.startswith('model.backbone.init_cfg') for key, _ in training.options)
        if row.x == 0:
            assert training.cfg.model.backbone.init_cfg is None and not training.initial_checkpoints
            continue
        checkpoint, = map(Path, training.initial_checkpoints)
        glyphs = Training(checkpoint.parent.name).cfg
        assert checkpoint.name == f'epoch_{row.x}.pth' and glyphs.train_cfg.max_epochs == row.x


def test_digits_of():
    assert digits_of('data/digits_hard/') == sweep_asymmetry.DIGITS
    assert digits_of('data/coco/') is None


def test_command():
    training = Training('resnet_asl_digits_paper', (('model.head.loss.clip', 0.), ('model.head.loss.gamma_neg', 2.)))
    assert training.command == ('python tools/train.py configs/digits/resnet_asl_digits_paper.py --cfg-options '
                                'model.head.loss.clip=0 model.head.loss.gamma_neg=2')
    assert training.name == 'resnet_asl_digits_paper_clip0_gamma_neg2'


def test_every_released_checkpoint_is_evaluated():
    stating = {path.stem for path in (ROOT / 'configs').rglob('*.py') if 'released' in path.read_text()
               and '_base_' not in path.parts and Training(path.stem).cfg.get('released')}
    found = {training.config: training for item in items('real') for row in rows(item, 'real')
             for training in row.trainings if training.released}
    assert set(found) == stating
    for training in found.values():
        assert training.command == f'python tools/test.py {training.path} {training.cfg.released.checkpoint}'


@pytest.mark.parametrize('item, total', [('Table 9', 128), ('Table 13', 48), ('Table 12', 128), ('Table 7', 128)])
def test_the_total_batch_does_not_depend_on_the_gpus(item, total):
    for training in {one for row in rows(item, 'real') for one in row.trainings if not one.released}:
        for gpus in (1, 4, 8):
            run = training.run('real', 0, 'work', gpus)
            assert run.placement['train_dataloader.batch_size'] * gpus == total
        assert total % training.cfg.train_dataloader.batch_size == 0


def test_gpus_that_cannot_share_a_batch():
    training = rows('Table 13', 'real')[0].trainings[0]
    with pytest.raises(ValueError, match='batches of 48 images, which 5 GPUs cannot share equally. Pass --gpus 1, 2'):
        training.run('real', 0, 'work', 5)
    assert not rows('Table 2', 'digits')[0].trainings[0].run('digits', 0, 'work').placement
