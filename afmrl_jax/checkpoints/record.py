"""Checks that a resumed run has the configuration, catalogue and terms with which it began."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.pages import outside_methods, program_fields

# Prefixes of fields that a resumed run may change: they change monitoring or placement, no results.
MAY_CHANGE = (
    "log_every", "eval_every", "evaluators", "checkpoint_every", "checkpoint_dir", "mesh.",
    "eval.batch", "data.workers", "data.timeout", "data.cache_dir", "profile",
)  # fmt: skip


def sections(saved: str | Mapping[str, Any], where: str | Path) -> Mapping[str, Any]:
    """A run's configuration, section by section, from its record.

    saved: its JSON, or the parsed JSON. where: names the run in errors. Raises UserError for any
    other value.
    """
    try:
        config = json.loads(saved) if isinstance(saved, str) else saved
        flatten(config)
    except (ValueError, AttributeError):
        raise UserError(
            f"{where}: the record of a run holds no configuration; bring it back, or start anew "
            "with another --workdir"
        ) from None
    return config


def recorded(saved: str | Mapping[str, Any], where: str | Path) -> Mapping[str, Any]:
    """A run's configuration as `sections` reads it. Raises UserError also where the fields are not
    those of the program as it is now."""
    config = sections(saved, where)
    program, fields = config.get("program"), flatten(config)
    current = program_fields(program) or fields
    # Fields that the page lacks may be those of a method outside the package.
    gone = set() if outside_methods(fields) else fields.keys() - current.keys()
    names = gone | (current.keys() - fields.keys())
    names = (name for name in names if not name.startswith(MAY_CHANGE))
    if differ := sorted(names):
        changes = [f"{name} is {'gone' if name in fields else 'new'} since" for name in differ]
        raise UserError(
            f"{where} holds a run of another version of {program}: {', '.join(changes)}; use that "
            "version, or start anew with another --workdir"
        )
    return config


def check_unchanged(
    saved: str, current: str, workdir: Path, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Raises UserError, naming the fields, where a run no longer has its first configuration.

    saved, current: JSON of the configuration then and now. may_change: prefixes of fields that may
    differ.
    """
    before, now = flatten(recorded(saved, workdir)), flatten(json.loads(current))
    if before.get("program") != now["program"]:
        raise UserError(
            f"{workdir} holds a run of {before.get('program')}: give {now['program']} another "
            "--workdir"
        )
    differ = [
        name
        for name in sorted(now.keys() | before.keys())
        if not name.startswith(may_change) and before.get(name) != now.get(name)
    ]
    if differ:
        changed = [
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in differ
        ]
        flag = f"--config.{differ[0]}={shlex.quote(str(before.get(differ[0])))}"
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. Give the old "
            f"values to resume it, as {flag}, or another --workdir to start anew"
        )


def check_catalogue(saved: Mapping[str, str], fingerprint: str, path: str, workdir: Path) -> None:
    """Raises UserError where the catalogue at `path` is not that with which a run began.

    saved: the run's record. fingerprint: of the catalogue as it is now.
    """
    if saved["catalogue"] != fingerprint:
        raise UserError(
            f"the catalogue {path} is not the one that {workdir} began with: bring "
            "that one back, or start anew with another --workdir"
        )


def check_statistics(saved: Mapping[str, str], statistics: str, workdir: Path) -> None:
    """Raises UserError where the same catalogue gives other attribute terms than when a run began:
    terms weight its negatives, and are the labels of its head.

    saved: the run's record. statistics: as `CorpusStatistics.to_json` writes them now.
    """
    if saved["statistics"] != statistics:
        raise UserError(
            f"{workdir} began with a version of the program that compares attributes otherwise: "
            "go on with that version, or start anew with another --workdir"
        )
