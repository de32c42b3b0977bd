"""The uses of Orbax's private interface, in one place; tested with orbax-checkpoint 0.12.8.

Of several processes, one whose save fails must end the others, but Orbax's thread raises the error
only when it has met the threads of the other processes, which wait for this one elsewhere: for 20
minutes.
"""

import threading
from collections.abc import Callable

from orbax.checkpoint import v1 as ocp


def hear_of_errors(
    checkpointer: ocp.training.Checkpointer, report: Callable[[BaseException], None]
) -> None:
    """Calls `report`, from Orbax's thread, with the error of a save as soon as it is raised."""
    manager = checkpointer._manager
    wait = manager._wait_for_checkpointers

    def wait_and_report() -> None:
        try:
            wait()
        except BaseException as error:
            report(error)
            raise

    manager._wait_for_checkpointers = wait_and_report


def is_saving() -> bool:
    """Whether Orbax's thread that finishes a save is running in this process."""
    return any(thread.name == "save_finalize" for thread in threading.enumerate())
