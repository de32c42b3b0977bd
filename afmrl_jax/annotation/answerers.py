"""The models that annotate listings: one behind an endpoint, or a generator of this project."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh

from afmrl_jax.annotation.answer_files import Annotation
from afmrl_jax.annotation.options import Api, BudgetLimits, EndpointQuestion
from afmrl_jax.annotation.replies import Kind
from afmrl_jax.assembly.description import describe
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.loaded import LoadedGenerator
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.attributes.reading import read_answer
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.processes import first_says
from afmrl_jax.data.processor import Row
from afmrl_jax.data.views import evaluation_row

if TYPE_CHECKING:
    from afmrl_jax.annotation.endpoint import Endpoint  # needs the extra `annotate`

log = logging.getLogger(__name__)

FAILURES = {Kind.ANSWERED: "", Kind.REFUSED: "refused", Kind.STOPPED: "stopped"}
DIGITS = 4  # of a confidence in the file


def pinned_generator(path: str) -> str:
    """The path of a checkpoint in the place of a generator's workdir: the best on validation.

    Without it a run that goes on after the workdir has a better checkpoint would mix the answers of
    two.
    """
    return find_pretrained(path, Generator, best=None).path


class GeneratorAnswerer:
    """A generator of this project answers, on all processes together."""

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
        """The mask of the first process, which alone has read the files."""
        return first_says(done)

    def answers(self, catalog: Catalog, listings: np.ndarray) -> Iterator[tuple[int, Annotation]]:
        """(the listing's place in listings, its annotation), in order."""
        tokenizer = self._model.generator.tokenizer
        for number, answer in enumerate(self._model.answers(catalog, listings)):
            description = describe(answer, tokenizer)
            self.spent["tokens"] += len(answer.tokens)
            confidence = {name: round(p, DIGITS) for name, p in description.confidence.items()}
            yield number, Annotation(answer.text, description.parsed, confidence)


class EndpointAnswerer:
    """A model behind an endpoint answers; only the first process asks it."""

    def __init__(self, endpoint: "Endpoint", question: EndpointQuestion):
        self._endpoint, self._question = endpoint, question

    @property
    def spent(self) -> dict[str, int]:
        budget = self._endpoint.budget
        return {"requests": budget.requests, "tokens": budget.tokens}

    def agree(self, done: np.ndarray) -> np.ndarray:
        """The mask as it is: no other process takes part."""
        return done

    def answers(self, catalog: Catalog, listings: np.ndarray) -> Iterator[tuple[int, Annotation]]:
        """(the listing's place in listings, its annotation), as answers arrive."""
        rows = shown_rows(catalog, (int(i) for i in listings), self._question)
        with contextlib.closing(self._endpoint.answers(rows)) as answers:
            for number, reply in answers:
                failure = FAILURES.get(reply.kind, "unanswered")
                parsed = read_answer(reply.text, reply.closed)
                yield number, Annotation(reply.text, parsed, failure=failure, reason=reply.reason)


def open_endpoint(question: EndpointQuestion, api: Api, limits: BudgetLimits) -> "Endpoint":
    """The model behind the endpoint of a configuration.

    Raises UserError where the client is not installed, or a field has an impossible value.
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
    if not key.isascii() or not key.isprintable():  # the client's error would quote the key
        raise UserError(
            f"the key in {api.key_variable} holds more than printable ASCII: correct it"
        )
    budget = Budget(limits.requests, limits.tokens)
    return Endpoint(api, key, prompt=question.prompt, budget=budget)


def shown_rows(
    catalog: Catalog, listings: Iterable[int], question: EndpointQuestion
) -> Iterator[Row]:
    """The rows that the model is sent: images made smaller, text cut."""
    for index in listings:
        row = evaluation_row(catalog, index, question.images)
        for image in row.images:
            image.thumbnail((question.image_side, question.image_side))
        yield Row(row.text[: question.text_characters], row.images)
