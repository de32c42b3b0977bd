"""What training changed in a generator's answers to held-out listings, in numbers.

Axes: Q queries, a listing each.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afmrl_jax.attributes.agreement import CHANGES, changes
from afmrl_jax.core.tables import markdown_table

SHOWN = 20  # attributes that are told apart, those that changed most

Answers = Sequence[Mapping[str, str]]  # the attributes of Q answers, {} of an invalid one


def count_changes(
    answers: tuple[Answers, Answers], true: Answers, found: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """How often each of CHANGES happened, and what the queries found where it did.

    answers: of the same queries before and after. true: the listings' attributes. found: float[Q]
    each, the R@1 of the queries before and after. Returns
      queries        {change: how many queries have one; and under "recall@1_before" and
                     "recall@1_after" their means}
      pairs          {change: how many pairs}
      by_attribute   {name: {change: how many pairs}}, the names folded, of the SHOWN that changed
                     most
    An invalid answer is one without pairs: a listing whose answer became invalid left out all.
    """
    by_attribute: dict[str, Counter[str]] = defaultdict(Counter)
    queries: dict[str, list[int]] = {change: [] for change in CHANGES}
    for query, one in enumerate(map(changes, *answers, true)):
        for name, change in one.items():
            by_attribute[name][change] += 1
        for change in set(one.values()):
            queries[change].append(query)

    def changed(name: str) -> int:
        return by_attribute[name].total() - by_attribute[name]["kept"]

    names = sorted(by_attribute, key=lambda name: (-changed(name), name))
    total = sum(by_attribute.values(), Counter())
    before, after = found
    return {
        "queries": {
            change: {
                "count": len(some),
                "recall@1_before": float(np.mean(before[some])) if some else 0.0,
                "recall@1_after": float(np.mean(after[some])) if some else 0.0,
            }
            for change, some in queries.items()
        },
        "pairs": {change: total[change] for change in CHANGES},
        "by_attribute": {
            name: {c: by_attribute[name][c] for c in CHANGES} for name in names[:SHOWN]
        },
    }


def changes_table(counted: Mapping[str, Any]) -> str:
    """The result of `count_changes` as Markdown: pairs by attribute, then the queries that have
    such a change and what they found."""
    rows = [
        (name, *(str(counts[change]) for change in CHANGES))
        for name, counts in counted["by_attribute"].items()
    ]
    rows.append(("all", *(str(counted["pairs"][change]) for change in CHANGES)))
    queries = [counted["queries"][change] for change in CHANGES]
    rows.append(("queries", *(str(of_change["count"]) for of_change in queries)))
    for name in ("recall@1_before", "recall@1_after"):
        rows.append((name, *(f"{of_change[name]:.3f}" for of_change in queries)))
    heads = (change.replace("_", " ") for change in CHANGES)
    return markdown_table(("attributes, sft to rar", *heads), rows)
