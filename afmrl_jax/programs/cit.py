"""Trains encoder and generator in a cycle (CIT), each by means of the other; METHOD: section 1.

1. Train an encoder on the catalogue's attributes (stage `agcl`).
2. Teach a generator to name them (`sft`).
3. Reward it for attributes that find the identical product under that encoder (`rar`).
4. Let it write the attributes of the training listings (`annotate`).
5. Train an encoder on those (`again`).
6. Judge both encoders on the test listings: plain, with the generator's attributes in the query,
   and in query and gallery (`evaluate`).

Each stage is a program of its own in a folder of its own. manifest.json tells how far they are:
what is done is not begun again, what was stopped goes on from its checkpoints.
"""

import contextlib
import gc
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.catalog.opening import CatalogOptions
from afmrl_jax.checkpoints.record import MAY_CHANGE, check_unchanged
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.logs import duration
from afmrl_jax.core.options import Options, between, check_options
from afmrl_jax.core.processes import meet
from afmrl_jax.programs import agcl, annotate, evaluate, rar, sft
from afmrl_jax.retrieval.scores import paired, results_table

SECTIONS = {  # of the configuration -> the program, and its fields that a run may change
    "agcl": (agcl, MAY_CHANGE),
    "sft": (sft, MAY_CHANGE),
    "rar": (rar, rar.NO_EFFECT),
    "annotate": (annotate, annotate.MAY_CHANGE),
    "again": (agcl, MAY_CHANGE),
    "evaluate": (evaluate, MAY_CHANGE),
}
ENCODERS = {"first": "agcl", "second": "again"}
ENRICHED = {  # how an encoder is judged -> whether with attributes, and where they join the texts
    "plain": (False, "both"),
    "query": (True, "queries"),
    "both": (True, "both"),
}
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Cycle(Options, section=""):
    """What all stages share."""

    seed: int = between(0, 2**31 - 1)
    share: float = between(1e-9, 1)  # of the training products, which the generator annotates


SHARES_WORKDIR = True  # all processes read it
OPTIONS = (Cycle, CatalogOptions)


@dataclass(frozen=True)
class Stage:
    """One program of the cycle; `name` is its folder under the cycle's workdir."""

    name: str
    section: str
    config: ConfigDict

    @property
    def program(self) -> ModuleType:
        return SECTIONS[self.section][0]

    @property
    def may_change(self) -> tuple[str, ...]:
        return SECTIONS[self.section][1]


def stages_of(config: ConfigDict, workdir: Path) -> list[Stage]:
    """The stages in their order, each with the whole configuration of its program.

    workdir: absolute, since a stage remembers where the models that it stands on lie.
    """
    attributes = workdir / "annotate" / "attributes.jsonl"

    def stage(section: str, name: str = "", **fields: Any) -> Stage:
        values = config[section].to_dict()
        if values.get("init_from") in ENCODERS.values():
            values["init_from"] = str(workdir / values["init_from"])
        values["program"] = SECTIONS[section][0].__name__.rpartition(".")[2]
        page = ConfigDict(values)
        page.update(seed=config.seed, mesh=config.mesh.to_dict())
        page.data = config.data.to_dict() | values["data"]
        for field, value in fields.items():
            inner, _, last = field.rpartition("__")
            (page[inner] if inner else page)[last] = value
        return Stage(name or section, section, page.lock())

    generator = str(workdir / "rar")
    return [
        stage("agcl"),
        stage("sft"),
        stage("rar", generator=str(workdir / "sft"), encoder=str(workdir / "agcl")),
        stage("annotate", generator=generator, split="train", share=config.share),
        stage("again", data__attributes=str(attributes)),
        *(
            stage(
                "evaluate",
                f"evaluate/{which}_{how}",
                checkpoint=str(workdir / encoder),
                eval__attributes=generator if enriched else "none",
                eval__enrich=where,
            )
            for which, encoder in ENCODERS.items()
            for how, (enriched, where) in ENRICHED.items()
        ),
    ]


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Runs, or goes on with, the whole cycle in `workdir`; see configs/cit.py."""
    # ---- what is asked, and what is done
    workdir = workdir.absolute()
    first_process = jax.process_index() == 0
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a training run: name another --workdir for the cycle")
    stages = stages_of(config, workdir)
    check_stages(config, stages)
    manifest = Manifest(workdir, config, stages)
    meet("begin")  # nobody writes before all have read
    if first_process:
        write_atomically(workdir / "config.json", config.to_json(indent=2))

    # ---- stages
    with _terminable():
        for number, stage in enumerate(stages, 1):
            place = f"stage {number} of {len(stages)}, {stage.name}"
            if manifest.is_done(stage):
                if first_process:
                    print(f"{place}: done before", flush=True)
                continue
            if first_process:
                print(f"{place}: in {workdir / stage.name}", flush=True)
            try:
                with manifest.running(stage):
                    stage.program.main(stage.config, workdir / stage.name, mesh)
                    meet(stage.name)  # what the first process wrote is there for all
            except UserError as error:
                raise type(error)(f"stage {stage.name}: {error}") from None
            except SystemExit:
                if first_process:
                    print(f"stopped in {place}: the same command goes on there", flush=True)
                raise
            _release()

    # ---- table
    if first_process:
        print(f"Done: {manifest.durations()}")
        print(_compare(workdir))
        print(f"The second encoder is in {workdir / 'again'}, the generator in {workdir / 'rar'}")


def _compare(workdir: Path) -> str:
    """The table of both encoders, and what the same queries gained by the second; in JSON too."""
    results, gains, gain_texts = {}, {}, []
    for how in ENRICHED:
        folders = [workdir / "evaluate" / f"{which}_{how}" for which in ENCODERS]
        for which, folder in zip(ENCODERS, folders):
            scores = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
            results[f"{which} encoder, {how}"] = scores
        gains[how] = paired(*(folder / "evaluation_queries.json" for folder in folders))
        gain_texts += [
            f"{task}, {how}: {gain['recall@1']:+.3f} ± {gain['recall@1_ci95']:.3f}"
            for task, gain in gains[how].items()
        ]
    text = json.dumps({"scores": results, "second - first": gains}, indent=2)
    write_atomically(workdir / EVALUATION, text)
    return (
        f"{results_table(results)}R@1 of the same queries, second - first: {'; '.join(gain_texts)}"
    )


class Manifest:
    """manifest.json: {stage: {"state": begun | done, "seconds": .., "running": ..}}.

    seconds: of computing, over all starts; one that was killed counts up to the last file that it
    wrote. running: when a start began that has not ended, seconds since 1970; else null.
    """

    def __init__(self, workdir: Path, config: ConfigDict, stages: list[Stage]):
        """Raises UserError where stages that were begun had another configuration, naming the
        fields, or where they stand on a stage that is gone."""
        self._path = workdir / "manifest.json"
        known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        # A stage whose folder was deleted is to be run anew.
        self._lines = {name: line for name, line in known.items() if (workdir / name).exists()}
        if begun := {stage.section for stage in stages if stage.name in self._lines}:
            fields = flatten(config)
            free = (name for name in fields if not any(_belongs(name, part) for part in begun))
            saved = (workdir / "config.json").read_text(encoding="utf-8")
            check_unchanged(saved, config.to_json(), workdir, tuple(free))
        self._check_order(workdir, stages)
        for name, line in self._lines.items():
            if line["running"] is not None:
                files = (path for path in (workdir / name).rglob("*") if path.is_file())
                last = max((path.stat().st_mtime for path in files), default=line["running"])
                line["seconds"] += round(max(0.0, last - line["running"]), 1)
                line["running"] = None

    def _check_order(self, workdir: Path, stages: list[Stage]) -> None:
        """A stage stands on all before it, but evaluations on no other evaluation."""
        missing = None
        for stage in stages:
            if missing and stage.section != missing.section and stage.name in self._lines:
                raise UserError(
                    f"{workdir / stage.name} was made with what stood in {workdir / missing.name}, "
                    "which is to be run anew: delete the folders of the later stages as well"
                )
            if not self.is_done(stage):
                missing = missing or stage

    def is_done(self, stage: Stage) -> bool:
        return self._lines.get(stage.name, {}).get("state") == "done"

    @contextlib.contextmanager
    def running(self, stage: Stage) -> Iterator[None]:
        """Notes that the stage begins, and that it is done where nothing is raised."""
        line, started = self._lines.setdefault(stage.name, {"seconds": 0.0}), time.monotonic()
        line.update(state="begun", running=time.time())
        self._write()
        try:
            yield
            line["state"] = "done"
        finally:
            line["seconds"] = round(line["seconds"] + time.monotonic() - started, 1)
            line["running"] = None
            self._write()

    def durations(self) -> str:
        """How long each section's stages took."""
        seconds: dict[str, float] = {}
        for name, line in self._lines.items():
            name = name.partition("/")[0]
            seconds[name] = seconds.get(name, 0) + line["seconds"]
        return ", ".join(f"{name} {duration(took)}" for name, took in seconds.items())

    def _write(self) -> None:
        if jax.process_index() == 0:
            write_atomically(self._path, json.dumps(self._lines, indent=2) + "\n")


def _belongs(field: str, section: str) -> bool:
    """Whether a field of the cycle's configuration says what a section's stages compute."""
    owner = {"share": "annotate"}.get(field, field.partition(".")[0])
    if owner not in SECTIONS:
        return not field.startswith(MAY_CHANGE)
    may_change = SECTIONS[section][1]
    return owner == section and not field.removeprefix(f"{section}.").startswith(may_change)


def check_stages(config: ConfigDict, stages: list[Stage]) -> None:
    """A field out of its range ends the run now, not after the stages before it."""
    check_options(config, OPTIONS)
    for stage in stages:
        check_options(stage.config, stage.program.OPTIONS, f"{stage.section}.")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run in order wherever it is, not in the training loop alone."""

    def end(*_: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _release() -> None:
    """Lets go of a stage's arrays and compiled programs, which the next has no use for."""
    gc.collect()
    jax.clear_caches()
