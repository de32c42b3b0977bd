"""Several processes of one run on this machine, and how they find one another."""

import os
import random
import socket
import subprocess
from pathlib import Path

from afmrl_jax.core.processes import TRY_AGAIN

ROOT = Path(__file__).resolve().parents[1]


ONCE = {  # the first process compiles for all; they wait for it, however busy the machine is
    "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1",
    "JAX_SHARE_BINARY_BETWEEN_HOSTS_TIMEOUT_MS": "400000",
}


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to connections: of those
    another test's might get it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def joined(count: int) -> list[dict[str, str]]:
    """What each of `count` processes finds in its environment."""
    both = {"COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "NUM_PROCESSES": str(count)}
    return [both | ONCE | {"PROCESS_ID": str(index)} for index in range(count)]


def run_all(command: list[str], count: int = 1, env: dict[str, str] | None = None) -> None:
    """Runs it as so many processes of one run, to the end of all. Raises where one fails.

    What is worth starting again is, once: Gloo waits 30 s for the others, who may be as far apart
    on a busy machine.
    """
    statuses = _statuses(command, count, env)
    if TRY_AGAIN in statuses:
        statuses = _statuses(command, count, env)
    assert statuses == [0] * count


def _statuses(command: list[str], count: int, env: dict[str, str] | None) -> list[int]:
    environments = joined(count) if count > 1 else [{}]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | (env or {}) | own)
        for own in environments
    ]
    try:
        return [process.wait(timeout=500) for process in running]
    finally:
        for process in running:
            process.kill()
