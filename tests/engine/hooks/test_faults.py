"""Killed trainings, full disks, and damaged, foreign or hostile checkpoints."""
import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import import_module
from itertools import count
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, ValLoop
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from mmasl.errors import CheckpointError
from mmasl.utils.checkpoint import read_checkpoint, safe_checkpoint_loading

ROOT = Path(__file__).parents[3]
NO_DISK = 77  # exit code


# --- trainings in their own processes, forked from one that has imported their modules

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['tools.train', 'mmpretrain.models', 'mmpretrain.datasets', 'mmdet.models'])


class Kill(Hook):
    """kill -9 after a number of iterations."""
    priority = 'LOWEST'

    def __init__(self, at: int) -> None:
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(number: int) -> None:
    """kill -9 with half of the number-th checkpoint on disk."""
    def torn(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    at_write(number, torn)


def kill_in_evaluation(number: int) -> None:
    """kill -9 before the number-th batch of all evaluations."""
    run_iter, batches = ValLoop.run_iter, count(1)

    def killed(*args) -> None:
        if next(batches) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        run_iter(*args)

    ValLoop.run_iter = killed


def limit_files(number: int) -> None:
    """After the number-th checkpoint, limit files to half of its size, as a quota does."""
    at_write(number, lambda handle: resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(handle).st_size // 2, ) * 2))


def at_write(number: int, action: Callable[[int], None]) -> None:
    fsync, written = os.fsync, count(1)

    def intercept(handle: int) -> None:
        if os.readlink(f'/proc/self/fd/{handle}').endswith('.part') and next(written) == number:
            action(handle)
        fsync(handle)

    os.fsync = intercept


def mount_small_disk(megabytes: float) -> None:
    """Mount a disk that only this process sees at ./small; at exit its files are copied to ./rescued."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # namespaces of users and mounts
        os._exit(NO_DISK)
    Path('/proc/self/setgroups').write_text('deny')
    Path('/proc/self/uid_map').write_text(f'0 {user} 1')
    Path('/proc/self/gid_map').write_text(f'0 {group} 1')
    Path('small').mkdir()
    if libc.mount(b'none', b'small', b'tmpfs', 0, f'size={int(megabytes * 1e6)}'.encode()):
        os._exit(NO_DISK)
    Finalize(None, shutil.copytree, args=('small', 'rescued'), exitpriority=0)


def work(folder: str, tool: str, argv: list[str], kill: int, prepare, argument) -> None:
    os.chdir(folder)
    log = os.open('log.txt', os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    sys.argv = [f'{tool}.py', *argv]
    Config.pretty_text = ''  # formatting it takes half of the time
    module = import_module(f'tools.{tool}')
    if prepare:
        prepare(argument)
    if kill:
        build = module.build_runner

        def build_with_kill(*args):
            runner = build(*args)
            runner.register_hook(Kill(kill))
            return runner

        module.build_runner = build_with_kill
    module.main()


def run(*argv: object, tool: str = 'train', kill: int = 0, prepare=None, argument=None) -> tuple[int, str]:
    """Run a tool in the current folder; returns its exit code, -9 if it was killed, and what it printed."""
    process = SERVER.Process(target=work, args=(os.getcwd(), tool, [*map(str, argv)], kill, prepare, argument))
    process.start()
    process.join()
    return process.exitcode, Path('log.txt').read_text()


def train(*argv: object, **kwargs) -> str:
    code, text = run(*argv, **kwargs)
    assert code == 0, text[-3000:]
    return text


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    from mmasl.datasets.digits import DigitScenes
    return DigitScenes(train=12, val=4, colors=1).write(tmp_path_factory.mktemp('data') / 'digits')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Random numbers of Python, NumPy and PyTorch in pipeline and model; an average, a cycle and a control with state.
CLASSIFIER = """
_base_ = {base!r}
model = dict(backbone=dict(depth=18, base_channels=8, drop_path_rate=0.3, init_cfg=None),
             head=dict(num_classes=10, in_channels=64))
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1, step=1., begin=0.),
                dict(type='EMAHook', momentum=0.1)]
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32), dict(type='RandomFlip', prob=0.5),
    dict(type='RandAugment', policies='timm_increasing', num_policies=2, magnitude_level=9, magnitude_std=0.5),
    dict(type='RandomErasing', erase_prob=0.5, mode='rand'),
    dict(type='ColorJitter', brightness=0.4), dict(type='PackInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]
"""
DETECTOR = """
_base_ = {base!r}
model = dict(backbone=dict(depth=18, base_channels=8, init_cfg=None), neck=dict(
    in_channels=[8, 16, 32, 64], out_channels=32), bbox_head=dict(
        num_classes=10, in_channels=32, feat_channels=32, stacked_convs=1), test_cfg=dict(score_thr=0.))
custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1, step=1., begin=0.)]
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(64, 64), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(48, 48)), dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'), dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True), dict(
        type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
val_evaluator = dict(ann_file={root!r} + '/annotations/instances_val.json')
test_evaluator = val_evaluator
"""
DATA = """
common = dict(data_root={root!r}, {more})
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    ann_file='annotations/instances_train.json', data_prefix=dict({prefix}='train/'), pipeline=train_pipeline,
    **common))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    ann_file='annotations/instances_val.json', data_prefix=dict({prefix}='val/'), pipeline=test_pipeline, **common))
test_dataloader = val_dataloader
randomness = dict(seed=3)
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
"""


def write_classifier(digits: Path, more: str = '') -> None:
    base = str(ROOT / 'configs/resnet101_asl_coco.py')
    Path('tiny.py').write_text(CLASSIFIER.format(base=base) + DATA.format(
        root=str(digits), prefix='img_path', more='') + more)


def write_detector(digits: Path, more: str = '') -> None:
    names = [category['name'] for category in json.loads(
        (digits / 'annotations/instances_val.json').read_text())['categories']]
    Path('tiny.py').write_text(
        DETECTOR.format(base=str(ROOT / 'configs/fcos_asl_coco.py'), root=str(digits)) + DATA.format(
            root=str(digits), prefix='img', more=f'metainfo=dict(classes={names})') + more)


def checkpoint(path: str) -> dict:
    return torch.load(path, weights_only=False)


def assert_same(first: object, second: object, where: str = '') -> None:
    """Equal to the last bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f'{where}.{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, (one, two) in enumerate(zip(first, second)):
            assert_same(one, two, f'{where}.{number}')
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, where
        assert first.numpy().tobytes() == second.numpy().tobytes(), where
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype and first.tobytes() == second.tobytes(), where
    else:
        assert first == second, where


def metrics(work_dir: str) -> dict[int, dict]:
    """The metrics of each evaluation; of repeated ones the last."""
    rows = (json.loads(line) for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
            for line in path.read_text().splitlines())
    return {row['step']: {key: value for key, value in row.items() if 'time' not in key}
            for row in rows if 'lr' not in row}


def assert_same_run(first: str, second: str, name: str = 'epoch_3.pth', start: int = 0) -> None:
    one, two = checkpoint(f'{first}/{name}'), checkpoint(f'{second}/{name}')
    for each in (one, two):
        assert {'optimizer', 'param_schedulers', 'adaptive_asymmetry', 'mmasl_resume'} <= set(each)
        each['meta'] = {key: each['meta'][key] for key in ('epoch', 'iter', 'seed')}
        logged = each['message_hub']['log_scalars']
        each['message_hub'] = {key: logged[key].data for key in logged if 'time' not in key}
    assert any('gamma_neg' in key for key in one['message_hub']) and any('loss' in key for key in one['message_hub'])
    assert_same(one, two)
    found, expected = ({step: row for step, row in metrics(each).items() if step > start} for each in (second, first))
    assert expected and found == expected


# --- kill -9


@pytest.fixture(scope='module')
def whole(digits, tmp_path_factory) -> str:
    """The work dir of an uninterrupted training of a classifier, which keeps one checkpoint and the best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('whole'))
        write_classifier(digits, BEST)
        train('tiny.py', '--work-dir', 'w')
        return str(Path('w').resolve())


BEST = "default_hooks['checkpoint'].update(max_keep_ckpts=1, save_best='multi-label/mAP')"
NO_BEST = "default_hooks['checkpoint'].update(max_keep_ckpts=1, save_best=None)"
ALONE = ['train_dataloader.num_workers=0']
WORKERS = ['train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True']


def killed(*argv: object, **kwargs) -> None:
    code, text = run(*argv, **kwargs)
    assert code == -signal.SIGKILL, text[-3000:]


def last() -> str:
    return Path(Path('w/last_checkpoint').read_text()).name


def test_killed_in_an_epoch(digits, whole):
    """With two persistent workers, where the uninterrupted run has none."""
    write_classifier(digits, BEST)
    argv = ['tiny.py', '--work-dir', 'w', '--resume', '--cfg-options', *WORKERS]
    killed(*argv, kill=15)
    assert last() == 'epoch_2.pth'
    assert 'resumed epoch: 2, iter: 12' in train(*argv)
    assert_same_run(whole, 'w')


@pytest.mark.slow
def test_killed_in_the_write_of_a_checkpoint(digits, whole):
    write_classifier(digits, BEST)
    argv = ['tiny.py', '--work-dir', 'w', '--resume']
    killed(*argv, prepare=kill_in_write, argument=4)  # after epoch 1, the best, and epoch 1 with its score
    assert {path.name for path in Path('w').glob('*.pth*')} == {
        'epoch_1.pth', 'best_multi-label_mAP_epoch_1.pth', 'epoch_2.pth.part'}
    assert last() == 'epoch_1.pth'
    with pytest.raises(Exception, match='central directory'):
        checkpoint('w/epoch_2.pth.part')  # it is truncated
    assert 'resumed epoch: 1, iter: 6' in train(*argv)
    assert_same_run(whole, 'w')
    assert sorted(path.name for path in Path('w').glob('*.pth*')) == sorted(
        path.name for path in Path(whole).glob('*.pth*'))


@pytest.mark.slow
@pytest.mark.parametrize('batch', [3, 5], ids=['of epoch 2', 'of the last epoch'])
def test_killed_in_an_evaluation(digits, whole, batch):
    write_classifier(digits, BEST)
    argv = ['tiny.py', '--work-dir', 'w', '--resume']
    killed(*argv, prepare=kill_in_evaluation, argument=batch)
    train(*argv)
    assert_same_run(whole, 'w')


@pytest.mark.slow
@pytest.mark.parametrize('interval', [4, 6], ids=['in an epoch', 'at its end'])
@pytest.mark.parametrize('workers', [ALONE, WORKERS], ids=['none', 'two'])
def test_killed_after_a_checkpoint_by_iterations(digits, interval, workers):
    write_classifier(digits, f"default_hooks['checkpoint'].update(by_epoch=False, interval={interval})")
    argv = ['tiny.py', '--cfg-options', *workers, '--work-dir']
    train(*argv, 'whole')
    killed(*argv, 'w', '--resume', kill=3 * interval - 1)
    assert last() == f'iter_{2 * interval}.pth'
    train(*argv, 'w', '--resume')
    assert_same_run('whole', 'w', 'iter_18.pth')


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
@pytest.mark.parametrize('workers', [ALONE, WORKERS], ids=['none', 'two'])
def test_killed_in_a_training_by_iterations(digits, sampler, workers):
    write_classifier(digits, f"""
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=18, val_interval=4)
param_scheduler = [dict(type='OneCycleLR', eta_max=1e-3, by_epoch=False, total_steps=18)]
default_hooks['checkpoint'].update(by_epoch=False, interval=4)
log_processor = dict(by_epoch=False)
default_hooks['logger'].update(log_metric_by_epoch=False)
train_dataloader['sampler'] = dict(_delete_=True, type={sampler!r}, shuffle=True)
""")
    argv = ['tiny.py', '--cfg-options', *workers, '--work-dir']
    train(*argv, 'whole')
    killed(*argv, 'w', '--resume', kill=11)
    assert last() == 'iter_8.pth'
    train(*argv, 'w', '--resume')
    assert_same_run('whole', 'w', 'iter_18.pth')


@pytest.mark.slow
@pytest.mark.parametrize('workers', [ALONE, WORKERS], ids=['none', 'two'])
def test_a_detector_killed_in_an_epoch(digits, workers):
    write_detector(digits)
    argv = ['tiny.py', '--cfg-options', *workers, '--work-dir']
    train(*argv, 'whole')
    killed(*argv, 'w', '--resume', kill=15)
    train(*argv, 'w', '--resume')
    assert_same_run('whole', 'w')


@pytest.mark.slow
def test_resumed_without_a_seed_in_the_config(digits):
    write_classifier(digits, 'randomness = dict(seed=None)')
    train('tiny.py', '--work-dir', 'whole')
    train('tiny.py', '--work-dir', 'w', '--resume', 'whole/epoch_1.pth')
    assert_same_run('whole', 'w', start=1)  # it was written again after its evaluation, with its score


@pytest.mark.slow
def test_one_of_two_processes_is_killed(digits, monkeypatch):
    write_classifier(digits, """
custom_imports = dict(imports=['mmasl', 'fatal'], allow_failed_imports=False)
custom_hooks.append(dict(type='Fatal'))
""")
    Path('fatal.py').write_text("""
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Fatal(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == int(os.environ['KILL_AT']) and runner.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
""")

    def train_two(work_dir: str, kill: int = 0) -> subprocess.CompletedProcess:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        return subprocess.run(
            [ROOT / 'tools/dist_train.sh', 'tiny.py', '2', '--work-dir', work_dir, '--resume'], capture_output=True,
            text=True, env=os.environ | dict(KILL_AT=str(kill), PORT=str(port), PYTHON=sys.executable, PYTHONPATH='.',
                                             OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))

    assert train_two('whole').returncode == 0
    assert train_two('w', kill=8).returncode != 0 and last() == 'epoch_2.pth'
    done = train_two('w')
    assert done.returncode == 0 and 'resumed epoch: 2, iter: 6' in done.stdout + done.stderr
    assert_same_run('whole', 'w')


# --- a full disk


@pytest.mark.slow
def test_a_file_that_may_not_grow(digits):
    write_classifier(digits, NO_BEST)
    code, text = run('tiny.py', '--work-dir', 'w', prepare=limit_files, argument=1)
    assert code == 1
    message = text.strip().splitlines()[-1]
    assert 'w/epoch_2.pth could not be written (File too large): it takes ' in message
    assert 'MB free' in message and 'continue with --resume' in message and 'Traceback' not in text
    assert [path.name for path in Path('w').glob('*.pth*')] == ['epoch_1.pth']
    checkpoint('w/epoch_1.pth')


@pytest.mark.slow
def test_a_full_disk(digits, whole):
    write_classifier(digits, NO_BEST)
    code, text = run('tiny.py', '--work-dir', 'small', prepare=mount_small_disk, argument=5)
    if code == NO_DISK:
        pytest.skip('this machine lets nobody mount a disk of their own')
    assert code == 1
    message = text.strip().splitlines()[-1]
    assert 'small/epoch_2.pth could not be written (No space left on device): it takes ' in message
    assert 'Traceback' not in text
    assert [path.name for path in Path('rescued').glob('*.pth*')] == ['epoch_1.pth']
    train('tiny.py', '--work-dir', 'rescued', '--resume')  # where there is space
    assert_same(checkpoint('rescued/epoch_3.pth')['state_dict'], checkpoint(f'{whole}/epoch_3.pth')['state_dict'])


# --- checkpoints that cannot be trusted, by every tool that loads one


class Touch:

    def __reduce__(self):
        return os.mkdir, ('owned', )


class TouchLater(Touch):
    """An allowed class with a forbidden state."""

    def __reduce__(self):
        return HistoryBuffer, (), dict(statistics_methods=dict(mean=os.mkdir))


def by_getattr(path: str) -> None:
    """Write a file that reaches exec by getattr, which MMEngine's list allows, and other allowed names."""
    def text(value: bytes) -> bytes:
        return b'X' + len(value).to_bytes(4, 'little') + value

    get = b'cbuiltins\ngetattr\n'
    execute = get + b'(' + get + b'(' + get + text(b'__self__') + b'tR' + text(b'exec') + b'tR'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('evil/data.pkl', b'\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(' + execute +
                      b'ctorch\nTensor\n' + text(b"import os; os.mkdir('owned')") + b'\x85}tR.')
        file.writestr('evil/version', '3\n')


def hostile(kind: str) -> str:
    if kind == 'getattr':
        by_getattr('bad.pth')
    else:
        torch.save(dict(state_dict={}, optimizer=TouchLater() if kind == 'state' else Touch()), 'bad.pth')
    return 'bad.pth'


HOSTILE = {'reduce': r'GLOBAL \w+.mkdir', 'state': r'GLOBAL \w+.mkdir', 'getattr': 'Unsupported attribute: __self__'}


@pytest.mark.parametrize('kind', HOSTILE)
def test_reading_executes_nothing(kind, monkeypatch):
    # Users set the second for old files.
    for name in (None, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
        if name:
            monkeypatch.setenv(name, '1')
        with pytest.raises(CheckpointError, match=f'bad.pth is refused: .*{HOSTILE[kind]}') as caught:
            read_checkpoint(hostile(kind))
        assert 'add_safe_globals' not in str(caught.value)
        assert name is None or os.environ.pop(name) == '1'
    assert not Path('owned').exists()


@pytest.mark.parametrize('kind', ['reduce', 'getattr'])
def test_the_files_are_indeed_hostile(kind):
    with contextlib.suppress(AttributeError), torch.serialization.safe_globals([getattr]):
        torch.load(hostile(kind), weights_only=kind == 'getattr')
    assert Path('owned').exists()


def test_mmengine_reads_so_from_every_place(monkeypatch):
    """Its own loader falls back to executing; torch.hub, which it loads URLs with, executes at once."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    executing = {'there://': lambda name, map_location: torch.load('bad.pth', weights_only=False),
                 'here://': lambda name, map_location: mmengine_checkpoint._safe_torch_load('bad.pth')}
    for prefix, loader in executing.items():
        CheckpointLoader.register_scheme(prefix, loader)
    before = dict(CheckpointLoader._schemes), mmengine_checkpoint.get_torch_safe_globals
    with safe_checkpoint_loading():
        for kind in ('reduce', 'getattr'):
            for prefix in ('', *executing):
                with pytest.raises(CheckpointError, match='bad.pth is refused'):
                    _load_checkpoint(prefix + hostile(kind))
        with pytest.raises(CheckpointError, match='no such checkpoint: none.pth'):
            _load_checkpoint('none.pth')
    assert not Path('owned').exists()
    assert (CheckpointLoader._schemes, mmengine_checkpoint.get_torch_safe_globals) == before


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'\x80\x02K\x01.', None],
                         ids=['empty', 'text', 'number', 'torn'])
def test_no_checkpoint(content):
    torch.save(dict(state_dict={'w': torch.zeros(100)}), 'bad.pth')
    Path('bad.pth').write_bytes(Path('bad.pth').read_bytes()[:600] if content is None else content)
    with pytest.raises(CheckpointError, match='bad.pth is not a checkpoint'):
        read_checkpoint('bad.pth')


def other_model(path: str) -> None:
    torch.save(dict(state_dict={'backbone.stem.weight': torch.zeros(1)}, meta={}), path)


def other_classes(path: str) -> None:
    good = torch.load('good.pth')
    for name in ('weight', 'bias'):
        good['state_dict'][f'head.fc.{name}'] = good['state_dict'][f'head.fc.{name}'][:4]
    torch.save(good | dict(meta=dict(dataset_meta=dict(classes=tuple('abcd')))), path)


TOOLS = {
    'train': 'tiny.py --cfg-options load_from=bad.pth', 'train resumed': 'tiny.py --resume bad.pth',
    'train pretrained': 'tiny.py --cfg-options model.init_cfg.type=Pretrained model.init_cfg.checkpoint=bad.pth',
    'test': 'tiny.py bad.pth', 'calibrate': 'tiny.py bad.pth', 'inspect_errors': 'tiny.py bad.pth',
    'infer': 'image.png tiny.py bad.pth', 'export_onnx': 'tiny.py bad.pth --out o.onnx',
    'advise': 'tiny.py --batches 1 --cfg-options load_from=bad.pth'}


@pytest.fixture
def good(digits) -> None:
    """tiny.py, and good.pth with all of its weights."""
    write_classifier(digits, "custom_hooks = []; work_dir = 'w'; tta_model = None")
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile('tiny.py').model)
    torch.save(dict(state_dict=model.state_dict(), meta={}), 'good.pth')
    shutil.copy(next((digits / 'val').iterdir()), 'image.png')


def refusal(tool: str, monkeypatch) -> str:
    name = tool.split()[0]
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *TOOLS[tool].split()])
    with pytest.raises(SystemExit) as stop:
        import_module(f'tools.{name}').main()
    return str(stop.value)


@pytest.mark.parametrize('tool', [
    pytest.param(tool, marks=[pytest.mark.slow] if tool in ('calibrate', 'inspect_errors', 'export_onnx') else [])
    for tool in TOOLS])
def test_a_hostile_checkpoint_executes_nothing(good, monkeypatch, tool):
    by_getattr('bad.pth')
    message = refusal(tool, monkeypatch)
    assert not Path('owned').exists()
    assert re.search(r'bad.pth is refused: loading it could execute code \(Unsupported attribute: __self__ of',
                     message), message
    assert 'nothing was executed. If you trust its source' in message


def test_a_config_in_a_checkpoint_is_not_executed(digits, whole):
    """MMEngine's Runner executes it when it resumes."""
    write_classifier(digits, BEST)
    path = Path(whole).resolve() / 'epoch_3.pth'
    content = checkpoint(path)
    content['meta']['config'] = "open('owned', 'w').close()"
    torch.save(content, 'bad.pth')
    train('tiny.py', '--work-dir', 'w', '--resume', 'bad.pth')
    assert not Path('owned').exists()


@pytest.mark.parametrize('tool', [
    'train', pytest.param('train resumed', marks=pytest.mark.slow), pytest.param('test', marks=pytest.mark.slow),
    'infer'])
def test_another_model(good, monkeypatch, tool):
    other_model('bad.pth')
    assert re.search('does not fit the model|cannot be resumed', refusal(tool, monkeypatch))


@pytest.mark.parametrize('tool', [
    'test', 'infer',
    *[pytest.param(tool, marks=pytest.mark.slow) for tool in ('calibrate', 'inspect_errors', 'export_onnx')]])
def test_another_number_of_classes(good, monkeypatch, tool):
    other_classes('bad.pth')
    message = refusal(tool, monkeypatch)
    assert 'head.fc.weight is (4, 64) in the checkpoint and (10, 64) in the model' in message
    assert 'The checkpoint has 4 classes, and num_classes of the head is 10' in message and 'load_from' in message
