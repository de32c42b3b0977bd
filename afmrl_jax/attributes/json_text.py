"""JSON as models write it: in prose, with single quotes or bare names, cut off, in many shapes.

The text is read once from left to right and never executed. Objects and lists may be nested
MAX_DEPTH deep.
"""

import json
import re
from collections.abc import Iterator

from afmrl_jax.attributes.comparison import fold

MAX_DEPTH = 8
MAX_STARTS = 8  # opening brackets in a text at which reading is tried

_START = re.compile(r"""\{(?=\s*(?:["'}]|\w[\w -]{0,50}:))|\[(?=\s*[\[{"'])""")
_TOKEN = re.compile(
    r"""\s*(?:("(?:[^"\\]|\\.)*+")|('(?:[^'\\]|\\.|'(?!\s*[,:}\]]))*+')|([{}\[\]:,])"""
    r"""|([^\s{}\[\]:,"'][^{}\[\]:,\n]*+))""",
    re.DOTALL,
)
_BETWEEN = re.compile(r"[\s,]*")
_LITERALS = {"true": "yes", "false": "no", "null": "", "none": ""}
_NAMES = frozenset(
    {"name", "attribute", "attribute name", "key", "property", "field", "feature", "label"}
)
_VALUES = frozenset({"value", "values", "attribute value", "val"})
WRAPPERS = frozenset(
    {"attributes", "key attributes", "product attributes", "properties", "product", "item", "items"}
    | {"result", "results", "data", "answer", "output", "response", "features", "specifications"}
)

Pairs = list[tuple[str, str]]


class Object(list):
    """The (key, node) pairs of an object, in order, repeats kept. A node is a str, an Object or an
    Array."""


class Array(list):
    """The nodes of a list. whole: True if the list was read to its end."""

    whole = False


class _Ended(Exception):
    """The text ends, or continues in a way that JSON does not."""


def read_json(text: str) -> tuple[Pairs, bool] | None:
    """The pairs of the first JSON in a text, and whether it is whole; None if there is no JSON.

    From JSON that is cut off, a pair is read only if more text follows it.
    """
    empty_json = None
    for start, _ in zip(_START.finditer(text), range(MAX_STARTS)):
        pairs, end, whole = [], start.start(), True
        while whole and _START.match(text, end):  # also several objects in a row
            node, whole, end = _Reader(text, end).read()
            # A list of two texts is a pair only inside another list: ["S", "M"] alone is a value.
            pairs += () if _is_pair(node) else _pairs(node)
            end = _BETWEEN.match(text, end).end()
        if pairs:
            return pairs, whole
        empty_json = empty_json or (([], True) if whole and not node else None)
    return empty_json


class _Reader:
    """Reads one object or list from `position` on, up to its end or to where it is cut off."""

    def __init__(self, text: str, position: int):
        self._text, self._end = text, position

    def read(self) -> tuple[Object | Array, bool, int]:
        """The object or list, whether it is whole, and where it ends."""
        node = Object() if self._next() == "{" else Array()
        try:
            self._fill(node, 1)
        except _Ended:
            return node, False, self._end
        return node, True, self._end

    def _next(self) -> str:
        token = _TOKEN.match(self._text, self._end)
        if not token:
            raise _Ended
        self._end = token.end()
        return token[0].strip()

    def _fill(self, node: Object | Array, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _Ended
        closing = "}" if isinstance(node, Object) else "]"
        token = self._next()
        while token != closing:
            key = ""
            if isinstance(node, Object):
                key = _plain(token)
                if self._next() != ":":
                    raise _Ended
                token = self._next()
            if token in ("{", "["):
                child = Object() if token == "{" else Array()
                node.append((key, child) if isinstance(node, Object) else child)
                self._fill(child, depth + 1)
                token = self._next()
            else:
                value = _plain(token)
                token = self._next()
                if token not in (",", closing):
                    raise _Ended
                node.append((key, value) if isinstance(node, Object) else value)
            if token == ",":
                token = self._next()
            elif token != closing:
                raise _Ended
        if isinstance(node, Array):
            node.whole = True


def _plain(token: str) -> str:
    """The text of a scalar: true is "yes", null is ""; a number stays as it is written."""
    if token in tuple("{}[]:,"):
        raise _Ended
    if token[0] == '"':
        try:
            return json.loads(token, strict=False)
        except ValueError:  # an escape that JSON lacks
            return token[1:-1].replace("\\", "")
    if token[0] == "'":
        return token[1:-1].replace("\\'", "'")
    return _LITERALS.get(token.lower(), token)


def _pairs(node: Object | Array | str, outer: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a tree. The name of a nested object stands before the names inside it
    ("size height")."""
    if isinstance(node, str):
        name, colon, value = node.partition(":")
        yield from [(name, value)] if colon else ()
    elif isinstance(node, Array):
        if _is_pair(node):
            yield node[0], node[1]
            return
        for part in node:
            yield from _pairs(part, outer)
    else:
        yield from _object_pairs(node, outer)


def _is_pair(node: Object | Array) -> bool:
    """Whether a node is a pair such as ["color", "navy"]."""
    has_two = isinstance(node, Array) and len(node) == 2 and node.whole
    return has_two and all(isinstance(part, str) for part in node) and ":" not in node[0]


def _object_pairs(node: Object, outer: str) -> Iterator[tuple[str, str]]:
    keys = {fold(key).replace("_", " "): child for key, child in node}
    name = next((keys[key] for key in keys if key in _NAMES), None)
    value = next((keys[key] for key in keys if key in _VALUES), None)
    if value is not None and (isinstance(name, str) or outer):
        unit = keys.get("unit", "")
        text = _text(value)
        if text is not None:
            yield name if isinstance(name, str) else outer, f"{text} {unit}".strip()
        return
    wrapped = [k for k, child in keys.items() if k in WRAPPERS and not isinstance(child, str)]
    if len(wrapped) == 1 and "attributes" in wrapped[0]:  # the other keys hold no attributes
        yield from _pairs(keys[wrapped[0]], outer)
        return
    for key, child in node:
        text = _text(child)
        if text is not None:
            yield f"{outer} {key}".strip(), text
        elif isinstance(child, Object) or any(not isinstance(part, str) for part in child):
            is_wrapper = len(node) == 1 or fold(key).replace("_", " ") in WRAPPERS
            is_value = isinstance(child, Object) and any(fold(k) in _VALUES for k, _ in child)
            inner = f"{outer} {key}".strip() if is_value or not is_wrapper else outer
            yield from _pairs(child, inner)


def _text(node: Object | Array | str) -> str | None:
    """A scalar, or a whole list of scalars joined by commas; None for a node that holds names."""
    if isinstance(node, str):
        return node
    if isinstance(node, Array) and node.whole and all(isinstance(part, str) for part in node):
        return ", ".join(part for part in node if part)
    return None
