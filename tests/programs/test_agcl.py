import contextlib
import functools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from workdirs import check_bit_equal, logged, losses, state_of

from afmrl_jax import runner
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.options import EncoderOptions, PresetOptions
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import find_checkpoints
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.corpus import corpus_statistics
from afmrl_jax.data.stream import Stream, StreamOptions
from afmrl_jax.data.views import listing_text
from afmrl_jax.programs import agcl
from afmrl_jax.retrieval.tasks import parse_task, validation_task

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_leaves_all_that_it_promises(whole):
    rows = logged(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "accuracy", "weight_p50", "masked_by_attributes", "pairs_per_second"} <= set(
        rows[0]
    )
    assert "validation" in rows[2] and "validation" in rows[5]
    results = json.loads((whole / "evaluation.json").read_text())
    assert set(results) == {"image+text->image+text", "image->text"}
    assert {"recall@1", "mrr", "map", "ndcg@10", "n_queries"} <= set(results["image->text"])
    assert json.loads((whole / "config.json").read_text(), parse_constant=int)["steps"] == 6
    assert list((whole / "tensorboard").iterdir())
    printed = whole.with_name("printed.txt").read_text()
    assert "| before " in printed and "| after " in printed


def test_the_same_command_again_says_that_it_is_complete(agcl_config, whole, capsys):
    before = state_of(whole)
    runner.run(agcl_config, whole)
    assert "is complete: 6 steps are done" in capsys.readouterr().out
    after = state_of(whole)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert len(logged(whole)) == 6


def test_a_changed_configuration_is_refused_field_by_field(agcl_config, whole):
    agcl_config.batch = 4
    agcl_config.loss.temperature = 0.1
    agcl_config.log_every = 3  # this one may change
    told = "batch was 8 and is now 4; loss.temperature was 0.05 and is now 0.1"
    with pytest.raises(UserError) as error:
        runner.run(agcl_config, whole)
    assert told in str(error.value)
    assert "log_every" not in str(error.value)


def test_a_run_killed_and_started_again_ends_bit_equal(agcl_config, whole, command, tmp_path):
    """kill -9 once the third step is logged; checkpoints are two steps apart."""
    workdir = tmp_path / "killed"
    process = subprocess.Popen(command(agcl_config, workdir), cwd=ROOT, start_new_session=True)
    log = workdir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.02)
    assert process.poll() is None  # still at work
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runner.run(agcl_config, workdir)
    check_bit_equal(whole, workdir)
    assert [row["step"] for row in logged(workdir)] == [1, 2, 3, 4, 5, 6]


def test_other_processes_show_each_listing_in_the_step_in_which_one_would(agcl_config, tmp_path):
    """Two processes take over after three steps: halves of a batch are the rows of the whole."""
    catalog = open_catalogue(CatalogOptions.of(agcl_config), tmp_path)
    statistics = corpus_statistics(catalog, "train", tmp_path)
    texts = [listing_text(catalog.listing(i)) for i in range(len(catalog))]
    options, preset = EncoderOptions.of(agcl_config), PresetOptions.of(agcl_config)
    encoder = Encoder.from_preset(options, preset, texts)
    read = catalog, encoder.processor(), statistics, tmp_path
    made = functools.partial(agcl.pair_batches, agcl_config, *read)

    def listings(first, last, *shares):
        """[step][example][view], as the streams of processes with these rows of a batch give."""
        options = StreamOptions.of(agcl_config)
        with contextlib.ExitStack() as stack:
            streams = (Stream(made(rows), first, options) for rows in shares)
            opened = [stack.enter_context(contextlib.closing(stream)) for stream in streams]
            steps = [[next(stream)["listing"] for stream in opened] for _ in range(first, last)]
        return [np.concatenate(parts, axis=1).tolist() for parts in steps]

    alone = listings(0, 6, np.arange(8))
    assert listings(3, 6, np.arange(4), np.arange(4, 8)) == alone[3:]
    assert len({str(step) for step in alone}) == 6  # they can be told apart


def test_a_step_that_is_not_finite_stops_with_its_listings_and_is_not_saved(agcl_config, tmp_path):
    agcl_config.optimizer.learning_rate = 1e38
    agcl_config.checkpoint_every = 1
    with pytest.raises(UserError, match=r"step \d+: the loss or its gradient.*(mug|shirt|hat)-"):
        runner.run(agcl_config, tmp_path / "nan")
    _, step = find_checkpoints(str(tmp_path / "nan"))
    assert step == 1  # its rate was 0, the warm-up's first


def test_gradcache_trains_as_the_direct_step_does(agcl_config, whole, tmp_path):
    agcl_config.micro_batches = 4
    runner.run(agcl_config, tmp_path / "micro_batches")
    np.testing.assert_allclose(losses(tmp_path / "micro_batches"), losses(whole), rtol=1e-4)


def test_a_checkpoint_starts_another_run_and_is_judged_anywhere(
    agcl_config, whole, catalogue_folder, tmp_path, capsys
):
    from afmrl_jax.configs.evaluate import get_config

    agcl_config.init_from = str(whole)
    agcl_config.steps = 3
    runner.run(agcl_config, tmp_path / "tuned")
    trained = json.loads((whole / "evaluation.json").read_text())
    before = json.loads((tmp_path / "tuned" / "evaluation_before.json").read_text())
    assert before == trained  # it began where the first run ended

    config = get_config()
    config.checkpoint = str(whole)
    config.data.cache_dir = agcl_config.data.cache_dir
    config.eval.update(queries=str(catalogue_folder), batch=8, tasks=agcl_config.eval.tasks)
    runner.run(config, tmp_path / "judged")
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text()) == trained
    assert "step 6" in capsys.readouterr().out


def test_a_catalogue_without_images_is_judged_by_its_texts_or_refused_before_compiling(
    agcl_config, tmp_path, caplog
):
    rows = [
        {"listing_id": str(i), "product_id": str(i // 2), "title": f"mug {i}", "split": split}
        for i, split in enumerate(["train"] * 4 + ["validation"] * 4)
    ]
    (tmp_path / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    agcl_config.data.path = str(tmp_path)
    catalog = open_catalogue(CatalogOptions.of(agcl_config), tmp_path / "w")
    images, texts = parse_task("image->image"), parse_task("text->text")
    task, listings = validation_task(catalog, [images, texts], agcl.VALIDATION_LISTINGS)
    assert task == texts and listings.tolist() == [4, 5, 6, 7]
    assert "the best checkpoint is chosen by text->text" in caplog.text
    agcl_config.eval.tasks = "image->image, text->image"
    with pytest.raises(UserError, match="text->image shows what no listing"):
        runner.run(agcl_config, tmp_path / "w")
