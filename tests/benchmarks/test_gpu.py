"""benchmarks/gpu.py: a failed part stops no other, a finished part is not repeated, and all parts run on a CPU."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import gpu, gpu_correctness, gpu_training
from benchmarks.speed import tiles
from mmasl.ops import triton_impl
from mmasl.ops.torch_impl import Problem
from mmasl.reproduce.runs import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ended(monkeypatch):
    """How the parts end, by name; and which ones were started."""
    states, started = {}, []

    def run_process(name, args, limit):
        started.append((name, limit))
        (args.out / f'{name}.log').write_text(f'a line\n{name} broke')
        return states.get(name, 'complete'), 1.

    monkeypatch.setattr(gpu, 'run_process', run_process)
    return states, started


def test_a_part_that_fails_stops_no_other_and_is_repeated(tmp_path, ended):
    states, started = ended
    states.update(correctness='failed', loss='out of time')
    arguments = ['--device', 'cpu', '--minutes', '1', '--out', str(tmp_path)]
    gpu.main(arguments)
    assert [name for name, _ in started] == list(gpu.PARTS)
    # What a part leaves of its time is the others'; none has more than there is.
    assert started[0][1] == pytest.approx(15, abs=0.5) and started[-1][1] == pytest.approx(60, abs=1)
    report = (tmp_path / 'report.md').read_text()
    assert '- correctness: failed (correctness broke)' in report and '- loss: out of time (loss broke)' in report
    assert 'A rehearsal on the CPU' in report and len(report.splitlines()) < 80
    states.clear()
    del started[:]
    gpu.main(arguments)
    assert [name for name, _ in started] == ['correctness', 'loss']
    assert {row['state'] for row in read_rows(tmp_path / gpu.STATES)} == {'complete'}


def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    script = tmp_path / 'part.py'
    script.write_text('import subprocess, sys, time\n'
                      'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])\n'
                      'print(child.pid, flush=True)\ntime.sleep(60)')
    monkeypatch.setattr(gpu, '__file__', str(script))
    args = gpu.parse_args(['--device', 'cpu', '--out', str(tmp_path)])
    state, seconds = gpu.run_process('loss', args, 1.5)
    assert state == 'out of time' and seconds < 5
    child = Path('/proc') / (tmp_path / 'loss.log').read_text().strip() / 'stat'
    end = time.monotonic() + 10  # a killed process needs a moment to end
    while child.exists() and child.read_text().split()[2] != 'Z':
        assert time.monotonic() < end, 'its workers end with it'
        time.sleep(0.1)


def test_requirements_are_pinned_for_packages_of_the_project(capsys):
    gpu.main(['--requirements'])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith('#')]
    assert all(line.count('==') == 1 for line in lines) and lines == sorted(lines)
    constraints = (ROOT / 'constraints.txt').read_text()
    for line in lines:
        assert line.partition('==')[0] + '==' in constraints, f'{line} is none of the pinned packages'


def test_outcomes_of_cases_become_rows_of_tests():
    log = ('tests/ops/test_a.py::test_one[x-(2, 3)] PASSED [ 10%]\ntests/ops/test_a.py::test_one[y] FAILED [ 20%]\n'
           'tests/ops/test_a.py::test_two SKIPPED (says what) [ 30%]\n'
           'FAILED tests/ops/test_a.py::test_one[y] - AssertionError: not close\n')
    names = 'test_one[x-(2, 3)]', 'test_one[y]', 'test_one[z]', 'test_two'
    cases = [f'tests/ops/test_a.py::{name}' for name in names]
    one, two = gpu_correctness.rows_of(cases, dict(gpu_correctness.RESULT.findall(log)),
                                       dict(gpu_correctness.REASON.findall(log)))
    assert one == dict(test='test_a.py::test_one', cases=3, passed=1, failed=1, skipped=0, not_run=1,
                       first_failure='test_one[y]: AssertionError: not close')
    assert (two['skipped'], two['not_run']) == (1, 0)
    (_, measured, reached), = gpu_correctness.targets([one, two])
    assert measured == '1 of 3' and not reached
    assert gpu_correctness.targets([dict(one, passed=3)])[0][2] and not gpu_correctness.targets([])[0][2]


def test_best_tiles_are_written_to_the_source(tmp_path):
    def row(size, elements, warps, over_default, shape='a'):
        return dict(architecture='sm_90', size=size, shape=shape, dtype='float32', elements=str(elements),
                    warps=str(warps), time_us='10', time_over_default=str(over_default))

    rows = [row('large', 2048, 4, 1), row('large', 4096, 8, 0.8), row('large', 4096, 8, 1.1, 'b'),
            row('large', 1024, 4, 0.9), row('large', 1024, 4, 0.9, 'b'), row('small', 2048, 4, 1),
            row('small', 1024, 4, 0.99)]
    assert tiles.best(rows) == {('sm_90', 'large'): (1024, 4)}
    source = tiles.SOURCE.read_text()
    text = tiles.render(rows, source)
    found: dict = {}
    exec(text, found)
    assert found['TILES'] == tiles.best(rows) and tiles.render([], text) == tiles.render([], source)
    assert tiles.render(read_rows(ROOT / 'benchmarks/speed/tiles_cuda.csv'), source) == source, (
        'run python benchmarks/speed/run.py --render')


@pytest.mark.parametrize('tile', [(256, 2), (4096, 8)], ids=str)
def test_any_tile_computes_the_same(tile, monkeypatch):
    logits, target = torch.randn(70, 33), torch.randint(2, (70, 33))
    parameters = dict(gamma_pos=torch.tensor(1.), gamma_neg=torch.tensor(4.), clip=torch.tensor(0.05))
    problem = Problem(**dict.fromkeys(Problem._fields) | parameters | dict(
        logits=logits, target=target, detach_focusing=False, reduction='sum', soft_label='mixture'))
    expected = triton_impl.run(problem, need_sums=True)
    torch.testing.assert_close(triton_impl.run(problem, need_sums=True, tile=tile), expected)
    monkeypatch.setitem(triton_impl.TILES, ('', 'small'), tile)
    torch.testing.assert_close(triton_impl.run(problem, need_sums=True), expected)


def test_targets_of_training():
    rows = [dict(data='VOC', loss=loss, seed=str(seed), mAP=str(80 + seed + bonus)) for seed in (0, 1)
            for loss, bonus in (('bce', 0), ('focal', 1), ('asl', 1.5))]
    (_, means, better), (_, seeds, complete) = gpu_training.targets(rows)
    assert means == 'bce 80.50, focal 81.50, asl 82.00' and better
    assert seeds == '2' and not complete


def write_photos(root: Path) -> None:
    """Tiny data sets in the layout of ``--data``."""
    voc, corel = root / 'VOCdevkit' / 'VOC2007', root / 'corel5k'
    for folder in (voc / 'JPEGImages', voc / 'Annotations', voc / 'ImageSets' / 'Main', corel / 'annotations',
                   corel / 'images'):
        folder.mkdir(parents=True)
    for split, start in (('train', 0), ('val', 6)):
        names = [f'{i:06}' for i in range(start, start + 6)]
        (voc / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names))
        for i, name in enumerate(names):
            Image.new('RGB', (20, 16), (40 * i, 0, 0)).save(voc / 'JPEGImages' / f'{name}.jpg')
            kind = ('dog', 'cat', 'person')[i % 3]
            (voc / 'Annotations' / f'{name}.xml').write_text(
                f'<annotation><object><name>{kind}</name><difficult>0</difficult></object></annotation>')
    for split in ('train', 'test'):
        images = [dict(img_path=f'{split}{i}.jpg', gt_label=[i % 3]) for i in range(6)]
        for image in images:
            Image.new('RGB', (20, 16), (0, 40, 0)).save(corel / 'images' / image['img_path'])
        (corel / 'annotations' / f'{split}.json').write_text(
            json.dumps(dict(metainfo=dict(classes=['a', 'b', 'c']), data_list=images)))


def test_photographs_are_found_and_read(tmp_path):
    write_photos(tmp_path / 'photos')
    for folder in (tmp_path, tmp_path / 'photos'):
        assert 'VOC 2007, train and val' in gpu_training.datasets(folder)
    found = gpu_training.datasets(tmp_path / 'photos')
    assert list(found) == ['VOC 2007, train and val', 'Corel-5k']
    base = gpu_training.read_base()
    with gpu_training.DefaultScope.overwrite_default_scope('mmpretrain'):
        voc, corel = (gpu_training.read(pair[1], base, 32, 'cpu', None) for pair in found.values())
    assert voc.images.shape == corel.images.shape == (6, 3, 32, 32) and voc.images.dtype == torch.uint8
    assert voc.labels.shape == (6, 20) and (voc.labels.sum(1) == 1).all()
    assert corel.labels.argmax(1).tolist() == [0, 1, 2] * 2
    assert voc.images[5, 0].float().mean() > 150 > 50 > voc.images[5, 2].float().mean(), 'red comes first'


def test_no_photographs(tmp_path):
    with pytest.raises(FileNotFoundError, match='no photographs. Give a folder'):
        next(gpu_training.measure('cpu', 1, tmp_path))


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """The command without a GPU, from end to end. It takes 3 minutes; the limit is for a machine with other work."""
    write_photos(tmp_path / 'photos')
    command = [sys.executable, str(ROOT / 'benchmarks' / 'gpu.py'), '--device', 'cpu', '--minutes', '30', '--out',
               str(tmp_path / 'out'), '--data', str(tmp_path / 'photos')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = {name: (tmp_path / 'out' / f'{name}.log').read_text()[-1500:] for name in gpu.PARTS}
    for row in read_rows(tmp_path / 'out' / gpu.STATES):
        assert row['state'] == 'complete', logs[row['part']]
    for name in gpu.PARTS:
        assert read_rows(tmp_path / 'out' / f'{name}_cpu.csv'), logs[name]
    assert '## Falls short' in (tmp_path / 'out' / 'report.md').read_text()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and 'complete after' not in again.stdout
