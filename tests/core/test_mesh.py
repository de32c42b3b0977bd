import jax
import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import AXES, batch_shards, local_rows, make_mesh


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
