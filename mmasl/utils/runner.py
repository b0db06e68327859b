"""State of MMEngine's Runner that it does not make public. CONTRIBUTING.md lists all private names that mmasl uses."""
from typing import Literal

from mmengine.runner import BaseLoop, Runner


def built_loop(runner: Runner, split: Literal['train', 'val', 'test']) -> BaseLoop | None:
    """A loop of the runner if it has been built. The property ``runner.train_loop`` would build it, with its data."""
    loop = getattr(runner, f'_{split}_loop')
    return loop if isinstance(loop, BaseLoop) else None


def is_resuming(runner: Runner) -> bool:
    """Whether the runner resumes a checkpoint, and not only loads its weights."""
    return runner._resume


def loads_checkpoint(runner: Runner) -> bool:
    """Whether the runner loads a checkpoint before it trains or tests."""
    return bool(runner._load_from)


def checkpoint_name(runner: Runner) -> str:
    """Path or URL of the checkpoint that the runner loads."""
    return str(runner._load_from or 'the checkpoint')
