"""What runs on a worker: the compiler's flags, the training, its end; with the real restart.sh."""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("--config=configs/agcl.py", '--config.data.path=it\'s "a" $(folder) & more')
ALL_REDUCE = (
    "--xla_enable_async_all_reduce=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true"
)


def flags(kind, **env):
    """What overlap_flags makes of the user's flags: LIBTPU_INIT_ARGS, XLA_FLAGS."""
    script = f"source launch/overlap_flags.sh && overlap_flags {kind} && env -0"
    own = {k: v for k, v in os.environ.items() if k not in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")} | env
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=own, capture_output=True, text=True, check=True
    )
    made = dict(line.split("=", 1) for line in done.stdout.split("\0")[:-1])
    return made.get("LIBTPU_INIT_ARGS"), made.get("XLA_FLAGS")


def test_each_kind_of_device_gets_its_flags_alone():
    assert flags("tpu") == (ALL_REDUCE, None)
    assert flags("gpu") == (None, "--xla_gpu_enable_latency_hiding_scheduler=true")


def test_the_user_s_own_flags_win():
    off = "--xla_dump_to=/tmp/x --xla_enable_async_all_reduce=false"
    tpu, _ = flags("tpu", LIBTPU_INIT_ARGS=off)
    assert tpu == f"{ALL_REDUCE.split()[1]} {off}"
    # Another flag that only begins alike is no reason to leave ours out.
    tpu, _ = flags("tpu", LIBTPU_INIT_ARGS="--xla_enable_async_all_reduce_x=1")
    assert tpu == f"{ALL_REDUCE} --xla_enable_async_all_reduce_x=1"
    bare = "--xla_gpu_enable_latency_hiding_scheduler"
    assert flags("gpu", XLA_FLAGS=bare) == (None, bare)


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.devices()  # XLA_FLAGS are read here, and an unknown one ends the process
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices), ("data",))

def loss(weights, x):
    return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2).mean()

gradient = jax.jit(
    jax.grad(loss),
    in_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))),
    out_shardings=NamedSharding(mesh, P()),
)
shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 1024, 1024), (512, 1024)))
text = gradient.lower(*shapes).compile().as_text()
print("overlapped" if "async_collective_fusion" in text else "waited for")
"""


def compiled(libtpu="", xla=""):
    # Others on this machine may have loaded libtpu as well; there is no TPU to quarrel over.
    env = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env |= {"LIBTPU_INIT_ARGS": libtpu, "XLA_FLAGS": xla}
    return subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_the_flags_are_known_and_overlap_what_is_waited_for_without_them():
    """By libtpu's own compiler: gradients of data replicas are all-reduced among 4 chips."""
    without, ours = compiled(), compiled(flags("tpu")[0], flags("gpu")[1])
    assert without.stdout.strip() == "waited for", without.stderr
    assert ours.stdout.strip() == "overlapped", ours.stderr
    for unknown in (
        {"libtpu": "--xla_tpu_make_it_fast=true"},
        {"xla": "--xla_gpu_make_it_fast=true"},
    ):
        refused = compiled(**unknown)
        assert refused.returncode != 0 and "make_it_fast" in refused.stderr


def told(trainer, seconds=20):
    """What the training wrote down, once it has."""
    end = time.monotonic() + seconds
    while not trainer.exists():
        assert time.monotonic() < end, f"the training did not write {trainer.name}"
        time.sleep(0.05)
    return trainer.read_text().split("\x1f")


def test_run_restarts_the_program_with_the_flags_of_its_device(cluster, trainer):
    args = ("run", "--kind", "tpu", "--times", "2")
    dry = cluster.launch("worker.sh", *args, "--dry-run", "--", *TRAINING)
    assert not trainer.exists()
    assert shlex.split(dry.stdout) == [
        *("env", f"LIBTPU_INIT_ARGS={ALL_REDUCE}", "bash", "launch/restart.sh", "--times", "2"),
        *("--", ".venv/bin/python", "-m", "afmrl_jax.main", *TRAINING),
    ]
    assert cluster.launch("worker.sh", *args, "--", *TRAINING).returncode == 0
    assert told(trainer)[:4] == ["-m", "afmrl_jax.main", *TRAINING]


def test_a_pod_s_workers_train_in_the_background_until_they_are_stopped(cluster, trainer):
    """`gcloud ssh` stands for the worker here: what it is told to run, runs."""
    worker = {"WORKER_HOME": str(cluster.root.parent), "WAIT": "yes"}
    own = "--xla_enable_async_all_reduce=false --xla_dump_to='a b'"
    run = ("run", "--name", "pod", "--zone", "z", "--", *TRAINING)
    pid = None
    try:
        started = cluster.launch("tpu_pod.sh", *run, LIBTPU_INIT_ARGS=own, **worker)
        assert "The training runs as process" in started.stdout, started.stderr
        pid = int((cluster.root / "runs" / "worker.pid").read_text())
        words = told(trainer)
        assert words[:4] == ["-m", "afmrl_jax.main", *TRAINING]
        assert words[4] == f"LIBTPU_INIT_ARGS={ALL_REDUCE.split()[1]} {own}"
        again = cluster.launch("tpu_pod.sh", *run, **worker)
        assert again.returncode == 0 and f"runs already, as process {pid}" in again.stdout
        stopped = cluster.launch("tpu_pod.sh", "stop", "--name", "pod", "--zone", "z", **worker)
        assert stopped.returncode == 0 and "has stopped" in stopped.stdout
        assert trainer.with_suffix(".saved").exists(), "stop did not wait for the checkpoint"
        nothing = cluster.launch("tpu_pod.sh", "stop", "--name", "pod", "--zone", "z", **worker)
        assert "No training runs here" in nothing.stdout
        trainer.unlink()
        trainer.with_suffix(".saved").unlink()
        cluster.launch("tpu_pod.sh", *run, **worker)  # and goes on
        pid = int((cluster.root / "runs" / "worker.pid").read_text())
        told(trainer)
    finally:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                told(trainer.with_suffix(".saved"))


def test_install_brings_a_python_where_there_is_none_that_will_do(cluster, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "basename", "cat", "cut", "sha256sum"):
        (bare / name).symlink_to(f"/usr/bin/{name}")
    where = {"PATH": str(bare), "HOME": "/home/me"}
    pip = "python3 -m pip install --user --quiet uv"
    done = cluster.launch("worker.sh", "install", "--extra", "tpu", "--dry-run", **where)
    assert [shlex.split(line) for line in done.stdout.splitlines()] == [
        shlex.split(f"env PIP_BREAK_SYSTEM_PACKAGES=1 {pip}"),
        ["/home/me/.local/bin/uv", "python", "install", "3.12"],
        ["bash", "-c", "source launch/setup.sh && setup tpu"],
    ]
    done = cluster.launch("worker.sh", "install", "--extra", "tpu", "--dry-run")
    assert len(done.stdout.splitlines()) == 1, "this machine has a Python that will do"
