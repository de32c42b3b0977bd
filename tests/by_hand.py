"""Loaded encoders whose vectors are worked out by hand: a function of their processor's rows."""

from dataclasses import dataclass
from typing import Any

import jax

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.core.mesh import make_mesh


@dataclass(frozen=True)
class FunctionEncoder:
    """An encoder without parameters. vectors: rows -> float32[B, E], of JAX's arrays."""

    rows: Any
    vectors: Any

    def processor(self):
        return self.rows

    def embed(self):
        return lambda params, rows: self.vectors(rows)


def loaded_encoder(processor, vectors, batch):
    """On one device."""
    sizes = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}
    mesh = make_mesh(sizes, among=jax.devices()[:1])
    return LoadedEncoder(FunctionEncoder(processor, vectors), {}, mesh, batch)
