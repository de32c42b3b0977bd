"""Stand-ins for the programs of clusters, which record what they are called with."""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A call is its words, each ended by \x1f, and \x1e.
RECORD = """#!/usr/bin/env bash
{ printf '%s\\x1f' "${0##*/}" "$@"; printf '\\x1e'; } >> "$CALLS"
"""
STAND_INS = {
    # `describe` tells one state after the other; `ssh` does on "the worker" what it is told to.
    "gcloud": """
case " $* " in
    *" describe "*)
        state="$(head -n 1 "$STATES")"
        sed -i 1d "$STATES"
        case "$state" in
            ABSENT) echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1 ;;
            DENIED) echo "ERROR: PERMISSION_DENIED: tpu.nodes.get" >&2; exit 1 ;;
        esac
        echo "$state" ;;
    *" ssh "*)
        command="${!#}"
        [[ -z "${WORKER_HOME:-}" ]] || (cd "$WORKER_HOME" && bash -c "${command#--command=}") ;;
esac
""",
    "tar": '\nexec /usr/bin/env PATH="$REAL_PATH" tar "$@"\n',
    "xpk": '\n[[ "$*" != *" list "* ]] || printf "Jobset Name  Created\\n%s\\n" "${LISTED:-}"\n',
    "squeue": '\nprintf "%s" "${LISTED:-}"\n',
    "kubectl": '\n[[ "$1" != apply ]] || cp "${2#--filename=}" "$CALLS.yaml"\n',
    "scontrol": '\n[[ "$1" != show ]] || printf "node7\\nnode9\\n"\n',
    # Leaves its own options out and runs the rest, as the second task.
    "srun": """
while [[ "$1" == --* ]]; do shift; done
SLURM_PROCID=1 exec "$@"
""",
    **dict.fromkeys(("sbatch", "scancel", "docker", "sleep", "tail"), ""),
}


TOLD = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


@dataclass
class Cluster:
    """A copy of launch/ in `root`, and programs on the PATH that record their calls."""

    root: Path
    env: dict[str, str]

    def launch(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        """Runs launch/`script`; its calls are in `calls()` until the next."""
        Path(self.env["CALLS"]).write_text("")
        command = ["bash", str(self.root / "launch" / script), *args]
        return subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[list[str]]:
        text = Path(self.env["CALLS"]).read_text()
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    def states(self, *states: str) -> None:
        """What gcloud will say of the slice, look by look."""
        Path(self.env["STATES"]).write_text("".join(f"{state}\n" for state in states))

    def both(self, script: str, *args: str, **env: str) -> list[list[str]]:
        """The calls of a real run, once a dry run has printed the very same and made none."""
        at = args.index("--") if "--" in args else len(args)
        dry = self.launch(script, *args[:at], "--dry-run", *args[at:], **env)
        assert (dry.returncode, dry.stderr, self.calls()) == (0, "", [])
        printed = [shlex.split(line) for line in dry.stdout.splitlines()]
        real = self.launch(script, *args, **env)
        assert real.returncode == 0, real.stderr
        assert [call for call in printed if call[0] != "mkdir"] == self.calls()
        return self.calls()


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    root = tmp_path / "afmrl_jax"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("LICENSE", "README.md", "afmrl_jax", "configs", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    for name in ("requirements.txt", "setup.cfg"):
        (root / name).symlink_to(ROOT / name)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, does in STAND_INS.items():
        (folder / name).write_text(RECORD + does)
        (folder / name).chmod(0o755)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AFMRL_", "SLURM_"))}
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        own.pop(name, None)
    own |= {"PATH": f"{folder}:{own['PATH']}", "REAL_PATH": own["PATH"], "TMPDIR": str(tmp_path)}
    own |= {"CALLS": str(tmp_path / "calls"), "STATES": str(tmp_path / "states")}
    return Cluster(root, own)


@pytest.fixture
def trainer(cluster, tmp_path):
    """A Python in the worker's environment that writes its words and flags to this file and ends
    with STATUS; where WAIT is set, it waits for SIGTERM and half a second later leaves
    FILE.saved."""
    told = tmp_path / "told"
    python = cluster.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/usr/bin/env bash
trap '/bin/sleep 0.5; echo > {told}.saved; exit 0' TERM
{{
    printf '%s\\x1f' "$@"
    for name in LIBTPU_INIT_ARGS XLA_FLAGS {" ".join(TOLD)}
    do printf '%s\\x1f' "$name=${{!name-unset}}"; done
}} > {told}.part
mv {told}.part {told}
[[ -n "${{WAIT:-}}" ]] || exit "${{STATUS:-0}}"
for ((i = 0; i < 600; i++)); do /bin/sleep 0.1; done
""")
    python.chmod(0o755)
    return told
