"""The command line: what a user mistypes ends in a sentence and a status."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "afmrl_jax.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            ["--config=configs/agcl.py", "--config.stpes=5"],
            "'stpes', which agcl does not read: did you mean 'steps'",
        ),
        (["--config=configs/agcl.py", "--config.data.pth=x"], "did you mean 'data.path'"),
        (
            ["--config=configs/agcl.py", "--config.loss.xyz=1"],
            "'loss.xyz', which agcl does not read",
        ),
        (["--config=configs/agcl.py", "--config.steps=many"], "--config.steps=many"),
        (["--config=configs/agcl.py", "steps=5"], "did you mean --config.steps=5?"),
        (["--config=configs/agcl.py:other"], "no arm 'other': it has agcl, vlm2vec, head"),
        (["--config=configs/none.py"], "there is no configuration file configs/none.py"),
        (["--confg=configs/agcl.py"], "Did you mean: config"),
        (
            ["--config=configs/agcl.py", "--workdir=gs://bucket/run"],
            "logs need a file system, as NFS or a bucket mounted by gcsfuse",
        ),
        ([], "say what to run, as --config=configs/agcl.py"),
    ],
)
def test_wrong_flags_end_in_one_sentence_and_status_2(arguments, told):
    done = run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_lists_the_fields_of_a_configuration():
    done = run("--config=configs/agcl.py", "--help")
    assert done.returncode == 0
    assert "loss.temperature = 0.05" in done.stdout


def test_what_a_user_got_wrong_ends_in_one_sentence_and_status_2(tmp_path):
    done = run(
        f"--config={ROOT / 'configs/agcl.py'}",
        "--config.data.path=nowhere",
        f"--workdir={tmp_path / 'w'}",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
