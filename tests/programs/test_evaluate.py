import json
import shutil

import numpy as np
import pytest

from afmrl_jax import runner
from afmrl_jax.assembly.description import Description
from afmrl_jax.assembly.pretrained import RECORD
from afmrl_jax.attributes.text import Parsed, Verdict
from afmrl_jax.core.errors import UserError
from afmrl_jax.programs import evaluate
from afmrl_jax.retrieval.scores import paired


@pytest.fixture
def config(agcl_config):
    from afmrl_jax.configs.evaluate import get_config

    config = get_config()
    config.data.update(path=agcl_config.data.path, cache_dir=agcl_config.data.cache_dir)
    return config


def test_a_checkpoint_must_be_named_and_must_be_one(config, tmp_path):
    with pytest.raises(UserError, match=r"as --config\.checkpoint=runs/agcl"):
        runner.run(config, tmp_path / "w")
    for name, told in [
        ("nowhere", "nowhere: no such folder"),
        ("2024", "2024 cannot be read whole"),
    ]:
        (tmp_path / "2024").mkdir(exist_ok=True)
        config.checkpoint = str(tmp_path / name)
        with pytest.raises(UserError, match=told):
            runner.run(config, tmp_path / "w")


def test_scores_never_replace_a_run_s_files(config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config.checkpoint = str(tmp_path / "run")
    with pytest.raises(UserError, match="holds a training run"):
        runner.run(config, tmp_path / "run")


def test_a_task_that_does_not_exist_is_refused_before_anything_is_read(config, tmp_path):
    config.checkpoint = str(tmp_path / "nowhere")
    config.eval.tasks = "imag->text"
    with pytest.raises(UserError, match='did you mean "image->text"'):
        runner.run(config, tmp_path / "w")


def judged(config, checkpoint, workdir):
    config.checkpoint = str(checkpoint)
    runner.run(config, workdir)
    return json.loads((workdir / "evaluation.json").read_text())


def test_an_exported_folder_scores_as_its_run_does(config, agcl_config, whole, exported, tmp_path):
    """As it is, and as any Hugging Face folder, whose settings are this configuration's."""
    config.eval.update(batch=8, tasks=agcl_config.eval.tasks)
    ran = json.loads((whole / "evaluation.json").read_text())
    assert judged(config, exported, tmp_path / "own") == ran
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare)
    (bare / RECORD).unlink()
    names = ("max_tokens", "max_patches", "min_pixels", "max_pixels")
    config.data.update({name: agcl_config.data[name] for name in names})
    config.model.dtype = "float32"
    assert judged(config, bare, tmp_path / "bare scores") == ran


def test_each_query_s_values_have_the_evaluation_s_means_and_pair_with_another_s(
    config, exported, tmp_path
):
    config.eval.update(batch=8, query_split="all", gallery_split="all")
    config.eval.tasks = "image+text->image+text, image->text"
    plain = judged(config, exported, tmp_path / "plain")
    config.eval.update(attributes="oracle", enrich="queries")
    enriched = judged(config, exported, tmp_path / "oracle")
    files = [tmp_path / name / "evaluation_queries.json" for name in ("plain", "oracle")]
    told = json.loads(files[0].read_text())
    gains = paired(*files)
    assert set(told) == set(gains) == set(plain)
    for task, of_task in told.items():
        assert of_task["listing_ids"][:2] == ["mug-red-0", "mug-red-1"]
        for name, values in of_task["values"].items():
            assert np.mean(values) == plain[task][name]
            gain = enriched[task][name] - plain[task][name]
            assert gains[task][name] == pytest.approx(gain, abs=1e-12)
    # Its query is an image, where no attributes can stand.
    assert enriched["image->text"] == plain["image->text"]
    assert enriched["image+text->image+text"] != plain["image+text->image+text"]
    config.eval.query_split = "test"
    judged(config, exported, tmp_path / "test")
    with pytest.raises(UserError, match="by other queries"):
        paired(files[0], tmp_path / "test" / "evaluation_queries.json")


class Parrot:
    """In the place of a generator: it says the true attributes, of colours it is half sure."""

    def describe(self, catalog, listings):
        ASKED.extend(listings.tolist())
        for index in listings:
            own = catalog.listing(int(index)).attributes
            confidence = {"color": 0.5, "type": 0.9}
            verdict = Verdict.VALID if index % 2 else Verdict.UNCLOSED
            yield Description(None, Parsed(own, verdict, {}), confidence)


ASKED = []


def test_a_generator_describes_each_listing_once_and_what_it_is_unsure_of_is_left_out(
    config, exported, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_generator", lambda path, mesh, batch: Parrot())
    shown = {}

    class Watching(evaluate.RetrievalEvaluator):
        def __init__(self, model, catalog, enriched):
            shown.update(queries=enriched.queries, gallery=enriched.gallery)
            super().__init__(model, catalog, enriched)

    monkeypatch.setattr(evaluate, "RetrievalEvaluator", Watching)
    ASKED.clear()
    config.eval.update(
        batch=8, query_split="test", gallery_split="all", attributes="some/generator"
    )
    config.eval.update(tasks="image+text->text", min_confidence=0.6)
    judged(config, exported, tmp_path / "both")
    assert list(range(40)) == ASKED
    assert shown["queries"] is shown["gallery"]
    assert [shown["queries"](index) for index in (0, 1)] == [{}, {"type": "mug"}]
    # Only of texts, and of the side that is asked for.
    ASKED.clear()
    config.eval.update(tasks="text->image, image->text", enrich="queries")
    judged(config, exported, tmp_path / "queries")
    assert len(ASKED) == 4 and shown["gallery"] is None


def watched(vectors, seen):
    """The evaluator's vectors, noting how many listings are asked for, and the 31st's label."""

    def noting(evaluator, view, indices, attributes=None):
        seen.append((len(indices), evaluator._catalog.listing(30).category))
        return vectors(evaluator, view, indices, attributes)

    return noting


def test_categories_are_told_where_asked_from_texts_that_do_not_state_them(
    config, exported, tmp_path, capsys, monkeypatch
):
    noting = watched(evaluate.RetrievalEvaluator.vectors, seen := [])
    monkeypatch.setattr(evaluate.RetrievalEvaluator, "vectors", noting)
    config.eval.update(batch=8, tasks="image+text->image+text", downstream=True)
    results = judged(config, exported, tmp_path / "w")
    assert set(results) == {"image+text->image+text", "category"}
    assert seen == [(4, "shoe"), (4, "shoe"), (4, ""), (30, "")]
    counts = {"n_queries": 4, "n_probe": 30, "n_categories": 2}
    assert counts.items() <= results["category"].items()
    assert "| category | checkpoint |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "w" / "evaluation_queries.json").read_text())["category"]
    assert np.mean(kept["values"]["accuracy"]) == results["category"]["accuracy"]
    config.eval.query_split = "train"
    with pytest.raises(UserError, match="0 training listings beside the queries"):
        judged(config, exported, tmp_path / "none left")


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"attributes": "orcale"}, "'orcale', neither none nor oracle.*no such folder"),
        ({"attributes": "oracle", "enrich": "query"}, r'enrich is \'query\'.*mean "queries"'),
        ({"attributes": "oracle", "min_confidence": 0.5}, "only a generator says how sure"),
        ({"attributes": "x", "min_confidence": 1.5}, "min_confidence is 1.5: give 0 to 1"),
        (
            {"attributes": "oracle", "enrich": "queries", "tasks": "image->text"},
            "eval.tasks=image->text has none to enrich with eval.enrich=queries",
        ),
    ],
)
def test_attributes_that_cannot_be_had_are_told_before_anything_is_embedded(
    config, exported, tmp_path, monkeypatch, fields, told
):
    monkeypatch.setattr(evaluate, "RetrievalEvaluator", None)
    config.checkpoint = str(exported)
    config.eval.update(batch=8, **fields)
    with pytest.raises(UserError, match=told):
        runner.run(config, tmp_path / "w")


def spoil(folder, case):
    weights = folder / "model.safetensors"
    if case == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "config":
        (folder / "config.json").unlink()
    elif case == "architecture":
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | {"model_type": "bert"}))
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif case == "record":
        (folder / RECORD).write_text("[]")
    else:
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "b.safetensors"}}'
        )


@pytest.mark.parametrize(
    "case, told",
    [
        ("tokenizer", r"folder holds no tokenizer: neither tokenizer\.json nor"),
        ("config", r"folder has no config\.json"),
        ("architecture", r"config\.json.*bert.*qwen2_vl"),
        ("truncated", r"model\.safetensors: not a whole safetensors file"),
        ("record", r"afmrl_jax\.json is no record of a run"),
        ("shard", r"b\.safetensors: not found"),
    ],
)
def test_a_broken_folder_is_told_by_its_file(config, exported, tmp_path, case, told):
    shutil.copytree(exported, tmp_path / "folder")
    spoil(tmp_path / "folder", case)
    config.checkpoint = str(tmp_path / "folder")
    with pytest.raises(UserError, match=told):
        runner.run(config, tmp_path / "w")
