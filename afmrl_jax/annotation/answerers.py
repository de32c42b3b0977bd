"""Who describes listings: a model behind an endpoint, or a generator that was trained here."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.annotation.answer_files import Said
from afmrl_jax.annotation.replies import Kind
from afmrl_jax.assembly.description import describe
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.loaded import LoadedGenerator
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.attributes.reading import read_answer
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import Options, between
from afmrl_jax.core.processes import first_says
from afmrl_jax.data.processor import Row
from afmrl_jax.data.views import evaluation_row

if TYPE_CHECKING:
    from afmrl_jax.annotation.endpoint import Endpoint  # needs the extra `annotate`

log = logging.getLogger(__name__)

FAILURES = {Kind.ANSWERED: "", Kind.REFUSED: "refused", Kind.STOPPED: "stopped"}
DIGITS = 4  # of a confidence in the file


@dataclass(frozen=True)
class EndpointQuestion(Options, section=""):
    """What a model behind an endpoint is shown of a listing."""

    prompt: str  # before its text
    images: int = between(0)  # the first ones
    image_side: int = between(16, 10_000)  # pixels of the longest side, at most
    text_characters: int = between(0)  # the first ones


@dataclass(frozen=True)
class Api(Options, section="api"):
    """An OpenAI-compatible endpoint."""

    base_url: str
    model: str  # its name there
    key_variable: str  # the environment variable that holds the key
    concurrency: int = between(1, 1000)  # requests at once
    timeout: float = between(0.01, 3600)  # seconds that a server may be silent
    retries: int = between(0, 100)  # of a request
    options: str  # JSON sent with each request


@dataclass(frozen=True)
class BudgetLimits(Options, section="budget"):
    """What one start of the program may spend; 0: no limit."""

    requests: int = between(0)  # retries among them
    tokens: int = between(0)  # of prompts, images and answers


def pin_generator(config: ConfigDict) -> ConfigDict:
    """The configuration with the generator's very checkpoint, the one that did best of a
    workdir: a run that goes on after it has got a better one would mix the answers of two."""
    pinned = ConfigDict(config.to_dict())
    pinned.generator = find_pretrained(config.generator, Generator, best=None).path
    return pinned.lock()


class Described:
    """A generator that was trained here answers, on all processes together."""

    def __init__(self, path: str, mesh: Mesh, batch: int):
        source = find_pretrained(path, Generator, best=None)
        self._model = LoadedGenerator.of(source, mesh, batch)
        self.spent = {"tokens": 0}  # of answers, in this start of the program
        log.info(
            "%s answers as it was trained to: this configuration's prompt, images and api fields "
            "do not count",
            source.label,
        )

    def agree(self, done: np.ndarray) -> np.ndarray:
        """The first process's view, which alone has read the files."""
        return first_says(done)

    def answers(self, catalog: Catalog, listings: np.ndarray) -> Iterator[tuple[int, Said]]:
        """The answer to each of listings beside its number there, in order."""
        tokenizer = self._model.generator.tokenizer
        for number, answer in enumerate(self._model.answers(catalog, listings)):
            one = describe(answer, tokenizer)
            self.spent["tokens"] += len(answer.tokens)
            confidence = {name: round(p, DIGITS) for name, p in one.confidence.items()}
            yield number, Said(answer.text, one.parsed, confidence)


class Asked:
    """A model behind an endpoint answers, to the first process."""

    def __init__(self, endpoint: "Endpoint", question: EndpointQuestion):
        self._endpoint, self._question = endpoint, question

    @property
    def spent(self) -> dict[str, int]:
        budget = self._endpoint.budget
        return {"requests": budget.requests, "tokens": budget.tokens}

    def agree(self, done: np.ndarray) -> np.ndarray:
        """No other process takes part."""
        return done

    def answers(self, catalog: Catalog, listings: np.ndarray) -> Iterator[tuple[int, Said]]:
        """The answers beside their listings' numbers, as they come."""
        rows = shown_rows(catalog, (int(i) for i in listings), self._question)
        with contextlib.closing(self._endpoint.answers(rows)) as answers:
            for number, one in answers:
                failure = FAILURES.get(one.kind, "unanswered")
                parsed = read_answer(one.text, one.closed)
                yield number, Said(one.text, parsed, failure=failure, reason=one.reason)


def open_endpoint(question: EndpointQuestion, api: Api, limits: BudgetLimits) -> "Endpoint":
    """The model that answers.

    Raises UserError where the client is missing, or a field can't be right.
    """
    try:
        from afmrl_jax.annotation.endpoint import Budget, Endpoint
    except ModuleNotFoundError as error:
        raise UserError(
            f"annotate needs the package {error.name}: install it with pip install -e '.[annotate]'"
        ) from None
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
        prompt=question.prompt,
        options=api.options,
        budget=Budget(limits.requests, limits.tokens),
        concurrency=api.concurrency,
        timeout=api.timeout,
        retries=api.retries,
    )


def shown_rows(
    catalog: Catalog, listings: Iterable[int], question: EndpointQuestion
) -> Iterator[Row]:
    """What the model is shown of each listing: its images made smaller, its text cut."""
    for index in listings:
        row = evaluation_row(catalog, index, question.images)
        for image in row.images:
            image.thumbnail((question.image_side, question.image_side))
        yield Row(row.text[: question.text_characters], row.images)
