"""Evaluators that a run asks during training, as its configuration lists them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from jax.sharding import Mesh

from afmrl_jax.assembly.model import Assembly
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.fields import load_named
from afmrl_jax.core.options import Options
from afmrl_jax.training.step import Params


class Evaluator(Protocol):
    """Scores of a state, the one to judge it by first: the higher, the better."""

    def __call__(self, state: TrainState) -> dict[str, float]: ...


@dataclass(frozen=True)
class Trained:
    """What a run trains: all that an evaluator of a user's module may need.

    config: the whole configuration, which only evaluators of users' modules read. params: state ->
    the model's parameters, frozen ones and adapters among them.
    """

    config: Any
    mesh: Mesh
    catalog: Catalog
    model: Assembly
    params: Callable[[TrainState], Params]


@dataclass(frozen=True)
class Evaluators(Options, section=""):
    """Which evaluators a run asks.

    known: the program's, which its subclass names.
    """

    known: ClassVar[tuple[str, ...]] = ()
    evaluators: str  # names, or module:function, by commas; the first chooses the best checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        _makers(self.evaluators, self.known)


def make_evaluator(
    names: str, known: Mapping[str, Evaluator | None], trained: Trained
) -> Evaluator | None:
    """One evaluator of all that `names` lists, by commas; None where none has anything to judge.

    names: each a key of `known`, the program's evaluators (None: the catalogue has nothing for it),
    or module:function, whose function makes an evaluator of `trained`. The first number of the
    first is called `validation`, which chooses the best checkpoint, its others `validation_NAME`;
    those of further evaluators EVALUATOR_NAME.
    """
    evaluators = {}
    for name, make in _makers(names, known).items():
        evaluator = make(trained) if make else known[name]
        if evaluator is not None:
            evaluators[name.rpartition(":")[2]] = evaluator
    if not evaluators:
        return None

    def evaluate(state: TrainState) -> dict[str, float]:
        values = {}
        for name, evaluator in evaluators.items():
            scores = evaluator(state)
            if not values:
                first = next(iter(scores))
                values = {"validation": scores.pop(first)}
                name = "validation"
            values |= {f"{name}_{score}": value for score, value in scores.items()}
        return values

    return evaluate


def _makers(
    names: str, known: Iterable[str]
) -> dict[str, Callable[[Trained], Evaluator | None] | None]:
    """What makes each evaluator of a list; None for the program's. Raises UserError for a name that
    stands for nothing."""
    words = dict.fromkeys(known, "")
    return {
        name: None if name in words else load_named(name, words, "evaluators")
        for name in filter(None, map(str.strip, names.split(",")))
    }
