"""The scalars and curves of runs, their rows, and the statistics over seeds."""
import json

import pytest

from mmasl.reproduce.experiments import rows
from mmasl.reproduce.results import Results, curve, scalars
from mmasl.reproduce.runs import Run, read_rows, write_rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of 100 steps. The gap rises to 0.1 at step 20 and stays there."""
    folder = tmp_path / 'run' / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    steps = [dict(iter=step, step=step, p_t_pos=0.6, p_t_neg=0.6 - min(0.1, 0.0051 * step), gap=min(0.1, 0.0051 * step),
                  gamma_neg=step / 100) for step in range(1, 101)]
    evaluations = [{'step': 1, 'multi-label/mAP': 50.},
                   {'step': 2, 'multi-label/mAP': 81.234, 'coco/bbox_mAP': 0.76543, 'pascal_voc/AP50': 0.5,
                    'time': 1.}]
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, [*steps, *evaluations])))
    (tmp_path / 'config.py').write_text("custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1)]\n")
    return Run(str(tmp_path / 'config.py'), str(tmp_path / 'run'))


def test_scalars(run):
    assert scalars(run) == dict(
        mAP='81.23', bbox_mAP='76.54', AP50='50', train_p_t_pos='0.6', train_p_t_neg='0.5', train_gap='0.1',
        gamma_neg='0.995', reached='16')  # at 0.08, within 0.02 of the target


def test_curve(run):
    points = list(curve(run))
    assert len(points) == 50 and points[0]['share'] == '0.020' and points[-1]['share'] == '1.000'
    assert points[-1]['gap'] == '0.1' and float(points[0]['gap']) == pytest.approx(0.00765)


def test_add_keeps_other_rows(run, tmp_path):
    other, training = (rows(item, 'digits')[0].trainings[0] for item in ('Fig. 5', 'Fig. 9'))
    write_rows(tmp_path / 'digits.csv', [dict(config=other.config, options=other.overrides, seed=0, mAP=80)])
    for _ in range(2):
        Results(tmp_path, 'digits').add({training: run}, 0, [training])
        results = Results(tmp_path, 'digits')
        assert len(results.rows) == 2 and results.scores(training, 'mAP') == {0: 81.23}
        assert results.outdated(other) and not results.outdated(training)
        assert len(results.curve(training, 'gap')[0]) == 50
    assert all(row[name] for row in [*results.rows, *results.curve_rows]
               for name in ('commit', 'date', 'torch', 'device'))


def test_a_released_checkpoint(tmp_path):
    training, = next(row.trainings for row in rows('Table 4', 'real') if row.label.startswith('released'))
    run = training.run('real', 0, str(tmp_path))
    assert run.checkpoint.startswith('https://') and run.checkpoint.endswith('MS_COCO_TRresNet_L_448_86.6.pth')
    (tmp_path / 'real' / training.name).mkdir(parents=True)
    (tmp_path / 'real' / training.name / 'metrics.json').write_text(
        '{"multi-label/mAP": 86.55, "multi-label/gap": 0.1}')
    assert scalars(run) == dict(mAP='86.55', gap='0.1')


def test_rows_keep_their_origin(tmp_path):
    path = tmp_path / 'rows.csv'
    write_rows(path, [dict(name='a', score=1)])
    path.write_text(path.read_text().replace(read_rows(path)[0]['date'], '2020-01-01'))
    write_rows(path, [*read_rows(path), dict(name='b', other=2)])
    old, new = read_rows(path)
    assert list(old) == ['name', 'score', 'other', 'commit', 'date', 'torch', 'device']
    assert old['date'] == '2020-01-01' and (new['score'], new['other']) == ('', '2')
