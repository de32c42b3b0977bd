"""Targets of past batches as further negatives: numbers worked by hand, layouts.

Axes: A micro-batches · C examples of one · V views of an example · E embedding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import devices

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.mesh import batch_sharding, make_mesh, replicated
from afmrl_jax.losses.agcl import AGCL
from afmrl_jax.losses.contrastive import Contrastive

A, C, V, E = 2, 8, 3, 6
MEMORY, STEPS = 4, 6
LOSS = Contrastive(
    temperature=0.2,
    negative_weight="bm25",
    weight_scale="self",
    weight_strength=1.5,
    similarity_strength=9.0,
    boost_positive=True,
    mask_target_similarity=2.0,
    mask_margin=2.0,
    mask_attributes=2.0,
    same_product="drop",
    symmetric=False,
)


def mesh_of(count):
    sizes = {"slice": 1, "data": -1, "fsdp": 1, "tensor": 1}
    return make_mesh(sizes, jax.devices()[:count])


def objective(mesh, batches=MEMORY, **loss):
    return AGCL(dataclasses.replace(LOSS, **loss), None, 0.0, batches, mesh)


def drawn():
    """(embeddings [A, C, V, E], batch) of each step; products repeat within and between batches."""
    rng = np.random.default_rng(0)
    documents = [
        {"color": f"c{rng.integers(3)}", "type": f"t{rng.integers(4)}"}
        for _ in range(STEPS * A * C * V)
    ]
    encoded = CorpusStatistics.from_documents(documents).encode(documents, 4)
    steps = []
    for step in range(STEPS):
        vectors = rng.normal(size=(A, C, V, E)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        part = slice(step * A * C * V, (step + 1) * A * C * V)
        batch = {name: x[part].reshape(A, C, V, -1) for name, x in encoded.items()}
        batch["product"] = rng.integers(0, 12, (A, C, V)).astype(np.int32)
        batch["product"][..., 1] = batch["product"][..., 0]
        batch["true_product"] = batch["product"]
        steps.append((vectors, batch))
    return steps


def losses_of(objective, steps):
    """The loss, the metrics and the memory after each step, by the jitted objective."""
    split, whole = batch_sharding(objective.mesh, 1), replicated(objective.mesh)
    abstract = objective.memory(E, steps[0][1])
    memory = {name: jnp.zeros(x.shape, x.dtype, device=whole) for name, x in abstract.items()}
    compute = jax.jit(lambda *arguments: objective({}, *arguments))
    found = []
    for vectors, batch in steps:
        value, memory, metrics = compute(memory, *jax.device_put((vectors, batch), split))
        found.append((float(value), metrics, jax.tree.map(np.asarray, memory)))
    return found


def listings_of(vectors, batch, view):
    """Of one view, in the order of the loss: C is the major part."""
    arrays = {"embedding": vectors, **batch}
    return {
        name: np.swapaxes(x, 0, 1)[:, :, view].reshape(A * C, *x.shape[3:])
        for name, x in arrays.items()
    }


def bm25(query, document):
    shared = (query["terms"][:, None] == document["terms"][None, :]) & (query["terms"] >= 0)[
        :, None
    ]
    return float((query["query_weights"][:, None] * document["document_weights"] * shared).sum())


def loss_by_hand(queries, targets):
    """-log of the positive's share among all targets but those of its product."""
    losses = []
    for i in range(A * C):
        query = {name: x[i] for name, x in queries.items()}
        own = max(float(np.sum(query["query_weights"] * query["document_weights"])), 1.0)
        logits = []
        for j in range(len(targets["product"])):
            target = {name: x[j] for name, x in targets.items()}
            if j != i and target["product"] == query["product"]:
                continue
            score = np.clip(bm25(query, target) / own, 0, 1)
            cosine = float(query["embedding"] @ target["embedding"])
            logits.append(cosine / LOSS.temperature + 1.5 * (1 + np.tanh(score)))
            if j == i:
                positive = logits[-1]
        losses.append(np.logaddexp.reduce(logits) - positive)
    return np.mean(losses)


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def steps():
    return drawn()


def test_queries_meet_the_targets_of_the_last_four_batches_and_no_older_ones(steps):
    found = losses_of(objective(mesh_of(1)), steps)
    batches = [joined([listings_of(*step, view) for view in range(1, V)]) for step in steps]
    for number, step in enumerate(steps):
        past = batches[max(0, number - MEMORY) : number]
        wanted = loss_by_hand(listings_of(*step, 0), joined([batches[number], *past[::-1]]))
        np.testing.assert_allclose(found[number][0], wanted, rtol=1e-5)
    memory, last = found[-1][2], joined(batches[: -MEMORY - 1 : -1])
    assert memory.pop("filled").all()
    assert memory.keys() == last.keys()
    for name, array in memory.items():
        np.testing.assert_array_equal(array, last[name])


@pytest.mark.parametrize("masks", [{}, {"mask_attributes": 0.8}, {"mask_target_similarity": 0.3}])
@pytest.mark.parametrize("symmetric", [False, True])
def test_empty_slots_change_neither_the_loss_nor_its_metrics(steps, symmetric, masks):
    with_memory = losses_of(objective(mesh_of(1), symmetric=symmetric, **masks), steps[:1])
    without = losses_of(objective(mesh_of(1), 0, symmetric=symmetric, **masks), steps[:1])
    np.testing.assert_allclose(with_memory[0][0], without[0][0], rtol=1e-6)
    assert with_memory[0][1].keys() == without[0][1].keys()
    for name, value in without[0][1].items():
        np.testing.assert_allclose(with_memory[0][1][name], value, rtol=1e-6)


def test_targets_ask_for_no_query_of_the_past(steps):
    """The mean of both directions, of which the second is that of the batch alone."""
    there, both, both_alone, there_alone = (
        losses_of(objective(mesh_of(1), batches, symmetric=symmetric), steps)[-1][0]
        for batches, symmetric in ((MEMORY, False), (MEMORY, True), (0, True), (0, False))
    )
    assert abs(there - there_alone) > 0.1
    np.testing.assert_allclose(both - there / 2, both_alone - there_alone / 2, rtol=1e-4)


def test_without_a_memory_the_program_has_no_trace_of_it(steps):
    one = objective(mesh_of(1), 0)
    assert one.memory(E, steps[0][1]) == {}
    value, memory, _ = one({}, {}, *steps[0])
    assert memory == {} and np.isfinite(value)


def test_two_and_eight_devices_see_the_numbers_of_one(steps):
    one = losses_of(objective(mesh_of(1), symmetric=True, mask_attributes=0.8), steps)
    with devices(8):
        for count in (2, 8):
            many = losses_of(objective(mesh_of(count), symmetric=True, mask_attributes=0.8), steps)
            for found, wanted in zip(many, one):
                np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
                for name, array in wanted[2].items():
                    np.testing.assert_allclose(found[2][name], array, rtol=1e-6)
