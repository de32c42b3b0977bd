"""What a trained generator says of listings, and how sure it is of each attribute.

Axes: N listings · T tokens of an answer.
"""

import codecs
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from afmrl_jax.assembly.generator import Answer, Answerer, Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.attributes.text import Parsed, Verdict, parse
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.views import evaluation_row

# Byte-level BPE writes a byte as one letter: printable ones as themselves, others from U+0100 on.
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHER = (byte for byte in range(256) if byte not in _PLAIN)
_BYTE_OF = {chr(b): b for b in _PLAIN} | {chr(256 + n): b for n, b in enumerate(_OTHER)}


@dataclass(frozen=True)
class Description:
    """What a generator says of one listing.

    confidence: of each of parsed.attributes, the probability of its value as written, given its
    name and the text before: the product over the value's tokens.
    """

    answer: Answer
    parsed: Parsed
    confidence: dict[str, float]

    def sure(self, least: float) -> dict[str, str]:
        """A valid answer's attributes with confidence >= least; {} where it is invalid."""
        if self.parsed.verdict is not Verdict.VALID:
            return {}
        found = self.parsed.attributes.items()
        return {name: value for name, value in found if self.confidence[name] >= least}


def describe(answer: Answer, tokenizer: Tokenizer) -> Description:
    """An answer read, with the confidence of its values.

    A token counts for the first value of which it writes a part. Names and separators count for
    none: which attributes a generator tells is no measure of whether they are right.
    """
    parsed = parse(answer.text, answer.closed)
    starts = token_starts(tokenizer, answer.tokens)
    owner: list[str | None] = [None] * len(answer.text)  # of each character
    for name, (first, end) in parsed.spans.items():
        owner[first:end] = [name] * (end - first)
    log_confidence = dict.fromkeys(parsed.attributes, 0.0)
    for start, end, log_prob in zip(starts, [*starts[1:], len(owner)], answer.log_probs):
        # The character in which a token begins is its own, though the next may begin there too.
        name = next(filter(None, owner[start : max(end, start + 1)]), None)
        if name is not None:
            log_confidence[name] += float(log_prob)
    return Description(
        answer, parsed, {name: math.exp(value) for name, value in log_confidence.items()}
    )


def token_starts(tokenizer: Tokenizer, tokens: np.ndarray) -> list[int]:
    """The character of the decoded text in which each token's first byte lies, in one pass.

    tokenizer: byte-level. tokens: int[T]; the text keeps special tokens, as `Generator.read`'s.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    starts, length = [], 0
    for token in tokens.tolist():
        written = _token_bytes(tokenizer, token)
        length += len(decoder.decode(written[:1]))
        unfinished = bool(decoder.getstate()[0])  # the byte's character is still to come
        starts.append(length - (not unfinished))
        length += len(decoder.decode(written[1:]))
    return starts


def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """As the byte-level decoder does it: a token with another letter is plain text."""
    text = tokenizer.id_to_token(token)
    try:
        return bytes(_BYTE_OF[letter] for letter in text)
    except KeyError:
        return text.encode()


class Describer:
    """A trained generator that describes listings, greedily.

    path: as in `find_pretrained`. batch: rows at once, of all processes. otherwise: settings for a
    model that has no run's, with `model` and `data`. Of a workdir it is the checkpoint that did
    best on validation: rewarded for too long, a generator may fall silent.
    """

    def __init__(self, path: str, mesh: Mesh, batch: int, *, otherwise: ConfigDict):
        """Raises UserError where there is no generator, or the mesh cannot split the batch."""
        source = find_pretrained(path, Generator, best=None)
        if source.enc.settings is None and "max_answer" not in otherwise.data:
            raise UserError(
                f"{path} is not known to answer with attributes: name what configs/sft.py or "
                "configs/rar.py has trained"
            )
        self.generator = source.model(otherwise)
        self.told, self.path = source.told, source.path  # see Pretrained
        self._answerer = Answerer(self.generator, mesh, batch, temperature=0)
        self._params = source.load(abstract_params(self.generator, mesh))

    def __call__(self, catalog: Catalog, listings: np.ndarray) -> Iterator[Description]:
        """What is said of each of listings, int[N] indices, in order, the same on every process."""
        row = functools.partial(evaluation_row, catalog)
        for answer in self._answerer.answers(self._params, listings, row):
            yield describe(answer, self.generator.tokenizer)
