"""A configuration's fields: their dotted names, and what values they may have."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from afmrl_jax.core.errors import UserError


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value, of a ConfigDict or a dict."""
    flat = {}
    for key, value in config.items():
        # Not by its class: the losses read this file, and need no ml_collections.
        nested = hasattr(value, "items")
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def to_json(config: Any, indent: int | None = None) -> str:
    """A ConfigDict as JSON, in which inf, a limit that is off, is null: JSON has no such number."""
    values = config.to_dict()
    return json.dumps(_replaced(values, math.inf, None), indent=indent, allow_nan=False)


def with_limits(read: Any) -> dict[str, Any]:
    """What `json.loads` gives of `to_json`'s text, with inf again: no field has another null."""
    return _replaced(read, None, math.inf)


def _replaced(values: Any, one: float | None, other: float | None) -> Any:
    if isinstance(values, dict):
        return {name: _replaced(value, one, other) for name, value in values.items()}
    return other if values == one else values


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, tuple]) -> None:
    """Raises UserError for the first field outside its (lowest, highest), both allowed, or, where
    its range is words, that is none of them; and for any that is nan, which has no place in a
    record."""
    for field, allowed in ranges.items():
        if isinstance(allowed[0], str):
            check_choice(field, values[field], allowed)
            continue
        check_range(field, values[field], *allowed)
    for field, value in values.items():
        if value != value:
            raise UserError(f"{field} is {value!r}: give a number")


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raises UserError where the value is not between the two, both allowed."""
    if not low <= value <= high:
        raise UserError(f"{field} is {value!r}: give {_allowed(low, high)}")


def _allowed(low: float, high: float) -> str:
    most = str(high) if isinstance(high, int) else f"{high:g}"
    if 0 < low < 1e-5:  # stands for more than 0
        return "more than 0" if high == math.inf else f"more than 0, at most {most}"
    return f"{low:g} or more" if high == math.inf else f"{low:g} to {most}"


def check_choice(field: str, value: object, allowed: Sequence[str]) -> None:
    """Raises UserError, with the nearest choice, where the value is none of those allowed."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise UserError(f"{field} is {value!r}, expected one of {', '.join(allowed)}{hint}")
