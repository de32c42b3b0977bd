import importlib.util

import jax
import numpy as np
import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import AXES, batch_shards, local_rows, make_mesh
from afmrl_jax.programs.plan import devices_of


def sizes(**given):
    return {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1} | given


def test_minus_one_takes_the_devices_that_are_left():
    mesh = make_mesh(sizes(data=-1))
    assert mesh.axis_names == AXES
    assert batch_shards(mesh) == jax.device_count()


@pytest.mark.parametrize(
    "given, told",
    [
        (sizes(data=3, fsdp=5), "needs 15 devices, but there are 1"),
        (sizes(data=-1, fsdp=-1), "at most one is -1"),
        (sizes(data=0), "positive number"),
        (sizes(data=-1, fsdp=7), "does not divide 1 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_says_so(given, told):
    with pytest.raises(UserError, match=told):
        make_mesh(given)


def test_one_process_delivers_every_row():
    assert local_rows(make_mesh(sizes()), 6, "batch").tolist() == [*range(6)]


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="XLA's TPU compiler (libtpu) is not installed",
)


@needs_compiler
def test_each_slice_is_a_pod_and_the_other_axes_stay_within_it():
    pods = devices_of("2xv5e:4x4")
    mesh = make_mesh(sizes(slice=2, data=-1, fsdp=4, tensor=2), pods)
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 4, "tensor": 2}
    assert [{d.slice_index for d in np.ravel(half)} for half in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"2 slices, and mesh\.slice is 1: set it to 2"):
        make_mesh(sizes(data=-1), pods)


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:8x8", "v6e:8x8", "v5p:4x4x4"])
def test_an_axis_may_be_longer_than_a_side_of_the_torus(topology):
    mesh = make_mesh(sizes(data=-1, fsdp=16), devices_of(topology))
    assert dict(mesh.shape) == {"slice": 1, "data": 4, "fsdp": 16, "tensor": 1}


@needs_compiler
def test_processes_of_a_torus_deliver_rows_that_lie_apart_and_all_of_them_once():
    pod = devices_of("v5e:4x4")
    mesh = make_mesh(sizes(fsdp=-1), pod)
    rows = local_rows(mesh, 32, "batch")
    own = [place for place, d in enumerate(mesh.devices.flat) if d.process_index == 0]
    assert rows.tolist() == sorted(row for place in own for row in (2 * place, 2 * place + 1))
    assert (np.diff(rows) > 1).any()  # a host's four chips are a square, the mesh a ring
