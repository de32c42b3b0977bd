"""The page that --config names."""

import shutil
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from afmrl_jax.configs import agcl, sft
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.pages import PACKAGED, PROGRAMS, check_page, load_page


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, of a user who has the package elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]


def test_the_packages_pages_are_found_from_any_folder(folder):
    assert {"agcl", "sft", "rar", "cit"} < set(PROGRAMS)
    for program in PROGRAMS:
        config = load_page(f"configs/{program}.py")
        check_page(config)
        assert config.program == program and config.is_locked
    assert load_page("configs/agcl.py:head").loss.head_weight == 0.3


def test_a_checkout_has_links_to_all_pages_where_commands_name_them():
    links = Path(__file__).parents[2] / "configs"
    assert {page.resolve() for page in links.glob("*.py")} == set(PACKAGED.glob("[a-z]*.py"))
    assert not (links / "__init__.py").exists()  # it would hide a user's own folder of that name


def test_a_page_works_as_a_copy_and_beside_other_packages_of_its_folders_name(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    shutil.copy(PACKAGED / "agcl.py", folder / "copied.py")
    assert load_page("copied.py:vlm2vec") == load_page("configs/agcl.py:vlm2vec")


def test_a_file_of_the_current_folder_goes_before_the_packages_and_imports_its_neighbours(folder):
    (folder / "configs").mkdir()
    shutil.copy(PACKAGED / "sft.py", folder / "configs" / "begin_here.py")
    (folder / "configs" / "agcl.py").write_text("from configs.begin_here import get_config\n")
    assert load_page("configs/agcl.py").program == "sft"


@pytest.mark.parametrize(
    "text, arm, sentence",
    [
        ("x = 1\ndef get_config(:\n", "", r"page\.py line 2: invalid syntax"),
        ("\nimport nosuch", "", r"page\.py line 2: ModuleNotFoundError: No module named 'nosuch'"),
        ("from configs.no import x", "", r"write `from afmrl_jax\.configs import NAME`"),
        ("x = 1", "", r"page\.py has no function get_config"),
        ("def get_config(): pass", "", "returned a NoneType, expected a ConfigDict"),
        ("def get_config(): pass", ":tiny", r"page\.py has no arms: leave out :tiny"),
        ("def get_config(arm): pass", "", r"page\.py wants an arm: give page\.py:ARM"),
        ("def get_config():\n    return open('x')", "", "line 2: FileNotFoundError"),
    ],
)
def test_a_page_that_fails_ends_in_a_sentence_with_its_line(folder, text, arm, sentence):
    (folder / "page.py").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_page(f"page.py{arm}")


def test_an_arm_that_a_page_does_not_have_is_told_with_those_that_it_has():
    with pytest.raises(UserError, match="no arm 'tyni': it has sft, tiny"):
        load_page("configs/sft.py:tyni")


def test_a_page_that_is_not_there_ends_with_the_nearest(folder):
    with pytest.raises(UserError, match=r"no configuration file configs/agc\.py: did you mean con"):
        load_page("configs/agc.py")


def test_a_page_that_sets_a_field_that_is_not_there_is_told_the_nearest_and_nothing_else(folder):
    page = "from afmrl_jax.configs import agcl\ndef get_config():\n    c = agcl.get_config()\n"
    (folder / "page.py").write_text(page + "    c.stepz = 5\n")
    with pytest.raises(UserError) as error:
        load_page("page.py")
    told = "page.py line 4: the configuration has no field 'stepz': did you mean 'steps'?"
    assert str(error.value) == told


def test_a_page_may_define_a_dataclass(folder):
    (folder / "page.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from afmrl_jax.configs import agcl\n"
        "@dataclass\nclass Size:\n    steps: int = 3\n"
        "def get_config():\n    c = agcl.get_config()\n    c.steps = Size().steps\n    return c\n"
    )
    assert load_page("page.py").steps == 3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"program": "sfft"}, "names the program 'sfft': `program` is one of agcl, "),
        ({"lerning_rate": 0.1}, "'lerning_rate', which sft does not read: did you mean 'optim"),
        ({"steps": "5"}, "steps is '5', a str: expected int, as 900 in configs/sft.py"),
        ({"eval_every": None}, "eval_every is None, a NoneType: expected int"),
        ({"batch": True}, "batch is True, a bool: expected int"),
    ],
)
def test_fields_that_the_program_does_not_read_or_of_another_type_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_page(ConfigDict(sft.get_config().to_dict() | changes))


def test_a_field_that_a_page_lacks_is_named_with_the_packages_value():
    config = agcl.get_config().unlock()
    config.data.timeout = 600  # a whole number is a number
    check_page(config)
    del config.data.attribute_noise
    with pytest.raises(UserError, match=r"lacks data\.attribute_noise \(0\.3 in configs/agcl\.py"):
        check_page(config)
