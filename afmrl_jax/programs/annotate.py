"""Writes attributes for a catalogue's listings, by a model that looks at them.

1. Find the listings of the split, or of a share of its products, that have no answer yet.
2. Show each one's images and text to the model, many at once: one behind an endpoint, or a
   generator that was trained here.
3. Read its answers: what keeps the format goes to attributes.jsonl, the rest to invalid.jsonl, with
   the listings that are refused.
4. Stop when all are answered, the budget is spent, or no answers come any more.
5. Tell what the files hold.
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
from afmrl_jax.attributes.summary import describe_answers
from afmrl_jax.attributes.text import Parsed, Verdict
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_ranges, flatten, to_json
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.writer import RunWriter
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.opening import open_listings
from afmrl_jax.data.processor import Row
from afmrl_jax.data.replies import Kind
from afmrl_jax.data.views import evaluation_row
from afmrl_jax.training.describer import Describer
from afmrl_jax.training.generator import Generator
from afmrl_jax.training.pretrained import find_pretrained
from afmrl_jax.training.unchanged import check_unchanged

if TYPE_CHECKING:
    from afmrl_jax.data.endpoint import Endpoint  # needs the extra `annotate`

log = logging.getLogger(__name__)

FILES = ("attributes", "invalid")  # .jsonl: what is valid, and the rest
FAILURES = {Kind.ANSWERED: "", Kind.REFUSED: "refused", Kind.STOPPED: "stopped"}
SUSPICIOUS = 50  # answers at the start without a valid one
KEPT_CHARACTERS = 10_000  # of an invalid answer
NO_CONTENT = ""  # in a line that does not say it
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
    """What a model said of a listing. confidence: as Description's, where a generator said it.

    failure: "" where it answered; "refused" or "stopped" where it would not answer the next time
    either, else "unanswered". reason: of the failure, in words.
    """

    text: str
    parsed: Parsed
    confidence: dict[str, float] | None = None
    failure: str = ""
    reason: str = ""

    @property
    def verdict(self) -> str:
        """The failure, else the parser's verdict."""
        return self.failure or self.parsed.verdict.value


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
    answers = AnswerFiles(workdir, config) if first_process else None
    left = listings[~model.agree(done_of(catalog, listings, answers))]

    # ---- ask
    said = model.answers(catalog, left)
    if not first_process:
        for _ in said:  # its part of each batch is answered here
            pass
        return
    answered, tally = len(listings) - len(left), Counter()
    with contextlib.ExitStack() as stack:
        writer = RunWriter(workdir, first_step=answered, steps=len(listings), active=True)
        for closed_at_the_end in (answers, writer, said):
            stack.enter_context(contextlib.closing(closed_at_the_end))
        writer.say(f"{catalog.name}: {len(left)} of {len(listings)} listings are left to ask")
        for number, one in said:
            index = int(left[number])
            listing_id = catalog.listing(index).listing_id
            tally[one.verdict] += 1
            if tally.total() == SUSPICIOUS and not tally[Verdict.VALID.value]:
                writer.say(f"None of the first {SUSPICIOUS} answers is valid: see invalid.jsonl")
            if one.failure:
                writer.say(f"listing {listing_id!r} {one.failure}: {one.reason}")
            if one.failure == "unanswered":
                continue
            answers.write(listing_id, catalog.content(index).key, one)
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


def chosen_listings(catalog: Catalog, split: str, share: float) -> np.ndarray:
    """int64 indices of a split's listings, ascending; of a share of its products, at least one.

    Products are whole: all listings of one, or none. A larger share holds the smaller one's.
    """
    listings = catalog.indices(split)
    products = np.unique(catalog.products[listings])
    chosen = np.random.default_rng(0).permutation(products)[: math.ceil(share * len(products))]
    return listings[np.isin(catalog.products[listings], chosen)]


def done_of(catalog: Catalog, listings: np.ndarray, answers: "AnswerFiles | None") -> np.ndarray:
    """bool[N]: which of the listings, int[N], are answered as they are now; none where no file is
    known. Tells how many have changed since their answer, and of how many that is not known."""
    done = np.zeros(len(listings), bool)
    if not answers or not answers.keys:
        return done
    ids = {listing_id for listing_id, _ in answers.keys}
    changed = untold = 0
    for place, index in enumerate(listings):
        listing_id = catalog.listing(int(index)).listing_id
        current = (listing_id, catalog.content(int(index)).key) in answers.keys
        older = not current and (listing_id, NO_CONTENT) in answers.keys
        done[place] = current or older
        untold += older
        changed += listing_id in ids and not done[place]
    if untold:
        log.warning(
            "%d listings are answered in %s by lines of an older version, which do not say what "
            "the model was shown: whether they have changed since cannot be told; delete a line "
            "to have its listing asked again",
            *(untold, answers.workdir),
        )
    if changed:
        log.warning(
            "%d listings have other texts or photos than those of their listing_id that are "
            "answered in %s: they are asked about; the old answers stay, and data.attributes "
            "leaves them out",
            changed,
            answers.workdir,
        )
    return done


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
                failure = FAILURES.get(one.kind, "unanswered")
                parsed = read_answer(one.text, one.closed)
                yield number, Said(one.text, parsed, failure=failure, reason=one.reason)


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
    """attributes.jsonl and invalid.jsonl of a workdir; keys: what they hold, each listing's id and
    its content (`Content.key`; NO_CONTENT in files of older versions). A listing whose line is
    deleted is asked again."""

    def __init__(self, workdir: Path, config: ConfigDict):
        """Leaves the configuration there too, which those who go on must have."""
        write_atomically(workdir / "config.json", to_json(config, indent=2))
        with contextlib.ExitStack() as stack:
            self._valid, self._invalid = (
                stack.enter_context(contextlib.closing(AnswerFile(workdir / f"{name}.jsonl")))
                for name in FILES
            )
            self._closed = stack.pop_all()
        self.workdir, self.keys = workdir, self._valid.keys | self._invalid.keys

    def close(self) -> None:
        """Ends the writing."""
        self._closed.close()

    def write(self, listing_id: str, content: str, said: Said) -> None:
        """Adds a line to the file that the answer belongs in. content: the listing's."""
        if said.verdict == Verdict.VALID.value:
            fields: dict[str, Any] = {"attributes": said.parsed.attributes}
            if said.parsed.form != "plain":
                fields["form"] = said.parsed.form
            if said.confidence is not None:
                fields["confidence"] = said.confidence
            self._valid.write(listing_id, **fields, content=content)
        else:
            reason = {"reason": said.reason} if said.reason else {}
            fields = {"verdict": said.verdict, **reason, "answer": said.text[:KEPT_CHARACTERS]}
            self._invalid.write(listing_id, **fields, content=content)


class AnswerFile:
    """Lines of JSON, each with a listing_id; after a kill it goes on behind the last whole one.

    keys: the listings that it holds, see AnswerFiles. Raises UserError where another run is writing
    it, or where a line is not its own.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.keys, whole, tail = _read_keys(path)
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


def _read_keys(path: Path) -> tuple[set[tuple[str, str]], int, bytes]:
    """The keys of a file's whole lines, the bytes of these, and what they lack: the end of the last
    one, where an editor left it out."""
    keys, whole, tail = set(), 0, b""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                if not _is_json(line):
                    break  # torn when a run was killed
                tail = b"\n"
            whole += len(line)
            try:
                fields = json.loads(line)
                keys.add((fields["listing_id"], fields.get("content", NO_CONTENT)))
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                raise UserError(
                    f"{path} line {number} is no answer of this program: delete the line"
                ) from None
    return keys, whole, tail


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of answers that is whole, as `AnswerFile` leaves it."""
    with path.open("rb") as lines:
        yield from map(json.loads, lines)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
