"""The errors that a user of mmasl causes and can correct.

The tools exit with the message of an :class:`MMASLError`. Every other exception keeps its traceback. Each kind also
derives from a builtin exception, so ``except ValueError`` and the like work. Each can be built from one string, because
data loaders and MMEngine's registries raise ``type(error)(text)``.
"""
import os
import os.path as osp
import shutil
from typing import Any


class MMASLError(Exception):
    """Base class. The message names the value, its place and what to do."""


class ConfigError(MMASLError, ValueError):
    """A setting of a config, an argument or a flag is wrong or does not fit another."""


class DataError(MMASLError, ValueError):
    """A data set, annotation file or label is missing, damaged or inconsistent."""


class CheckpointError(MMASLError, ValueError):
    """A checkpoint is missing, damaged, unsafe, or does not fit the model or the data set."""


class NonFiniteError(MMASLError, FloatingPointError):
    """A loss, weight or score is NaN or infinite."""


class UnavailableError(MMASLError, RuntimeError):
    """A package, device, launcher or derivative that is needed is not available."""


class UnreadableImageError(MMASLError, OSError):
    """Image files cannot be decoded.

    Args:
        message: The message.
        reasons: The reason for each image, if several were read.
        results: What the call would have returned for the other images.
    """

    def __init__(self, message: str, reasons: dict[str, str] | None = None, results: Any = None) -> None:
        super().__init__(message)
        self.reasons = reasons or {}
        self.results = results

    def __str__(self) -> str:
        return str(self.args[0])


class DiskFullError(MMASLError, OSError):
    """The disk or quota is full; no partial file remains."""

    @classmethod
    def describe(cls, error: OSError, path: str, folder: str, size: int | None = None) -> 'DiskFullError':
        """Describe a failed write.

        Args:
            error: The error of the system.
            path: File that could not be written.
            folder: Folder of the file, whose free space the message names; '' if unknown.
            size: Size of the file in bytes, if known.
        """
        facts = [f'it takes {size / 1e6:,.1f} MB'] if size is not None else []
        if osp.isdir(folder):
            facts.append(f'{folder} has {shutil.disk_usage(folder).free / 1e6:,.1f} MB free')
        text = f'{path} could not be written ({os.strerror(error.errno or 0)})' + ': ' * bool(facts)
        full = cls(f'{text}{" and ".join(facts)}. Earlier checkpoints are intact: free some space, or lower '
                   'default_hooks.checkpoint.max_keep_ckpts, and continue with --resume')
        full.errno = error.errno
        return full
