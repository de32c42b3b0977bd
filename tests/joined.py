"""Several processes of one run on this machine, and how they find one another."""

import os
import random
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    return [both | {"PROCESS_ID": str(index)} for index in range(count)]


def run_all(command: list[str], count: int = 1, env: dict[str, str] | None = None) -> None:
    """Runs it as so many processes of one run, to the end of all. Raises where one fails."""
    environments = joined(count) if count > 1 else [{}]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | (env or {}) | own)
        for own in environments
    ]
    try:
        assert [process.wait(timeout=500) for process in running] == [0] * count
    finally:
        for process in running:
            process.kill()
