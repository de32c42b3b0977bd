"""The tour runs from top to bottom as a reader runs it, but for the sizes in its parameters."""

import json
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the tour's test needs nbclient, as [test] has")
TOUR = Path(__file__).resolve().parents[2] / "notebooks" / "tour.ipynb"

# Fields by stage, as in configs: the smallest with which each stage does all that it does.
SIZES = {
    "DATA": {
        "data.workers": 0,
        "data.max_patches": 16,
        "data.min_pixels": 256,
        "data.max_pixels": 1024,
        "eval.batch": 8,
    },
    "AGCL": {
        "steps": 4,
        "batch": 8,
        "data.max_tokens": 24,
        "data.neighbours": 4,
        "model.vocab_size": 300,
        "eval.tasks": "image+text->image+text",
    },
    "SFT": {
        "steps": 60,
        "batch": 8,
        "data.max_tokens": 48,
        "data.max_answer": 16,
        "data.buckets": 1,  # so small a catalogue is learned faster where rows of all lengths mix
        "model.vocab_size": 320,
        "optimizer.learning_rate": 3e-3,
        "eval.validation_listings": 6,
    },
    "RAR": {
        "steps": 1,
        "queries": 4,
        "samples": 4,
        "reward.batch": 20,
        "watch.copied": 1.0,
        "watch.held_out_gain": -2.0,
        "watch.answer_diversity": 0.0,
        "watch.pair_diversity": 0.0,
    },
}


@pytest.fixture
def tour():
    return nbformat.read(TOUR, as_version=4)


def parameters_of(notebook):
    """The one cell that says how much is done."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def test_the_file_is_a_plain_notebook_without_anything_that_a_run_leaves(tour):
    nbformat.validate(tour)
    assert tour.metadata.kernelspec.name == "python3"
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    assert len({cell.id for cell in tour.cells}) == len(tour.cells)


def test_its_own_sizes_are_fields_of_the_configurations(tour):
    from afmrl_jax.configs import agcl, rar, sft

    sizes = {}
    exec(parameters_of(tour).source, sizes)
    for name, module in {"AGCL": agcl, "SFT": sft, "RAR": rar}.items():
        fields = sizes["DATA"] | sizes[name]
        config = module.get_config()
        config.update_from_flattened_dict(fields)  # KeyError, TypeError on what is none
        assert 0 < fields["steps"] <= module.get_config().steps


@pytest.fixture(scope="module")
def executed(catalogue_folder, tmp_path_factory):
    """The tour after it ran on the small catalogue, and its workdir."""
    pytest.importorskip("ipykernel", reason="the tour's test needs ipykernel, as [test] has")
    nbclient = pytest.importorskip("nbclient", reason="the tour's test needs nbclient, as [test]")
    notebook, folder = nbformat.read(TOUR, as_version=4), tmp_path_factory.mktemp("tour")
    sizes = SIZES | {"WORKDIR": str(folder / "runs")}
    sizes["DATA"] = sizes["DATA"] | {"data.path": str(catalogue_folder)}
    parameters_of(notebook).source = "\n".join(f"{k} = {v!r}" for k, v in sizes.items())
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(variable, str(folder / variable.lower()))
        # Most of the time goes into compiling, and nothing runs often here.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        # Not from the repository's root: it must find the configurations itself.
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=500, resources=resources).execute()
    return notebook, folder / "runs"


def shown(notebook, cell_id):
    """What a cell printed, and the HTML that it displayed."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    printed = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    displayed = "".join(o.data.get("text/html", "") for o in cell.outputs if "data" in o)
    return printed, displayed


def test_every_cell_runs_and_every_stage_takes_its_steps_and_is_judged(executed):
    notebook, workdir = executed
    for stage in ("agcl", "sft", "rar"):
        assert (workdir / stage / "evaluation.json").is_file()
        last = (workdir / stage / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["step"] == SIZES[stage.upper()]["steps"]
    assert "40 listings of 20 products" in shown(notebook, "catalogue")[0]


def test_hits_are_marked_right_where_they_are_the_same_product(executed):
    """Each query is one of 4 test listings: of the 3 others, one is of its product."""
    _, table = shown(executed[0], "hits")
    rows = table.split("<tr>")[1:]
    assert len(rows) == 4
    for row in rows:
        assert row.count("query") == 1 and row.count("<img") == 4
        assert (row.count("✓"), row.count("✗")) == (1, 2)


def test_generated_attributes_are_shown_beside_their_listing(executed):
    _, table = shown(executed[0], "describe")
    rows = table.split("<tr>")[1:]
    assert len(rows) == 4
    for row in rows:
        title = re.search(r"<small>(.*?)</small>", row)[1].lower()
        pairs = re.findall(r"([✓✗]) type: (\w+) \(\d+%\)", row)
        assert pairs  # what SFT has learned in its few steps, if not which type it is
        assert all((mark == "✓") == (kind in title) for mark, kind in pairs)


def test_answers_stand_by_what_they_were_worth(executed):
    told, _ = shown(executed[0], "rollout")
    title, *answers = told.splitlines()
    advantages = [float(answer.split()[0]) for answer in answers]
    assert title.endswith(", step 1") and len(answers) == SIZES["RAR"]["samples"]
    assert advantages == sorted(advantages, reverse=True)


def test_the_gain_is_told_as_the_run_measured_it(executed):
    notebook, workdir = executed
    found = json.loads((workdir / "rar" / "evaluation.json").read_text())["differences"]
    told, _ = shown(notebook, "gain")
    for pair in ("sft - plain", "rar - sft", "oracle - rar"):
        mean, half = (found[pair][name] for name in ("recall@1", "recall@1_ci95"))
        (line,) = [line for line in told.splitlines() if f"{pair}:" in line]
        assert f"{mean:+.3f} ± {half:.3f}" in line
        assert ("no more than chance" in line) == (abs(mean) <= half)
