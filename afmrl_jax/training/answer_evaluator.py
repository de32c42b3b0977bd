"""How good a generator's answers to held-out listings are."""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afmrl_jax.assembly.generator import batches_of
from afmrl_jax.assembly.loaded import LoadedGenerator
from afmrl_jax.attributes.agreement import Majority, agreement, agreement_by_name
from afmrl_jax.attributes.text import Verdict, format_attributes, normalise, parse
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.logs import cut_back
from afmrl_jax.core.mesh import local_rows, put_batch, replicated
from afmrl_jax.core.options import Options, between
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.data.answers import question_and_answer
from afmrl_jax.data.views import listing_text
from afmrl_jax.training.evaluators import Trained
from afmrl_jax.training.step import Params

MAJORITY_LISTINGS = 20_000  # of the training split, from which the guesses are learned


@dataclass(frozen=True)
class AnswerEvaluation(Options, section="eval"):
    """How the generator is judged."""

    batch: int = between(1)  # listings answered at once
    validation_listings: int = between(1)
    listings: int = between(1)  # of the test split
    samples: int = between(0)  # answers shown of each evaluation


class AnswerEvaluator:
    """Lets the generator answer held-out listings and compares with their attributes; called with
    a state it is the evaluator `answers`."""

    def __init__(
        self,
        trained: Trained,
        options: AnswerEvaluation,
        chunk: int,
        listings: dict[str, np.ndarray],
        workdir: Path,
    ):
        """chunk: tokens of each row whose logits are in memory at once. listings: split -> int64,
        indices; from those of `train` the guesses by category are learned."""
        self.trained, self._listings, self._path = trained, listings, workdir / "samples.jsonl"
        generator, self._batch, self._shown = trained.model, options.batch, options.samples
        self._generator = LoadedGenerator(generator, None, trained.mesh, self._batch)
        loss = generator.answer_loss(chunk)
        self._loss = jax.jit(loss, out_shardings=replicated(trained.mesh))
        self._processor = generator.processor(answers=True)
        self._local = local_rows(trained.mesh, self._batch, "eval.batch")

    def go_on(self, step: int) -> None:
        """The run goes on from this step: samples of later ones are removed."""
        if jax.process_index() == 0:
            cut_back(self._path, step)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """F1, loss, exact match and share of valid answers of the validation listings."""
        scores = self.scores(state, "validation")["generator"]
        return {name: scores[name] for name in ("f1", "loss", "exact_match", "valid")}

    @functools.cached_property
    def _majority(self) -> Majority:
        chosen = np.random.default_rng(0).permutation(self._listings["train"])[:MAJORITY_LISTINGS]
        shown = (self.trained.catalog.listing(int(index)) for index in chosen)
        return Majority((listing.category, listing.attributes) for listing in shown)

    def scores(self, state: TrainState, split: str) -> dict[str, Any]:
        """{"generator", "majority": scores, "by_attribute": {name: f1 of both}} of a split.

        The first `eval.samples` answers are printed, and added to samples.jsonl.
        """
        params, indices = self.trained.params(state), self._listings[split]
        catalog = self.trained.catalog
        listings = [catalog.listing(int(index)) for index in indices]
        true = [normalise(listing.attributes) for listing in listings]
        answers = list(self._generator.with_params(params).answers(catalog, indices))
        parsed = [parse(answer.text, answer.closed) for answer in answers]
        predicted = {
            "generator": [answer.attributes for answer in parsed],
            "majority": [self._majority(listing.category) for listing in listings],
        }
        verdicts = Counter(answer.verdict for answer in parsed)
        scores = {name: agreement(attributes, true) for name, attributes in predicted.items()}
        scores["generator"] |= {
            "loss": self._mean_loss(params, indices),
            "valid": verdicts[Verdict.VALID] / len(parsed),
            "verdicts": {verdict.value: n / len(parsed) for verdict, n in verdicts.most_common()},
            "listings": len(parsed),
        }
        samples = [
            {
                "step": int(state.step),
                "listing_id": listing.listing_id,
                "text": listing_text(listing),
                "answer": answer.text,
                "verdict": reading.verdict.value,
                "attributes": attributes,
            }
            for listing, answer, reading, attributes in zip(listings, answers, parsed, true)
        ]
        if jax.process_index() == 0:
            self._show(samples[: self._shown])
        by_name = {
            name: agreement_by_name(attributes, true) for name, attributes in predicted.items()
        }
        scores["by_attribute"] = {
            name: {**of_name, "majority_f1": by_name["majority"][name]["f1"]}
            for name, of_name in by_name["generator"].items()
        }
        return scores

    def by_view(self, state: TrainState, split: str, views: Sequence[str]) -> dict[str, float]:
        """view -> F1 of the answers to it, of a split's listings."""
        params, indices = self.trained.params(state), self._listings[split]
        generator, catalog = self._generator.with_params(params), self.trained.catalog
        true = [normalise(catalog.listing(int(index)).attributes) for index in indices]
        answers = {view: generator.answers(catalog, indices, view) for view in views}
        return {
            view: agreement([parse(x.text, x.closed).attributes for x in given], true)["f1"]
            for view, given in answers.items()
        }

    def _mean_loss(self, params: Params, indices: np.ndarray) -> float:
        """Nats a token of the true answers."""
        sums = np.zeros(2)
        for batch, real in batches_of(indices, self._batch):
            shown = [
                question_and_answer(self.trained.catalog, int(index), self._processor)
                for index in batch[self._local]
            ]
            rows = self._processor(shown)
            rows["answer_mask"][np.arange(len(batch))[self._local] >= real] = False
            rows = put_batch(rows, self.trained.mesh, axis=0, rows=len(batch))
            sums += [float(x) for x in self._loss(params, rows)]
        return float(sums[0] / sums[1])

    def _show(self, samples: list[dict[str, Any]]) -> None:
        # A run killed before it wrote evaluation.json judges again, and says the same.
        before = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        lines = (json.dumps(sample) for sample in samples)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines if line not in before)
        for sample in samples:
            title = sample["text"].partition("\n")[0]
            true = format_attributes(sample["attributes"])
            print(f"  {title}\n    answer: {sample['answer']}\n    true:   {true}", flush=True)


def results_table(results: dict[str, Any]) -> str:
    """An evaluation.json as Markdown, percentages by row, and the attributes' F1 below."""
    columns = ("f1", "precision", "recall", "exact_match", "valid")
    rows = []
    for name in ("generator", "majority"):
        scores = results[name]
        percent = [f"{scores[c]:.1%}" if c in scores else "" for c in columns]
        rows.append((name, *percent, f"{scores['loss']:.3f}" if "loss" in scores else ""))
    f1 = (
        f"{name} {scores['f1']:.0%} ({scores['majority_f1']:.0%})"
        for name, scores in results["by_attribute"].items()
    )
    table = markdown_table(("", *columns, "loss"), rows)
    told = f"{table}\nF1 by attribute (the majority's): {', '.join(f1)}"
    views = (f"{view} {score:.0%}" for view, score in results.get("by_view", {}).items())
    return f"{told}\nF1 by view: {', '.join(views)}" if "by_view" in results else told
