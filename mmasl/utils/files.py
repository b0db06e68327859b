"""Atomic file writes and full disks."""
import errno
import os
import os.path as osp
from pathlib import Path

from mmasl.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, limit of a file's size


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk or quota is full."""
    return error.errno in FULL


def atomic_write(path: str | os.PathLike, content: bytes) -> None:
    """Write a file completely or not at all; a crash or power failure leaves the old or the new content.

    The content goes to ``path.part`` first. A killed process may leave that file, which the next write replaces.

    Args:
        path: Destination.
        content: Content of the file.

    Raises:
        DiskFullError: The disk or quota is full; no partial file remains.
        OSError: The file cannot be written for another reason; no partial file remains.
    """
    path, temporary = str(path), f'{path}.part'
    folder = osp.dirname(osp.abspath(path))
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)  # makes the new name durable
        finally:
            os.close(handle)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and is_full(error):
            raise DiskFullError.describe(error, path, folder, len(content)) from error
        raise
