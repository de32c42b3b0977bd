"""What a model's answers hold, in a few lines that a person can judge them by."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_NAMES = 12  # the commonest
SHOWN_ONCE = 5  # of the names that stand in one listing only
SHOWN_CHARACTERS = 60  # of a name
SHOWN_REASON = 300  # characters


def describe_answers(
    valid: Iterable[Mapping[str, Any]], invalid: Iterable[Mapping[str, Any]]
) -> str:
    """Lines without an end: how many answers there are, how they were read, the attributes' names.

    valid: {"attributes": {name: value}}, with "form" where an answer was not plain. invalid:
    {"verdict": ..., "answer": ...}, with "reason" where no answer came.
    """
    forms, names, listings = Counter(), Counter(), 0
    for line in valid:
        attributes = line.get("attributes")
        listings += 1
        forms[str(line.get("form", "plain"))] += 1
        names.update(list(attributes) if isinstance(attributes, dict) else ())
    told = [f"{listings} valid"]
    if listings:
        told[0] += f", {names.total() / listings:.1f} attributes each; read as {_counts(forms)}"
        told.append(_describe_names(names, listings))
    verdicts, reasons, silent = Counter(), Counter(), 0
    for line in invalid:
        verdict = str(line.get("verdict"))
        verdicts[verdict] += 1
        silent += verdict == "unclosed" and not str(line.get("answer")).strip()
        if "reason" in line:
            reasons[str(line["reason"])] += 1
    if verdicts:
        told.append(
            f"{verdicts.total()} invalid: {_counts(verdicts)}; to have some asked again, delete "
            "their lines from invalid.jsonl"
        )
    if silent:
        told.append(
            f"{silent} of the unclosed hold no word: where a model thinks first, raise the limit "
            "of tokens in api.options, or have it not think"
        )
    if reasons:
        reason, count = reasons.most_common(1)[0]
        reason = reason if len(reason) <= SHOWN_REASON else reason[: SHOWN_REASON - 3] + "..."
        told.append(f"the commonest reason for no answer ({count}): {reason}")
    return "\n".join(told)


def _describe_names(names: Counter, listings: int) -> str:
    """The commonest, then those that one listing alone has: many of these are a misread format."""
    shown = Counter(dict(names.most_common(SHOWN_NAMES)))
    told = f"names: {_counts(shown)}"
    if more := len(names) - len(shown):
        told += f" and {more} more"
    once = [name for name, count in names.items() if count == 1] if listings > 1 else []
    if once:
        examples = ", ".join(_shown(name) for name in once[:SHOWN_ONCE])
        told += f"; {len(once)} of {len(names)} in one listing only, as {examples}"
    return told


def _counts(counter: Counter) -> str:
    return ", ".join(f"{_shown(name)} {count}" for name, count in counter.most_common())


def _shown(name: str) -> str:
    """A name that fits a line and moves no terminal's cursor."""
    name = name if len(name) <= SHOWN_CHARACTERS else name[: SHOWN_CHARACTERS - 3] + "..."
    return name if name.isprintable() else ascii(name)
