"""The whole cycle on a small catalogue: 15 products in two listings each to train on."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from workdirs import check_bit_equal, lines

from afmrl_jax import runner
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import find_checkpoints
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.corpus import TrainedOn
from afmrl_jax.programs.cit import Manifest, stages_of

SIZES = {"workers": 0, "max_patches": 16, "min_pixels": 256, "max_pixels": 1024}
ARMS = ("plain", "query", "both")
JUDGED = [f"evaluate/{which}_{how}" for which in ("first", "second") for how in ARMS]


@pytest.fixture
def config(catalogue_folder, cache_dir, taught):
    """configs/cit.py at its smallest, in one process."""
    from afmrl_jax.configs.cit import get_config

    config = get_config()
    config.data.path = str(catalogue_folder)
    config.data.cache_dir = cache_dir
    for encoder in (config.agcl, config.again):  # as agcl_config is, and compiled already
        encoder.update(steps=6, batch=8, eval_every=0, checkpoint_every=2)
        encoder.data.update(**SIZES, max_tokens=24, neighbours=4)
        encoder.model.update(vocab_size=300, dtype="float32")
        encoder.optimizer.learning_rate = 5e-4
        encoder.eval.update(batch=8, tasks="image+text->image+text")
    config.sft.update(init_from=str(taught), steps=2, batch=8, micro_batches=1)
    config.sft.update(eval_every=0, checkpoint_every=0)
    config.sft.data.update(**SIZES, max_tokens=64, max_answer=16, buckets=1)
    config.sft.data.instruction = "color type"
    config.sft.model.dtype = "float32"
    config.sft.optimizer.learning_rate = 1e-4
    config.sft.eval.update(batch=8, validation_listings=6)
    config.rar.update(steps=5, queries=4, samples=4, eval_every=0, checkpoint_every=1)
    config.rar.update(rollouts_every=1)
    config.rar.reward.batch = 20
    config.rar.eval.batch = 8
    config.rar.watch.update(copied=1.0, held_out_gain=-2.0, answer_diversity=0, pair_diversity=0)
    config.annotate.eval.batch = config.evaluate.eval.batch = 8
    config.share = 0.7
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the cycle that the first test runs."""
    return tmp_path_factory.mktemp("cit")


def manifest_of(workdir):
    return json.loads((workdir / "manifest.json").read_text())


@contextlib.contextmanager
def terminated_when(path):
    """Sends this process a SIGTERM once the file has a line."""
    left = threading.Event()

    def watch():
        while not left.is_set():
            if path.exists() and path.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def test_a_cycle_stopped_within_a_stage_goes_on_there_to_its_end(config, folder, capsys):
    run = folder / "run"
    with pytest.raises(SystemExit) as ended, terminated_when(run / "rar" / "metrics.jsonl"):
        runner.run(config, run)
    told = capsys.readouterr().out
    assert ended.value.code == 143
    assert "stopped by SIGTERM at step" in told and "stopped in stage 3 of 11, rar" in told
    before = manifest_of(run)
    states = {name: line["state"] for name, line in before.items()}
    assert states == {"agcl": "done", "sft": "done", "rar": "begun"}
    assert not (run / "annotate").exists()
    assert find_checkpoints(str(run / "rar"))[1] < config.rar.steps

    runner.run(config, run)
    told = capsys.readouterr().out
    assert "stage 1 of 11, agcl: done before" in told and "sft: done before" in told
    after = manifest_of(run)
    assert list(after) == ["agcl", "sft", "rar", "annotate", "again", *JUDGED]
    assert {line["state"] for line in after.values()} == {"done"}
    assert after["agcl"] == before["agcl"] and after["sft"] == before["sft"]
    assert after["rar"]["seconds"] > before["rar"]["seconds"] > 0
    for row in ARMS:
        assert f"| first encoder, {row} " in told and f"| second encoder, {row} " in told
    assert "second - first: image+text->image+text, plain: " in told
    results = json.loads((run / "evaluation.json").read_text())
    plain = results["scores"]["second encoder, plain"]["image+text->image+text"]
    trained = json.loads((run / "again" / "evaluation.json").read_text())
    assert plain["mrr"] == trained["image+text->image+text"]["mrr"]

    runner.run(config, run)
    assert "evaluate/second_both: done before" in capsys.readouterr().out


@pytest.fixture
def run(config, folder):
    """The workdir of a cycle that is done."""
    if not (folder / "run" / "evaluation.json").exists():
        runner.run(config, folder / "run")
    return folder / "run"


def test_the_stopped_stage_ends_as_one_that_was_never_stopped(config, run, tmp_path):
    stage = stages_of(config, run)[2]
    runner.run(stage.config, tmp_path / "rar")
    for name in ("rollouts.jsonl", "evaluation.json"):
        assert (run / "rar" / name).read_text() == (tmp_path / "rar" / name).read_text()
    check_bit_equal(run / "rar", tmp_path / "rar")


def test_the_second_encoder_learns_from_the_generators_share_alone(config, run):
    written = lines(run / "annotate" / "attributes.jsonl")
    ids = {line["listing_id"] for line in written}
    products = {listing_id.rpartition("-")[0] for listing_id in ids}
    assert 8 <= len(products) < 15 and not any("grey" in product for product in products)
    own = stages_of(config, run)[4].config
    assert own.data.attributes == str(run / "annotate" / "attributes.jsonl")
    catalog = open_catalogue(CatalogOptions.of(own), run)
    shown = [i for i in catalog.indices("train") if catalog.listing(int(i)).listing_id in ids]
    checkpoints, step = find_checkpoints(str(run / "again"))
    found = checkpoints.record(step)["catalogue"]
    assert found == TrainedOn(catalog, np.array(shown, np.int64)).fingerprint


def test_a_changed_field_is_refused_where_its_stage_has_begun(config, tmp_path):
    finish(config, tmp_path, "agcl", "sft")
    config.rar.steps = 9  # its stage has not begun
    config.share = 0.5
    config.sft.log_every = 7  # changes nothing of what is computed
    Manifest(tmp_path, config, stages_of(config, tmp_path))
    config.sft.optimizer.learning_rate = 0.5
    config.again.steps = 9
    with pytest.raises(UserError) as error:
        Manifest(tmp_path, config, stages_of(config, tmp_path))
    assert "sft.optimizer.learning_rate was 0.0001 and is now 0.5. Give" in str(error.value)
    assert not any(name in str(error.value) for name in ("rar", "share", "log_every", "again"))
    config.sft.optimizer.learning_rate = 1e-4
    config.seed = 1  # of every stage
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        runner.run(config, tmp_path)


def test_a_deleted_stage_is_run_anew_with_those_behind_it(config, tmp_path):
    names = [stage.name for stage in finish(config, tmp_path, "agcl", "sft", "rar")]
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(UserError, match=r"rar was made with what stood in .*sft, which is to be"):
        Manifest(tmp_path, config, stages_of(config, tmp_path))
    shutil.rmtree(tmp_path / "rar")
    stages = stages_of(config, tmp_path)
    manifest = Manifest(tmp_path, config, stages)
    assert [stage.name for stage in stages if manifest.is_done(stage)] == names[:1]


def test_a_killed_start_counts_until_the_last_file_that_it_wrote(config, tmp_path):
    stages = finish(config, tmp_path)
    with pytest.raises(ZeroDivisionError), Manifest(tmp_path, config, stages).running(stages[0]):
        (tmp_path / "agcl").mkdir()
        (tmp_path / "agcl" / "metrics.jsonl").touch()
        killed = (tmp_path / "manifest.json").read_text()
        1 / 0  # noqa: B018
    assert manifest_of(tmp_path)["agcl"]["state"] == "begun"
    (tmp_path / "manifest.json").write_text(killed)
    began = manifest_of(tmp_path)["agcl"]["running"]
    os.utime(tmp_path / "agcl" / "metrics.jsonl", (began + 50, began + 50))
    with Manifest(tmp_path, config, stages).running(stages[0]):
        pass
    line = manifest_of(tmp_path)["agcl"]
    assert line["state"] == "done" and 50 <= line["seconds"] < 60


def finish(config, workdir, *names):
    """A cycle of which these stages are done, without having computed anything."""
    stages = stages_of(config, workdir)
    (workdir / "config.json").write_text(config.to_json())
    manifest = Manifest(workdir, config, stages)
    for stage in stages:
        if stage.name in names:
            (workdir / stage.name).mkdir()
            with manifest.running(stage):
                pass
    return stages


@pytest.mark.parametrize("field", ["rar.generator", "sft.seed", "again.data.attributes"])
def test_what_the_cycle_sets_itself_is_not_offered(config, field):
    inner, _, last = field.rpartition(".")
    for name in inner.split("."):
        config = config[name]
    with pytest.raises(AttributeError, match=last):
        setattr(config, last, "x")


def test_a_stage_may_begin_with_the_first_encoder(config, tmp_path):
    config.sft.init_from = "agcl"
    config.again.init_from = "elsewhere"
    stages = {stage.name: stage.config for stage in stages_of(config, tmp_path)}
    assert stages["sft"].init_from == str(tmp_path / "agcl")
    assert stages["again"].init_from == "elsewhere"


def test_a_field_out_of_its_range_ends_the_run_before_the_first_stage(config, tmp_path):
    config.again.batch = 0
    with pytest.raises(UserError, match=r"again.batch is 0: give 1 or more"):
        runner.run(config, tmp_path / "run")
    config.again.batch, config.rar.optimizer.b1 = 8, 1.0
    with pytest.raises(UserError, match=r"rar.optimizer.b1 is 1.0: give 0 to 0.999999"):
        runner.run(config, tmp_path / "run")
    config.rar.optimizer.b1, config.rar.policy.clip = 0.9, 2.0
    with pytest.raises(UserError, match=r"rar.policy.clip is 2.0: give 0 to 1"):
        runner.run(config, tmp_path / "run")
    config.rar.policy.clip, config.rar.reward.kind = 0.2, "ndgc"
    with pytest.raises(UserError, match=r"rar.reward.kind is 'ndgc', .* did you mean \"ndcg\""):
        runner.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "agcl").exists()
