"""TODO."""
import os
import os.path as osp
import shutil


class CheckpointError(ValueError):
    """A checkpoint cannot be used, and the message says which, why and what helps."""


class UnreadableImage(OSError):
    """An image file that cannot be decoded; the message names it and the cure."""


class DiskFull(OSError):
    """There is no space left.

    Args:
        error: What the system said.
        path: File that could not be written.
        folder: Where it was to be.
        size: Its size in bytes, if known.
    """

    def __init__(self, error: OSError, path: str, folder: str, size: int | None = None) -> None:
        free = f'{folder} has {shutil.disk_usage(folder).free / 1e6:,.1f} MB free' if osp.isdir(folder) else ''
        needed = f'it takes {size / 1e6:,.1f} MB' if size is not None else ''
        facts = ' and '.join(filter(None, [needed, free]))
        super().__init__(
            error.errno, f'{path} could not be written ({os.strerror(error.errno or 0)}): {facts}. The last checkpoint '
            'is as it was. Make space, or keep fewer checkpoints (default_hooks.checkpoint.max_keep_ckpts), and go on '
            'with --resume')

    def __str__(self) -> str:
        return str(self.strerror)
