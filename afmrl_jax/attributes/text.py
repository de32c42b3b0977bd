r"""Prints attributes as text, "name: value; name: value", and reads them back.

`parse(format_attributes(x))` gives `normalise(x)`, whatever Unicode x holds. Inside a name or a
value `\`, `;` are written as `\\`, `\;`, and in a name `:` as `\:`. A name that begins as JSON, a
list or a table does gets a `\` before it.
The reader also accepts line breaks for ";", and superfluous blanks and ";". Otherwise it is strict:
it reads the answers of generators trained on this format. `attributes.reading` reads any model's.
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
# The quantifiers are possessive, so that no text makes the pattern backtrack.
_PIECE = re.compile(r"((?:\\[\\;:]|[^;\r\n])*+)(?:[;\r\n]|\Z)")
_PAIR = re.compile(r"((?:\\[\\;:]|[^:])*+):(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\;:])")
# The beginnings of JSON, lists, tables and markup: a name that begins so is of another format.
_FOREIGN = re.compile(r"[{}\[\"“<>|`*•·●▪‣–—-]|__|\d+[.)](?!\d)")


class Verdict(enum.Enum):
    """Whether a text keeps the format. A text with several faults gets the first of this list."""

    UNCLOSED = "unclosed"  # the token limit came before the end
    TOO_LONG = "too_long"  # more characters or pairs than allowed
    EMPTY = "empty"  # no pair, or only pairs that say nothing
    MALFORMED = "malformed"  # a piece is not a pair, or lacks its name or its value
    DUPLICATE = "duplicate"  # a name occurs twice
    VALID = "valid"


@dataclass(frozen=True)
class Parsed:
    """The result of reading a text.

    attributes: all pairs that could be read, whatever the verdict; normalised.
    spans: name -> (start, value, end) of the pair in the text before stripping: where it begins,
    where its value does, behind the colon, and where it ends, before the separator; blanks
    included. `attributes.reading` leaves it empty.
    form: one of `attributes.reading.FORMS`.
    """

    attributes: dict[str, str]
    verdict: Verdict
    spans: dict[str, tuple[int, int, int]] = field(default_factory=dict, compare=False, repr=False)
    form: str = "plain"


def normalise(attributes: Mapping[str, str]) -> dict[str, str]:
    """The same attributes in the form that is printed and read; normalising twice changes nothing.

    Names and values: NFC, at most MAX_MARKS marks a letter, half characters (lone surrogates)
    replaced by U+FFFD, white space and control characters collapsed to one space. Names are in
    lower case. A pair whose name is blank or whose value says nothing (`is_empty`) is left out. Of
    names that are equal when folded the first stays.
    """
    normal: dict[str, tuple[str, str]] = {}
    for name, value in attributes.items():
        name, value = _clean_name(name), _clean(value)
        if (key := fold(name)) and not is_empty(value):
            normal.setdefault(key, (name, value))
    return dict(normal.values())


def format_attributes(attributes: Mapping[str, str]) -> str:
    """ "name: value; name: value", normalised, in the mapping's order; "" if there are none."""
    pairs = normalise(attributes).items()
    return "; ".join(f"{_print_name(name)}: {_escape(value, ';')}" for name, value in pairs)


def parse(
    text: str,
    closed: bool = True,
    *,
    max_characters: int = MAX_CHARACTERS,
    max_pairs: int = MAX_PAIRS,
) -> Parsed:
    """Reads a text that `format_attributes` or a model wrote; never raises; takes linear time.

    closed: whether the text ended by itself, not by a limit of tokens. If the text is cut, by that
    limit or here by `max_characters`, its last pair may be incomplete and is left out.
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
            continue  # well formed, but the value says nothing
        elif key in names:
            faults.add(Verdict.DUPLICATE)
        else:
            names.add(key)
            attributes[name] = value
            start = blank + piece.start(1)
            spans[name] = (start, start + pair.start(2), blank + piece.end(1))
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
    """The name that was printed as this text; "" if the text is of another format."""
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
