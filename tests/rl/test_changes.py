"""What became of answers, counted by hand."""

import numpy as np

from afmrl_jax.rl.changes import changes_table, count_changes

TRUE = [{"color": "red", "type": "mug"}, {"color": "blue"}, {"color": "red"}]
BEFORE = [{"color": "green", "type": "mug"}, {"color": "blue", "size": "s"}, {"color": "red"}]
AFTER = [{"Color": "RED", "type": "cup"}, {"size": "m", "type": "hat"}, {"color": "red"}]
FOUND = np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0, 1.0])


def test_what_became_of_each_attribute_is_counted_with_what_its_queries_found():
    counted = count_changes((BEFORE, AFTER), TRUE, FOUND)
    once = {"corrected": 1, "spoilt": 1, "altered": 1, "left_out_right": 1, "added_wrong": 1}
    expected = dict.fromkeys(counted["pairs"], 0) | once | {"kept": 1}
    assert counted["pairs"] == expected
    of_name = {
        name: {c: n for c, n in x.items() if n} for name, x in counted["by_attribute"].items()
    }
    assert of_name == {
        "color": {"kept": 1, "corrected": 1, "left_out_right": 1},
        "type": {"spoilt": 1, "added_wrong": 1},
        "size": {"altered": 1},
    }
    assert counted["queries"]["spoilt"] == {
        "count": 1,
        "recall@1_before": 0.0,
        "recall@1_after": 1.0,
    }
    assert counted["queries"]["added_right"]["count"] == 0
    table = changes_table(counted).splitlines()
    assert [line.split()[1] for line in table[2:6]] == ["color", "type", "size", "all"]


def test_an_answer_that_became_invalid_left_all_out_and_equal_ones_changed_nothing():
    counted = count_changes((BEFORE, [{}] * 3), TRUE, FOUND)
    assert counted["pairs"]["left_out_right"] == 3 and counted["pairs"]["left_out_wrong"] == 2
    same = count_changes((BEFORE, BEFORE), TRUE, FOUND)["pairs"]
    assert same.pop("kept") == 5 and not any(same.values())
