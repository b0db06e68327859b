"""Importing and training open no connection and write nothing outside the work dir and the documented caches."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mmasl.datasets.digits import DigitScenes

ROOT = Path(__file__).parents[1]
# Libraries write these outside the work dir. The documents name each.
CACHES = ('home/.cache/matplotlib', 'home/.config/matplotlib', 'home/.cache/YAPF', 'tmp/torchinductor_', 'tmp/pymp-')

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
    """A folder with a short path: the path of a loader worker's socket may have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix='mmasl') as folder:
        yield Path(folder).resolve()


@pytest.fixture
def watched(tmp_path):
    """Runs Python in folders of its own. Returns its output, the paths that it wrote, and its network addresses.

    Paths are relative to these folders, or absolute. Documented caches and deleted temporary files are left out.
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
        # Files that native code writes raise no audit event.
        left = {str(path) for name in ('home', 'tmp', 'cwd') for path in (tmp_path / name).rglob('*')}
        temporary = tmp_path / 'tmp'
        written = {path for kind, path in noted if kind == 'write' and temporary not in Path(path).parents} | left
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


@pytest.mark.slow
def test_import_needs_no_network_and_writes_nothing(watched):
    output, written, network = watched('-c', IMPORT_ALL)
    assert {'mmasl.models.losses.asymmetric_loss', 'mmasl.datasets.coco', 'mmasl.apis'} <= set(output.split())
    assert not network
    assert not written


@pytest.mark.slow
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


def test_the_documents_name_the_caches():
    text = ''.join(path.read_text() for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')))
    for cache in (*CACHES, 'home/.cache/mmasl', 'home/.triton', 'home/.cache/torch', 'home/.cache/huggingface'):
        assert cache.replace('home/', '~/').removeprefix('tmp/') in text
