"""Whether a run that goes on is still the one that began: its configuration, its catalogue."""

import functools
import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afmrl_jax.attributes import comparison
from afmrl_jax.attributes.bm25 import version_of
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.pages import program_fields

log = logging.getLogger(__name__)

# The kind of fingerprint that records have; without it, one of texts and of images' sizes.
FINGERPRINTS = "bytes"

# Fields that change how a run is watched or where it runs, never what it computes.
MAY_CHANGE = (
    "log_every", "eval_every", "checkpoint_every", "checkpoint_dir", "mesh.", "eval.batch",
    "data.workers", "data.timeout", "data.cache_dir", "profile",
)  # fmt: skip

# Fields that the first records lack, with the value that computes what was computed without them. A
# new field that MAY_CHANGE does not name belongs here.
BEFORE = {
    "data.answer_dropout": 0.0,
    "data.attributes": "",
    "data.buckets": 1,
    "data.described_only": False,
    "data.prompt": "plain",
    "data.shared_ids": True,
    "eval.enrich": "both",
    "generator": "",
    "loss.head_labels": 2048,
    "loss.head_weight": 0.0,
    "model.lora_alpha": 32.0,
    "model.lora_rank": 0,
    "model.lora_targets": r"^layers\.",
    "optimizer.name": "adamw",
    "share": 1.0,
}


def recorded(saved: str | Mapping[str, Any]) -> ConfigDict:
    """A run's configuration, from its record; fields that are newer have BEFORE's values.

    saved: its JSON, or what that says. Raises UserError where it is neither.
    """
    try:
        config = json.loads(saved) if isinstance(saved, str) else saved
        program, fields = config.get("program"), flatten(config)
    except (ValueError, AttributeError):
        raise UserError("the record of a run holds no configuration") from None
    for name in program_fields(program).keys() - fields.keys():
        key = name.partition(".")[2] if program == "cit" else name
        if key in BEFORE:
            *sections, field = name.split(".")
            inner = functools.reduce(lambda part, key: part.setdefault(key, {}), sections, config)
            inner[field] = BEFORE[key]
    return ConfigDict(config)


def check_unchanged(
    saved: str, config: ConfigDict, workdir: Path, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Raises UserError where `config` differs from the one a run began with, field by field.

    saved: the JSON of that configuration. may_change: beginnings of fields that may differ.
    """
    try:
        before = flatten(recorded(saved))
    except UserError as error:
        raise UserError(
            f"{workdir}: {error}; bring it back, or start anew with another --workdir"
        ) from None
    now, older = flatten(json.loads(config.to_json())), flatten(json.loads(saved))
    if before.get("program") != now["program"]:
        raise UserError(
            f"{workdir} holds a run of {before.get('program')}: give {now['program']} another "
            "--workdir"
        )
    differ = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(may_change)
    ]
    if alone := [name for name in differ if name not in before or name not in now]:
        fields = [f"{name} is {'gone' if name in before else 'new'} since" for name in alone]
        raise UserError(
            f"{workdir} holds a run of another version of {now['program']}: {', '.join(fields)}; "
            "go on with that version, or start anew with another --workdir"
        )
    if differ:
        changed = [
            f"{name} was {before[name]!r}{'' if name in older else ' (the run is older than it)'} "
            f"and is now {now[name]!r}"
            for name in differ
        ]
        flag = f"--config.{differ[0]}={shlex.quote(str(before[differ[0]]))}"
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. Give the old "
            f"values to resume it, as {flag}, or another --workdir to start anew"
        )


def catalogue_record(fingerprint: str) -> dict[str, str]:
    """What a run's record says of its catalogue."""
    return {"catalogue": fingerprint, "fingerprints": FINGERPRINTS}


def check_catalogue(saved: dict[str, str], fingerprint: str, path: str, workdir: Path) -> None:
    """Raises UserError where the catalogue at `path` is not the one that a run began with.

    saved: the run's record. fingerprint: of the catalogue as it is now. Where the record's is of an
    older kind, which cannot be compared, only warns.
    """
    if saved["catalogue"] == fingerprint:
        return
    if saved.get("fingerprints") == FINGERPRINTS:
        raise UserError(
            f"the catalogue {path} is not the one that {workdir} began with: bring "
            "that one back, or start anew with another --workdir"
        )
    log.warning(
        "%s began with a version that knew photos by their size alone: it goes on with %s, and "
        "whether that is still its catalogue cannot be told",
        workdir,
        path,
    )


def check_terms(statistics: str, workdir: Path, *, labels: bool) -> None:
    """Warns where a run began with attribute terms that are made otherwise today.

    statistics: of its record. Raises UserError where such terms are the labels that it learns.
    """
    before = version_of(statistics)
    if before == comparison.VERSION:
        return
    began = (
        f"{workdir} began with a program that compares attributes otherwise (version {before}, "
        f"this is {comparison.VERSION})"
    )
    if labels:
        raise UserError(
            f"{began}, and its head's labels are others now: end the run with that program, or "
            "begin anew in another --workdir"
        )
    log.warning("%s: from here on its negatives are weighed and masked as this one does", began)
