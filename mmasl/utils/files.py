"""TODO."""
import errno
import os
import os.path as osp
from pathlib import Path

from mmasl.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, limit of a file's size


# --- files


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no space left."""
    return error.errno in FULL


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that at every moment, also after a power failure, it is there as it was or as it will be.

    The content goes to ``path.part`` first. After a kill that file may be left; the next write takes its place.

    Raises:
        OSError: It cannot be written, :class:`DiskFullError` if for want of space. Nothing is left of it.
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
            os.fsync(handle)  # of the name
        finally:
            os.close(handle)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and is_full(error):
            raise DiskFullError.describe(error, path, folder, len(content)) from error
        raise
