"""The reward-hacking watch: whether answers earn their reward by other means than attributes.

It computes figures of a batch of rollouts, each with a limit; the verdict names the figures beyond
their limits, and quotes rollouts. Axes: B rollouts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afmrl_jax.attributes.comparison import fold, words
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import Options, between
from afmrl_jax.rl.environment import Rollout

EXAMPLES = 3  # rollouts quoted for each figure beyond its limit
SHORTEST_ID = 4  # characters; "12" as a product_id would be found in every "12 cm"

PREDICATES = {  # sentences that the value of a figure begins
    "copied": "of the words of an answer's values are copied from the title (mean)",
    "leaked": "of the answers hold an id of their own listing",
    "answer_diversity": "is the diversity of the answers to different queries",
    "pair_diversity": "is the diversity of the attributes given to different queries",
    "held_out_gain": "is what such answers gain on held-out queries over none, or over those before"
    " training where these lose",
}
AT_MOST = ("copied", "leaked")  # figures whose limit is an upper bound


@dataclass(frozen=True)
class WatchLimits(Options, section="watch"):
    """Limits of the figures, beyond which a run stops."""

    copied: float = between(0, 1)  # at most: mean share of the words of an answer's values
    leaked: float = between(0, 1)  # at most: share of answers
    answer_diversity: float = between(0, 1)  # at least: 0 = all queries' are equal, 1 = all differ
    pair_diversity: float = between(0, 1)  # at least: likewise, of "name: value" pairs
    held_out_gain: float = between(-2, 2)  # at least: in units of the reward's measure


@dataclass(frozen=True)
class WatchVerdict:
    """figures: by the names of the limits. sentence: about those beyond their limits, "" without
    any."""

    figures: dict[str, float]
    sentence: str


def watch(
    rollouts: Sequence[Rollout], limits: WatchLimits, held_out_gain: float | None = None
) -> WatchVerdict:
    """The figures of B >= 1 rollouts, and a sentence with examples where any is beyond its limit.

    held_out_gain: mean gain (`rl.rewards`) of answers to held-out queries, where it was measured,
    less the gain before training where that was below 0.
    An answer that rephrases its title, names its listing, or is the same for every listing may be
    rewarded without any knowledge of attributes. So may one whose reward does not carry over to
    held-out queries.
    """
    answers = [" ".join(_words(rollout.answer)) for rollout in rollouts]
    pairs = [_pairs(rollout) for rollout in rollouts]
    queries = [rollout.query for rollout in rollouts]
    copied = [_copied(rollout) for rollout in rollouts]
    leaks = [_leaks(rollout) for rollout in rollouts]
    parsed = [share for share, rollout in zip(copied, rollouts) if rollout.attributes]
    figures = {
        "copied": float(np.mean(parsed)) if parsed else 0.0,
        "leaked": float(np.mean(leaks)),
        "answer_diversity": _diversity(queries, [{answer} for answer in answers]),
        "pair_diversity": _diversity(queries, pairs),
    }
    if held_out_gain is not None:
        figures["held_out_gain"] = float(held_out_gain)

    counts = Counter(answers)
    repeats, paid = [counts[answer] for answer in answers], [r.reward for r in rollouts]
    # By figure, how well each rollout illustrates it: the higher, the better.
    evidence = dict(zip(PREDICATES, (copied, leaks, repeats, repeats, paid)))
    charges = []
    for name, figure in figures.items():
        limit, most = getattr(limits, name), name in AT_MOST
        if figure > limit if most else figure < limit:
            bound = "at most" if most else "at least"
            charges.append(f"{figure:.3g} {PREDICATES[name]}, allowed is {bound} {limit:g}")
            charges[-1] += "".join(_examples(rollouts, evidence[name]))
    if not charges:
        return WatchVerdict(figures, "")
    return WatchVerdict(figures, "These rollouts look like reward hacking: " + "\n".join(charges))


def stopped(step: int, verdict: WatchVerdict, rollouts: Path) -> UserError:
    """The error that ends a run at this step. rollouts: the file that holds more of them."""
    return UserError(
        f"step {step}: {verdict.sentence}\nThe run has stopped; {rollouts} holds more. "
        "Mend the reward or raise policy.kl and start anew; to go on all the same raise the limit "
        "in watch.*"
    )


def _words(text: str) -> list[str]:
    return words(fold(text))


def _pairs(rollout: Rollout) -> set[str]:
    """Each attribute as "name: value", with case and spaces normalised."""
    pairs = rollout.attributes.items()
    return {f"{' '.join(_words(name))}: {' '.join(_words(value))}" for name, value in pairs}


def _copied(rollout: Rollout) -> float:
    """The share of the words of an answer's values that its title holds; 0 without any."""
    title = set(_words(rollout.title))
    words = [word for value in rollout.attributes.values() for word in _words(value)]
    return sum(word in title for word in words) / max(len(words), 1)


def _leaks(rollout: Rollout) -> bool:
    """Whether the answer holds an id of its listing as a whole word."""
    answer = fold(rollout.answer)
    return any(
        re.search(rf"(?<!\w){re.escape(listed)}(?!\w)", answer)
        for listed in map(fold, rollout.ids)
        if len(listed) >= SHORTEST_ID
    )


def _diversity(queries: Sequence[int], items: Sequence[Iterable[str]]) -> float:
    """How far queries differ in their items, from 0 (all have the same) to 1 (none is shared).

    (distinct items / mean distinct items of a query - 1) / (queries - 1): independent of the number
    of a query's answers and of their similarity. 1 where fewer than two queries have items.
    """
    of_query: dict[int, set[str]] = defaultdict(set)
    for query, some in zip(queries, items):
        of_query[query].update(some)
    listed = [some for some in of_query.values() if some]
    if len(listed) < 2:
        return 1.0
    distinct, mean = len(set.union(*listed)), float(np.mean([len(some) for some in listed]))
    return (distinct / mean - 1) / (len(listed) - 1)


def _examples(rollouts: Sequence[Rollout], evidence: Sequence[float]) -> list[str]:
    """The rollouts with the most evidence, as text; of equals those with the higher reward."""
    order = sorted(
        range(len(rollouts)), key=lambda i: (evidence[i], rollouts[i].reward), reverse=True
    )
    return [
        f"\n  {r.title!r} ({', '.join(r.ids)}) -> {r.answer!r}, reward {r.reward:.3g}"
        for r in (rollouts[i] for i in order[:EXAMPLES])
    ]
