"""The method that CONTRIBUTING.md shows works as it is written there."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import afmrl_jax as aj
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import check_options
from afmrl_jax.core.pages import check_method_fields, check_page, load_page
from afmrl_jax.programs import agcl
from afmrl_jax.training.objective import find_objective

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page of the section "Add a loss", in a folder with its module."""
    section = TEXT.partition("## Add a loss")[2].partition("\n## ")[0]
    module, page = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    (tmp_path / "triplet.py").write_text(module, encoding="utf-8")
    (tmp_path / "triplet_page.py").write_text(page, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield load_page(str(tmp_path / "triplet_page.py"))
    sys.modules.pop("triplet", None)


def check(config):
    check_page(config)
    check_method_fields(config)
    check_options(config, agcl.OPTIONS)


def test_its_loss_is_the_mean_excess_over_the_other_products(page):
    page.loss.margin = 0.5
    objective = find_objective(page.method).of(page, None, None)
    queries, targets = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8]]
    embeddings = jnp.stack([jnp.array(queries), jnp.array(targets)], 1)[:, None]  # [A, C=1, V, E]

    def loss(products):
        batch = {"product": jnp.array(products)[:, None, None].repeat(2, 2)}
        value, memory, metrics = objective({}, {}, embeddings, batch)
        assert memory == {}
        return float(value), float(metrics["violated"])

    # Cosines 1 .6 / 0 .8. Excesses: .5 + .6 - 1 of the first query, none of the second.
    assert loss([7, 8]) == pytest.approx((0.05, 0.5))
    assert loss([7, 7]) == (0, 0)


def test_its_fields_are_read_and_checked_as_those_of_the_package(page):
    check(page)
    page.loss.margin = 3.0
    with pytest.raises(UserError, match=r"loss\.margin is 3\.0: give 0 to 2"):
        check(page)


def test_a_field_that_no_option_reads_is_refused_beside_them(page):
    with page.unlocked():
        page.loss.margn = 0.2
    with pytest.raises(UserError, match=r"'loss\.margn', which agcl does not .*'loss\.margin'"):
        check(page)


def test_a_page_without_its_fields_is_told_which(page):
    with page.unlocked():
        del page.loss.margin
    with pytest.raises(UserError, match=r"loss\.margin is missing from the configuration"):
        check(page)


def test_its_fields_may_be_given_as_flags(page, tmp_path):
    method, margin = "--config.method=triplet:Triplet", "--config.loss.margin=3"
    command = [sys.executable, "-m", "afmrl_jax.main", "--config=configs/agcl.py", method, margin]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "afmrl_jax: loss.margin is 3.0: give 0 to 2"


def test_its_fields_may_be_given_to_the_api(page, tmp_path):
    fields = {"method": "triplet:Triplet", "loss.margin": 3.0, "data.cache_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"loss\.margin is 3\.0: give 0 to 2"):
        aj.train("configs/agcl.py", tmp_path / "run", **fields)
    with pytest.raises(UserError, match=r"there is no field 'steps\.x'"):
        aj.train("configs/agcl.py", tmp_path / "run", **{"steps.x": 3.0})
    with pytest.raises(UserError, match=r"there is no field 'loss'"):
        aj.train("configs/agcl.py", tmp_path / "run", loss=3.0)
