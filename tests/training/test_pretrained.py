"""A checkpoint found again, as what it is or as what it can begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.training.checkpoint import Checkpoints
from afmrl_jax.training.encoder import Encoder, abstract_params, from_preset
from afmrl_jax.training.generator import Generator
from afmrl_jax.training.pretrained import find_pretrained
from afmrl_jax.training.state import TrainState


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The workdir of a run of an encoder, and its parameters."""
    from afmrl_jax.configs.agcl import get_config

    config = ConfigDict(get_config().to_dict())
    config.model.vocab_size = 300
    enc = from_preset(config, ["red mug"], Encoder)
    params = jax.jit(lambda: enc.init_params(0))()
    workdir = tmp_path_factory.mktemp("encoder")
    with Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        record = enc.record() | {"config": config.to_json()}
        checkpoints.save(TrainState(jnp.int32(1), params, {}), record, 1, None)
    return workdir, params


def test_an_encoder_gives_a_generator_its_parameters(encoder):
    workdir, params = encoder
    source = find_pretrained(str(workdir), Generator, begin=True)
    mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})
    begun = source.load(abstract_params(source.enc, mesh))
    jax.tree.map(np.testing.assert_array_equal, begun, params["backbone"])


def test_but_is_none_itself(encoder):
    with pytest.raises(UserError, match="holds the encoder of a run: name what has trained"):
        find_pretrained(str(encoder[0]), Generator)


def test_parameters_that_were_not_saved_are_told(encoder):
    workdir, _ = encoder
    source = find_pretrained(str(workdir))
    mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})
    wanted = abstract_params(source.enc, mesh)
    wanted["backbone"]["head"] = jax.tree.leaves(wanted)[0]
    with pytest.raises(ValueError, match="lacks some of these parameters"):
        source.load(wanted)
