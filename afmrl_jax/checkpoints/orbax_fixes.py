"""What Orbax has no public way for, in one place: it was seen to work on orbax-checkpoint 0.12.8.

Of several processes, one whose save fails must end the others, but Orbax's thread raises the error
only when it has met the threads of the other processes, which wait for this one elsewhere: for 20
minutes.
"""

import threading
from collections.abc import Callable

from orbax.checkpoint import v1 as ocp


def hear_of_errors(
    checkpointer: ocp.training.Checkpointer, tell: Callable[[BaseException], None]
) -> None:
    """Calls `tell`, from Orbax's own thread, with the error that ends a save, at once."""
    manager = checkpointer._manager
    wait = manager._wait_for_checkpointers

    def wait_and_tell() -> None:
        try:
            wait()
        except BaseException as error:
            tell(error)
            raise

    manager._wait_for_checkpointers = wait_and_tell


def is_saving() -> bool:
    """Whether Orbax's thread that ends a save is at work in this process."""
    return any(thread.name == "save_finalize" for thread in threading.enumerate())
