"""tools/reproduce.py: its list, its flags, what it reads from runs, its tables, and the page that shows them."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from mmasl.reproduce import FOOTNOTES, load
from mmasl.reproduce.experiments import MISSING_LABELS, OWN, items, rows
from mmasl.reproduce.render import Results, best, draw, interval, render
from mmasl.reproduce.runs import Run, write_rows

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tools import reproduce  # noqa: E402


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def write(folder: Path, item: str, data: str = 'digits', seeds: int = 3, **scores) -> Results:
    """Rows of all trainings of an item, whose mAP is 80, 80.1, ... by training, and 0.5 more by seed."""
    trainings = dict.fromkeys(training for row in rows(item, data) for training in row.trainings)
    write_rows(folder / f'{data}.csv', [
        dict(config=one.config, options=one.overrides, seed=seed, mAP=80 + 0.1 * place + 0.5 * seed, CF1=70., gap=-0.2,
             gamma_neg=3., **scores) for place, one in enumerate(trainings) for seed in range(seeds)])
    return Results(folder, data)


def test_interval():
    values = [1., 2., 4.]
    mean, half = interval(values)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(t.interval(0.95, 2, scale=np.std(values, ddof=1) / 3**0.5)[1])
    assert np.isnan(interval([1.])[1])


def test_table(tmp_path):
    text = render('Fig. 5', write(tmp_path, 'Fig. 5'))
    lines = text.splitlines()
    assert lines[0] == ('|  | paper, MS-COCO: mAP | mAP | against the first row | CF1 | gap (validation) | seeds |')
    assert lines[2] == '| gamma 0 | 84 | 80.5 ± 1.2 |  | 70.0 ± 0.0 | -0.20 ± 0.00 | 3 |'
    assert lines[4] == '| gamma 2 |  | 80.7 ± 1.2 | +0.2 ± 0.0 | 70.0 ± 0.0 | -0.20 ± 0.00 | 3 |'
    # The best of gamma 2, 3, 4 by our own score, beside the paper's best.
    assert lines[8].startswith(
        '| best, gamma 2 to 4 | 85.1 (1) | 80.9 ± 1.2 (gamma_pos=4.0, gamma_neg=4.0) | +0.4 ± 0.0 |')
    assert lines[-1] == f'(1) {FOOTNOTES["focal-gamma"]}  '


def test_no_number_of_ours_stands_in_a_column_of_the_paper_s(tmp_path):
    lines = render('Table 4', write(tmp_path, 'Table 4', 'real', 1)).splitlines()
    heads = [head.strip() for head in lines[0].strip('|').split('|')]
    paper = {place for place, head in enumerate(heads) if head.startswith('paper')}
    printed = {f'{entry.value:g}' for entry in load() if entry.item == 'Table 4' and entry.value is not None}
    for line in lines[2:lines.index('')]:
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        assert all(not cell or cell.split(' (')[0] in printed for place, cell in enumerate(cells) if place in paper)
        ours = ('', '80.0', '80.1', '80.2', '+0.1', '+0.2', '70.0', '1')
        assert all(cells[place] in ours for place in range(1, len(cells)) if place not in paper)
        assert ('(cited)' in cells[0]) == (not cells[-1])


def test_table_without_any_training(tmp_path):
    text = render('Table 2', Results(tmp_path, 'digits'))
    line = next(line for line in text.splitlines() if line.startswith('| FL |'))
    assert [cell.strip() for cell in line.strip('|').split('|')] == ['FL', '85.1 (1)', *[''] * 8, '0']
    assert not draw('Table 2', Results(tmp_path, 'digits'), [tmp_path / 'a.svg'])


def test_differences_are_on_common_seeds(tmp_path):
    results = write(tmp_path, 'Fig. 5')
    first = rows('Fig. 5', 'digits')[0].trainings[0]
    results.rows = [row for row in results.rows if row['seed'] != '0' or row['config'] != first.config]
    results.rows = [dict(row, mAP=float(row['mAP']) - 30 * (row['seed'] == '0')) for row in results.rows]
    assert '| gamma 2 |  |' in (text := render('Fig. 5', results))
    assert '| +0.2 ± 0.0 |' in text  # seed 0, 30 points lower, is not among the first row's


def test_points_are_compared_at_the_same_place(tmp_path):
    """Of what is varied beside the loss: each loss against cross-entropy there, a backbone's against its own."""
    write(tmp_path, MISSING_LABELS)
    head, _, *lines = render(MISSING_LABELS, Results(tmp_path, 'digits')).splitlines()
    place = [cell.strip() for cell in head.split('|')].index('against CE, same point')
    cells = [[cell.strip() for cell in line.split('|')] for line in lines if line]
    assert [line[place] for line in cells] == [*[''] * 5, *['+0.5 ± 0.0'] * 5, *['+1.0 ± 0.0'] * 5]
    for item, count in (('Fig. 8', 3), ('Table 13', 2), *dict.fromkeys(OWN, 3).items()):
        labels = {row.label for row in rows(item, 'digits')}
        assert len({row.against for row in rows(item, 'digits')}) * count == len(labels)
        assert {row.against for row in rows(item, 'digits')} < labels


def test_what_is_known_of_the_missing_labels_stands_beside_the_scores(tmp_path):
    one = rows(MISSING_LABELS, 'digits')[3].trainings[0]
    write(tmp_path, MISSING_LABELS)
    write_rows(tmp_path / 'digits_missing.csv', [
        dict(config=one.config, options=one.overrides, seed=seed, p_missing=0.25, gradient_missing=12.34)
        for seed in range(2)])
    head, _, *lines = render(MISSING_LABELS, Results(tmp_path, 'digits')).splitlines()
    names = [cell.strip() for cell in head.split('|')]
    cells = [[cell.strip() for cell in line.split('|')] for line in lines]
    assert cells[3][names.index('of missing')] == '0.25 ± 0.00' and cells[2][names.index('of missing')] == ''
    assert cells[3][names.index('gradient on missing labels [%]')] == '12.3 ± 0.0'
    assert cells[3][names.index('seeds')] == '3'


def test_table_1_agrees_with_the_gradients(tmp_path):
    cells = [[cell.strip() for cell in line.strip('|').split('|')]
             for line in render('Table 1', Results(tmp_path, 'real')).splitlines()[2:]]
    assert len(cells) == 4 and {cell for row in cells for cell in row[1:]} == {'+', '-'}
    assert all(row[1::2] == row[2::2] for row in cells)


@pytest.mark.parametrize('item', ['Fig. 5', 'Fig. 7', 'Fig. 8', *OWN])
def test_pictures(item, tmp_path):
    paths = [tmp_path / 'a' / 'one.svg', tmp_path / 'one.png']
    assert draw(item, write(tmp_path, item), paths)
    assert all(path.stat().st_size > 5000 for path in paths)
    again = tmp_path / 'again.svg'
    draw(item, Results(tmp_path, 'digits'), [again])
    assert again.read_bytes() == paths[0].read_bytes()  # no dates, no random ids


def test_the_best_of_several_trainings(tmp_path):
    row = next(row for row in rows('Table 2', 'digits') if len(row.trainings) == 10)
    results = write(tmp_path, 'Table 2')
    assert best(row, results) == row.trainings[-1]
    results.rows = [one for one in results.rows if one['options'] != row.trainings[-1].overrides]
    assert best(row, results) == row.trainings[-2]
    results = write(tmp_path, 'Table 2', seeds=8)
    results.rows = [one for one in results.rows if one['seed'] == '7' or one['options'] != row.trainings[0].overrides]
    assert best(row, results) == row.trainings[-1]  # the first has the best seed alone
    assert best(row, Results(tmp_path / 'none', 'digits')) == row.trainings[0]


@pytest.fixture
def run(tmp_path):
    """A finished run of 100 steps: the gap rises to 0.1 at step 20, and stays."""
    folder = tmp_path / 'run' / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    steps = [dict(iter=step, step=step, p_t_pos=0.6, p_t_neg=0.6 - min(0.1, 0.0051 * step), gap=min(0.1, 0.0051 * step),
                  gamma_neg=step / 100) for step in range(1, 101)]
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, [
        *steps, {'step': 1, 'multi-label/mAP': 50.}, {'step': 2, 'multi-label/mAP': 81.234, 'coco/bbox_mAP': 0.76543,
                                                      'time': 1.}])))
    return Run('configs/digits/resnet_adaptive_digits_paper.py', str(tmp_path / 'run'))


def test_scalars_of_a_run(run):
    assert reproduce.scalars(run) == dict(
        mAP='81.23', bbox_mAP='76.54', train_p_t_pos='0.6', train_p_t_neg='0.5', train_gap='0.1', gamma_neg='0.995',
        reached='16')  # at 0.08, within 0.02 of the target


def test_scalars_of_an_evaluated_checkpoint(tmp_path):
    training, = next(row.trainings for row in rows('Table 4', 'real') if row.label.startswith('released'))
    run = reproduce.run_of(training, 'real', 0, str(tmp_path))
    assert run.checkpoint.startswith('https://') and run.checkpoint.endswith('MS_COCO_TRresNet_L_448_86.6.pth')
    Path(run.work_dir).mkdir(parents=True)
    (Path(run.work_dir) / 'metrics.json').write_text(json.dumps({'multi-label/mAP': 86.55, 'multi-label/gap': 0.1}))
    run.finish()
    assert reproduce.scalars(run) == dict(mAP='86.55', gap='0.1')
    results = Results(tmp_path / 'out', 'real')
    reproduce.collect({training: run}, 0, results)
    lines = render('Table 4', Results(tmp_path / 'out', 'real')).splitlines()
    line = next(line for line in lines if 'released' in line)
    assert line.startswith('| released checkpoint of tresnet-l_official_asl_coco |  |  |  | 86.5 |'), line


def test_released_checkpoints_are_evaluated_once_and_only_on_request(tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(reproduce, 'prepare', lambda *_: None)
    monkeypatch.setattr(reproduce, 'train', lambda runs, *_: wanted.append([bool(run.checkpoint) for run in runs]))
    flags = ['--table', '11', '--data', 'real', '--seeds', '2', '--gpus', '1', '--out', str(tmp_path), '--work-dir',
             str(tmp_path)]
    reproduce.main(flags)
    reproduce.main([*flags, '--released'])
    assert [sum(checkpoints) for checkpoints in wanted] == [0, 0, 1, 0]


def test_curve_of_a_run(run):
    points = list(reproduce.curve(run))
    assert len(points) == 50 and points[0]['share'] == '0.020' and points[-1]['share'] == '1.000'
    assert points[-1]['gap'] == '0.1' and float(points[0]['gap']) == pytest.approx(0.00765)


def test_collecting_keeps_other_rows(tmp_path, run):
    results = write(tmp_path / 'rows', 'Fig. 5', seeds=1)
    training = rows('Fig. 9', 'digits')[0].trainings[0]
    before = len(results.rows)
    reproduce.collect({training: run}, 0, results)
    results = Results(tmp_path / 'rows', 'digits')
    assert len(results.rows) == before + 1 and results.scores(training, 'mAP') == {0: 81.23}
    assert len(results.curve(training, 'gap')[0]) == 50
    reproduce.collect({training: run}, 0, results)
    again = Results(tmp_path / 'rows', 'digits')
    assert len(again.rows) == before + 1
    assert all(row[name] for row in [*again.rows, *again.curve_rows] for name in ('commit', 'date', 'torch', 'device'))


def test_an_interrupted_call_leaves_its_rows(tmp_path, run, monkeypatch):
    """Of two trainings one is over when the call is cut off; the next call trains the other alone."""
    one, other = (training for row in rows('Fig. 4', 'digits')[:2] for training in row.trainings)
    started = []

    def train(runs, jobs, gpus):
        started.append([Path(run.work_dir).name for run in runs])
        if len(started) == 1:
            folder = Path(runs[0].work_dir)
            folder.parent.mkdir(parents=True)
            Path(run.work_dir).rename(folder)
            runs[0].finish()
            raise SystemExit('terminated')

    monkeypatch.setattr(reproduce, 'prepare', lambda *_: None)
    monkeypatch.setattr(reproduce, 'train', train)
    flags = ['--figure', '4', '--seeds', '1', '--out', str(tmp_path / 'out'), '--work-dir', str(tmp_path / 'work')]
    with pytest.raises(SystemExit, match='terminated'):
        reproduce.main(flags)
    assert Results(tmp_path / 'out', 'digits').scores(one, 'mAP') == {0: 81.23}
    (tmp_path / 'out' / 'digits.csv').unlink()
    reproduce.main([*flags, '--render'])  # trains nothing, and finds what is finished
    assert Results(tmp_path / 'out', 'digits').scores(one, 'mAP') == {0: 81.23} and len(started) == 1
    reproduce.main(flags)
    assert started[1] == started[0][1:] and started[1][0].startswith(other.config)


def test_list(capsys):
    reproduce.main(['--list', '--data', 'real', '--out', 'nowhere'])
    text = capsys.readouterr().out
    assert all(f'\n## {item}' in text for item in {entry.item for entry in load()})
    blocks = re.split(r'\n(?=\S)', text)
    states = [re.search(r'state: (.*)', block)[1] for block in blocks if 'state: ' in block]
    assert len(states) == sum(len(rows(item, 'real')) for item in {entry.item for entry in load()})
    assert {state.split(':')[0] for state in states} <= {
        'cited', 'drawn from the equations', 'needs data', 'needs checkpoint', 'to be trained', 'to be evaluated'}
    assert all('    python tools/' in block for block in blocks if 'state: ' in block)


@pytest.mark.parametrize('flags, message', [
    ([], 'nothing to do: give --list, --all, --table N'),
    (['--table', '14'], 'Table 14 has no rows on --data digits; there are: Table'),
    (['--table', '6'], 'Table 6 has no rows on --data digits'),
    (['--missing-labels', '--data', 'real'], 'Missing labels has no rows on --data real'),
    (['--convergence', '--data', 'real'], 'Convergence has no rows on --data real'),
    (['--imbalance', '--missing-labels', '--data', 'real'], 'Imbalance has no rows on --data real'),
    (['--table', '2', '--seeds', '0'], '--seeds 0: at least one'),
    (['--table', '9', '--data', 'real', '--gpus', '0'], '--gpus 0: at least one'),
    (['--table', '2', '--gpus', '8'], '--gpus 8: a training on digits is of one process')],
    ids=lambda value: ' '.join(value)[:30])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('settings, refused', [(None, True), ('', True), ('0' * 12, True), ('now', False)])
def test_rows_of_other_settings_are_refused(tmp_path, settings, refused, monkeypatch):
    monkeypatch.setattr(reproduce, 'prepare', lambda *_: None)
    monkeypatch.setattr(reproduce, 'train', lambda *_: None)
    one = rows('Table 2', 'digits')[0].trainings[0]
    settings = reproduce.settings(one) if settings == 'now' else settings
    write_rows(tmp_path / 'digits.csv', [dict(config=one.config, options=one.overrides, seed=0, mAP=80.) | (
        {} if settings is None else dict(settings=settings))])
    flags = ['--table', '2', '--out', str(tmp_path), '--work-dir', str(tmp_path / 'work')]
    if not refused:
        reproduce.main(flags)
        return
    for more in ([], ['--render']):
        with pytest.raises(SystemExit, match=r'digits.csv has rows of other settings .*: resnet_focal_digits_paper\.'):
            reproduce.main([*flags, *more])
    assert reproduce.state(rows('Table 2', 'digits')[0], Results(tmp_path, 'digits')).startswith('to be trained again')


def test_the_committed_rows_are_of_the_configs():
    results = Results(ROOT / 'benchmarks' / 'paper', 'digits')
    trainings = {training for item in items('digits') for row in rows(item, 'digits') for training in row.trainings}
    assert results.rows and not [one.name for one in trainings if reproduce.changed_since(one, results)]
    assert all(row[name] for row in results.rows for name in ('commit', 'date', 'torch', 'device'))
    now = {(training.config, training.overrides): reproduce.settings(training) for training in trainings}
    assert all(row['settings'] == now[row['config'], row['options']] for row in results.missing_rows)


def test_rendering_passes_over_runs_of_other_settings(tmp_path):
    one = rows('Table 2', 'digits')[0].trainings[0]
    run = reproduce.run_of(one, 'digits', 0, str(tmp_path / 'work'))
    other = Run(run.config, run.work_dir, {**run.options, 'randomness.seed': 9})
    Path(run.work_dir).mkdir(parents=True)
    other.finish()
    reproduce.main(['--table', '2', '--render', '--out', str(tmp_path), '--work-dir', str(tmp_path / 'work')])
    assert not (tmp_path / 'digits.csv').exists()
    with pytest.raises(SystemExit, match='other settings'):
        assert run.finished


def test_what_others_start_from(tmp_path, monkeypatch):
    """Is trained once, taken as it is where it comes from elsewhere, and refused where its config has changed."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.DigitScenes, 'write', lambda *_: None)
    monkeypatch.setattr(reproduce, 'check_data', lambda *_: None)
    trained = []
    monkeypatch.setattr(reproduce, 'train', lambda runs, *_: trained.extend(run.work_dir for run in runs))
    training, = rows('Table 2', 'digits')[0].trainings
    folder = 'work_dirs/resnet_ce_glyphs_24e'

    def prepare():
        trained.clear()
        reproduce.prepare([training], 'digits', None, 1)
        return trained

    assert prepare() == [folder]
    Path(folder).mkdir(parents=True)
    Path(folder, 'epoch_24.pth').touch()
    assert prepare() == []
    run = Run('configs/digits/resnet_ce_glyphs_24e.py', folder)
    run._stamp(finished=False)
    assert prepare() == [folder]
    run.finish()
    assert prepare() == []
    Run(run.config, folder, {'randomness.seed': 7}).finish()
    with pytest.raises(SystemExit, match=f'{folder} holds a run of .* with other settings'):
        prepare()


@pytest.mark.parametrize('item, total', [('Table 9', 128), ('Table 13', 48), ('Table 12', 128), ('Table 7', 128)])
@pytest.mark.parametrize('gpus', [1, 4, 8])
def test_the_total_batch_is_the_same_on_any_number_of_gpus(item, total, gpus):
    for training in {one for row in rows(item, 'real') for one in row.trainings if not one.released}:
        run = reproduce.run_of(training, 'real', 0, 'work', gpus)
        assert run.placement['train_dataloader.batch_size'] * gpus == total
        cfg = reproduce.config(training)
        assert total % cfg.train_dataloader.batch_size == 0


def test_gpus_that_cannot_share_a_batch():
    training = rows('Table 13', 'real')[0].trainings[0]
    with pytest.raises(SystemExit, match='batches of 48 images, which 5 GPUs cannot share: choose --gpus among 1, 2'):
        reproduce.run_of(training, 'real', 0, 'work', 5)
    assert not reproduce.run_of(rows('Table 2', 'digits')[0].trainings[0], 'digits', 0, 'work').placement


@pytest.mark.parametrize('item', ['Fig. 2', 'Fig. 3'])
def test_figures_of_the_equations(item, tmp_path):
    reproduce.main(['--figure', item[-1], '--data', 'real', '--out', str(tmp_path)])
    text = (tmp_path / 'real' / f'fig{item[-1]}.md').read_text()
    assert f'![{item}](fig{item[-1]}.svg)' in text and '| CE |' in text
    assert all((tmp_path / 'real' / f'fig{item[-1]}.{ending}').stat().st_size > 5000 for ending in ('svg', 'png'))


def test_the_score_stands_first_beside_what_the_training_found(tmp_path):
    """Table 3 of real data has the paper's gamma_neg first; the differences and the picture are of mAP."""
    head, _, _, second, *_ = render('Table 3', write(tmp_path, 'Table 3', 'real')).splitlines()
    names = [cell.strip() for cell in head.split('|')]
    assert names.index('mAP') < names.index('against the first row') < names.index('final gamma_neg')
    assert [cell.strip() for cell in second.split('|')][names.index('against the first row')] == '+0.1 ± 0.0'


def test_the_best_of_a_curve_stands_beside_the_paper_s(tmp_path):
    text = render('Fig. 6', write(tmp_path, 'Fig. 6'))
    assert '| best, gamma_neg 4 | 0 | 81.2 ± 1.2 (gamma_pos=4.0, gamma_neg=4.0) |' in text
    text = render('Fig. 7', write(tmp_path, 'Fig. 7'))
    assert re.search(r'\| best, gamma 2 \|  \| 0.3 \| 0.4 \| \S+ ± 1.2 \(clip=0.4\)', text)


def test_a_list_of_some(capsys):
    reproduce.main(['--list', '--table', '4', '2', '--out', 'nowhere'])
    text = capsys.readouterr().out
    assert re.findall('^#.*?(?=:|$)', text, re.MULTILINE) == [
        '# --data real', '## Table 2', '## Table 4', '# --data digits', '## Table 2']


def test_missing_data(tmp_path, monkeypatch):
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)  # where no data are
    with pytest.raises(SystemExit, match='(?s)data/nus_wide.*NUS-WIDE: images and the list'):
        reproduce.main(['--table', '11', '--data', 'real', '--out', str(tmp_path), '--work-dir', str(tmp_path)])


def test_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, 'tools/reproduce.py', '--table', '1', '--data', 'real', '--out', str(tmp_path)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '| ASL (AF+PS) | + | +' in (tmp_path / 'real' / 'table1.md').read_text()


def test_the_page_shows_the_rows():
    text = reproduce.PAGE.read_text()
    assert reproduce.page(text, ROOT / 'benchmarks' / 'paper') == text, (
        'run python tools/reproduce.py --render --out benchmarks/paper')
    assert {f'<!-- paper: {item}, digits -->' for item in items('digits') if rows(item, 'digits')[0].trainings} == set(
        re.findall('<!-- paper: .*? -->', text))
