"""Checkpoints of a run: state, stream position and everything that its embeddings depend on.

A checkpoint is whole or absent: Orbax writes beside and renames. With the state, whose step is the
stream's position, it holds the run's record, strings by name: config, model, tokenizer, corpus
statistics, the catalogue's fingerprint.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.training.state import TrainState

# Fields that change how a run is watched or where it runs, never what it computes.
MAY_CHANGE = (
    "log_every", "eval_every", "checkpoint_every", "mesh.", "eval.batch", "data.workers",
    "data.cache_dir",
)  # fmt: skip


class Checkpoints:
    """The checkpoints under a folder: the last two are kept, and the best on validation."""

    def __init__(self, folder: Path, *, writable: bool = False):
        """writable: this run's own folder, where what a killed save left is cleaned away."""
        # Not Orbax's own clean-up: its thread outlives a program that ends at once, and complains.
        if writable and jax.process_index() == 0:
            for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self.folder = folder
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(2),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics["validation"],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
        )

    def _whole(self) -> list[Any]:
        """What is known of each whole checkpoint, oldest first. Orbax alone would take any folder
        with a number for a name for one."""
        found = self._orbax.checkpoints
        return [c for c in found if (Path(c.path) / "_CHECKPOINT_METADATA").exists()]

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return max((c.step for c in self._whole()), default=None)

    @property
    def best(self) -> int | None:
        """The step that did best on validation; the newest of equals."""
        scored = [c for c in self._whole() if c.metrics]
        best = max(scored, key=lambda c: (c.metrics["validation"], c.step), default=None)
        return best.step if best else None

    def has(self, step: int) -> bool:
        """Whether that step is saved whole."""
        return any(c.step == step for c in self._whole())

    def save(
        self, state: TrainState, record: dict[str, str], step: int, validation: float | None
    ) -> None:
        """Begins to write; the state may be donated as soon as this returns."""
        self._orbax.save_checkpointables_async(
            step,
            {"state": state, "run": record},
            metrics=None if validation is None else {"validation": validation},
        )

    def record(self, step: int) -> dict[str, str]:
        """The strings saved beside the state."""
        return self._orbax.load_checkpointables(step, {"run": None})["run"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state, straight into the shardings of `abstract`, whatever mesh it was saved from."""
        return self._orbax.load_checkpointables(step, {"state": abstract})["state"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters alone, straight into the shardings of `abstract`.

        Raises ValueError where one of them was not saved, which Orbax would leave abstract.
        """
        options = ocp.options.PyTreeOptions(
            loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
        )
        with ocp.Context(pytree_options=options):
            loaded = self._orbax.load_checkpointables(step, {"state": {"params": abstract}})
        params = loaded["state"]["params"]
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise ValueError(f"{self.folder / str(step)} lacks some of these parameters")
        return params

    def restore_raw(self, step: int) -> Any:
        """The state as nested containers of arrays on this process's device, as it was saved."""
        return self._orbax.load_checkpointables(step, {"state": None})["state"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        """Waits until everything is written, also where a run ends in an error."""
        self._orbax.close()


def find_checkpoints(path: str, *, best: bool | None = False) -> tuple[Checkpoints, int]:
    """The checkpoints that `path` names, and the step.

    path: a run's workdir (its last checkpoint, with `best` the best on validation, with None the
    best where the run validated any), or the folder of one step. Raises UserError where there is
    none.
    """
    folder = Path(path)
    for root in (folder / "checkpoints", folder):
        if root.is_dir() and (checkpoints := Checkpoints(root)).latest is not None:
            if best and checkpoints.best is None:
                raise UserError(f"{path} has no validated checkpoint: leave best out")
            chosen = checkpoints.latest if best is False else checkpoints.best
            return checkpoints, chosen or checkpoints.latest
    if folder.name.isdigit() and folder.is_dir():
        checkpoints = Checkpoints(folder.parent)
        if checkpoints.has(int(folder.name)):
            return checkpoints, int(folder.name)
    raise UserError(
        f"{path} holds no whole checkpoint: give a run's workdir, one folder of its checkpoints, "
        "or a Hugging Face folder with its *.safetensors"
    )


def check_unchanged(
    saved: str, config: ConfigDict, workdir: Path, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Raises UserError where `config` differs from the one a run began with, field by field.

    saved: the JSON of that configuration. may_change: beginnings of fields that may differ.
    """
    before, now = flatten(json.loads(saved)), flatten(json.loads(config.to_json()))
    changed = [
        f"{name} was {before.get(name, 'absent')!r} and is now {now.get(name, 'absent')!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(may_change)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. Give the old "
            "values to resume it, or another --workdir to start anew"
        )


def check_catalogue(saved: dict[str, str], fingerprint: str, path: str, workdir: Path) -> None:
    """Raises UserError where the catalogue at `path` is not the one that a run began with.

    saved: the run's record. fingerprint: of the catalogue as it is now.
    """
    if saved["catalogue"] != fingerprint:
        raise UserError(
            f"the catalogue {path} is not the one that {workdir} began with: bring "
            "that one back, or start anew with another --workdir"
        )
