r"""Attributes as text: "name: value; name: value", printed in one way and read in many.

What is printed reads back as it was, whatever the Unicode: `parse(format_attributes(x))` gives
`normalise(x)`. Inside a name or a value `\`, `;` stand as `\\`, `\;`, and in a name `:` as `\:`;
a name that begins as JSON, a list or a table does has a `\` before it.
The reader also takes line breaks for ";", and blanks and ";" where none are needed. It is strict:
it reads a generator that was taught this format. `attributes.reading` reads any model.
"""

import enum
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from afmrl_jax.attributes.comparison import few_marks, fold, is_empty

MAX_CHARACTERS = 2_000
MAX_PAIRS = 50

_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Possessive, so that hostile text is never read twice.
_PIECE = re.compile(r"((?:\\[\\;:]|[^;\r\n])*+)(?:[;\r\n]|\Z)")
_PAIR = re.compile(r"((?:\\[\\;:]|[^:])*+):(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\;:])")
# How JSON, lists, tables, markup begin: where a name begins so, another format was written.
_FOREIGN = re.compile(r"[{}\[\"“<>|`*•·●▪‣–—-]|__|\d+[.)](?!\d)")


class Verdict(enum.Enum):
    """Whether a text keeps the format. Of several faults the first of these is told."""

    UNCLOSED = "unclosed"  # the token limit came before the end
    TOO_LONG = "too_long"  # more characters or pairs than allowed
    EMPTY = "empty"  # no pair, or only such as say nothing
    MALFORMED = "malformed"  # something is no pair, or half of it is missing
    DUPLICATE = "duplicate"  # a name stands twice
    VALID = "valid"


@dataclass(frozen=True)
class Parsed:
    """What was read. attributes: all pairs that could be, whatever the verdict; normalised.

    spans: each name's value in the text as it was given, (first character, behind the last), from
    behind the colon to before the separator, blanks and all; `attributes.reading` tells none.
    form: how the text was written, see `attributes.reading`.
    """

    attributes: dict[str, str]
    verdict: Verdict
    spans: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)
    form: str = "plain"


def normalise(attributes: Mapping[str, str]) -> dict[str, str]:
    """The same attributes in the form that is printed and read; doing it again changes nothing.

    Names and values: NFC, at most MAX_MARKS marks a letter, half characters (lone surrogates)
    replaced by U+FFFD, white space and control characters collapsed to one space. Names in lower
    case. A pair whose name is blank or whose value says nothing (`is_empty`) is left out; of names
    that are equal when folded the first stays.
    """
    normal: dict[str, tuple[str, str]] = {}
    for name, value in attributes.items():
        name, value = _clean_name(name), _clean(value)
        if (key := fold(name)) and not is_empty(value):
            normal.setdefault(key, (name, value))
    return dict(normal.values())


def format_attributes(attributes: Mapping[str, str]) -> str:
    """ "name: value; name: value", normalised, in the order given; "" where there are none."""
    pairs = normalise(attributes).items()
    return "; ".join(f"{_print_name(name)}: {_escape(value, ';')}" for name, value in pairs)


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
    names, faults = set(), set()
    for piece in pieces[:max_pairs]:
        pair = _PAIR.fullmatch(piece[1])
        name, value = pair.groups() if pair else ("", "")
        name, value = _read_name(name), _clean(_unescape(value))
        key = fold(name)
        if not key or not value:
            faults.add(Verdict.MALFORMED)
        elif is_empty(value):
            continue  # said in the format, and says nothing
        elif key in names:
            faults.add(Verdict.DUPLICATE)
        else:
            names.add(key)
            attributes[name] = value
            spans[name] = (blank + piece.start(1) + pair.start(2), blank + piece.end(1))
    if not closed:
        faults.add(Verdict.UNCLOSED)
    if long or len(pieces) > max_pairs:
        faults.add(Verdict.TOO_LONG)
    if not attributes and Verdict.MALFORMED not in faults:
        faults.add(Verdict.EMPTY)
    verdict = next((fault for fault in Verdict if fault in faults), Verdict.VALID)
    return Parsed(attributes, verdict, spans)


def _clean(text: str) -> str:
    if not text.isascii():
        text = _SURROGATES.sub("\ufffd", text)
        text = few_marks(unicodedata.normalize("NFC", few_marks(text)))
    return " ".join(text.translate(_CONTROLS).split())


def _clean_name(text: str) -> str:
    return _clean(_clean(text).lower())


def _print_name(name: str) -> str:
    mark = "\\" if _FOREIGN.match(name) else ""
    return mark + _escape(name, ";:")


def _read_name(text: str) -> str:
    """The name that was printed as the text; "" where another format was written."""
    text = _clean(text)
    if _FOREIGN.match(text):
        return ""
    if text.startswith("\\") and _FOREIGN.match(text, 1):
        text = text[1:]
    return _clean_name(_unescape(text))


def _escape(text: str, special: str) -> str:
    for character in "\\" + special:
        text = text.replace(character, "\\" + character)
    return text


def _unescape(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)
