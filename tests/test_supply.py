"""What mmasl depends on and what it does to a machine: declared and pinned; no network, nothing written elsewhere."""
import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement

from mmasl.datasets.digits import DigitScenes

ROOT = Path(__file__).parents[1]
# What is not named because it comes with something that is, or must be left to the user.
COMES_WITH = dict(
    cv2='onedl-mmcv', PIL='onedl-mmcv',  # who knows which opencv
    rich='onedl-mmengine', yaml='onedl-mmengine', packaging='onedl-mmengine',
    pycocotools='onedl-mmdetection', triton='torch')
# Looked for first; modelindex comes with mmpretrain, through a distribution that is empty.
OPTIONAL = {'deepspeed', 'transformers', 'pip', 'modelindex'}
OUTDATED = 'make constraints.txt anew, its first lines say how'
# Written beside the work dir, by the libraries below; the README names each.
CACHES = ('home/.cache/matplotlib', 'home/.config/matplotlib', 'home/.cache/YAPF', 'tmp/torchinductor_', 'tmp/pymp-')


def canonical(name: str) -> str:
    return re.sub('[-_.]+', '-', name).lower()


@pytest.fixture(scope='module')
def setup() -> dict:
    """The arguments of setup.py."""
    with patch('setuptools.setup') as called, patch('os.getcwd', return_value=str(ROOT)):
        runpy.run_path(str(ROOT / 'setup.py'))
    return called.call_args.kwargs


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By name, of those that hold for this Python."""
    found = [Requirement(line) for line in lines]
    return {canonical(one.name): one for one in found if one.marker is None or one.marker.evaluate(dict(extra=''))}


def imported(folder: str) -> dict[str, str]:
    """Modules from elsewhere that a folder's files import, and one of these files each."""
    found = {}
    for path in (ROOT / folder).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split('.')[0]: str(path) for name in names if not (
                path.parent / f'{name.split(".")[0]}.py').exists()}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {'mmasl', 'tools'}}


@pytest.mark.parametrize('folder', ['mmasl', 'tools', 'tests'])
def test_every_import_is_declared(folder, setup):
    declared = set(requirements([*setup['install_requires'], *sum(
        (lines for extra, lines in setup['extras_require'].items() if folder != 'mmasl' or extra != 'test'), [])]))
    distributions, missing = importlib.metadata.packages_distributions(), {}
    for name, path in imported(folder).items():
        giver = COMES_WITH.get(name)
        sources = requirements(importlib.metadata.requires(giver)) if giver in declared else declared
        if name not in OPTIONAL and not {canonical(one) for one in distributions.get(name, [name])} & set(sources):
            missing[name] = path
    assert not missing, 'in setup.py these must be named'


def test_everything_that_is_installed_with_mmasl_is_pinned(setup):
    pins, choices = (requirements(re.findall('^[^#\\s].*', (ROOT / name).read_text(), re.MULTILINE))
                     for name in ('constraints.txt', 'constraints.in'))
    assert all(re.fullmatch('==[^*,]+', str(pin.specifier)) for pin in pins.values())
    for name, choice in choices.items():
        assert str(pins[name].specifier).startswith(str(choice.specifier)), f'{name}: {OUTDATED}'
    waiting, seen = list(requirements([*setup['install_requires'], *sum(setup['extras_require'].values(), [])])), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            assert name in pins, f'{name}: {OUTDATED}'
            # Another version's needs are others.
            if str(pins[name].specifier) == f'=={importlib.metadata.version(name)}':
                waiting += requirements(importlib.metadata.requires(name) or [])
    assert len(seen) > 50


# --- what a process does

WATCH = """
import os, sys
def note(event, args):
    if event in ('socket.connect', 'socket.sendto', 'socket.getaddrinfo', 'socket.gethostbyname'):
        address = args[1] if event in ('socket.connect', 'socket.sendto') else args[0]
        local = event in ('socket.connect', 'socket.sendto') and isinstance(address, (str, bytes))
        what = None if local else f'network {address}'
    elif event == 'open':
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        what = f'write {os.path.abspath(os.fsdecode(path))}' if writes and not isinstance(path, int) else None
    elif event in ('os.mkdir', 'os.rename', 'os.symlink', 'os.link'):
        place = args[0] if event == 'os.mkdir' else args[1]
        what = f'write {os.path.abspath(os.fsdecode(place))}'
    else:
        return
    if what:
        os.write(LOG, (what + '\\n').encode())
LOG = os.open(os.environ['MMASL_WATCH'], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(note)
"""


@pytest.fixture
def tmp_path():
    """A folder with a short path: a loader worker's socket in it may have 107 characters, and hangs with more."""
    with tempfile.TemporaryDirectory(prefix='mmasl') as folder:
        yield Path(folder).resolve()


@pytest.fixture
def watched(tmp_path):
    """Runs Python in folders of its own; returns its output, the paths that it wrote and what it asked the network for.

    Paths are relative to these folders, or absolute. Caches that the README names are left out, and temporary files
    that are gone in the end.
    """
    for name in ('home', 'tmp', 'cwd', 'site'):
        (tmp_path / name).mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(WATCH)
    log = tmp_path / 'log.txt'
    env = {name: value for name, value in os.environ.items() if not name.startswith(('XDG_', 'MPL', 'HF_', 'TORCH'))}
    env |= dict(HOME=str(tmp_path / 'home'), TMPDIR=str(tmp_path / 'tmp'), PYTHONPATH=str(tmp_path / 'site'),
                MMASL_WATCH=str(log), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

    def run(*argv: object) -> tuple[str, list[str], list[str]]:
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=tmp_path / 'cwd', env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:]
        noted = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
        # What is not written by Python is only seen where it lies.
        left = {str(path) for name in ('home', 'tmp', 'cwd') for path in (tmp_path / name).rglob('*')}
        written = {path for kind, path in noted if kind == 'write' and not path.startswith(f'{tmp_path}/tmp/')} | left
        written = {path.removeprefix(f'{tmp_path}/') for path in written} - {'home/.cache', 'home/.config', '/dev/null'}
        return (done.stdout, sorted(path for path in written if not path.startswith(CACHES)),
                [address for kind, address in noted if kind == 'network'])

    return run


IMPORT_ALL = """
import pkgutil, torch, mmasl
for module in pkgutil.walk_packages(mmasl.__path__, 'mmasl.'):
    __import__(module.name)
    print(module.name)
z = torch.zeros(2, 3, requires_grad=True)
mmasl.AsymmetricLoss()(z, torch.zeros(2, 3)).backward()
"""


def test_the_watch_sees_what_it_should(watched, tmp_path):
    _, written, network = watched('-c', f"""
import os, socket, subprocess, sys
open({str(tmp_path / 'elsewhere')!r}, 'w').close()
os.mkdir('folder')
subprocess.run([sys.executable, '-c', 'open("child", "w")'])
socket.getaddrinfo('localhost', 80)
socket.socket().connect_ex(('127.0.0.1', 9))
""")
    assert written == ['cwd/child', 'cwd/folder', 'elsewhere']
    assert network == ['localhost', "('127.0.0.1', 9)"]


def test_import_needs_no_network_and_writes_nothing(watched):
    output, written, network = watched('-c', IMPORT_ALL)
    assert {'mmasl.models.losses.asymmetric_loss', 'mmasl.models.heads.ml_decoder_head', 'mmasl.datasets.coco'} <= set(output.split())
    assert not network
    assert not written


def test_training_writes_to_its_work_dir_alone(watched, tmp_path):
    data = DigitScenes(train=8, val=4, colors=1).write(tmp_path / 'digits')
    (tmp_path / 'config.py').write_text(f"""
_base_ = {str(ROOT / 'configs/digits/resnet_asl_digits.py')!r}
model = dict(backbone=dict(init_cfg=None), head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(data_root={str(data)!r}))
val_dataloader = dict(num_workers=1, dataset=dict(data_root={str(data)!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
""")
    output, written, network = watched(ROOT / 'tools/train.py', tmp_path / 'config.py', '--work-dir', 'mine')
    assert 'Epoch(val) [1]' in output
    assert not network
    assert 'cwd/mine/epoch_1.pth' in written
    assert not [path for path in written if not path.startswith('cwd/mine')]


def test_readme_names_the_caches():
    readme = (ROOT / 'README.md').read_text()
    for cache in (*CACHES, 'home/.cache/mmasl', 'home/.triton', 'home/.cache/torch', 'home/.cache/huggingface'):
        assert cache.replace('home/', '~/').removeprefix('tmp/') in readme
