"""The program with an attribute-label head, which is trained and saved beside the encoder."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from workdirs import check_bit_equal, logged, state_of, stopped

from afmrl_jax import runner
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.corpus import corpus_statistics
from afmrl_jax.programs import agcl


@pytest.fixture
def config(agcl_config):
    agcl_config.update(steps=4, eval_every=0, checkpoint_every=2, micro_batches=2)
    agcl_config.loss.update(head_weight=0.5, negative_weight="none")
    agcl_config.eval.tasks = "image->text"
    return agcl_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("head") / "run"


@pytest.fixture
def headed(config, folder):
    """The workdir of a run that nothing stopped."""
    if not folder.exists():
        runner.run(config, folder)
    return folder


def test_the_head_learns_and_is_saved(headed):
    rows = logged(headed)
    losses = [row["head_loss"] for row in rows]
    # A new head holds the 3 training colours for equally likely, and the 5 kinds.
    assert losses[0] == pytest.approx((np.log(3) + np.log(5)) / 2, rel=1e-5)
    assert losses[-1] < losses[0] and rows[0]["head_accuracy"] == 0
    state = state_of(headed)
    assert state["params.head.bias"].shape == (8,)
    assert state["params.head.kernel"].any()


def test_a_run_stopped_and_started_again_ends_bit_equal(config, headed, tmp_path):
    runner.run(config, stopped(headed, tmp_path / "stopped"))
    check_bit_equal(headed, tmp_path / "stopped")


def test_labels_that_the_rarest_terms_push_out_are_told(config, tmp_path, caplog):
    catalog = open_catalogue(CatalogOptions.of(config), Path())
    statistics = corpus_statistics(catalog, "train", tmp_path)
    agcl._tell_of_cut_labels(catalog, statistics, 4)  # two pairs, and two words
    assert not caplog.records
    agcl._tell_of_cut_labels(catalog, statistics, 3)
    assert "30 of 30 training listings read have more than data.max_terms=3" in caplog.text
    assert "--config.data.max_terms=4 keeps all of theirs" in caplog.text


@pytest.mark.parametrize("rank", [0, 2])
def test_what_reads_a_checkpoint_gets_the_encoder_alone(config, headed, tmp_path, rank):
    """As evaluate, export and RAR read it; a run that begins with it gets a head of its own."""
    workdir = headed
    if rank:  # the head is trained beside adapters, on the encoder of the run with a head
        config.update(init_from=str(headed), steps=2, micro_batches=1)
        config.model.lora_rank = rank
        workdir = tmp_path / "adapters"
        runner.run(config, workdir)
        before = json.loads((workdir / "evaluation_before.json").read_text())
        assert before == json.loads((headed / "evaluation.json").read_text())
        names = {name.rpartition(".")[2] for name in state_of(workdir) if "params." in name}
        assert names == {"lora_a", "lora_b", "kernel", "bias"}
    source = find_pretrained(str(workdir))
    params = source.load(abstract_params(source.model, make_mesh(dict(config.mesh))))
    own = jax.tree.map(np.asarray, dataclasses.replace(source.model, lora=None).init_params(0))
    assert jax.tree.structure(params) == jax.tree.structure(own)
    assert not np.array_equal(jax.tree.leaves(params)[-1], jax.tree.leaves(own)[-1])
