"""The contrastive losses: numbers worked by hand, gradients, properties, and sharding.

Targets are unit axes in most cases, so that the queries *are* the matrix of cosines.
"""

import dataclasses
import functools
import re
from math import exp, log, tanh

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.errors import UserError
from afmrl_jax.losses.contrastive import Contrastive, contrastive_loss

COSINES = [[0.8, 0.6, 0.0], [0.2, 0.9, 0.4], [0.1, 0.3, 0.7]]
NEVER = 2.0
PLAIN = Contrastive(
    temperature=0.5,
    negative_weight="none",
    weight_scale="self",
    weight_strength=1.0,
    similarity_strength=9.0,
    boost_positive=True,
    mask_target_similarity=NEVER,
    mask_margin=NEVER,
    mask_attributes=NEVER,
    same_product="keep",
    symmetric=False,
)
JITTED = jax.jit(contrastive_loss, static_argnames="options")
AGCL = dataclasses.replace(PLAIN, negative_weight="bm25")
MASKED = dataclasses.replace(AGCL, temperature=0.3, mask_attributes=0.95, same_product="drop")
TRUE = ("query_true_product", "target_true_product")
SHARED = [[5, 6, -1], [5, 7, -1], [5, 6, 8]]


def strangers(n: int, m: int) -> dict[str, np.ndarray]:
    """No attributes at all, and products that are all different but for each positive."""
    info = {"query_product": np.arange(n), "target_product": np.arange(m)}
    for side, rows in (("query", n), ("target", m)):
        info[f"{side}_terms"] = np.full((rows, 3), -1, np.int32)
        for weights in ("query_weights", "document_weights"):
            info[f"{side}_{weights}"] = np.zeros((rows, 3), np.float32)
    return info


def with_terms(info: dict[str, np.ndarray], terms) -> dict[str, np.ndarray]:
    """The listings of both sides hold these terms, each of weight 1 for queries and documents."""
    terms = np.asarray(terms, np.int32)
    held = (terms >= 0).astype(np.float32)
    sides = {
        f"{side}_{name}": array
        for side in ("query", "target")
        for name, array in (("terms", terms), ("query_weights", held), ("document_weights", held))
    }
    return {**info, **sides}


def loss_of(options: Contrastive, cosines=COSINES, targets=None, info=None):
    queries = jnp.asarray(cosines, jnp.float32)
    targets = jnp.eye(queries.shape[1]) if targets is None else jnp.asarray(targets, jnp.float32)
    info = strangers(len(queries), len(targets)) if info is None else info
    total, count, metrics = contrastive_loss(queries, targets, info, options)
    assert float(count) == len(queries)
    return float(total), {name: float(value) for name, value in metrics.items()}


def nll(positive: float, *negatives: float) -> float:
    """-log of the positive's share, from logits: cosines / .5 and, where weighed, log weights."""
    return log(sum(map(exp, negatives), exp(positive))) - positive


def random_batch(n: int, k: int = 0, seed: int = 0, size: int = 6):
    """Unit embeddings and attributes of n queries and n (1 + k) targets; products repeat."""
    rng = np.random.default_rng(seed)
    m = n * (1 + k)
    embeddings = rng.normal(size=(n + m, size))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    listings = [
        {"color": f"c{rng.integers(3)}", "type": f"t{rng.integers(4)}"} for _ in range(n + m)
    ]
    products = rng.integers(0, n, n)
    info = {
        "query_product": products,
        "target_product": np.concatenate([products, rng.integers(0, n, m - n)]),
    }
    encoded = CorpusStatistics.from_documents(listings).encode(listings, 4)
    for name, array in encoded.items():
        info[f"query_{name}"], info[f"target_{name}"] = array[:n], array[n:]
    return embeddings[:n], embeddings[n:], info


ARMS = {
    "plain": PLAIN,
    "agcl": MASKED,
    "raw": dataclasses.replace(
        MASKED, weight_scale="raw", weight_strength=3.0, boost_positive=False
    ),
    "llave": dataclasses.replace(MASKED, negative_weight="similarity"),
    "all masks": dataclasses.replace(
        MASKED,
        mask_target_similarity=0.6,
        mask_margin=0.4,
        same_product="positive",
        symmetric=True,
    ),
}


# ---- numbers worked by hand


def test_without_weights_and_masks_it_is_infonce():
    expected = nll(1.6, 1.2, 0.0) + nll(1.8, 0.4, 0.8) + nll(1.4, 0.2, 0.6)
    assert expected == pytest.approx(0.6271 + 0.4790 + 0.5599, abs=2e-4)
    assert loss_of(PLAIN)[0] == pytest.approx(expected, rel=1e-6)
    labels = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(COSINES) / 0.5, jnp.arange(3)
    )
    assert loss_of(PLAIN)[0] == pytest.approx(float(labels.sum()), rel=1e-6)


def test_symmetric_averages_both_directions():
    there = nll(1.6, 1.2, 0.0) + nll(1.8, 0.4, 0.8) + nll(1.4, 0.2, 0.6)
    back = nll(1.6, 0.4, 0.2) + nll(1.8, 1.2, 0.6) + nll(1.4, 0.0, 0.8)
    loss, _ = loss_of(dataclasses.replace(PLAIN, symmetric=True))
    assert loss == pytest.approx((there + back) / 2, rel=1e-6)


def test_hard_negatives_join_the_rows_and_leave_the_other_direction_alone():
    cosines = [[0.8, 0.6, 0.5, 0.1], [0.2, 0.9, 0.0, 0.4]]
    there = nll(1.6, 1.2, 1.0, 0.2) + nll(1.8, 0.4, 0.0, 0.8)
    back = nll(1.6, 0.4) + nll(1.8, 1.2)
    assert loss_of(PLAIN, cosines)[0] == pytest.approx(there, rel=1e-6)
    symmetric = dataclasses.replace(PLAIN, symmetric=True)
    assert loss_of(symmetric, cosines)[0] == pytest.approx((there + back) / 2, rel=1e-6)


@pytest.mark.parametrize("boost", [True, False])
def test_attributes_add_strength_times_one_plus_tanh_to_the_logits(boost):
    # Terms shared / terms of the asking row: 0 has {5, 6}, 1 has {5, 7}, 2 has {5, 6, 8}.
    share = [[1, 1 / 2, 1], [1 / 2, 1, 1 / 2], [2 / 3, 1 / 3, 1]]
    weight = [[2 * (1 + tanh(s)) for s in row] for row in share]
    own = [weight[i][i] if boost else 0.0 for i in range(3)]
    expected = (
        nll(1.6 + own[0], 1.2 + weight[0][1], 0.0 + weight[0][2])
        + nll(1.8 + own[1], 0.4 + weight[1][0], 0.8 + weight[1][2])
        + nll(1.4 + own[2], 0.2 + weight[2][0], 0.6 + weight[2][1])
    )
    options = dataclasses.replace(AGCL, weight_strength=2.0, boost_positive=boost)
    info = with_terms(strangers(3, 3), SHARED)
    loss, metrics = loss_of(options, info=info)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["weight_p99"] == pytest.approx(exp(weight[0][2]), rel=1e-3)
    assert metrics["weight_p10"] == pytest.approx(exp(weight[2][1]), rel=1e-3)
    # The other way, targets ask: each column's shares are of the column's own terms.
    expected_back = (
        nll(1.6 + own[0], 0.4 + weight[0][1], 0.2 + weight[0][2])
        + nll(1.8 + own[1], 1.2 + weight[1][0], 0.6 + weight[1][2])
        + nll(1.4 + own[2], 0.0 + weight[2][0], 0.8 + weight[2][1])
    )
    symmetric = dataclasses.replace(options, symmetric=True)
    assert loss_of(symmetric, info=info)[0] == pytest.approx((expected + expected_back) / 2)


def test_the_papers_raw_weight_is_not_scaled_by_the_own_score():
    info = with_terms(strangers(3, 3), SHARED)
    raw = [[2, 1, 2], [1, 2, 1], [2, 1, 3]]
    weight = [[1 + tanh(s) for s in row] for row in raw]
    expected = (
        nll(1.6 + weight[0][0], 1.2 + weight[0][1], 0.0 + weight[0][2])
        + nll(1.8 + weight[1][1], 0.4 + weight[1][0], 0.8 + weight[1][2])
        + nll(1.4 + weight[2][2], 0.2 + weight[2][0], 0.6 + weight[2][1])
    )
    loss, _ = loss_of(dataclasses.replace(AGCL, weight_scale="raw"), info=info)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_the_hardness_weight_adds_alpha_times_the_cosine_to_negatives_only():
    expected = nll(1.6, 1.2 + 5.4, 0) + nll(1.8, 0.4 + 1.8, 0.8 + 3.6) + nll(1.4, 1.1, 0.6 + 2.7)
    loss, _ = loss_of(dataclasses.replace(PLAIN, negative_weight="similarity"))
    assert loss == pytest.approx(expected, rel=1e-6)


def test_a_target_almost_equal_to_the_positive_is_dropped():
    targets = [[1, 0, 0], [0.96, 0.28, 0], [0, 0, 1]]  # cos(d_0, d_1) = .96
    queries = [[0.8, 0.6, 0.0], [0.2, 0.9, 0.4], [0.1, 0.3, 0.7]]
    options = dataclasses.replace(PLAIN, mask_target_similarity=0.95)
    info = {**strangers(3, 3), "target_product": np.array([0, 0, 2])}
    cosines = np.asarray(queries) @ np.asarray(targets).T / 0.5
    expected = (
        nll(cosines[0, 0], cosines[0, 2])
        + nll(cosines[1, 1], cosines[1, 2])
        + nll(cosines[2, 2], cosines[2, 0], cosines[2, 1])
    )
    loss, metrics = loss_of(options, queries, targets, info)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["masked_by_target_similarity"] == pytest.approx(2 / 6)
    assert metrics["precision_of_target_similarity"] == pytest.approx(1 / 2)  # 0 of 1, 1 of 0


def test_a_negative_nearer_than_the_positive_by_the_margin_is_dropped():
    cosines = [[0.8, 0.95, 0.0], [0.2, 0.9, 0.95], [0.1, 0.3, 0.7]]
    expected = nll(1.6, 0.0) + nll(1.8, 0.4, 1.9) + nll(1.4, 0.2, 0.6)
    loss, metrics = loss_of(dataclasses.replace(PLAIN, mask_margin=0.1), cosines)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["masked_by_margin"] == metrics["masked"] == pytest.approx(1 / 6)
    assert metrics["precision_of_margin"] == 0  # it was another product
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["accuracy_unmasked"] == pytest.approx(2 / 3)


def test_attributes_that_agree_both_ways_drop_a_negative_and_one_way_is_not_enough():
    info = with_terms(strangers(3, 3), [[5, 6, -1], [5, 6, -1], [5, 6, 8]])
    expected = nll(1.6, 0.0) + nll(1.8, 0.8) + nll(1.4, 0.2, 0.6)
    loss, metrics = loss_of(dataclasses.replace(PLAIN, mask_attributes=0.95), info=info)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["masked_by_attributes"] == pytest.approx(2 / 6)


def test_listings_without_telling_attributes_do_not_agree():
    info = strangers(3, 3)
    assert loss_of(dataclasses.replace(PLAIN, mask_attributes=0.5), info=info)[1]["masked"] == 0


@pytest.mark.parametrize("rule", ["drop", "positive", "keep"])
def test_other_listings_of_the_same_product(rule):
    products = np.array([4, 4, 9])
    info = {**strangers(3, 3), "query_product": products, "target_product": products}
    first = {
        "keep": nll(1.6, 1.2, 0.0) + nll(1.8, 0.4, 0.8),
        "drop": nll(1.6, 0.0) + nll(1.8, 0.8),
        "positive": (nll(1.6, 0) + nll(1.2, 0)) / 2 + (nll(1.8, 0.8) + nll(0.4, 0.8)) / 2,
    }
    loss, metrics = loss_of(dataclasses.replace(PLAIN, same_product=rule), info=info)
    assert loss == pytest.approx(first[rule] + nll(1.4, 0.2, 0.6), rel=1e-6)
    assert metrics["masked"] == pytest.approx(2 / 6 if rule == "drop" else 0)
    assert metrics["accuracy"] == 1


def test_metrics_count_true_duplicates_that_a_feed_does_not_know():
    """All ids differ; pairs 0 and 1 are one product. Query 0 agrees with targets 1 and 2."""
    agreeing = with_terms(strangers(3, 3), [[5, 6, -1], [5, 7, -1], [5, 7, -1]])
    info = with_terms(strangers(3, 3), [[5, 7, -1], [5, 8, -1], [5, 9, -1]])
    info |= {name: array for name, array in agreeing.items() if name.startswith("target_")}
    truth = np.array([4, 4, 9])
    options = dataclasses.replace(PLAIN, mask_attributes=0.95, same_product="drop")
    loss, metrics = loss_of(options, info={**info, **dict.fromkeys(TRUE, truth)})
    assert loss == loss_of(options, info=info)[0]  # it changes metrics alone
    assert metrics["duplicates"] == pytest.approx(2 / 6)
    assert metrics["masked_by_attributes"] == pytest.approx(2 / 6)
    assert metrics["duplicates_masked_by_attributes"] == pytest.approx(1 / 6)
    assert metrics["duplicates_masked"] == pytest.approx(1 / 6)
    assert metrics["precision_of_attributes"] == pytest.approx(1 / 2)
    assert metrics["masked_by_same_product"] == metrics["duplicates_masked_by_same_product"] == 0


# ---- properties


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_duplicate_listing_is_never_a_negative(symmetric):
    cosines, _, info = random_batch(6)
    info["query_product"] = info["target_product"] = np.array([0, 1, 2, 3, 4, 0])
    options = dataclasses.replace(
        MASKED, temperature=0.02, symmetric=symmetric, mask_attributes=NEVER
    )
    # With the axes as targets, the gradient to the queries is the gradient to the cosines.
    push = jax.grad(lambda s: JITTED(s, jnp.eye(6), info, options)[0])(cosines)
    duplicates = np.zeros((6, 6), bool)
    duplicates[0, 5] = duplicates[5, 0] = True
    np.testing.assert_array_equal(push[duplicates], 0)
    assert (np.asarray(push)[~duplicates & ~np.eye(6, dtype=bool)] > 0).all()


@pytest.mark.parametrize("name", ARMS)
def test_a_row_without_negatives_costs_nothing_and_moves_nothing(name):
    options = dataclasses.replace(ARMS[name], same_product="drop")
    queries, targets, info = random_batch(4)
    info["query_product"] = info["target_product"] = np.zeros(4, np.int32)
    loss = lambda q, t: JITTED(q, t, info, options)[0]  # noqa: E731
    value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.asarray(queries), jnp.asarray(targets))
    assert value == 0
    np.testing.assert_array_equal(jnp.stack(gradients), 0)


@pytest.mark.parametrize("name", sorted(ARMS.keys() - {"llave"}))
@pytest.mark.parametrize("k", [0, 1])
def test_gradients_are_those_of_finite_differences(name, k):
    queries, targets, info = random_batch(5, k)
    with jax.enable_x64(True):
        loss = jax.jit(lambda q, t: contrastive_loss(q, t, info, ARMS[name])[0])
        gradients = jax.jit(jax.grad(loss, (0, 1)))(queries, targets)
        rng = np.random.default_rng(1)
        for _ in range(3):
            dq, dt = (rng.normal(size=a.shape) * 1e-5 for a in (queries, targets))
            difference = loss(queries + dq, targets + dt) - loss(queries - dq, targets - dt)
            along = (gradients[0] * dq).sum() + (gradients[1] * dt).sum()
            assert float(difference) / 2 == pytest.approx(float(along), rel=1e-5)


def test_the_hardness_weight_gets_no_gradient():
    queries, targets, info = random_batch(5)
    options = dataclasses.replace(PLAIN, negative_weight="similarity")
    weights = 9.0 * queries @ targets.T * (1 - np.eye(5))  # constants

    def expected(q, t):
        logits = q @ t.T / 0.5 + weights
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(5)).sum()

    found = jax.grad(lambda q, t: JITTED(q, t, info, options)[0], (0, 1))
    both = [
        jnp.stack(f(jnp.asarray(queries), jnp.asarray(targets)))
        for f in (found, jax.grad(expected, (0, 1)))
    ]
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_weights_cancel_when_the_positive_is_boosted_too(symmetric):
    queries, targets, info = random_batch(5)
    info = with_terms(info, [[1, 2, 3]] * 5)
    plain = dataclasses.replace(PLAIN, symmetric=symmetric)
    boosted = dataclasses.replace(plain, negative_weight="bm25", weight_strength=3.0)
    expected = loss_of(plain, queries, targets, info)[0]
    assert loss_of(boosted, queries, targets, info)[0] == pytest.approx(expected, rel=1e-5)
    only_negatives = dataclasses.replace(boosted, boost_positive=False)
    assert loss_of(only_negatives, queries, targets, info)[0] > expected + 1


def test_large_weights_stay_finite():
    queries, targets, info = random_batch(5)
    options = dataclasses.replace(AGCL, weight_strength=100.0, temperature=0.001)
    info = with_terms(info, [[1, 2, 3]] * 5)
    loss = lambda q: contrastive_loss(q, targets, info, options)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(queries, jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_collapsed_encoder_scores_no_accuracy():
    assert loss_of(PLAIN, np.ones((3, 3)))[1]["accuracy"] == 0


@settings(max_examples=10)
@given(st.permutations(range(6)), st.sampled_from(sorted(ARMS)))
def test_the_order_of_the_pairs_does_not_matter(order, name):
    queries, targets, info = random_batch(6)
    shuffled = {key: array[np.asarray(order)] for key, array in info.items()}
    expected, _, metrics = JITTED(queries, targets, info, ARMS[name])
    order = np.asarray(order)
    loss, _, moved = JITTED(queries[order], targets[order], shuffled, ARMS[name])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for key, value in metrics.items():
        assert float(moved[key]) == pytest.approx(float(value), rel=1e-4), key


def test_eight_devices_see_the_loss_of_one_and_never_gather_the_matrix():
    queries, targets, info = random_batch(64, k=1, size=4)
    queries, targets = queries.astype("f4"), targets.astype("f4")
    moves = r" = (.*?) (?:all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\("
    for options in (ARMS["agcl"], ARMS["all masks"]):

        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def step(queries, targets, info, options=options):
            total, count, metrics = contrastive_loss(queries, targets, info, options)
            return total / count, metrics

        expected = jax.tree.map(np.asarray, jax.jit(step)(queries, targets, info))
        with devices(8):
            mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
            rows, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
            place = {key: rows if key.startswith("query") else whole for key in info}
            arguments = jax.device_put((queries, targets, info), (rows, whole, place))
            compiled = jax.jit(step).lower(*arguments).compile()
            found = jax.tree.map(np.asarray, compiled(*arguments))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, found, expected)
        shapes = re.findall(r"\[([\d,]+)\]", " ".join(re.findall(moves, compiled.as_text())))
        # Targets' gradients [M, E] are the most that is exchanged: not [B, M], nor a device's part.
        assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) == 128 * 4


# ---- options


def test_a_mask_whose_threshold_nothing_passes_is_off_and_leaves_no_metric():
    metrics = loss_of(PLAIN)[1]
    assert metrics["masked"] == 0
    assert not [name for name in metrics if name.startswith(("masked_by_", "precision_of_"))]
    on = dataclasses.replace(PLAIN, mask_target_similarity=1.0, mask_margin=1.9)
    assert {"masked_by_target_similarity", "masked_by_margin"} <= loss_of(on)[1].keys()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"negative_weight": "bm52"}, 'did you mean "bm25"'),
        ({"same_product": "dropped"}, 'did you mean "drop"'),
        ({"weight_scale": 2}, "expected one of self, raw"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": None}, "temperature is None"),
        ({"mask_margin": "0.1"}, r"loss\.mask_margin is '0.1': give a number"),
        ({"mask_attributes": 95}, "give 0 to 2"),
        ({"symmetric": 1}, "give True or False"),
        ({"weight_strength": float("nan")}, "weight_strength is nan"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(wrong, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(PLAIN, **wrong)
