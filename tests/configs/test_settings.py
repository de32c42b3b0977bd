"""The pages and the options that read them: each field has a reader, each value stands once."""

import dataclasses
import importlib

import pytest

from afmrl_jax.core.fields import flatten
from afmrl_jax.core.options import check_options
from afmrl_jax.core.pages import PROGRAMS, check_page, load_page
from afmrl_jax.training.objective import METHODS, Method, find_objective

SINGLE = [program for program in PROGRAMS if program != "cit"]
# Read by main, before it knows the program.
MAIN = {"program", "data.cache_dir", "mesh.slice", "mesh.data", "mesh.fsdp", "mesh.tensor"}


def options_of(program):
    """All options that a program reads, those of folders, endpoints and methods among them."""
    module = importlib.import_module(f"afmrl_jax.programs.{program}")
    names = ("OPTIONS", "FOLDER_OPTIONS", "ENDPOINT_OPTIONS")
    kinds = {kind for name in names for kind in getattr(module, name, ())}
    methods = map(find_objective, METHODS if Method in kinds else ())
    return kinds.union(*(method.options for method in methods))


def fields_of(program):
    return set().union(*(kind.names() for kind in options_of(program)))


@pytest.mark.parametrize("program", SINGLE)
def test_each_field_of_a_page_is_read_and_each_field_that_is_read_stands_in_the_page(program):
    fields = set(flatten(load_page(f"configs/{program}.py")))
    assert fields == fields_of(program) | MAIN


def test_each_field_of_the_cycle_is_read_by_it_or_by_a_stage():
    config = load_page("configs/cit.py")
    stages = {"again": "agcl"} | {name: name for name in ("agcl", "sft", "rar", "annotate")}
    stages["evaluate"] = "evaluate"
    for name in flatten(config):
        section, _, field = name.partition(".")
        read = fields_of(stages[section]) if section in stages else fields_of("cit") | MAIN
        assert (field if section in stages else name) in read, name


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_value_stands_in_a_page_alone(program):
    for kind in options_of(program):
        for field in dataclasses.fields(kind):
            assert field.default is dataclasses.MISSING, (kind, field.name)
            assert field.default_factory is dataclasses.MISSING, (kind, field.name)


def test_no_two_options_have_one_name():
    kinds = {kind for program in PROGRAMS for kind in options_of(program)}
    assert len({kind.__name__ for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("program", [program for program in PROGRAMS if program != "export"])
def test_the_arm_tiny_of_a_page_can_be_run(program):
    config = load_page(f"configs/{program}.py:tiny")
    check_page(config)
    assert config != load_page(f"configs/{program}.py")
    check_options(config, importlib.import_module(f"afmrl_jax.programs.{program}").OPTIONS)


@pytest.mark.parametrize("arm", ["", ":tiny"])
def test_the_base_is_trained_by_the_program_sft_on_the_world(arm):
    config = load_page(f"configs/pretrain.py{arm}")
    check_page(config)
    assert config.program == "sft" and config.data.path == "world"
    assert config.data.subset_share and config.data.caption_share
    check_options(config, importlib.import_module("afmrl_jax.programs.sft").OPTIONS)


@pytest.mark.parametrize("arm", ["", ":tiny"])
def test_distillation_is_a_method_of_the_program_agcl(arm):
    config = load_page(f"configs/distill.py{arm}")
    check_page(config)
    assert config.program == "agcl" and config.method == "distill"
    check_options(config, importlib.import_module("afmrl_jax.programs.agcl").OPTIONS)
