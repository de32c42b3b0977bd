"""Evaluators that a run asks during training, as its configuration lists them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jax.sharding import Mesh

from afmrl_jax.assembly.model import Assembly
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.fields import load_named
from afmrl_jax.training.step import Params


class Evaluator(Protocol):
    """Scores of a state, the one to judge it by first: the higher, the better."""

    def __call__(self, state: TrainState) -> dict[str, float]: ...


@dataclass(frozen=True)
class Trained:
    """What a run trains: all that an evaluator of a user's module may need.

    params: state -> the model's parameters, frozen ones and adapters among them.
    """

    config: Any
    mesh: Mesh
    catalog: Catalog
    model: Assembly
    params: Callable[[TrainState], Params]


def make_evaluator(
    names: str, own: Mapping[str, Evaluator | None], trained: Trained
) -> Evaluator | None:
    """One evaluator of all that `names` lists, by commas; None where none has anything to judge.

    names: each a key of `own`, the program's evaluators (None: the catalogue has nothing for it),
    or module:function, whose function makes an evaluator of `trained`. The first number of the
    first is called `validation`, which chooses the best checkpoint, its others `validation_NAME`;
    those of further evaluators EVALUATOR_NAME. Raises UserError for an unknown name.
    """
    evaluators = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name in own:
            evaluator = own[name]
        else:
            evaluator = load_named(name, dict.fromkeys(own, ""), "evaluators")(trained)
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
