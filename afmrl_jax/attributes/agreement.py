"""How well attributes agree with those that are held to be true, and what a guess would score.

A pair is right where its name and its value are, compared as `attributes.comparison` does; one
that says nothing ("unknown") is none. F1 is micro: over all pairs of all listings.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from afmrl_jax.attributes.comparison import fold
from afmrl_jax.attributes.text import normalise

Attributes = Mapping[str, str]


def _pairs(attributes: Attributes) -> set[tuple[str, str]]:
    return {(fold(name), fold(value)) for name, value in normalise(attributes).items()}


def agreement(found: Sequence[Attributes], true: Sequence[Attributes]) -> dict[str, float]:
    """f1, precision and recall of the pairs, and exact_match, the share of listings whose pairs are
    all right and none is missing; 0 where there is nothing to count."""
    right = given = wanted = exact = 0
    for one, other in zip(map(_pairs, found), map(_pairs, true)):
        right, given, wanted = right + len(one & other), given + len(one), wanted + len(other)
        exact += one == other
    return {
        "f1": 2 * right / max(given + wanted, 1),
        "precision": right / max(given, 1),
        "recall": right / max(wanted, 1),
        "exact_match": exact / max(len(true), 1),
    }


def agreement_by_name(
    found: Sequence[Attributes], true: Sequence[Attributes]
) -> dict[str, dict[str, float]]:
    """The f1 of each attribute that is among the true ones, and in how many listings it is; the
    most frequent first."""
    shown = {fold(name): name for attributes in reversed(true) for name in normalise(attributes)}
    right, given, wanted = Counter(), Counter(), Counter()
    for one, other in zip(map(_pairs, found), map(_pairs, true)):
        right.update(name for name, _ in one & other)
        given.update(name for name, _ in one)
        wanted.update(name for name, _ in other)
    return {
        shown[name]: {"f1": 2 * right[name] / (given[name] + count), "listings": count}
        for name, count in wanted.most_common()
    }


class Majority:
    """The answer of one who sees a listing's category alone: of each attribute that most listings
    of the category have, the most frequent value. A category never seen gets that of all listings.
    """

    def __init__(self, examples: Iterable[tuple[str, Attributes]]):
        """examples: category and true attributes of listings to learn from."""
        listings: Counter[str | None] = Counter()
        values: dict[str | None, dict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )
        for category, attributes in examples:
            for key in (category, None):  # None: all
                listings[key] += 1
                for name, value in _pairs(attributes):
                    values[key][name][value] += 1
        self._answers = {
            key: {
                name: max(counts, key=lambda value: (counts[value], value))
                for name, counts in names.items()
                if 2 * counts.total() > listings[key]
            }
            for key, names in values.items()
        }

    def __call__(self, category: str) -> dict[str, str]:
        return self._answers.get(category, self._answers.get(None, {}))
