"""Whether a run that goes on is still the one that began: its configuration, its catalogue."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.pages import program_fields

# Fields that change how a run is watched or where it runs, never what it computes.
MAY_CHANGE = (
    "log_every", "eval_every", "evaluators", "checkpoint_every", "checkpoint_dir", "mesh.",
    "eval.batch", "data.workers", "data.timeout", "data.cache_dir", "profile",
)  # fmt: skip


def recorded(saved: str | Mapping[str, Any], where: str | Path) -> ConfigDict:
    """A run's configuration, from its record.

    saved: its JSON, or what that says. where: the run, for the errors. Raises UserError for what is
    neither, and for other fields than the run's program has today.
    """
    try:
        config = json.loads(saved) if isinstance(saved, str) else saved
        program, fields = config.get("program"), flatten(config)
    except (ValueError, AttributeError):
        raise UserError(
            f"{where}: the record of a run holds no configuration; bring it back, or start anew "
            "with another --workdir"
        ) from None
    today = program_fields(program) or fields
    # Exported folders leave out data.cache_dir, a place on one machine, which may change.
    names = (name for name in today.keys() ^ fields.keys() if not name.startswith(MAY_CHANGE))
    if differ := sorted(names):
        told = [f"{name} is {'gone' if name in fields else 'new'} since" for name in differ]
        raise UserError(
            f"{where} holds a run of another version of {program}: {', '.join(told)}; use that "
            "version, or start anew with another --workdir"
        )
    return ConfigDict(config)


def check_unchanged(
    saved: str, config: ConfigDict, workdir: Path, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Raises UserError where `config` differs from the one a run began with, field by field.

    saved: the JSON of that configuration. may_change: beginnings of fields that may differ.
    """
    before, now = flatten(recorded(saved, workdir)), flatten(json.loads(config.to_json()))
    if before.get("program") != now["program"]:
        raise UserError(
            f"{workdir} holds a run of {before.get('program')}: give {now['program']} another "
            "--workdir"
        )
    differ = [
        name
        for name in sorted(now)
        if not name.startswith(may_change) and before.get(name) != now[name]
    ]
    if differ:
        changed = [f"{name} was {before[name]!r} and is now {now[name]!r}" for name in differ]
        flag = f"--config.{differ[0]}={shlex.quote(str(before[differ[0]]))}"
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. Give the old "
            f"values to resume it, as {flag}, or another --workdir to start anew"
        )


def check_catalogue(saved: Mapping[str, str], fingerprint: str, path: str, workdir: Path) -> None:
    """Raises UserError where the catalogue at `path` is not the one that a run began with.

    saved: the run's record. fingerprint: of the catalogue as it is now.
    """
    if saved["catalogue"] != fingerprint:
        raise UserError(
            f"the catalogue {path} is not the one that {workdir} began with: bring "
            "that one back, or start anew with another --workdir"
        )


def check_statistics(saved: Mapping[str, str], statistics: str, workdir: Path) -> None:
    """Raises UserError where the same catalogue's attributes give other terms than when a run
    began, which weigh its negatives and are its labels.

    saved: the run's record. statistics: as `CorpusStatistics.to_json` writes them now.
    """
    if saved["statistics"] != statistics:
        raise UserError(
            f"{workdir} began with a version of the program that compares attributes otherwise: "
            "go on with that version, or start anew with another --workdir"
        )
