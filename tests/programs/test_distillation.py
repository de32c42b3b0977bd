"""A student of vectors that are given, by the program agcl."""

import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afmrl_jax import runner
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.checkpoints.checkpoint import find_checkpoints
from afmrl_jax.core.errors import UserError


@pytest.fixture
def config(agcl_config, catalogue_folder, cache_dir, tmp_path):
    """The student of a teacher who knows colours and kinds."""
    catalog = open_catalog(catalogue_folder, cache_dir=cache_dir)
    listings = [catalog.listing(i) for i in range(len(catalog))]
    words = sorted({word for x in listings for word in x.attributes.values()})
    vectors = [[float(word in x.attributes.values()) for word in words] for x in listings]
    table = pa.table({"listing_id": [x.listing_id for x in listings], "vector": vectors})
    pq.write_table(table, tmp_path / "teacher.parquet")
    agcl_config.method = "distill"
    agcl_config.update(steps=12, eval_every=0, checkpoint_every=9)
    agcl_config.optimizer.learning_rate = 3e-3
    agcl_config.eval.tasks = "image+text->image+text"
    agcl_config.data.update(
        identity="listing", lookalike_share=0.0, teachers=str(tmp_path / "teacher.parquet")
    )
    return agcl_config


def state_of(workdir):
    checkpoints, step = find_checkpoints(str(workdir))
    return checkpoints.restore_raw(step)


def test_a_student_learns_and_goes_on_where_it_was_stopped(config, tmp_path):
    runner.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    apart = [json.loads(line)["ranking_divergence"] for line in lines]
    assert np.mean(apart[-4:]) < 0.7 * np.mean(apart[:4])
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped)
    shutil.rmtree(stopped / "checkpoints" / "12")
    (stopped / "evaluation.json").unlink()
    runner.run(config, stopped)
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path / "run"), state_of(stopped))


def test_teachers_of_a_method_that_has_none_are_refused(config, tmp_path):
    config.method = "agcl"
    with pytest.raises(
        UserError, match=r"data\.teachers is .*, but the method agcl has no teachers"
    ):
        runner.run(config, tmp_path / "run")
