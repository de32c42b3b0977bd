"""Whether a run that goes on is still the one that began: its configuration, its catalogue."""

import json
import logging
from pathlib import Path

from ml_collections import ConfigDict

from afmrl_jax.attributes import comparison
from afmrl_jax.attributes.bm25 import version_of
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten, to_json, with_limits

log = logging.getLogger(__name__)

# Fields that change how a run is watched or where it runs, never what it computes.
MAY_CHANGE = (
    "log_every", "eval_every", "checkpoint_every", "checkpoint_dir", "mesh.", "eval.batch",
    "data.workers", "data.timeout", "data.cache_dir", "profile",
)  # fmt: skip


def check_unchanged(
    saved: str, config: ConfigDict, workdir: Path, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Raises UserError where `config` differs from the one a run began with, field by field.

    saved: the JSON of that configuration. may_change: beginnings of fields that may differ.
    """
    before, now = (flatten(with_limits(json.loads(text))) for text in (saved, to_json(config)))
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
