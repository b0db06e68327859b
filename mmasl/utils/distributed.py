"""Checks that all ranks pass or fail together."""
from collections.abc import Callable

import torch
from mmengine.dist import all_gather_object, all_reduce, broadcast_object_list, get_world_size, is_main_process


def check_on_main_process(check: Callable[[], None]) -> None:
    """Run a check on rank 0 and raise its error on all ranks, so that none waits for a rank that has stopped.

    Args:
        check: Raises if something is wrong.

    Raises:
        Exception: The error of rank 0.
    """
    outcome: list[Exception | None] = [None]
    if is_main_process():
        try:
            check()
        except Exception as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def first_of_all_ranks(message: str) -> str:
    """Share a message, which most often is empty: the first one of the ranks that have one.

    Every rank must call this. Without a message it costs one reduction of a number, and nothing in one process.

    Args:
        message: What this rank has to say, or ''.

    Returns:
        The same text on all ranks; '' if none has a message.
    """
    if get_world_size() == 1:
        return message
    flag = torch.tensor(float(bool(message)))
    all_reduce(flag, op='max')
    if not flag.item():
        return ''
    return next(text for text in all_gather_object(message) if text)
