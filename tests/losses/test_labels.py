import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.errors import UserError
from afmrl_jax.losses.labels import Labels, frequent_labels, label_loss

CATALOGUE = [
    {"Color": "Navy Blue", "size": "L", "made in": "EU"},
    {"color": "navy blue", "size": "M", "made in": "EU"},
    {"color": "red", "size": "L", "made in": "EU"},
    {"color": "green", "note": "a=b"},
]
STATISTICS = CorpusStatistics.from_documents(CATALOGUE)
LABELS = Labels(np.array([2, 5, 6, 9, 11]), np.array([0, 0, 1, 1, 1]))


def told(labels):
    terms = list(STATISTICS.document_frequencies)
    return [terms[term] for term in labels.terms]


def random_case(shape=(2, 3)):
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(4, 5)), "bias": rng.normal(size=5)}
    terms = rng.choice([-1, 2, 5, 6, 9, 10, 11, 2**31 - 1], size=(*shape, 4)).astype(np.int32)
    return head, rng.normal(size=(*shape, 4)), terms


def test_labels_are_the_frequent_pairs_of_names_that_have_several_values():
    every = frequent_labels(STATISTICS, 100)
    assert told(every) == [
        *("color=green", "color=navy blue", "color=red"),
        *("size=l", "size=m"),
    ]  # all is made in the EU, and there is one note
    assert every.names.tolist() == [0, 0, 0, 1, 1]
    # The most frequent four are of the EU, navy blue, L and, the first of equals, green.
    assert told(frequent_labels(STATISTICS, 4)) == ["color=green", "color=navy blue"]


def test_a_catalogue_with_nothing_to_tell_apart_is_refused():
    with pytest.raises(UserError, match=r"none of the 2 most frequent.*loss.head_labels"):
        frequent_labels(STATISTICS, 2)
    with pytest.raises(UserError, match=r"data\.attributes"):
        frequent_labels(CorpusStatistics.from_documents([{}]), 100)


def test_the_loss_equals_the_number_worked_by_hand():
    """Two names, of 2 and of 3 values; an embedding of one number gives the logits as they are."""
    head = {"kernel": np.log([[1.0, 3.0, 2.0, 2.0, 4.0]]), "bias": np.log([2.0, 1, 1, 1, 1])}
    embeddings = np.ones((1, 4, 1))
    terms = np.array(
        [
            [5, 11, -1],  # shares 3 / (2 + 3) and 4 / (2 + 2 + 4)
            [7, 6, 400],  # share 2 / 8; the others are no labels
            [2, -1, -1],  # share 2 / 5
            [-1, 8, 3],  # no label: counts nothing
        ]
    )[None]
    total, count, metrics = label_loss(head, embeddings, terms, LABELS)
    expected = -(np.log(3 / 5) + np.log(4 / 8)) / 2 - np.log(2 / 8) - np.log(2 / 5)
    assert count == 3
    assert total == pytest.approx(expected, rel=1e-6)
    assert metrics["head_loss"] == pytest.approx(expected / 3, rel=1e-6)
    assert metrics["head_accuracy"] == pytest.approx(1 / 3)


def test_an_embedding_counts_by_the_root_of_its_size():
    """Four numbers of 1/2, a unit vector, are worth four ones."""
    head = {"kernel": np.ones((4, 5)) * np.log([1.0, 3.0, 1.0, 1.0, 1.0]) / 4, "bias": np.zeros(5)}
    total, _, _ = label_loss(head, np.full((1, 4), 0.5), np.array([[5]]), LABELS)
    assert total == pytest.approx(-np.log(3 / 4), rel=1e-6)


def test_a_new_head_holds_all_values_for_equally_likely_and_tells_none():
    shapes = LABELS.abstract_head(4)
    head = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, count, metrics = label_loss(head, np.ones((2, 4)), np.array([[2], [9]]), LABELS)
    assert total / count == pytest.approx((np.log(2) + np.log(3)) / 2, rel=1e-6)
    assert metrics["head_accuracy"] == 0


def test_a_batch_without_labels_costs_nothing_and_moves_nothing():
    head, embeddings, _ = random_case()
    none = np.full((2, 3, 4), -1)
    value, gradients = jax.value_and_grad(
        lambda h, e: label_loss(h, e, none, LABELS)[0], argnums=(0, 1)
    )(head, embeddings)
    assert value == 0
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


def test_names_whose_logits_lie_far_apart_stay_exact():
    head = {"kernel": np.zeros((1, 5)), "bias": np.array([0.0, 0.0, 1e4, 1e4, 1e4])}
    total, _, _ = label_loss(head, np.ones((1, 1)), np.array([[2, 9]]), LABELS)
    assert total == pytest.approx((np.log(2) + np.log(3)) / 2, rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    head, embeddings, terms = random_case()
    with jax.enable_x64(True):
        loss = jax.jit(lambda h, e: label_loss(h, e, terms, LABELS)[0])
        gradients = jax.jit(jax.grad(loss, (0, 1)))(head, embeddings)
        rng = np.random.default_rng(1)
        for _ in range(3):
            step = jax.tree.map(lambda x: rng.normal(size=x.shape) * 1e-5, (head, embeddings))
            ahead, behind = (
                jax.tree.map(lambda x, d, s=sign: x + s * d, (head, embeddings), step)
                for sign in (1, -1)
            )
            along = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradients, step))))
            difference = float(loss(*ahead)) - float(loss(*behind))
            assert difference / 2 == pytest.approx(float(along), rel=1e-5)
