r"""Attributes as text: "name: value; name: value", printed in one way and read in many.

What is printed reads back as it was, whatever the Unicode: `parse(format_attributes(x))` gives
`normalise(x)`. Inside a name or a value `\`, `;` stand as `\\`, `\;`, and in a name `:` as `\:`.
The reader also takes line breaks for ";", and blanks and ";" where none are needed.
"""

import enum
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_CHARACTERS = 2_000
MAX_PAIRS = 50
# Unicode's stream-safe limit (UAX 15). No writing has more marks on one letter, and Python sorts a
# letter's marks in quadratic time.
MAX_MARKS = 30

_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Possessive, so that hostile text is never read twice.
_PIECE = re.compile(r"((?:\\[\\;:]|[^;\r\n])*+)(?:[;\r\n]|\Z)")
_PAIR = re.compile(r"((?:\\[\\;:]|[^:])*+):(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\;:])")


class Verdict(enum.Enum):
    """Whether a text keeps the format. Of several faults the first of these is told."""

    UNCLOSED = "unclosed"  # the token limit came before the end
    TOO_LONG = "too_long"  # more characters or pairs than allowed
    EMPTY = "empty"  # no pair
    MALFORMED = "malformed"  # something is no pair, or half of it is missing
    DUPLICATE = "duplicate"  # a name stands twice
    VALID = "valid"


@dataclass(frozen=True)
class Parsed:
    """What was read. attributes: all pairs that could be, whatever the verdict; normalised.

    spans: each name's value in the text as it was given, (first character, behind the last), from
    behind the colon to before the separator, blanks and all. form: how the text was read.
    """

    attributes: dict[str, str]
    verdict: Verdict
    spans: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)
    form: str = "plain"


def normalise(attributes: Mapping[str, str]) -> dict[str, str]:
    """The same attributes in the form that is printed and read; doing it again changes nothing.

    Names and values: NFC, at most MAX_MARKS marks a letter, half characters (lone surrogates)
    replaced by U+FFFD, white space and control characters collapsed to one space. Names in lower
    case. A pair whose name or value is blank is left out; of equal names the first stays.
    """
    normal: dict[str, str] = {}
    for name, value in attributes.items():
        name, value = _clean_name(name), _clean(value)
        if name and value:
            normal.setdefault(name, value)
    return normal


def format_attributes(attributes: Mapping[str, str]) -> str:
    """ "name: value; name: value", normalised, in the order given; "" where there are none."""
    pairs = normalise(attributes).items()
    return "; ".join(f"{_escape(name, ';:')}: {_escape(value, ';')}" for name, value in pairs)


def parse(
    text: str,
    closed: bool = True,
    *,
    max_characters: int = MAX_CHARACTERS,
    max_pairs: int = MAX_PAIRS,
) -> Parsed:
    """Reads what `format_attributes` wrote, or a model; never raises, in linear time.

    closed: whether the text ended by itself, not by a limit of tokens. Of a text that is cut, by
    that limit or here by `max_characters`, the last pair is not trusted, and left out.
    """
    blank = len(text) - len(text.lstrip())
    text = text.strip()
    long = len(text) > max_characters
    pieces = [piece for piece in _PIECE.finditer(text[:max_characters]) if piece[1].strip()]
    if long or not closed:
        pieces = pieces[:-1]
    attributes: dict[str, str] = {}
    spans = {}
    faults = set()
    for piece in pieces[:max_pairs]:
        pair = _PAIR.fullmatch(piece[1])
        name, value = pair.groups() if pair else ("", "")
        name, value = _clean_name(_unescape(name)), _clean(_unescape(value))
        if not name or not value:
            faults.add(Verdict.MALFORMED)
        elif name in attributes:
            faults.add(Verdict.DUPLICATE)
        else:
            attributes[name] = value
            spans[name] = (blank + piece.start(1) + pair.start(2), blank + piece.end(1))
    if not closed:
        faults.add(Verdict.UNCLOSED)
    if long or len(pieces) > max_pairs:
        faults.add(Verdict.TOO_LONG)
    if not pieces:
        faults.add(Verdict.EMPTY)
    verdict = next((fault for fault in Verdict if fault in faults), Verdict.VALID)
    return Parsed(attributes, verdict, spans)


def _clean(text: str) -> str:
    if not text.isascii():
        text = _SURROGATES.sub("\ufffd", text)
        text = _few_marks(unicodedata.normalize("NFC", _few_marks(text)))
    return " ".join(text.translate(_CONTROLS).split())


def _clean_name(text: str) -> str:
    return _clean(_clean(text).lower())


def _few_marks(text: str) -> str:
    """Without the marks of a letter beyond MAX_MARKS."""
    kept, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= MAX_MARKS:
            kept.append(character)
    return "".join(kept)


def _escape(text: str, special: str) -> str:
    for character in "\\" + special:
        text = text.replace(character, "\\" + character)
    return text


def _unescape(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)
