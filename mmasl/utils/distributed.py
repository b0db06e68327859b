"""Checks that all ranks pass or fail together."""
from collections.abc import Callable

from mmengine.dist import broadcast_object_list, is_main_process


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
