import json
from pathlib import Path

import pytest

from mmasl import runs
from mmasl.runs import Run, train

# Stands in for tools/train.py: two epochs of MMEngine's files and log lines.
SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[3])
assert sys.argv[1].endswith('.py') and sys.argv[2] == '--work-dir' and '--resume' in sys.argv
if '--cfg-options' in sys.argv and 'model.fail=True' in sys.argv:
    sys.exit('no such model')
vis = folder / '20260101_000000' / 'vis_data'
vis.mkdir(parents=True)
with open(vis / 'scalars.json', 'w') as file:
    for epoch in (1, 2):
        print(f'Epoch(train) [{epoch}][ 50/188]  lr: 1.0e-03  eta: 0:0{3 - epoch}:24  time: 0.1')
        file.write(json.dumps({'loss': 1., 'epoch': epoch, 'iter': 188 * epoch, 'step': 188 * epoch}) + '\\n')
        file.write(json.dumps({'multi-label/mAP': 40. * epoch, 'step': epoch}) + '\\n')
(folder / 'last_checkpoint').write_text('/elsewhere/first/epoch_2.pth')  # absolute, as MMEngine writes it
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / 'train.py').write_text(SCRIPT)
    (tmp_path / 'config.py').write_text('model = dict(depth=18)\n')
    monkeypatch.setattr(runs, 'TRAIN', tmp_path / 'train.py')
    return Run(str(tmp_path / 'config.py'), str(tmp_path / 'work' / 'first'), {'model.depth': 34})


def test_a_run_is_trained_once_and_read_back(run, capsys):
    assert not run.finished and run.progress() == 'starting'
    train([run])
    assert run.finished
    assert 'first: done' in capsys.readouterr().out
    assert run.evaluations() == [{'multi-label/mAP': 40., 'step': 1}, {'multi-label/mAP': 80., 'step': 2}]
    assert run.progress() == 'epoch 2  step 50/188  0:01:24 left  mAP 80'
    assert run.checkpoint() == str(Path(run.work_dir) / 'epoch_2.pth')
    train([run])
    assert capsys.readouterr().out == '', 'a finished run must not be trained again'


def test_an_interrupted_run_goes_on(run):
    train([run])
    stamp = json.loads((run._folder / 'run.json').read_text())
    (run._folder / 'run.json').write_text(json.dumps({**stamp, 'finished': False}))
    later = run._folder / '20260101_000001' / 'vis_data'
    later.mkdir(parents=True)
    (later / 'scalars.json').write_text(json.dumps({'multi-label/mAP': 90., 'step': 2}) + '\n{"multi-label/m')
    assert not run.finished
    assert [row['multi-label/mAP'] for row in run.evaluations()] == [40., 90.], 'a later file counts'


def test_changed_settings_are_refused(run):
    train([run])
    other = Run(run.config, run.work_dir, {'model.depth': 50})
    with pytest.raises(SystemExit, match='first holds a run of .* with other settings .* remove the folder'):
        assert other.finished


def test_a_failure_shows_its_end_and_stops_the_rest(run, tmp_path):
    bad = Run(run.config, str(tmp_path / 'work' / 'bad'), {'model.fail': True})
    with pytest.raises(SystemExit, match=r'bad failed \(exit 1\); the end of .*train.txt:\n.*no such model'):
        train([bad, run], jobs=1)
    assert not bad.finished and not run.finished


def test_several_jobs(run, tmp_path):
    several = [Run(run.config, str(tmp_path / 'work' / str(number))) for number in range(3)]
    train(several, jobs=2)
    assert all(one.finished for one in several)
