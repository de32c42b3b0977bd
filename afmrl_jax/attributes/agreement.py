"""Scores attributes against the true ones (F1, precision, recall), says how two answers differ,
and has a baseline that guesses.

A pair is right where both its name and its value are equal to a true pair's, compared as
`attributes.comparison` does. A pair whose value says nothing ("unknown") is not counted. F1 is
micro: over all pairs of all listings.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from afmrl_jax.attributes.comparison import fold
from afmrl_jax.attributes.text import normalise

Attributes = Mapping[str, str]


def _pairs(attributes: Attributes) -> set[tuple[str, str]]:
    return {(fold(name), fold(value)) for name, value in normalise(attributes).items()}


def agreement(predicted: Sequence[Attributes], true: Sequence[Attributes]) -> dict[str, float]:
    """f1, precision and recall of the pairs, and exact_match, the share of listings whose pairs are
    all right and none is missing; 0 where there is nothing to count."""
    n_right = n_predicted = n_true = n_exact = 0
    for predicted_pairs, true_pairs in zip(map(_pairs, predicted), map(_pairs, true)):
        n_right += len(predicted_pairs & true_pairs)
        n_predicted += len(predicted_pairs)
        n_true += len(true_pairs)
        n_exact += predicted_pairs == true_pairs
    return {
        "f1": 2 * n_right / max(n_predicted + n_true, 1),
        "precision": n_right / max(n_predicted, 1),
        "recall": n_right / max(n_true, 1),
        "exact_match": n_exact / max(len(true), 1),
    }


def agreement_by_name(
    predicted: Sequence[Attributes], true: Sequence[Attributes]
) -> dict[str, dict[str, float]]:
    """The f1 of each attribute that is among the true ones, and in how many listings it is; the
    most frequent first."""
    shown = {fold(name): name for attributes in reversed(true) for name in normalise(attributes)}
    n_right, n_predicted, n_true = Counter(), Counter(), Counter()
    for predicted_pairs, true_pairs in zip(map(_pairs, predicted), map(_pairs, true)):
        n_right.update(name for name, _ in predicted_pairs & true_pairs)
        n_predicted.update(name for name, _ in predicted_pairs)
        n_true.update(name for name, _ in true_pairs)
    return {
        shown[name]: {"f1": 2 * n_right[name] / (n_predicted[name] + count), "listings": count}
        for name, count in n_true.most_common()
    }


# What can become of an attribute between two answers.
CHANGES = (
    "kept",  # its value, right or wrong
    "corrected",  # a wrong value became the right one
    "spoilt",  # the right value became a wrong one
    "altered",  # a wrong value became another wrong one
    "left_out_right",  # it is left out; its value was right
    "left_out_wrong",
    "added_right",  # it is new, with the right value
    "added_wrong",
)


def changes(before: Attributes, after: Attributes, true: Attributes) -> dict[str, str]:
    """What became of each attribute of two answers to a listing: its name, folded, to one of
    CHANGES. An attribute that the listing does not have is wrong whatever its value."""
    first, last, right = (dict(_pairs(attributes)) for attributes in (before, after, true))

    def change(name: str) -> str:
        old, new, value = first.get(name), last.get(name), right.get(name)
        if old is None:
            return "added_right" if new == value else "added_wrong"
        if new is None:
            return "left_out_right" if old == value else "left_out_wrong"
        if old == new:
            return "kept"
        return "spoilt" if old == value else "corrected" if new == value else "altered"

    return {name: change(name) for name in sorted(first.keys() | last.keys())}


class Majority:
    """A baseline that sees only a listing's category. It answers with the attributes that most
    listings of the category have, each with its most frequent value. A category that is not among
    the examples gets the answer for all listings together."""

    def __init__(self, examples: Iterable[tuple[str, Attributes]]):
        """examples: category and true attributes of listings to learn from."""
        listings: Counter[str | None] = Counter()
        values: dict[str | None, dict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )
        for category, attributes in examples:
            for key in (category, None):  # None: all categories
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
