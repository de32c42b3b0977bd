import pytest

from afmrl_jax.attributes.agreement import Majority, agreement, agreement_by_name

TRUE = [{"color": "red", "type": "mug"}, {"color": "blue"}]
FOUND = [{"type": "mug", "Color ": "RED"}, {"color": "red", "type": "hat"}]


def test_scores_worked_by_hand():
    """3 pairs are true, 4 are found, 2 of these right; the first listing's are all right."""
    found = agreement(FOUND, TRUE)
    assert found == pytest.approx(
        {"f1": 4 / 7, "precision": 1 / 2, "recall": 2 / 3, "exact_match": 1 / 2}
    )


def test_each_name_has_its_own_score():
    assert agreement_by_name(FOUND, TRUE) == {
        "color": {"f1": 2 / 4, "listings": 2},
        "type": {"f1": 2 / 3, "listings": 1},
    }


def test_nothing_scores_zero():
    assert set(agreement([], []).values()) == {0}
    assert agreement([{}], [{"color": "red"}])["f1"] == 0


def test_the_majority_answers_what_most_of_a_category_have_with_its_commonest_value():
    majority = Majority(
        [
            ("cup", {"color": "red", "size": "small"}),
            ("cup", {"color": "red", "glaze": "matt"}),
            ("cup", {"color": "blue", "size": "large"}),
            ("hat", {"color": "blue"}),
            ("hat", {"color": "blue"}),
        ]
    )
    assert majority("cup") == {"color": "red", "size": "small"}  # equally often: the later word
    assert majority("hat") == {"color": "blue"}
    assert majority("shoe") == {"color": "blue"}  # never seen: as all listings
    assert Majority([])("cup") == {}
