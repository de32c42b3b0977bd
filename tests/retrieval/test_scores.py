"""An evaluation's file, and models side by side."""

import json

import pytest

from afmrl_jax.retrieval.scores import results_table, write_evaluation


def test_the_evaluation_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run" / "evaluation.json"
    results = {"image->text": {"recall@1": 0.5, "n_queries": 2, "n_gallery": 4}}
    write_evaluation(path, results)
    assert json.loads(path.read_text()) == results
    with pytest.raises(ValueError, match="JSON"):
        write_evaluation(path, {"image->text": {"recall@1": float("nan")}})
    assert json.loads(path.read_text()) == results
    assert [p.name for p in path.parent.iterdir()] == ["evaluation.json"]


def test_the_table_shows_models_side_by_side_and_leaves_unknown_cells_empty():
    first = {"recall@1": 0.0523, "recall@1_ci95": 0.01, "n_queries": 1200}
    table = results_table({"untrained": {"t": first}, "trained": {"t": {"recall@1": 0.5}}})
    assert table.splitlines() == [
        "| task | model     | R@1           | n_queries |",
        "| ---- | --------- | ------------- | --------- |",
        "| t    | untrained | 0.052 ± 0.010 | 1,200     |",
        "| t    | trained   | 0.500         |           |",
    ]


def test_tasks_without_a_metric_in_common_stand_in_tables_of_their_own():
    category = {"accuracy": 0.5, "n_queries": 4, "nmi": 0.25, "nmi_ci95": 0.125}
    table = results_table({"a": {"t": {"recall@1": 1.0}, "c": category, "u": {"recall@1": 0.0}}})
    assert table.splitlines() == [
        "| task | model | R@1   |",
        "| ---- | ----- | ----- |",
        "| t    | a     | 1.000 |",
        "| u    | a     | 0.000 |",
        "",
        "| task | model | accuracy | nmi           | n_queries |",
        "| ---- | ----- | -------- | ------------- | --------- |",
        "| c    | a     | 0.500    | 0.250 ± 0.125 | 4         |",
    ]
