"""launch/restart.sh and launch/processes.sh, around small commands of the shell."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESTART = ("bash", "launch/restart.sh", "--wait", "0")
PROCESSES = ("bash", "launch/processes.sh")
SAVES = "trap 'echo saved; exit 143' TERM INT; echo ready; sleep 30 & wait; kill %1"


# What runs in the background ignores SIGINT, and so would all that it starts.
HEED = ("env", "--default-signal=INT")


def run(*command):
    return subprocess.run([*HEED, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("ends", "status", "times"),
    [
        ("exit 0", 0, 1),
        ("exit 1", 1, 1),
        ("exit 2", 2, 1),  # what the user got wrong
        ("exit 75", 75, 3),
        ("kill -KILL $$", 137, 3),
        ("kill -SEGV $$", 139, 3),
        ("kill -ABRT $$", 134, 3),
        ("kill -TERM $$", 143, 1),
        ("kill -INT $$", 130, 1),
    ],
)
def test_what_a_restart_helps_is_started_again(tmp_path, ends, status, times):
    done = run(*RESTART, "--times", "2", "--", "bash", "-c", f"echo x >> {tmp_path}/runs; {ends}")
    assert done.returncode == status
    assert (tmp_path / "runs").read_text().split() == ["x"] * times
    if times == 3:
        assert "starting again in 0 s (2 of 2)" in done.stderr
        assert "was started again 2 times: giving up" in done.stderr


def test_it_ends_with_the_status_of_the_run_that_succeeds(tmp_path):
    done = run(*RESTART, "--", "bash", "-c", f"mkdir {tmp_path}/once && exit 75; echo done")
    assert done.returncode == 0 and done.stdout == "done\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_its_end_is_final(sent):
    command = [*RESTART, "--", *PROCESSES, "2", "--", "bash", "-c", SAVES]
    running = subprocess.Popen([*HEED, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        ready = [running.stdout.readline() for _ in range(2)]
        began = time.monotonic()
        running.send_signal(sent)
        told, _ = running.communicate(timeout=20)
    finally:
        running.kill()
    assert ready == ["ready\n"] * 2 and told.split() == ["saved", "saved"]
    assert running.returncode == 143 and time.monotonic() - began < 10


def test_each_process_knows_the_others():
    done = run(*PROCESSES, "3", "--", "bash", "-c", "echo $PROCESS_ID $NUM_PROCESSES; test -t 0")
    assert sorted(done.stdout.splitlines()) == ["0 3", "1 3", "2 3"]
    assert done.returncode == 1  # no terminal: three can't read from one
    told = "echo $COORDINATOR_ADDRESS; exec 3<>/dev/tcp/${COORDINATOR_ADDRESS/:/\\/}"
    done = run(*PROCESSES, "2", "--", "bash", "-c", told)
    one, other = done.stdout.splitlines()
    assert one == other and done.stderr.count("Connection refused") >= 2  # the port is free


@pytest.mark.parametrize(
    ("ends", "others", "status"),
    [
        ("kill -KILL $$", "sleep 0.5; exit 75", 137),  # of two such the first
        ("exit 2", "exit 75", 2),
        ("sleep 0.3; exit 2", "exit 75", 2),  # final, though another was sooner
        ("exit 0", "exit 0", 0),
        ("exit 75", "sleep 60", 75),  # ended when the grace is over
    ],
)
def test_the_status_of_all_is_the_one_that_decides(ends, others, status):
    command = f"if ((PROCESS_ID == 1)); then {ends}; else {others}; fi"
    done = run(*PROCESSES, "3", "--grace", "1", "--", "bash", "-c", command)
    assert done.returncode == status
    assert ("process 1 ended by KILL" in done.stderr) == (status == 137)
    assert ("not all have ended within 1 s" in done.stderr) == (others == "sleep 60")


@pytest.mark.parametrize("script", ["restart.sh", "processes.sh"])
def test_help_and_mistakes_are_told(script):
    told = run("bash", f"launch/{script}", "--help")
    assert told.returncode == 0 and f"bash launch/{script}" in told.stdout
    assert "set -" not in told.stdout
    for wrong in (["--tims", "3"], ["--wait", "soon", "--grace", "soon"], [], ["2"], ["two", "x"]):
        if script == "restart.sh" and wrong and not wrong[0].startswith("--"):
            continue  # a command
        done = run("bash", f"launch/{script}", *wrong)
        assert done.returncode == 2 and "see --help" in done.stderr


def test_a_dry_run_prints_what_would_run():
    done = run(*RESTART, "--times", "4", "--dry-run", "--", "echo", "two words")
    assert done.stdout == "up to 5 times, with a pause of 0 s: 'echo' 'two words'\n"
    done = run(*PROCESSES, "2", "--dry-run", "--", "echo", "two words")
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [
        ["NUM_PROCESSES=2", f"PROCESS_ID={index}", "'echo'", "'two", "words'", "&"]
        for index in range(2)
    ]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    assert run("shellcheck", "launch/restart.sh", "launch/processes.sh").stdout == ""
