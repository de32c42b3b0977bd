"""The program on a small catalogue: 20 products in two listings each, colour and type to name."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from workdirs import check_bit_equal, lines, logged, losses, state_of, stopped

from afmrl_jax import runner
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.loaded import LoadedGenerator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import GeneratorOptions
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.attributes.text import Verdict, parse
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.processor import Row
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset
from afmrl_jax.weights import hf_weights


@pytest.fixture
def config(catalogue_folder, cache_dir):
    """configs/sft.py at its smallest, in one process."""
    from afmrl_jax.configs.sft import get_config

    config = get_config()
    config.update(
        steps=30, batch=8, micro_batches=2, log_every=5, eval_every=15, checkpoint_every=25
    )
    config.data.update(
        path=str(catalogue_folder),
        cache_dir=cache_dir,
        workers=0,
        max_tokens=48,
        max_answer=16,
        buckets=2,
        answer_dropout=0.0,  # so short a run is to learn whole answers
        max_patches=16,
        min_pixels=256,
        max_pixels=1024,
    )
    config.model.update(vocab_size=320, dtype="float32")
    config.optimizer.learning_rate = 3e-3
    config.eval.update(batch=8, validation_listings=6, samples=2)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the run that the first test makes."""
    return tmp_path_factory.mktemp("sft")


@pytest.fixture
def run(config, folder):
    """The workdir of a run that nothing stopped."""
    if not (folder / "run").exists():
        runner.run(config, folder / "run")
    return folder / "run"


def test_a_run_learns_the_format_and_leaves_all_that_it_promises(config, folder, capsys):
    runner.run(config, folder / "run")
    told = capsys.readouterr().out
    rows = logged(folder / "run")
    assert [row["step"] for row in rows] == list(range(5, 31, 5))
    assert {"loss", "answer_tokens", "gradient_norm", "answers_per_second"} <= set(rows[0])
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert {"validation", "validation_loss", "validation_exact_match"} <= set(rows[-1])
    results = json.loads((folder / "run" / "evaluation.json").read_text())
    scores = results["generator"]
    assert scores["listings"] == 4 and scores["verdicts"] == {"valid": 1.0}
    # Grey is in no training listing; the kinds are.
    assert results["by_attribute"]["type"]["f1"] == 1 and results["majority"]["f1"] == 0.5
    assert re.search(r"\| majority +\| 50\.0% +\|", told) and "F1 by attribute" in told
    samples = lines(folder / "run" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [15, 15, 30, 30, 30, 30]
    assert parse(samples[-1]["answer"]).verdict is Verdict.VALID
    assert samples[-1]["answer"] in told


def test_a_run_stopped_and_started_again_ends_bit_equal(config, run, tmp_path):
    other = stopped(run, tmp_path / "stopped")
    runner.run(config, other)
    check_bit_equal(run, other)
    (other / "evaluation.json").unlink()  # killed once more, when the samples had been told
    runner.run(config, other)
    for name in ("evaluation.json", "samples.jsonl"):
        assert (run / name).read_text() == (other / name).read_text()


def test_a_checkpoint_alone_gives_the_generator_back(config, run):
    source = find_pretrained(str(run), Generator)
    mesh = make_mesh(dict(config.mesh))
    with jax.set_mesh(mesh):
        params = source.load(abstract_params(source.model, mesh))
        catalog = open_catalogue(CatalogOptions.of(config), run)
        listings = {catalog.listing(i).listing_id: i for i in range(len(catalog))}
        wanted = [s for s in lines(run / "samples.jsonl") if s["step"] == 30]
        indices = np.array([listings[sample["listing_id"]] for sample in wanted])
        model = LoadedGenerator(source.model, params, mesh, batch=3)  # the last batch is filled up
        found = list(model.answers(catalog, indices))
    assert [answer.text for answer in found] == [sample["answer"] for sample in wanted]
    assert all(answer.closed and (answer.log_probs <= 0).all() for answer in found)
    with pytest.raises(UserError, match="holds the generator of a run: name what has trained the"):
        find_pretrained(str(run))


def test_adapters_on_a_run_learn_what_another_model_wrote(config, run, tmp_path):
    """Distillation: the base knows kinds and colours, the other model names a maker."""
    catalog = open_catalogue(CatalogOptions.of(config), tmp_path)
    with (tmp_path / "written.jsonl").open("w") as file:
        for index in catalog.indices("train")[:10]:
            row = {"listing_id": catalog.listing(int(index)).listing_id}
            file.write(json.dumps(row | {"attributes": {"maker": "lamp"}}) + "\n")
    config.update(init_from=str(run), steps=15, eval_every=0, log_every=1)
    config.data.attributes = str(tmp_path / "written.jsonl")
    config.model.update(lora_rank=4)
    config.optimizer.learning_rate = 1e-2
    runner.run(config, tmp_path / "distilled")
    learned = losses(tmp_path / "distilled")
    assert learned[-1] < 0.5 * learned[0]
    trained = [name for name in state_of(tmp_path / "distilled") if name.startswith("params.")]
    assert trained and all("lora_" in name for name in trained)
    assert not (tmp_path / "distilled" / "evaluation.json").exists()  # nothing held out is labelled


def test_a_catalogue_without_attributes_is_refused(config, tmp_path):
    line = {"listing_id": "mug-grey-0", "attributes": {"color": "grey"}}  # of no training listing
    (tmp_path / "written.jsonl").write_text(json.dumps(line) + "\n")
    config.data.attributes = str(tmp_path / "written.jsonl")
    with pytest.raises(UserError, match=r"no listing of the training split .*configs/annotate.py"):
        runner.run(config, tmp_path / "run")


def test_the_loss_is_transformers_own_over_the_answers_tokens(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = train_tokenizer(["colour red type mug"] * 4, 290)
    tiny = preset("tiny")
    model_config = tiny.replace(
        vision=dataclasses.replace(tiny.vision, num_layers=1),
        text=dataclasses.replace(tiny.text, num_layers=1),
        vocab_size=tokenizer.get_vocab_size(),
        **special_token_ids(tokenizer),
    )
    config.data.max_tokens = 80
    generator = Generator(GeneratorOptions.of(config), model_config, tokenizer)
    shown = [Row("red mug", answer="colour: red"), Row("", answer="type: mug; colour: red, blue")]
    rows = generator.processor(answers=True)(shown, [(96, 0)])
    params = generator.init_params(0)
    total, count = jax.jit(generator.answer_loss(chunk=5))(params, rows)

    hf_weights.save(tmp_path, params, model_config)
    theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    tokens = torch.tensor(rows["tokens"].astype(np.int64))
    with torch.no_grad():
        found = theirs(
            input_ids=tokens,
            attention_mask=torch.tensor(rows["token_mask"].astype(np.int64)),
            position_ids=torch.tensor(rows["positions"].astype(np.int64)).swapaxes(0, 1),
            labels=torch.where(torch.tensor(rows["answer_mask"]), tokens, -100),
        ).loss
    assert count == rows["answer_mask"].sum()
    np.testing.assert_allclose(total / count, found.item(), rtol=1e-5)
