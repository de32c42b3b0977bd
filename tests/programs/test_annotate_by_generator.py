"""Our own generator as the one that annotates: 40 listings of a small catalogue."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from joined import joined

from afmrl_jax import runner
from afmrl_jax.annotation.answerers import pinned_generator
from afmrl_jax.assembly.loaded import load_generator
from afmrl_jax.catalog.opening import CatalogOptions, ListingOptions, open_catalogue, open_listings
from afmrl_jax.checkpoints.checkpoint import Checkpoints, find_checkpoints
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(agcl_config, taught):
    from afmrl_jax.configs.annotate import get_config

    config = get_config()
    config.data.update(path=agcl_config.data.path, cache_dir=agcl_config.data.cache_dir)
    config.generator, config.eval.batch, config.log_every = str(taught), 8, 10
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the run that the first test makes."""
    return tmp_path_factory.mktemp("annotated") / "run"


def annotated(config, workdir):
    """(lines of attributes.jsonl, of invalid.jsonl) of a run that nothing stopped."""
    if not workdir.exists():
        runner.run(config, workdir)
    return [
        [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("attributes", "invalid")
    ]


def test_every_listing_gets_what_the_generator_says_and_how_sure_it_is(config, folder, capsys):
    valid, invalid = annotated(config, folder)
    told = capsys.readouterr().out
    assert "40 of 40 listings are answered; this start: " in told and " tokens" in told
    catalog = open_listings(ListingOptions.of(config), folder)
    model = load_generator(config.generator, make_mesh(dict(config.mesh)), 16)
    said = {
        catalog.listing(i).listing_id: one
        for i, one in enumerate(model.describe(catalog, np.arange(40)))
    }
    assert len(valid) > 20 and len(valid) + len(invalid) == 40
    for line in valid:
        one = said[line["listing_id"]]
        assert line["attributes"] == one.sure(0) and line["confidence"].keys() == one.sure(0).keys()
        assert line["confidence"] == pytest.approx(one.confidence, abs=1e-3)
    assert all(not said[line["listing_id"]].sure(0) for line in invalid)
    config.data.unlock().attributes = str(folder / "attributes.jsonl")
    catalog = open_catalogue(CatalogOptions.of(config), folder)  # confidence is no hindrance
    shown = {catalog.listing(i).listing_id: catalog.listing(i).attributes for i in range(40)}
    assert all(shown[line["listing_id"]] == line["attributes"] for line in valid)


def test_two_processes_go_on_behind_the_last_whole_line_with_the_answers_of_one(
    config, folder, command, tmp_path
):
    wanted = annotated(config, folder)
    lines = (folder / "attributes.jsonl").read_bytes().splitlines(keepends=True)
    kept = lines[:13]
    shutil.copytree(folder, tmp_path / "two", ignore=lambda *_: ["tensorboard", "invalid.jsonl"])
    (tmp_path / "two" / "attributes.jsonl").write_bytes(b"".join(kept) + lines[13][:-9])
    config.mesh.data = 2
    running = [
        subprocess.Popen(
            command(config, tmp_path / "two"),
            cwd=ROOT,
            env=os.environ | own,
            stdout=subprocess.PIPE,
        )
        for own in joined(2)
    ]
    try:
        told = [process.communicate(timeout=300)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    found = annotated(config, tmp_path / "two")
    assert (tmp_path / "two" / "attributes.jsonl").read_bytes().startswith(b"".join(kept))
    for ours, theirs in zip(found, wanted):
        assert [strip(line) for line in ours] == [strip(line) for line in theirs]
    for ours, theirs in zip(found[0], wanted[0]):
        assert ours["confidence"] == pytest.approx(theirs["confidence"], abs=1e-3)
    assert f"{40 - 13} of 40 listings are left" in told[0]
    assert "listings" not in told[1]


def strip(line):
    return {name: value for name, value in line.items() if name != "confidence"}


def test_another_checkpoint_does_not_go_on_with_the_answers_of_the_first(config, folder, tmp_path):
    annotated(config, folder)
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(config.generator, tmp_path / "other")
    config.generator = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"generator was '.*checkpoints/40' and is now '.*other"):
        runner.run(config, tmp_path / "run")


def test_a_model_that_nobody_taught_is_refused(config, tmp_path, agcl_config):
    config.generator = agcl_config.data.path
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        runner.run(config, tmp_path)
    config.update(generator=config.generator, share=0.0)
    with pytest.raises(UserError, match=r"share is 0\.0"):
        runner.run(config, tmp_path)


def test_of_a_workdir_the_generator_that_did_best_on_validation_answers(taught, tmp_path):
    trained, step = find_checkpoints(str(taught))
    record, state = trained.record(step), TrainState(**trained.restore_raw(step))
    with Checkpoints(tmp_path / "checkpoints", writable=True) as checkpoints:
        for step, validation in enumerate([0.9, 0.1], 1):
            checkpoints.save(state, record, step, validation)
    folder = tmp_path / "checkpoints"
    assert pinned_generator(str(tmp_path)) == str(folder / "1")
    assert pinned_generator(str(folder / "2")) == str(folder / "2")
