"""tools/reproduce.py: its list, its flags, how it goes on, and the page that it fills."""
import json
import re
from pathlib import Path

import pytest

from mmasl.reproduce import load
from mmasl.reproduce.experiments import items, rows
from mmasl.reproduce.results import Results
from mmasl.reproduce.runs import Run, write_rows
from tools import reproduce

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_list(capsys):
    reproduce.main(['--list', '--data', 'real', '--out', 'nowhere'])
    text = capsys.readouterr().out
    named = {entry.item for entry in load()}
    assert all(f'\n## {item}' in text for item in named)
    blocks = [block for block in re.split(r'\n(?=\S)', text) if 'state: ' in block]
    states = [re.search(r'state: (.*)', block)[1] for block in blocks]
    assert len(states) == sum(len(rows(item, 'real')) for item in named)
    assert {state.split(':')[0] for state in states} <= {
        'cited', 'drawn from the equations', 'needs data', 'needs checkpoint', 'not trained', 'not evaluated'}
    assert all('    python tools/' in block for block in blocks)


def test_list_of_some_items(capsys):
    reproduce.main(['--list', '--table', '4', '2', '--out', 'nowhere'])
    text = capsys.readouterr().out
    assert re.findall('^#.*?(?=:|$)', text, re.MULTILINE) == [
        '# --data real', '## Table 2', '## Table 4', '# --data photos', '## Table 2', '# --data digits', '## Table 2']


@pytest.mark.parametrize('flags, message', [
    ([], 'nothing to do'),
    (['--missing-labels', '--table', '14'], 'Table 14 has no rows on --data digits'),
    (['--convergence', '--data', 'real'], 'Convergence has no rows on --data real'),
    (['--table', '2', '--seeds', '0'], '--seeds 0'),
    (['--table', '2', '--gpus', '8'], '--gpus 8')])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(flags)
    assert message in capsys.readouterr().err


def test_an_interrupted_call_keeps_its_rows(tmp_path, monkeypatch):
    """Of two trainings one has finished when the call is cut off. The next call trains only the other."""
    one, other = (training for row in rows('Fig. 4', 'digits')[:2] for training in row.trainings)
    started = []

    def train(runs, jobs, gpus):
        started.append([Path(run.work_dir).name for run in runs])
        if len(started) == 1:
            folder = Path(runs[0].work_dir) / '20260101_000000' / 'vis_data'
            folder.mkdir(parents=True)
            (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, [
                dict(iter=1, step=1, p_t_pos=0.6, p_t_neg=0.5, gap=0.1), {'step': 8, 'multi-label/mAP': 81.234}])))
            runs[0].finish()
            raise SystemExit('terminated')

    monkeypatch.setattr(reproduce, 'prepare', lambda *_: None)
    monkeypatch.setattr(reproduce, 'train', train)
    flags = ['--figure', '4', '--seeds', '1', '--out', str(tmp_path / 'out'), '--work-dir', str(tmp_path / 'work')]
    with pytest.raises(SystemExit, match='terminated'):
        reproduce.main(flags)
    assert Results(tmp_path / 'out', 'digits').scores(one, 'mAP') == {0: 81.23}
    (tmp_path / 'out' / 'digits.csv').unlink()
    reproduce.main([*flags, '--render'])  # trains nothing, and finds what has finished
    assert Results(tmp_path / 'out', 'digits').scores(one, 'mAP') == {0: 81.23} and len(started) == 1
    reproduce.main(flags)
    assert started[1] == started[0][1:] and started[1][0].startswith(other.config)


def test_released_checkpoints_are_evaluated_once_and_only_on_request(tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(reproduce, 'prepare', lambda *_: None)
    monkeypatch.setattr(reproduce, 'train', lambda runs, *_: wanted.append([bool(run.checkpoint) for run in runs]))
    flags = ['--table', '11', '--data', 'real', '--seeds', '2', '--gpus', '1', '--out', str(tmp_path), '--work-dir',
             str(tmp_path)]
    reproduce.main(flags)
    reproduce.main([*flags, '--released'])
    assert [sum(checkpoints) for checkpoints in wanted] == [0, 0, 1, 0]


@pytest.mark.parametrize('outdated', [True, False])
def test_outdated_rows_are_refused(tmp_path, outdated, monkeypatch):
    monkeypatch.setattr(reproduce, 'prepare', lambda *_: None)
    monkeypatch.setattr(reproduce, 'train', lambda *_: None)
    row = rows('Table 2', 'digits')[0]
    one = row.trainings[0]
    write_rows(tmp_path / 'digits.csv', [dict(config=one.config, options=one.overrides, seed=0, mAP=80.,
                                              settings='0' * 12 if outdated else one.settings)])
    flags = ['--table', '2', '--out', str(tmp_path), '--work-dir', str(tmp_path / 'work')]
    if not outdated:
        reproduce.main(flags)
        return
    for more in ([], ['--render']):
        with pytest.raises(SystemExit, match=r'digits.csv has rows of other settings .*: resnet_focal_digits_paper\.'):
            reproduce.main([*flags, *more])
    assert reproduce.describe_state(row, Results(tmp_path, 'digits')).startswith('outdated')


def test_rendering_ignores_runs_of_other_settings(tmp_path):
    run = rows('Table 2', 'digits')[0].trainings[0].run('digits', 0, str(tmp_path / 'work'))
    Path(run.work_dir).mkdir(parents=True)
    Run(run.config, run.work_dir, {**run.options, 'randomness.seed': 9}).finish()
    reproduce.main(['--table', '2', '--render', '--out', str(tmp_path), '--work-dir', str(tmp_path / 'work')])
    assert not (tmp_path / 'digits.csv').exists()


def test_initial_checkpoints(tmp_path, monkeypatch):
    """They are trained once, used as they are if they come from elsewhere, and refused if their config has changed."""
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
    with pytest.raises(ValueError, match=f'{folder} holds a run of .* with other settings'):
        prepare()


def test_figures_of_the_equations(tmp_path):
    reproduce.main(['--figure', '3', '--data', 'real', '--out', str(tmp_path)])
    text = (tmp_path / 'real' / 'fig3.md').read_text()
    assert '![Fig. 3](fig3.svg)' in text and '| CE |' in text
    assert all((tmp_path / 'real' / f'fig3.{ending}').stat().st_size > 5000 for ending in ('svg', 'png'))


def test_missing_data(tmp_path, monkeypatch):
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)  # there are no data
    with pytest.raises(SystemExit, match='(?s)data/nus_wide.*NUS-WIDE: images and the list'):
        reproduce.main(['--table', '11', '--data', 'real', '--out', str(tmp_path), '--work-dir', str(tmp_path)])


def test_the_page_shows_the_committed_rows():
    text = reproduce.PAGE.read_text()
    assert reproduce.fill_page(text, ROOT / 'benchmarks' / 'paper') == text, (
        'run python tools/reproduce.py --render --out benchmarks/paper')
    trained = {f'<!-- paper: {item}, {data} -->' for data in ('digits', 'photos') for item in items(data)
               if any(Results(ROOT / 'benchmarks' / 'paper', data).of(training)
                      for row in rows(item, data) for training in row.trainings)}
    assert trained == set(re.findall('<!-- paper: .*? -->', text))
