"""Writes attributes for a catalogue's listings, by a model that looks at them.

1. Find the listings of the split that have no answer yet.
2. Show each one's images and text to the model, many at once.
3. Read its answers: what keeps the format goes to attributes.jsonl, the rest to invalid.jsonl.
4. Stop when all are answered, the budget is spent, or no answers come any more.
"""

import contextlib
import fcntl
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.attributes.text import Verdict, parse
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_ranges, flatten
from afmrl_jax.core.writer import RunWriter, write_atomically
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.opening import open_listings
from afmrl_jax.data.processor import Row
from afmrl_jax.data.views import evaluation_row
from afmrl_jax.training.checkpoint import check_unchanged

if TYPE_CHECKING:
    from afmrl_jax.data.endpoint import Endpoint  # needs the extra `annotate`

GIVE_UP = 10  # listings in a row without an answer
KEPT_CHARACTERS = 10_000  # of an invalid answer
RANGES = {
    "log_every": (1, math.inf),
    "images": (0, math.inf),
    "image_side": (16, 10_000),
    "text_characters": (0, math.inf),
    "api.concurrency": (1, 1000),
    "api.timeout": (0.01, 3600),
    "api.retries": (0, 100),
    "budget.requests": (0, math.inf),
    "budget.tokens": (0, math.inf),
}
MAY_CHANGE = (  # when a run goes on: these change no answer
    "split", "log_every", "api.base_url", "api.key_variable", "api.concurrency", "api.timeout",
    "api.retries", "budget.", "mesh.", "data.cache_dir",
)  # fmt: skip


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Writes attributes.jsonl and invalid.jsonl into the workdir; see configs/annotate.py."""
    if jax.process_index():
        return  # one process asks
    # ---- model
    check_ranges(flatten(config), RANGES)
    endpoint = open_endpoint(config)
    budget = endpoint.budget

    # ---- what is left to ask
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a training run: name another --workdir for attributes")
    if (workdir / "config.json").exists():
        check_unchanged((workdir / "config.json").read_text(), config, workdir, MAY_CHANGE)
    catalog = open_listings(config.data.path, config.data, workdir)
    write_atomically(workdir / "config.json", config.to_json(indent=2))
    valid, invalid = (AnswerFile(workdir / f"{name}.jsonl") for name in ("attributes", "invalid"))
    index_of = {catalog.listing(int(i)).listing_id: int(i) for i in catalog.indices(config.split)}
    left = [listing_id for listing_id in index_of if listing_id not in valid.ids | invalid.ids]
    rows = shown_rows(catalog, (index_of[listing_id] for listing_id in left), config)

    # ---- ask
    answered, tally, silent = len(index_of) - len(left), Counter(), 0
    with contextlib.ExitStack() as stack:
        writer = RunWriter(workdir, first_step=answered, steps=len(index_of), active=True)
        for closed_at_the_end in (valid, invalid, writer, answers := endpoint.answers(rows)):
            stack.enter_context(contextlib.closing(closed_at_the_end))
        writer.say(f"{catalog.name}: {len(left)} of {len(index_of)} listings are left to ask")
        for number, answer in answers:
            if answer.problem:
                tally["unanswered"], silent = tally["unanswered"] + 1, silent + 1
                writer.say(f"listing {left[number]!r} got no answer: {answer.problem}")
                if silent == GIVE_UP:
                    raise UserError(
                        f"{config.api.base_url} gave no answer to {GIVE_UP} listings in a row (the "
                        f"last: {answer.problem}); mend that and give the same command again"
                    )
                continue
            parsed = parse(answer.text, answer.closed)
            if parsed.verdict is Verdict.VALID:
                valid.write(left[number], attributes=parsed.attributes)
            else:
                text = answer.text[:KEPT_CHARACTERS]
                invalid.write(left[number], verdict=parsed.verdict.value, answer=text)
            answered, silent = answered + 1, 0
            tally[parsed.verdict.value] += 1
            if answered % config.log_every == 0:
                metrics = {**tally, "requests": budget.requests, "tokens": budget.tokens}
                writer.log(answered, metrics, "  ".join(f"{k} {v}" for k, v in metrics.items()))

    # ---- report
    print(f"{answered} of {len(index_of)} listings are answered; this start: ", end="")
    print(", ".join(f"{n} {name}" for name, n in tally.most_common()) or "none", end="")
    print(f"; {budget.requests} requests, {budget.tokens} tokens")
    if answered < len(index_of):
        why = f"The budget of {budget.spent} is spent" if budget.spent else "Some got no answer"
        print(f"{why}: the same command goes on.")
    print(f"Use them with --config.data.attributes={workdir / 'attributes.jsonl'}", flush=True)


def open_endpoint(config: ConfigDict) -> "Endpoint":
    """The model that answers. Of it, `main` uses `answers(rows)` and `budget`.

    Raises UserError where the client is missing, or a field can't be right.
    """
    try:
        from afmrl_jax.data.endpoint import Budget, Endpoint
    except ModuleNotFoundError as error:
        raise UserError(
            f"annotate needs the package {error.name}: install it with pip install -e '.[annotate]'"
        ) from None
    api = config.api
    if not api.model:
        raise UserError("say which model answers, as --config.api.model=NAME")
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", api.key_variable):
        raise UserError(
            "api.key_variable must be the name of an environment variable, as OPENAI_API_KEY; the "
            "key itself has no place in a configuration, which is written down"
        )
    key = os.environ.get(api.key_variable, "").strip()
    if not key.isascii() or not key.isprintable():  # told here: the client's error would quote it
        raise UserError(
            f"the key in {api.key_variable} holds more than printable ASCII: correct it"
        )
    return Endpoint(
        api.base_url,
        api.model,
        key,
        prompt=config.prompt,
        options=api.options,
        budget=Budget(config.budget.requests, config.budget.tokens),
        concurrency=api.concurrency,
        timeout=api.timeout,
        retries=api.retries,
    )


def shown_rows(catalog: Catalog, listings: Iterable[int], config: ConfigDict) -> Iterator[Row]:
    """What the model is shown of each listing: its images made smaller, its text cut."""
    for index in listings:
        row = evaluation_row(catalog, index, "image+text", max_images=config.images)
        for image in row.images:
            image.thumbnail((config.image_side, config.image_side))
        yield Row(row.text[: config.text_characters], row.images)


class AnswerFile:
    """Lines of JSON, each with a listing_id; after a kill it goes on behind the last whole one.

    ids: the listings that it holds. Raises UserError where another run is writing it, or where a
    line is not its own.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.ids, whole = _read_ids(path)
            self._file.truncate(whole)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another run: wait until it ends") from None
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the writing; another run may."""
        self._file.close()

    def write(self, listing_id: str, **fields: Any) -> None:
        """Adds a line, in one write."""
        line = json.dumps({"listing_id": listing_id, **fields}, ensure_ascii=False) + "\n"
        # A lone surrogate becomes \udXXX, which is how JSON writes it.
        self._file.write(line.encode(errors="backslashreplace"))


def _read_ids(path: Path) -> tuple[set[str], int]:
    """The listing_ids of a file's whole lines, and the bytes of these."""
    ids, whole = set(), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # torn when a run was killed
            whole += len(line)
            try:
                ids.add(json.loads(line)["listing_id"])
            except (ValueError, RecursionError, LookupError, TypeError):
                raise UserError(
                    f"{path} line {number} is no answer of this program: delete the line"
                ) from None
    return ids, whole
