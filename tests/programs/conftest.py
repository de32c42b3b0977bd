"""Running the program as its own process."""

import sys

import pytest


@pytest.fixture
def command():
    """A function (config, workdir) -> the command line that runs a configuration made here."""

    def flat(config, prefix=""):
        for name, value in config.items():
            if hasattr(value, "items"):
                yield from flat(value, f"{prefix}{name}.")
            elif name != "program":
                yield f"--config.{prefix}{name}={value}"

    def build(config, workdir):
        return [
            *(sys.executable, "-m", "afmrl_jax.main", f"--config=configs/{config.program}.py"),
            *(f"--workdir={workdir}", *flat(config)),
        ]

    return build


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The workdir of a run of agcl_config that nothing stopped; made by the first who needs it."""
    return tmp_path_factory.mktemp("agcl") / "whole"
