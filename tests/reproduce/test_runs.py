"""Runs as child processes: progress, resuming, failures, and GPUs of their own."""
import json
import signal
from pathlib import Path

import pytest

from mmasl.errors import MMASLError
from mmasl.reproduce import runs
from mmasl.reproduce.runs import Run, train

# Replaces tools/train.py: writes the files and log lines of two epochs.
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
    (tmp_path / 'config.py').write_text('model = dict(depth=18)\ntrain_cfg = dict(max_epochs=2)\n')
    monkeypatch.setattr(runs, 'TRAIN', tmp_path / 'train.py')
    return Run(str(tmp_path / 'config.py'), str(tmp_path / 'work' / 'first'), {'model.depth': 34})


def test_a_run_is_trained_once_and_read_back(run, capsys):
    assert not run.finished and run.progress() == 'starting'
    train([run])
    assert run.finished
    assert 'first: done' in capsys.readouterr().out
    assert run.evaluations() == [{'multi-label/mAP': 40., 'step': 1}, {'multi-label/mAP': 80., 'step': 2}]
    assert run.progress() == 'epoch 1.3 of 2  mAP 80'
    assert run.last_checkpoint() == str(Path(run.work_dir) / 'epoch_2.pth')
    train([run])
    assert capsys.readouterr().out == '', 'a finished run must not be trained again'


def test_the_remaining_time_counts_from_the_start_of_this_process(run, monkeypatch):
    """Epochs before a resume took other time, and MMEngine's own estimate lacks the evaluations."""
    train([run])
    run._begin = 100., 0.5
    monkeypatch.setattr(runs.time, 'monotonic', lambda: 100. + 60 * (50 / 188 + 0.5))
    assert run.progress() == 'epoch 1.3 of 2  about 44 s left  mAP 80'


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
    with pytest.raises(ValueError, match='first holds a run of .* with other settings'):
        assert other.finished


def test_a_failure_shows_its_end_and_stops_the_rest(run, tmp_path):
    bad = Run(run.config, str(tmp_path / 'work' / 'bad'), {'model.fail': True})
    with pytest.raises(MMASLError, match=r'bad failed \(exit 1\). The end of .*train.txt:\n.*no such model'):
        train([bad, run], jobs=1)
    assert not bad.finished and not run.finished


def test_several_jobs(run, tmp_path):
    several = [Run(run.config, str(tmp_path / 'work' / str(number))) for number in range(3)]
    handler = signal.getsignal(signal.SIGTERM)
    train(several, jobs=2)
    assert all(one.finished for one in several)
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize('jobs, threads', [(3, 2), (None, 8)])
def test_named_jobs_share_the_cores_even_if_fewer_run(run, monkeypatch, jobs, threads):
    monkeypatch.setattr(runs.os, 'sched_getaffinity', lambda _: range(8))
    given, start = [], Run.start
    monkeypatch.setattr(Run, 'start', lambda self, number, *rest: given.append(number) or start(self, number, *rest))
    train([run], jobs)
    assert given == [threads]


def test_placement_may_change_and_reaches_the_training(run):
    run.placement['train_dataloader.batch_size'] = 16
    train([run])
    assert '"train_dataloader.batch_size"' not in (run._folder / 'run.json').read_text()
    assert Run(run.config, run.work_dir, run.options, {'train_dataloader.batch_size': 32}).finished


@pytest.mark.parametrize('visible, gpus, expected', [
    (None, 1, ['0', '1', '2', '3']), (None, 2, ['0,1', '2,3']), (None, 3, ['0,1,2']), ('4,6,7,9', 2, ['4,6', '7,9'])])
def test_trainings_side_by_side_have_gpus_of_their_own(run, tmp_path, monkeypatch, visible, gpus, expected):
    monkeypatch.setattr(runs.torch.cuda, 'device_count', lambda: 4)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    seen, running, most = [], set(), 0

    class Done:
        returncode = 0

        def __init__(self, device):
            self.device, self.polls = device, 0

        def poll(self):
            self.polls += 1
            if self.polls < 2:
                return None
            running.discard(self.device)
            return 0

    def start(self, threads, gpus, devices):
        nonlocal most
        assert devices not in running, 'two trainings on one GPU'
        running.add(devices)
        seen.append(devices)
        most = max(most, len(running))
        Path(self.work_dir).mkdir(parents=True)
        return Done(devices)

    monkeypatch.setattr(Run, 'start', start)
    monkeypatch.setattr(runs.time, 'sleep', lambda _: None)
    train([Run(run.config, str(tmp_path / 'work' / str(number))) for number in range(9)], gpus=gpus)
    assert set(seen) == set(expected) and len(seen) == 9 and most == len(expected)


def test_more_gpus_than_there_are(run, monkeypatch):
    monkeypatch.setattr(runs.torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(RuntimeError, match='needs 8 GPUs, and PyTorch finds 2'):
        train([run], gpus=8)


def test_devices_reach_the_training(run, tmp_path):
    (tmp_path / 'train.py').write_text("import os; print('GPUs', os.environ['CUDA_VISIBLE_DEVICES'])")
    run.start(1, 1, '2,3').wait()
    assert run.tail(100) == 'GPUs 2,3\n'


def test_a_checkpoint_is_evaluated_once_and_read_back(run, tmp_path, monkeypatch):
    (tmp_path / 'test.py').write_text("""
import json, pathlib, sys
assert sys.argv[1].endswith('config.py') and sys.argv[2] == 'zoo.pth' and '--resume' not in sys.argv
assert sys.argv[sys.argv.index('--out-item') + 1] == 'metrics'
print('Epoch(test) [  50/2504]    eta: 0:10:02  time: 0.2')
pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps({'multi-label/mAP': 86.6}))
""")
    monkeypatch.setattr(runs, 'TEST', tmp_path / 'test.py')
    one = Run(run.config, str(tmp_path / 'work' / 'released'), checkpoint='zoo.pth')
    assert one.evaluations() == [] and one.progress() == 'starting'
    train([one])
    assert one.finished and one.evaluations() == [{'multi-label/mAP': 86.6}] and one.training() == []
    assert one.progress() == 'batch 50/2504  0:10:02 left'
