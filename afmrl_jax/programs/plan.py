"""Predicts the memory of a run and the time of a step, on devices that need not exist here.

    python -m afmrl_jax.main --config=configs/agcl.py --config.model.preset=qwen2_vl_2b \\
        --plan=v5e:16x16          # or 2xv5e:16x16, two slices; or local, the devices at hand

1. Make the mesh of the topology, and compile the run's steps for it with XLA's TPU compiler.
2. Print memory, work, time and exchanges of the run as it is configured.
3. Search for better settings: meshes, then micro-batches, then remat.
4. Print tables, and write WORKDIR/plan.json.

Only shapes matter: no catalogue is opened, and no weights are read.
"""

import dataclasses
import importlib
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import check_options
from afmrl_jax.core.pages import check_method_fields
from afmrl_jax.planning.search import Choice, Trial, advice, search, trials_table

if TYPE_CHECKING:  # JAX is imported once the topology is known
    import jax

    from afmrl_jax.planning.report import Report

log = logging.getLogger(__name__)

TOPOLOGY = re.compile(r"(?:(\d+)x)?(v\d\w*:\d+(?:x\d+)+)")


def main(config: ConfigDict, workdir: Path, topology: str) -> None:
    """Plans `config.program` for a topology. Raises UserError for what it cannot plan."""
    devices = devices_of(topology)
    from afmrl_jax.planning import report

    program = importlib.import_module(f"afmrl_jax.programs.{config.program}")
    if not hasattr(program, "plan"):
        raise UserError(f"--plan knows programs that train, as agcl, and not {config.program}")
    check_method_fields(config)

    def measure(choice: Choice) -> tuple[Trial, "list[Report]"]:
        began = time.monotonic()
        reports = reports_of(_changed(config, choice), devices)
        fits = all(report.fits for report in reports)
        has_times = all(report.seconds is not None for report in reports)
        trial = Trial(
            choice,
            fits,
            sum(report.seconds for report in reports) if has_times and fits else None,
            max(report.needed for report in reports),
        )
        cost = f"{trial.seconds:.3g} s" if trial.seconds else "fits" if fits else "does not fit"
        log.info("%s: %s (compiled in %.0f s)", choice.label, cost, time.monotonic() - began)
        return trial, reports

    configured = _configured(config, devices)
    first, reports = measure(configured)
    print(f"\n{config.program} on {topology}, {len(devices)} devices: {configured.label}\n")
    print(report.memory_table(reports), report.time_table(reports), sep="\n\n", flush=True)
    for part in reports:
        if part.exchanges:
            print(f"\n{part.name}:\n{report.exchange_table(part)}", flush=True)
    batch = config[program.BATCH_FIELD]
    trials = search(lambda choice: measure(choice)[0], first, batch, len(devices))
    print(f"\n{trials_table(trials)}\n{advice(trials)}", flush=True)
    result = {
        "topology": topology,
        "asked": dataclasses.asdict(configured),
        "reports": [dataclasses.asdict(report) for report in reports],
        "tried": [dataclasses.asdict(trial) for trial in trials],
    }
    from afmrl_jax.core.files import write_atomically

    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "plan.json", json.dumps(result, indent=2))


def devices_of(topology: str) -> "list[jax.Device]":
    """The devices of a topology, or those at hand. Call it before anything imports JAX."""
    if topology == "local":
        import jax

        return jax.devices()
    m = TOPOLOGY.fullmatch(topology)
    if not m:
        raise UserError(
            f"--plan={topology} is no topology: write it as v5e:16x16, v5p:4x4x4, 2xv6e:8x8 (two "
            "slices), or local for the devices at hand"
        )
    # libtpu would otherwise look for TPUs, and for other processes that use them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('--plan needs XLA\'s TPU compiler: pip install -e ".[tpu-plan]"')
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    slices = {"num_slices": int(m[1])} if m[1] else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=m[2], **slices)
    except (JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"XLA knows no TPUs {topology}: {reason}") from None
    return list(description.devices)


def reports_of(config: ConfigDict, devices: "list[jax.Device]") -> "list[Report]":
    """The memory and time of each compiled part of the run."""
    from afmrl_jax.core.mesh import make_mesh
    from afmrl_jax.planning.report import compile_part, reckon

    mesh = make_mesh(dict(config.mesh), devices)
    program = importlib.import_module(f"afmrl_jax.programs.{config.program}")
    check_options(config, program.OPTIONS)
    reports = []
    for part in program.plan(config, mesh):
        compiled, report = compile_part(part, mesh)
        reports.append(reckon(part, compiled, report, mesh) if compiled else report)
    return reports


def _configured(config: ConfigDict, devices: "list[jax.Device]") -> Choice:
    """The choice of the configuration, with -1 replaced by sizes."""
    from afmrl_jax.core.mesh import make_mesh

    sizes = make_mesh(dict(config.mesh), devices).shape
    return Choice(tuple(sizes.items()), config.model.remat, config.micro_batches)


def _changed(config: ConfigDict, choice: Choice) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    changed.mesh.update(dict(choice.mesh))
    changed.model.remat, changed.micro_batches = choice.remat, choice.micro_batches
    return changed
