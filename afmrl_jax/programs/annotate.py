"""Annotates a catalogue's listings with attributes, by a model that reads them.

1. Find the listings of the split, or of a share of its products, that have no answer yet.
2. Send images and text of many listings at once to the model: one behind an endpoint, or a
   generator of this project.
3. Parse its answers: valid ones go to attributes.jsonl; the others go to invalid.jsonl, with the
   listings that the model refuses.
4. Stop when all listings are answered, the budget is spent, or no more answers arrive.
5. Print a summary of the files.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.annotation.answer_files import FILES, AnswerFiles
from afmrl_jax.annotation.answerers import (
    EndpointAnswerer,
    GeneratorAnswerer,
    open_endpoint,
    pinned_generator,
)
from afmrl_jax.annotation.options import Api, BudgetLimits, EndpointQuestion
from afmrl_jax.attributes.summary import describe_answers
from afmrl_jax.attributes.text import Verdict
from afmrl_jax.catalog.groups import share_of_products
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.names import SPLITS
from afmrl_jax.catalog.opening import ListingOptions, open_listings
from afmrl_jax.checkpoints.record import check_unchanged
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.logs import RunWriter
from afmrl_jax.core.options import Options, among, between, check_options

log = logging.getLogger(__name__)

SUSPICIOUS = 50  # first answers of a run; a warning tells if none is valid
MAY_CHANGE = (  # fields that change no answer, and may change when a run goes on
    "split", "log_every", "eval.batch", "api.base_url", "api.key_variable",
    "api.concurrency", "api.timeout", "api.retries", "budget.", "mesh.", "data.cache_dir",
)  # fmt: skip


@dataclass(frozen=True)
class Annotated(Options, section=""):
    """The listings that are annotated, and the model that annotates them."""

    split: str = among(*SPLITS, "all")
    share: float = between(1e-9, 1)  # of the split's products
    generator: str  # a workdir, a checkpoint or a folder; "" = an endpoint
    log_every: int = between(1)  # answers


@dataclass(frozen=True)
class GeneratorBatch(Options, section="eval"):
    """The batch of a generator."""

    batch: int = between(1)  # listings at once, on all devices


SHARES_WORKDIR = True  # all processes read it
OPTIONS = (Annotated, GeneratorBatch, ListingOptions)
ENDPOINT_OPTIONS = (EndpointQuestion, Api, BudgetLimits)


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Writes attributes.jsonl and invalid.jsonl into the workdir; see configs/annotate.py."""
    first_process = jax.process_index() == 0
    if jax.process_count() > 1 and not config.generator:
        raise UserError("one process asks an endpoint: give this command to one machine alone")
    # ---- model
    check_options(config, OPTIONS)
    if config.generator:
        generator = pinned_generator(config.generator)
        config = ConfigDict(config.to_dict() | {"generator": generator})
    else:
        check_options(config, ENDPOINT_OPTIONS)
        question = EndpointQuestion.of(config)
        endpoint = open_endpoint(question, Api.of(config), BudgetLimits.of(config))

    # ---- listings without an answer
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a training run: name another --workdir for attributes")
    if (workdir / "config.json").exists():
        before = (workdir / "config.json").read_text()
        check_unchanged(before, config.to_json(), workdir, MAY_CHANGE)
    catalog = open_listings(ListingOptions.of(config), workdir)
    if config.generator:
        model = GeneratorAnswerer(config.generator, mesh, config.eval.batch)
    else:
        model = EndpointAnswerer(endpoint, question)
    listings = share_of_products(catalog, catalog.indices(config.split), config.share)
    answers = None
    if first_process:
        write_atomically(workdir / "config.json", config.to_json(indent=2))
        answers = AnswerFiles(workdir)
    left = listings[~model.agree(done_of(catalog, listings, answers))]

    # ---- answers
    annotations = model.answers(catalog, left)
    if not first_process:
        for _ in annotations:  # this process computes its part of each batch
            pass
        return
    answered, tally = len(listings) - len(left), Counter()
    with contextlib.ExitStack() as stack:
        writer = RunWriter(workdir, first_step=answered, steps=len(listings), active=True)
        for closed_at_the_end in (answers, writer, annotations):
            stack.enter_context(contextlib.closing(closed_at_the_end))
        writer.say(f"{catalog.name}: {len(left)} of {len(listings)} listings are left to ask")
        for number, annotation in annotations:
            index = int(left[number])
            listing_id = catalog.listing(index).listing_id
            tally[annotation.verdict] += 1
            if tally.total() == SUSPICIOUS and not tally[Verdict.VALID.value]:
                writer.say(f"None of the first {SUSPICIOUS} answers is valid: see invalid.jsonl")
            if annotation.failure:
                writer.say(f"listing {listing_id!r} {annotation.failure}: {annotation.reason}")
            if annotation.failure == "unanswered":
                continue
            answers.write(listing_id, catalog.content(index).key, annotation)
            answered += 1
            if answered % config.log_every == 0:
                metrics = {**tally, **model.spent}
                writer.log(answered, metrics, "  ".join(f"{k} {v}" for k, v in metrics.items()))

    # ---- report
    print(f"{answered} of {len(listings)} listings are answered; this start: ", end="")
    print(", ".join(f"{n} {name}" for name, n in tally.most_common()) or "none", end="")
    print("; " + ", ".join(f"{n} {name}" for name, n in model.spent.items()))
    print(describe_answers(*(_read_lines(workdir / f"{name}.jsonl") for name in FILES)))
    if answered < len(listings):
        spent = endpoint.budget.spent
        why = f"The budget of {spent} is spent" if spent else "Some got no answer"
        print(f"{why}: the same command goes on.")
    print(f"Use them with --config.data.attributes={workdir / 'attributes.jsonl'}", flush=True)


def done_of(catalog: Catalog, listings: np.ndarray, answers: AnswerFiles | None) -> np.ndarray:
    """bool[N]: which of the listings, int[N], have an answer to their current content.

    answers: None in processes that do not read the files. Warns of listings that have
    changed since their answer.
    """
    done = np.zeros(len(listings), bool)
    if not answers or not answers.keys:
        return done
    ids = {listing_id for listing_id, _ in answers.keys}
    changed = 0
    for place, index in enumerate(listings):
        listing_id = catalog.listing(int(index)).listing_id
        done[place] = (listing_id, catalog.content(int(index)).key) in answers.keys
        changed += listing_id in ids and not done[place]
    if changed:
        log.warning(
            "%d listings have other texts or photos than those of their listing_id that are "
            "answered in %s: they are asked about; the old answers stay, and data.attributes "
            "leaves them out",
            changed,
            answers.workdir,
        )
    return done


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of an answer file, which `AnswerFile` has left whole."""
    with path.open("rb") as lines:
        yield from map(json.loads, lines)
