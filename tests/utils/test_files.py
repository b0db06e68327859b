"""Atomic writes and full disks."""
import errno
import os
from pathlib import Path

import pytest

from mmasl.errors import DiskFullError
from mmasl.utils.files import atomic_write, is_full


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_replaced():
    Path('a').write_bytes(b'old')
    atomic_write('a', b'new')
    assert Path('a').read_bytes() == b'new' and os.listdir() == ['a']


@pytest.mark.parametrize('failing', ['fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(errno.EIO, 'Input/output error'), KeyboardInterrupt()],
                         ids=['io', 'stopped'])
def test_a_failed_write_leaves_the_old_file(monkeypatch, failing, error):
    Path('a').write_bytes(b'old')

    def fail(*_):
        assert Path('a.part').read_bytes() == b'new'
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        atomic_write('a', b'new')
    assert Path('a').read_bytes() == b'old' and os.listdir() == ['a']


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=['disk', 'quota', 'size'])
def test_a_full_disk_is_described(monkeypatch, folder, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(DiskFullError) as caught:
        atomic_write('epoch_2.pth', bytes(3_400_000))
    assert is_full(caught.value) and os.listdir() == []
    for part in ('epoch_2.pth could not be written', os.strerror(number), 'it takes 3.4 MB', f'{folder} has', 'MB free',
                 'max_keep_ckpts', '--resume'):
        assert part in str(caught.value)
