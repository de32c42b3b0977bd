"""Summarises a model's answers in a few lines, so that a person can judge them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_NAMES = 12  # most frequent names that are shown
SHOWN_ONCE = 5  # names of a single listing that are shown
SHOWN_CHARACTERS = 60  # characters of a name
SHOWN_REASON = 300  # characters of a reason


def describe_answers(
    valid: Iterable[Mapping[str, Any]], invalid: Iterable[Mapping[str, Any]]
) -> str:
    """Lines about the number of answers, their forms and the attributes' names; no final newline.

    valid: {"attributes": {name: value}}, with "form" if the answer's form was not plain.
    invalid: {"verdict": ..., "answer": ...}, with "reason" if no answer came.
    """
    forms, names, listings = Counter(), Counter(), 0
    for line in valid:
        attributes = line.get("attributes")
        listings += 1
        forms[str(line.get("form", "plain"))] += 1
        names.update(list(attributes) if isinstance(attributes, dict) else ())
    lines = [f"{listings} valid"]
    if listings:
        lines[0] += f", {names.total() / listings:.1f} attributes each; read as {_counts(forms)}"
        lines.append(_describe_names(names, listings))
    verdicts, reasons, silent = Counter(), Counter(), 0
    for line in invalid:
        verdict = str(line.get("verdict"))
        verdicts[verdict] += 1
        silent += verdict == "unclosed" and not str(line.get("answer")).strip()
        if "reason" in line:
            reasons[str(line["reason"])] += 1
    if verdicts:
        lines.append(
            f"{verdicts.total()} invalid: {_counts(verdicts)}; to have some asked again, delete "
            "their lines from invalid.jsonl"
        )
    if silent:
        lines.append(
            f"{silent} of the unclosed hold no word: where a model thinks first, raise the limit "
            "of tokens in api.options, or have it not think"
        )
    if reasons:
        reason, count = reasons.most_common(1)[0]
        reason = reason if len(reason) <= SHOWN_REASON else reason[: SHOWN_REASON - 3] + "..."
        lines.append(f"the commonest reason for no answer ({count}): {reason}")
    return "\n".join(lines)


def _describe_names(names: Counter, listings: int) -> str:
    """The most frequent names, then those of a single listing: many such names are a sign that the
    format was misread."""
    shown = Counter(dict(names.most_common(SHOWN_NAMES)))
    description = f"names: {_counts(shown)}"
    if more := len(names) - len(shown):
        description += f" and {more} more"
    once = [name for name, count in names.items() if count == 1] if listings > 1 else []
    if once:
        examples = ", ".join(_shown(name) for name in once[:SHOWN_ONCE])
        description += f"; {len(once)} of {len(names)} in one listing only, as {examples}"
    return description


def _counts(counter: Counter) -> str:
    return ", ".join(f"{_shown(name)} {count}" for name, count in counter.most_common())


def _shown(name: str) -> str:
    """The name, shortened to fit a line and without control characters that move a cursor."""
    name = name if len(name) <= SHOWN_CHARACTERS else name[: SHOWN_CHARACTERS - 3] + "..."
    return name if name.isprintable() else ascii(name)
