"""What the launchers hand to gcloud, xpk, Slurm, kubectl and Docker; a dry run prints just that."""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("tpu_pod.sh", "multislice_xpk.sh", "gpu_slurm.sh", "gke_jobset.sh", "worker.sh")
TRAINING = ("--config=configs/agcl.py", '--config.data.path=it\'s "a" $(folder) & more', "")
POD = ("--name", "pod", "--zone", "us-west4-a")
XPK = ("run", "--name=w", "--cluster=c", "--type=v5litepod-16", "--image=i:1")
GKE = ("--name", "j", "--image", "i:1")


def test_scripts_pass_shellcheck():
    scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.s*h"))
    scripts.append("launch/gpu_slurm.sbatch")
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_the_head_comment_and_tells_of_all_options(cluster, script):
    done = cluster.launch(script, "--help")
    assert done.returncode == 0 and done.stderr == "" and cluster.calls() == []
    text = (ROOT / "launch" / script).read_text()
    assert done.stdout.splitlines()[0] == text.splitlines()[1].removeprefix("# ")
    read = re.search(
        r'^read_arguments "(.*?)" \\?\s*"(.*?)" \\?\s*"?(.*?)"? "\$@"$', text, re.M | re.S
    )
    verbs, options, switches = (part.strip(' "\\\n').split() for part in read.groups())
    for word in [*verbs, *(f"--{option}" for option in (*options, *switches))]:
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", done.stdout), (
            f"--help says nothing of {word}"
        )


MISTAKES = [
    ("tpu_pod.sh", (), "say what to do"),
    ("tpu_pod.sh", ("train", *POD), "no sub-command 'train'"),
    ("tpu_pod.sh", ("create", "delete", *POD), "two sub-commands"),
    ("tpu_pod.sh", ("create", "--zone", "z", "--type", "v6e-8"), "--name is missing"),
    ("tpu_pod.sh", ("create", "--name", "My_Pod", "--zone", "z"), "--name is 'My_Pod'"),
    ("tpu_pod.sh", ("create", *POD), "--type is missing"),
    ("tpu_pod.sh", ("create", *POD, "--type", "v9-8"), "say --runtime VERSION"),
    ("tpu_pod.sh", ("create", *POD, "--type"), "--type needs a value"),
    ("tpu_pod.sh", ("run", *POD), "say after --"),
    ("tpu_pod.sh", ("run", *POD, "--config=configs/agcl.py"), "goes after --"),
    ("tpu_pod.sh", ("run", *POD, "--times", "often", "--", "x"), "--times is 'often'"),
    ("tpu_pod.sh", ("tail", *POD, "--worker", "first"), "--worker is 'first'"),
    ("multislice_xpk.sh", ("run", "--name", "w"), "--cluster is missing"),
    ("multislice_xpk.sh", (*XPK, "--slices", "0", "--", "x"), "--slices is '0'"),
    ("multislice_xpk.sh", ("build",), "--image is missing"),
    ("gpu_slurm.sh", ("run", "--name", "g", "--", "x"), "--nodes is missing"),
    ("gpu_slurm.sh", ("run", "--name", "g", "--nodes=2", "--per=core", "--", "x"), "gpu or node"),
    ("gke_jobset.sh", ("run", *GKE, "--", "x"), "--accelerator is missing"),
    ("gke_jobset.sh", ("run", *GKE, "--accelerator=tpu-v6e-slice", "--", "x"), "--topology is ''"),
    (
        "gke_jobset.sh",
        ("run", *GKE, "--accelerator=tpu-v6e-slice", "--topology=2x3", "--", "x"),
        "not a multiple of --chips 4",
    ),
    ("gke_jobset.sh", ("run", *GKE, "--accelerator=nvidia-l4", "--", "x"), "--nodes is missing"),
    ("gke_jobset.sh", ("build", "--image", "i", "--kind", "cpu"), "say tpu or gpu"),
    ("worker.sh", ("run", "--", "x"), "--kind is ''"),
    ("worker.sh", ("install", "--extra", "cuda11"), "--extra is 'cuda11'"),
]


@pytest.mark.parametrize(("script", "args", "sentence"), MISTAKES)
def test_a_mistake_ends_with_a_sentence_and_status_2(cluster, script, args, sentence):
    done = cluster.launch(script, *args)
    assert (done.returncode, done.stdout, cluster.calls()) == (2, "", [])
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr


def test_a_program_that_is_not_installed_is_named(cluster):
    bare = Path(cluster.env["TMPDIR"]) / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "basename"):
        (bare / name).symlink_to(shutil.which(name))
    done = cluster.launch("tpu_pod.sh", "delete", *POD, PATH=str(bare))
    assert done.returncode == 2
    assert "gcloud is not on the PATH" in done.stderr and done.stderr.count("\n") == 1


# ---- Cloud TPU

CREATE = ("create", *POD, "--type", "v5litepod-16", "--spot", "--project", "p")


def test_a_slice_is_asked_for_once_and_used_from_then_on(cluster):
    cluster.states("ABSENT", "ACTIVE")
    look, create, again = cluster.both("tpu_pod.sh", *CREATE)
    where = ["--zone=us-west4-a", "--project=p"]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert look == again == [*queued, "describe", "pod", *where, "--format=value(state.state)"]
    assert create == [
        *(*queued, "create", "pod", *where, "--node-id=pod"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    cluster.states("ACTIVE")
    assert cluster.launch("tpu_pod.sh", *CREATE).returncode == 0
    assert cluster.calls() == [look]


def actions(cluster):
    return [call[4] if call[0] == "gcloud" else call[0] for call in cluster.calls()]


def test_a_slice_that_was_taken_away_is_replaced_and_waited_for(cluster):
    cluster.states("SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = cluster.launch("tpu_pod.sh", *CREATE, "--poll", "7")
    assert done.returncode == 0
    assert "WAITING_FOR_RESOURCES; the next look is in 7 seconds" in done.stderr
    waits = ["describe", "sleep", "describe", "sleep", "describe"]
    assert actions(cluster) == ["describe", "delete", "create", *waits]
    assert cluster.calls()[1][-2:] == ["--force", "--quiet"] and ["sleep", "7"] in cluster.calls()


@pytest.mark.parametrize(
    ("states", "sentence", "wanted"),
    [
        (["DENIED"], "PERMISSION_DENIED", ["describe"]),
        (["ABSENT", "FAILED"], "pod became FAILED", ["describe", "create", "describe"]),
    ],
)
def test_a_slice_that_can_not_be_had_ends_the_launcher(cluster, states, sentence, wanted):
    cluster.states(*states)
    done = cluster.launch("tpu_pod.sh", *CREATE)
    assert done.returncode == 1 and sentence in done.stderr
    assert actions(cluster) == wanted


def test_options_may_stand_in_the_environment(cluster):
    where = {"AFMRL_NAME": "pod", "AFMRL_ZONE": "us-west4-a", "AFMRL_PROJECT": "p"}
    (call,) = cluster.both("tpu_pod.sh", "delete", **where)
    assert call[4:8] == ["delete", "pod", "--zone=us-west4-a", "--project=p"]


def test_install_brings_what_the_program_needs_to_all_workers(cluster):
    pack, copy, install = cluster.both("tpu_pod.sh", "install", *POD)
    archive = pack[2]
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True).stdout.split()
    assert {"launch/worker.sh", "setup.cfg", "afmrl_jax", "configs"} <= set(listed)
    assert copy[:7] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "scp",
        archive,
        "pod:afmrl_jax.tar.gz",
    ]
    assert "--worker=all" in copy and "--worker=all" in install
    assert install[-1].endswith("bash afmrl_jax/launch/worker.sh install --extra tpu")


@pytest.mark.parametrize("verb", ["tail", "stop"])
def test_tail_and_stop_reach_the_workers(cluster, verb):
    (call,) = cluster.both("tpu_pod.sh", verb, *POD)
    assert call[-2] == ("--worker=0" if verb == "tail" else "--worker=all")
    assert call[-1] == f"--command=bash afmrl_jax/launch/worker.sh {verb}"


# ---- several slices by xpk


def xpk_parser():
    """The options of `xpk workload create | list | delete` that its documentation names."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    verbs = parser.add_subparsers().add_parser("workload").add_subparsers(dest="verb")
    create, show, delete = (verbs.add_parser(verb) for verb in ("create", "list", "delete"))
    for verb in (create, show, delete):
        verb.add_argument("--cluster", required=True)
        verb.add_argument("--zone")
        verb.add_argument("--project")
    show.add_argument("--filter-by-job")
    delete.add_argument("--workload")
    delete.add_argument("--force", action="store_true")
    for name in ("workload", "command", "tpu-type", "docker-image"):
        create.add_argument(f"--{name}", required=True)
    for name in ("num-slices", "max-restarts", "termination-grace-period-seconds"):
        create.add_argument(f"--{name}", type=int)
    create.add_argument("--restart-on-user-code-failure", action="store_true")
    return parser


def test_a_workload_gets_a_mesh_with_as_many_slices(cluster, trainer):
    calls = cluster.both("multislice_xpk.sh", *XPK, "--slices=2", "--", *TRAINING)
    show, create = (xpk_parser().parse_args(call[1:]) for call in calls)
    assert show.verb == "list" and show.filter_by_job == "^w$"
    assert (create.workload, create.num_slices, create.tpu_type) == ("w", 2, "v5litepod-16")
    # What the container's shell makes of the command is what was said, and the slices.
    subprocess.run(["bash", "-c", create.command], cwd=cluster.root, env=cluster.env, check=True)
    told = trainer.read_text().split("\x1f")
    assert told[:6] == ["-m", "afmrl_jax.main", *TRAINING, "--config.mesh.slice=2"]


def test_a_mesh_of_the_user_s_own_is_kept(cluster):
    args = (*XPK, "--slices=4", "--", "--config=c.py", "--config.mesh.slice=2")
    assert "slice=4" not in cluster.both("multislice_xpk.sh", *args)[1][-1]


def test_a_workload_that_runs_already_is_left_alone(cluster):
    listed = {"LISTED": "w 2026-01-01T00:00:00Z medium 8"}
    done = cluster.launch("multislice_xpk.sh", *XPK, "--slices=2", "--", *TRAINING, **listed)
    assert done.returncode == 0 and "stop it first" in done.stdout
    assert [call[2] for call in cluster.calls()] == ["list"]
    other = {"LISTED": "w-2 2026-01-01T00:00:00Z medium 8"}
    cluster.launch("multislice_xpk.sh", *XPK, "--slices=2", "--", *TRAINING, **other)
    assert [call[2] for call in cluster.calls()] == ["list", "create"]


def test_a_workload_is_stopped_by_name_and_never_all_of_them(cluster):
    (call,) = cluster.both("multislice_xpk.sh", "stop", "--cluster=c", "--name=w")
    assert xpk_parser().parse_args(call[1:]).workload == "w"
    assert cluster.launch("multislice_xpk.sh", "stop", "--cluster=c").returncode == 2


# ---- Slurm

SLURM = ("run", "--name=g", "--nodes=2", "--gpus=4", "--partition=a100")


@pytest.mark.parametrize(("per", "tasks"), [("gpu", 4), ("node", 1)])
def test_a_job_asks_for_its_nodes_a_second_turn_and_a_warning(cluster, per, tasks):
    known, submit = cluster.both("gpu_slurm.sh", *SLURM, f"--per={per}", "--", *TRAINING)
    assert known[:3] == ["squeue", "--me", "--noheader"]
    at = submit.index(str(cluster.root / "launch/gpu_slurm.sbatch"))
    wanted = {"--nodes=2", "--gpus-per-node=4", f"--ntasks-per-node={tasks}", "--partition=a100"}
    assert wanted | {"--requeue", "--signal=TERM@120", f"--chdir={cluster.root}"} <= set(
        submit[:at]
    )
    assert submit[at + 1 :] == [per, "3", *TRAINING]
    assert (cluster.root / "runs").is_dir()  # Slurm would drop the job without


def test_a_job_that_waits_or_runs_already_is_left_alone(cluster):
    done = cluster.launch("gpu_slurm.sh", *SLURM, "--", *TRAINING, LISTED="4711")
    assert done.returncode == 0 and "Job 4711" in done.stdout
    assert [call[0] for call in cluster.calls()] == ["squeue"]


def batch(cluster, per, **env):
    given = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", "launch/gpu_slurm.sbatch", per, "3", *TRAINING]
    Path(cluster.env["CALLS"]).write_text("")
    return subprocess.run(command, cwd=cluster.root, env=cluster.env | given | env, timeout=60)


def test_a_task_of_each_gpu_trains_with_what_slurm_tells_it(cluster, trainer):
    assert batch(cluster, "gpu").returncode == 0
    told = trainer.read_text().split("\x1f")
    assert told[:5] == ["-m", "afmrl_jax.main", *TRAINING]
    assert "COORDINATOR_ADDRESS=unset" in told and "PROCESS_ID=unset" in told
    assert "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true" in told


def test_a_task_of_each_node_is_told_who_is_who_and_takes_all_gpus(cluster, trainer):
    assert batch(cluster, "node").returncode == 0
    told = trainer.read_text().split("\x1f")
    assert told[:5] == ["-m", "afmrl_jax.main", *TRAINING]
    address = "COORDINATOR_ADDRESS=node7:62055"  # 61440 + 4711 % 4096
    assert {address, "NUM_PROCESSES=2", "PROCESS_ID=1"} <= set(told)


@pytest.mark.parametrize(
    ("status", "left", "requeued"),
    [
        *(("143", 60, True), ("143", 175, True), ("143", 3600, False)),
        *(("143", None, False), ("0", 60, False)),
    ],
)
def test_a_job_that_its_time_limit_stopped_queues_again(cluster, trainer, status, left, requeued):
    """One that was stopped earlier, or is complete, does not."""
    end = {} if left is None else {"SLURM_JOB_END_TIME": str(int(time.time()) + left)}
    assert batch(cluster, "gpu", STATUS=status, **end).returncode == int(status)
    assert (["scontrol", "requeue", "4711"] in cluster.calls()) == requeued


def test_a_job_is_stopped_by_sigterm_so_that_it_can_save(cluster):
    waiting, running = cluster.both("gpu_slurm.sh", "stop", "--name=g")
    assert waiting == ["scancel", "--me", "--name=g", "--state=PENDING"]
    assert running == ["scancel", "--me", "--name=g", "--signal=TERM"]


# ---- GKE


def jobset(cluster, *machines):
    (call,) = cluster.both("gke_jobset.sh", "run", *GKE, *machines, "--", *TRAINING)
    assert call[:2] == ["kubectl", "apply"]
    spec = yaml.safe_load(Path(cluster.env["CALLS"] + ".yaml").read_text())
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = spec["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    # Only what stands above a reference is filled in by Kubernetes.
    seen = set()
    for entry in container["env"]:
        assert set(re.findall(r"\$\((\w+)\)", entry.get("value", ""))) <= seen
        assert isinstance(entry.get("value", ""), str)
        seen.add(entry["name"])
    assert "__" not in str(spec)
    words = [word.replace("$$", "$") for word in container["command"]]
    return spec, job, pod, container, env, words


def test_a_jobset_on_tpus_has_a_pod_for_each_machine_of_the_topology(cluster):
    machines = ("--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
    spec, job, pod, container, env, words = jobset(cluster, *machines)
    inner = job["template"]["spec"]
    assert (job["replicas"], inner["parallelism"], inner["completions"]) == (1, 4, 4)
    assert inner["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert inner["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == "training"
    assert spec["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["TPU_WORKER_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index
    names = ",".join(f"j-worker-0-{i}.j" for i in range(4))
    assert env["TPU_WORKER_HOSTNAMES"]["value"] == names
    assert env.keys() == {"TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"}
    assert words[-4:] == ["--", *TRAINING] and words[:2] == ["bash", "launch/worker.sh"]


def test_several_slices_find_each_other_and_lie_on_the_mesh(cluster):
    machines = ("--accelerator=tpu-v6e-slice", "--topology=2x4", "--slices=3")
    _, job, _, _, env, words = jobset(cluster, *machines)
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (3, 2)
    assert env["MEGASCALE_NUM_SLICES"]["value"] == "3"
    assert env["MEGASCALE_SLICE_ID"]["value"] == "$(SLICE)"
    assert env["MEGASCALE_COORDINATOR_ADDRESS"]["value"] == "j-worker-0-0.j"
    names = "j-worker-$(SLICE)-0.j,j-worker-$(SLICE)-1.j"
    assert env["TPU_WORKER_HOSTNAMES"]["value"] == names
    assert words[-1] == "--config.mesh.slice=3"


def test_a_jobset_on_gpus_tells_each_process_who_it_is(cluster):
    machines = ("--accelerator=nvidia-h100-80gb", "--nodes=2")
    spec, job, pod, container, env, _ = jobset(cluster, *machines)
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (1, 2)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert env["COORDINATOR_ADDRESS"]["value"] == "j-worker-0-0.j:8476"
    assert env["NUM_PROCESSES"]["value"] == "2" and "PROCESS_ID" in env
    assert "hostNetwork" not in pod and "securityContext" not in container
    assert "annotations" not in spec["metadata"] and "TPU_WORKER_ID" not in env


def test_show_prints_the_jobset_that_run_applies(cluster):
    rest = ("--accelerator=tpu-v5p-slice", "--topology=2x2x2", "--", *TRAINING)
    shown = cluster.launch("gke_jobset.sh", "show", *GKE, *rest).stdout
    cluster.launch("gke_jobset.sh", "run", *GKE, *rest)
    assert shown == Path(cluster.env["CALLS"] + ".yaml").read_text()
    assert yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())["kind"] == "JobSet"


@pytest.mark.parametrize("verb", ["tail", "stop"])
def test_a_jobset_is_followed_and_stopped_by_name(cluster, verb):
    (call,) = cluster.both("gke_jobset.sh", verb, "--name=j", "--namespace=team")
    assert call[0] == "kubectl" and "--namespace=team" in call
    assert any(word == "j" or "jobset-name=j," in word for word in call[2:])


# ---- the image


@pytest.mark.parametrize("args", [("gke_jobset.sh", "--kind=tpu"), ("multislice_xpk.sh",)])
def test_build_makes_and_pushes_the_target_for_the_machine(cluster, args):
    build, push = cluster.both(args[0], "build", "--image=i:1", *args[1:])
    assert build[:4] == ["docker", "build", "--file", str(cluster.root / "launch/Dockerfile")]
    root = ["--build-arg", "RUN_AS=root"] if "xpk" in args[0] else []
    assert build[4:] == ["--target", "tpu", "--tag", "i:1", *root, str(cluster.root)]
    assert push == ["docker", "push", "i:1"]


def test_the_image_has_both_targets_and_copies_what_exists_and_no_more():
    text = (ROOT / "launch/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    stages, user = {}, {}
    allowed = [w[1:] for w in (ROOT / ".dockerignore").read_text().split() if w.startswith("!")]
    for words in lines:
        if words[0] == "FROM":
            stage = words[3]
            stages[stage] = words[1]
            user[stage] = user.get(words[1])
        elif words[0] == "USER":
            user[stage] = words[1]
        elif words[0] == "COPY":
            for source in (w for w in words[1:-1] if not w.startswith("--")):
                assert (ROOT / source).exists() and source in allowed
                allowed.remove(source)
    assert allowed == [], "let in by .dockerignore, yet not copied"
    assert stages.keys() == {"base", "tpu", "gpu"} and stages["tpu"] == stages["gpu"] == "base"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", stages["base"]), "not pinned"
    assert user["base"] == "trainer" and user["tpu"] == user["gpu"] == "${RUN_AS}"
    assert text.count("ARG RUN_AS=trainer") == 2
    extras = re.findall(r"worker\.sh install --extra (\S+)|ARG CUDA=(\S+)", text)
    known = re.findall(r"^(\w+) =", (ROOT / "setup.cfg").read_text(), re.M)
    assert {"tpu", "cuda12"} <= {a or b for a, b in extras} and {"tpu", "cuda12"} <= set(known)
