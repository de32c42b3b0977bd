"""A parsed answer: which tokens write which attribute, and the generator's confidence in each.

Axis: T tokens of an answer.
"""

import codecs
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from afmrl_jax.assembly.generator import Answer
from afmrl_jax.attributes.text import Parsed, Verdict, parse

# Byte-level BPE writes a byte as one letter: printable ones as themselves, others from U+0100 on.
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHER = (byte for byte in range(256) if byte not in _PLAIN)
_BYTE_OF = {chr(b): b for b in _PLAIN} | {chr(256 + n): b for n, b in enumerate(_OTHER)}


@dataclass(frozen=True)
class Description:
    """A generator's answer to a listing, parsed.

    confidence: for each of parsed.attributes, the probability of the value as written, given its
    name and the text before it: the product over the value's tokens.
    """

    answer: Answer
    parsed: Parsed
    confidence: dict[str, float]

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes of a valid answer; {} of an invalid one."""
        return self.sure(0.0)

    def sure(self, least: float) -> dict[str, str]:
        """The attributes of a valid answer with confidence >= least; {} of an invalid one."""
        if self.parsed.verdict is not Verdict.VALID:
            return {}
        pairs = self.parsed.attributes.items()
        return {name: value for name, value in pairs if self.confidence[name] >= least}


def describe(answer: Answer, tokenizer: Tokenizer) -> Description:
    """Parses an answer, and computes the confidence of its values.

    Names and separators do not count: the choice of attributes is no measure of their truth.
    """
    parsed = parse(answer.text, answer.closed)
    values = {name: (value, end) for name, (_, value, end) in parsed.spans.items()}
    log_confidence = dict.fromkeys(parsed.attributes, 0.0)
    for name, log_prob in zip(_written(answer, tokenizer, values), answer.log_probs):
        if name is not None:
            log_confidence[name] += float(log_prob)
    return Description(
        answer, parsed, {name: math.exp(value) for name, value in log_confidence.items()}
    )


def pairs_of_tokens(answer: Answer, tokenizer: Tokenizer) -> list[str | None]:
    """For each token of an answer, the name of the attribute that it writes, of its name, its colon
    or its value; None for what stands between the pairs."""
    spans = parse(answer.text, answer.closed).spans.items()
    return _written(answer, tokenizer, {name: (start, end) for name, (start, _, end) in spans})


def _written(
    answer: Answer, tokenizer: Tokenizer, spans: Mapping[str, tuple[int, int]]
) -> list[str | None]:
    """For each token, the first of the spans of the text that it writes a part of."""
    starts = token_starts(tokenizer, answer.tokens)
    owner: list[str | None] = [None] * len(answer.text)  # of each character
    for name, (first, end) in spans.items():
        owner[first:end] = [name] * (end - first)
    return [
        # A token has at least the character where it begins; the next one may begin there, too.
        next(filter(None, owner[start : max(end, start + 1)]), None)
        for start, end in zip(starts, [*starts[1:], len(owner)])
    ]


def token_starts(tokenizer: Tokenizer, tokens: np.ndarray) -> list[int]:
    """For each token, the place in the decoded text of the character that holds its first byte.

    tokenizer: byte-level. tokens: int[T]; the text keeps special tokens, as in `Generator.read`.
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
    """The bytes of a token, as the byte-level decoder writes them. A token is plain text where a
    letter of it stands for no byte."""
    text = tokenizer.id_to_token(token)
    try:
        return bytes(_BYTE_OF[letter] for letter in text)
    except KeyError:
        return text.encode()
