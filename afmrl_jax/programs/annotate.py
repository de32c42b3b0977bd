"""Writes attributes for a catalogue's listings, by a model that looks at them.

1. Find the listings of the split, or of a share of its products, that have no answer yet.
2. Show each one's images and text to the model, many at once: one behind an endpoint, or a
   generator that was trained here.
3. Read its answers: what keeps the format goes to attributes.jsonl, the rest to invalid.jsonl.
4. Stop when all are answered, the budget is spent, or no answers come any more.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.attributes.reading import read_answer
from afmrl_jax.attributes.text import Parsed, Verdict
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_ranges, flatten, to_json
from afmrl_jax.core.writer import RunWriter, write_atomically
from afmrl_jax.data.catalog import Catalog, ConcatCatalog
from afmrl_jax.data.opening import open_listings
from afmrl_jax.data.processor import Row
from afmrl_jax.data.views import evaluation_row
from afmrl_jax.training.describer import Describer
from afmrl_jax.training.generator import Generator
from afmrl_jax.training.pretrained import find_pretrained
from afmrl_jax.training.unchanged import check_unchanged

if TYPE_CHECKING:
    from afmrl_jax.data.endpoint import Endpoint  # needs the extra `annotate`

log = logging.getLogger(__name__)

GIVE_UP = 10  # listings in a row without an answer
KEPT_CHARACTERS = 10_000  # of an invalid answer
DIGITS = 4  # of a confidence in the file
RANGES = {
    "log_every": (1, math.inf),
    "share": (1e-9, 1),
    "eval.batch": (1, math.inf),
}
ENDPOINT_RANGES = {
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
    "split", "log_every", "eval.batch", "api.base_url", "api.key_variable",
    "api.concurrency", "api.timeout", "api.retries", "budget.", "mesh.", "data.cache_dir",
    "profile", "checkpoint_dir",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a model said of a listing. confidence: as Description's, where a generator said it;
    problem: why nothing was said."""

    text: str
    parsed: Parsed
    confidence: dict[str, float] | None = None
    problem: str = ""


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Writes attributes.jsonl and invalid.jsonl into the workdir; see configs/annotate.py."""
    first_process = jax.process_index() == 0
    if jax.process_count() > 1 and not config.generator:
        raise UserError("one process asks an endpoint: give this command to one machine alone")
    # ---- model
    check_ranges(flatten(config), RANGES)
    if config.generator:
        config = pin_generator(config)
    else:
        check_ranges(flatten(config), ENDPOINT_RANGES)
        endpoint = open_endpoint(config)

    # ---- what is left to ask
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a training run: name another --workdir for attributes")
    if (workdir / "config.json").exists():
        check_unchanged((workdir / "config.json").read_text(), config, workdir, MAY_CHANGE)
    catalog = open_listings(config.data.path, config.data, workdir)
    model = Described(config, mesh) if config.generator else Asked(endpoint, config)
    listings = chosen_listings(catalog, config.split, config.share)
    if isinstance(catalog, ConcatCatalog):
        check_ids(catalog, listings)
    answers = AnswerFiles(workdir, config) if first_process else None
    left = listings[~model.agree(done_of(catalog, listings, answers))]

    # ---- ask
    said = model.answers(catalog, left)
    if not first_process:
        for _ in said:  # its part of each batch is answered here
            pass
        return
    answered, tally, silent = len(listings) - len(left), Counter(), 0
    with contextlib.ExitStack() as stack:
        writer = RunWriter(workdir, first_step=answered, steps=len(listings), active=True)
        for closed_at_the_end in (answers, writer, said):
            stack.enter_context(contextlib.closing(closed_at_the_end))
        writer.say(f"{catalog.name}: {len(left)} of {len(listings)} listings are left to ask")
        for number, one in said:
            listing_id = catalog.listing(int(left[number])).listing_id
            if one.problem:
                tally["unanswered"], silent = tally["unanswered"] + 1, silent + 1
                writer.say(f"listing {listing_id!r} got no answer: {one.problem}")
                if silent == GIVE_UP:
                    raise UserError(
                        f"{config.api.base_url} gave no answer to {GIVE_UP} listings in a row (the "
                        f"last: {one.problem}); mend that and give the same command again"
                    )
                continue
            answers.write(listing_id, one)
            answered, silent = answered + 1, 0
            tally[one.parsed.verdict.value] += 1
            if answered % config.log_every == 0:
                metrics = {**tally, **model.spent}
                writer.log(answered, metrics, "  ".join(f"{k} {v}" for k, v in metrics.items()))

    # ---- report
    print(f"{answered} of {len(listings)} listings are answered; this start: ", end="")
    print(", ".join(f"{n} {name}" for name, n in tally.most_common()) or "none", end="")
    print("; " + ", ".join(f"{n} {name}" for name, n in model.spent.items()))
    if answered < len(listings):
        spent = endpoint.budget.spent
        why = f"The budget of {spent} is spent" if spent else "Some got no answer"
        print(f"{why}: the same command goes on.")
    print(f"Use them with --config.data.attributes={workdir / 'attributes.jsonl'}", flush=True)


def chosen_listings(catalog: Catalog, split: str, share: float) -> np.ndarray:
    """int64 indices of a split's listings, ascending; of a share of its products, at least one.

    Products are whole: all listings of one, or none. A larger share holds the smaller one's.
    """
    listings = catalog.indices(split)
    products = np.unique(catalog.products[listings])
    chosen = np.random.default_rng(0).permutation(products)[: math.ceil(share * len(products))]
    return listings[np.isin(catalog.products[listings], chosen)]


def check_ids(catalog: ConcatCatalog, listings: np.ndarray) -> None:
    """Raises UserError where two of the listings, int[N], have one id, by which answers are known.

    Within one catalogue none have, or it would not have been opened.
    """
    ids = Counter(catalog.listing(int(index)).listing_id for index in listings)
    if twice := next((listing_id for listing_id, count in ids.items() if count > 1), None):
        raise UserError(
            f"several of the catalogues {catalog.name} have a listing {twice!r}, and one file of"
            " attributes could not tell them apart: annotate each in a --workdir of its own"
        )


def done_of(catalog: Catalog, listings: np.ndarray, answers: "AnswerFiles | None") -> np.ndarray:
    """bool[N]: which of the listings, int[N], are answered; none where no file is known."""
    if not answers or not answers.ids:
        return np.zeros(len(listings), bool)
    return np.array([catalog.listing(int(i)).listing_id in answers.ids for i in listings], bool)


def pin_generator(config: ConfigDict) -> ConfigDict:
    """The configuration with the generator's very checkpoint, the one that Describer takes of a
    workdir: a run that goes on after it has got a better one would mix the answers of two."""
    pinned = ConfigDict(config.to_dict())
    pinned.generator = find_pretrained(config.generator, Generator, best=None).path
    return pinned.lock()


class Described:
    """A generator that was trained here answers, on all processes together."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self._describe = Describer(config.generator, mesh, config.eval.batch, otherwise=config)
        self.spent = {"tokens": 0}  # of answers, in this start of the program
        log.info(
            "%s answers as it was trained to: this configuration's prompt, images and api fields "
            "do not count",
            self._describe.told,
        )

    def agree(self, done: np.ndarray) -> np.ndarray:
        """The first process's view, which alone has read the files."""
        return multihost_utils.broadcast_one_to_all(done.astype(np.uint8)).astype(bool)

    def answers(self, catalog: Catalog, listings: np.ndarray) -> Iterator[tuple[int, Said]]:
        """The answer to each of listings beside its number there, in order."""
        for number, one in enumerate(self._describe(catalog, listings)):
            self.spent["tokens"] += len(one.answer.tokens)
            confidence = {name: round(p, DIGITS) for name, p in one.confidence.items()}
            yield number, Said(one.answer.text, one.parsed, confidence)


class Asked:
    """A model behind an endpoint answers, to the first process."""

    def __init__(self, endpoint: "Endpoint", config: ConfigDict):
        self._endpoint, self._config = endpoint, config

    @property
    def spent(self) -> dict[str, int]:
        budget = self._endpoint.budget
        return {"requests": budget.requests, "tokens": budget.tokens}

    def agree(self, done: np.ndarray) -> np.ndarray:
        """No other process takes part."""
        return done

    def answers(self, catalog: Catalog, listings: np.ndarray) -> Iterator[tuple[int, Said]]:
        """The answers beside their listings' numbers, as they come."""
        rows = shown_rows(catalog, (int(i) for i in listings), self._config)
        with contextlib.closing(self._endpoint.answers(rows)) as answers:
            for number, one in answers:
                parsed = read_answer(one.text, one.closed)
                yield number, Said(one.text, parsed, problem=one.problem)


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


class AnswerFiles:
    """attributes.jsonl and invalid.jsonl of a workdir; ids: the listings that they hold."""

    def __init__(self, workdir: Path, config: ConfigDict):
        """Leaves the configuration there too, which those who go on must have."""
        write_atomically(workdir / "config.json", to_json(config, indent=2))
        with contextlib.ExitStack() as stack:
            self._valid, self._invalid = (
                stack.enter_context(contextlib.closing(AnswerFile(workdir / f"{name}.jsonl")))
                for name in ("attributes", "invalid")
            )
            self._closed = stack.pop_all()
        self.ids = self._valid.ids | self._invalid.ids

    def close(self) -> None:
        """Ends the writing."""
        self._closed.close()

    def write(self, listing_id: str, said: Said) -> None:
        """Adds a line to the file that the answer belongs in."""
        if said.parsed.verdict is Verdict.VALID:
            confidence = {} if said.confidence is None else {"confidence": said.confidence}
            self._valid.write(listing_id, attributes=said.parsed.attributes, **confidence)
        else:
            text = said.text[:KEPT_CHARACTERS]
            self._invalid.write(listing_id, verdict=said.parsed.verdict.value, answer=text)


class AnswerFile:
    """Lines of JSON, each with a listing_id; after a kill it goes on behind the last whole one.

    ids: the listings that it holds. Raises UserError where another run is writing it, or where a
    line is not its own.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.ids, whole, tail = _read_ids(path)
            self._file.truncate(whole)
            self._file.write(tail)
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


def _read_ids(path: Path) -> tuple[set[str], int, bytes]:
    """The listing_ids of a file's whole lines, the bytes of these, and what they lack: the end of
    the last one, where an editor left it out."""
    ids, whole, tail = set(), 0, b""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                if not _is_json(line):
                    break  # torn when a run was killed
                tail = b"\n"
            whole += len(line)
            try:
                ids.add(json.loads(line)["listing_id"])
            except (ValueError, RecursionError, LookupError, TypeError):
                raise UserError(
                    f"{path} line {number} is no answer of this program: delete the line"
                ) from None
    return ids, whole, tail


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
