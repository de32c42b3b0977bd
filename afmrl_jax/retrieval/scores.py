"""Scores of queries: their means, their files, and models side by side.

Axes: Q queries.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.retrieval import metrics

Results = Mapping[str, Mapping[str, float]]  # task -> metric -> value


@dataclass(frozen=True)
class Scores:
    """Scores of each query.

    queries: int64[Q], places of the scored queries among all, ascending. values: float64[Q] each,
    named as by `metrics.score_ranks`. extra: figures of all queries together.
    """

    queries: np.ndarray
    values: dict[str, np.ndarray]
    extra: dict[str, float]

    def means(self) -> dict[str, float]:
        """Means of the values, `recall@1_ci95` (half the width of its 95% interval), `n_queries`
        and the figures of `extra`."""
        means = {name: float(value.mean()) for name, value in self.values.items()}
        if "recall@1" in means:
            means["recall@1_ci95"] = metrics.interval95(self.values["recall@1"])
        return {**means, "n_queries": len(self.queries), **self.extra}


def write_evaluation(path: str | Path, results: Results) -> None:
    """Writes {task: {metric: value, n_queries, n_gallery}} as JSON, whole or not at all."""
    write_atomically(Path(path), json.dumps(results, indent=2, allow_nan=False) + "\n")


def write_queries(
    path: str | Path, scores_of: Mapping[str, Scores], listing_ids: list[str]
) -> None:
    """Writes {task: {"listing_ids": [...], "values": {metric: [...]}}} as JSON, a value a query, so
    that another evaluation can be paired with this one.

    listing_ids: of all queries, scored or not.
    """
    tasks = {
        task: {
            "listing_ids": [listing_ids[query] for query in scores.queries],
            "values": {name: value.tolist() for name, value in scores.values.items()},
        }
        for task, scores in scores_of.items()
    }
    write_atomically(Path(path), json.dumps(tasks, allow_nan=False) + "\n")


def paired(before: str | Path, after: str | Path) -> dict[str, dict[str, float]]:
    """The gains of queries between two evaluations, from the files of `write_queries`.

    Returns {task: {metric: mean of after - before, metric_ci95: half the width of its 95% interval,
    n_queries}} for the tasks of both. Raises UserError where a task's queries differ.
    """
    first, second = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (before, after))
    gains: dict[str, dict[str, float]] = {}
    for task in [task for task in first if task in second]:
        ids = first[task]["listing_ids"]
        if ids != second[task]["listing_ids"]:
            raise UserError(
                f"{before} and {after} judge {task} by other queries: evaluate both on the same "
                "catalogue with the same eval.queries, eval.gallery and splits"
            )
        gains[task] = {}
        for name, values in first[task]["values"].items():
            mean, half = metrics.paired(np.array(values), np.array(second[task]["values"][name]))
            gains[task] |= {name: mean, f"{name}_ci95": half}
        gains[task]["n_queries"] = len(ids)
    return gains


def results_table(models: Mapping[str, Results]) -> str:
    """A Markdown table of models ("untrained", "trained", ...), one line a task and model.

    The columns are the metrics of any of the models; a value is followed by its 95% interval, where
    it has one. Tasks without a common metric stand in separate tables.
    """
    tables: list[tuple[dict[str, None], list[tuple[str, str, Mapping[str, float]]]]] = []
    for task in dict.fromkeys(task for results in models.values() for task in results):
        rows = [(task, model, models[model][task]) for model in models if task in models[model]]
        names = dict.fromkeys(n for *_, scores in rows for n in scores if not n.endswith("_ci95"))
        metric = {name for name in names if not name.startswith("n_")}
        same = next((table for table in tables if metric & table[0].keys()), None)
        if same is None:
            tables.append((names, rows))
        else:
            same[0].update(names)
            same[1].extend(rows)
    return "\n".join(_table(*table) for table in tables)


def _table(names: Iterable[str], rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    names = sorted(names, key=lambda name: name.startswith("n_"))  # counts stand last
    head = ["task", "model", *(name.replace("recall@", "R@") for name in names)]
    cells = [
        [task, model, *(_cell(scores, name) for name in names)] for task, model, scores in rows
    ]
    return markdown_table(head, cells) + "\n"


def _cell(scores: Mapping[str, float], name: str) -> str:
    if name not in scores:
        return ""
    if name.startswith("n_"):
        return f"{scores[name]:,}"
    interval = scores.get(f"{name}_ci95")
    return f"{scores[name]:.3f}" + (f" ± {interval:.3f}" if interval is not None else "")
