"""A student of vectors that are given, by the program agcl."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workdirs import check_bit_equal, logged, stopped

from afmrl_jax import runner
from afmrl_jax.catalog.listings import open_catalog
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


def test_a_student_learns_and_goes_on_where_it_was_stopped(config, tmp_path):
    runner.run(config, tmp_path / "run")
    apart = [row["ranking_divergence"] for row in logged(tmp_path / "run")]
    assert np.mean(apart[-4:]) < 0.7 * np.mean(apart[:4])
    runner.run(config, stopped(tmp_path / "run", tmp_path / "stopped"))
    check_bit_equal(tmp_path / "run", tmp_path / "stopped")


def test_teachers_of_a_method_that_has_none_are_refused(config, tmp_path):
    config.method = "agcl"
    with pytest.raises(
        UserError, match=r"data\.teachers is .*, but the method agcl has no teachers"
    ):
        runner.run(config, tmp_path / "run")
