"""A configuration's fields: their dotted names, and the values that they may have."""

import difflib
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afmrl_jax.core.errors import UserError


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value, of a ConfigDict or a dict, nested to any depth."""
    flat = {}
    for key, value in config.items():
        # Not isinstance(value, dict): a ConfigDict is no dict.
        nested = hasattr(value, "items")
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raises UserError where the value is below `low` or above `high`."""
    if not low <= value <= high:
        raise UserError(f"{field} is {value!r}: give {_allowed(low, high)}")


def _allowed(low: float, high: float) -> str:
    most = str(high) if isinstance(high, int) else f"{high:g}"
    if 0 < low < 1e-5:  # the smallest numbers stand for "more than 0"
        return "more than 0" if high == math.inf else f"more than 0, at most {most}"
    return f"{low:g} or more" if high == math.inf else f"{low:g} to {most}"


def check_choice(field: str, value: object, allowed: Sequence[str]) -> None:
    """Raises UserError, with the most similar choice, where the value is not allowed."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise UserError(f"{field} is {value!r}, expected one of {', '.join(allowed)}{hint}")


Mixture = tuple[tuple[str, ...], np.ndarray]  # words and their shares, float64


def parse_mixture(text: str, field: str, words: Sequence[str] | None = None) -> Mixture:
    """The words of a text such as "image+text 0.7, text 0.3", and their shares.

    words: those that may stand there; None for any. Raises UserError, naming `field`, for another
    word or shares that do not sum to 1.
    """
    chosen, shares = [], []
    for part in text.split(","):
        word, _, share = part.strip().partition(" ")
        try:
            shares.append(float(share or 1))
        except ValueError:
            raise UserError(f"{field}: {share!r} after {word!r} is not a number") from None
        if words is not None:
            check_choice(field, word, words)
        chosen.append(word)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{field}: the shares of {text!r} sum to {sum(shares):g}, not 1")
    return tuple(chosen), np.asarray(shares)


def load_named(name: str, known: Mapping[str, str], field: str) -> Any:
    """What `name`, a word of `known` or module:NAME, stands for.

    known: word -> module:NAME. field: of the configuration, for errors. Raises UserError where
    there is no such word, module or NAME.
    """
    if known and ":" not in name:
        check_choice(field, name, [*known, "module:NAME"])
        name = known[name]
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UserError(f"{field} is {name!r}: write it as module:NAME")
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another
        raise UserError(
            f"{field} is {name!r}, and there is no module {module}: name one that Python finds "
            "from this folder, or put its folder into PYTHONPATH"
        ) from None
    if not hasattr(loaded, attribute):
        raise UserError(f"{field} is {name!r}, and {module} has no {attribute}")
    return getattr(loaded, attribute)
