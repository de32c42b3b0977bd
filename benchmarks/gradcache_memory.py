"""Measures GradCache's memory: the compiled step's temporary bytes at batches 256 and 4,096.

python benchmarks/gradcache_memory.py [--chunk 32]

Uses the tiny encoder at its default row size and the AGCL loss; the step is compiled, not run. The
memory that the method itself needs for a batch B is subtracted: the embeddings with their gradient,
and one B x B buffer of the loss. The loss holds several such buffers, but XLA puts some of them
where activations were.
"""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from running import write

from afmrl_jax.configs import agcl
from afmrl_jax.losses.contrastive import Contrastive, contrastive_loss
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.training.gradients import gradcache

ROW = SimpleNamespace(tokens=56, patches=64, terms=32)
LIMIT = 1.3
OPTIONS = dataclasses.replace(Contrastive.of(agcl.get_config()), temperature=0.02)


def loss(embeddings: jax.Array, side: dict[str, jax.Array]):
    """The AGCL loss over [micro_batches, pairs, 2, E]."""
    queries, targets = (embeddings[:, :, v].reshape(-1, embeddings.shape[-1]) for v in (0, 1))
    info = {f"{s}_{name}": array for s in ("query", "target") for name, array in side.items()}
    total, count, _ = contrastive_loss(queries, targets, info, OPTIONS)
    return total / count, {}


def measure(batch: int, chunk: int) -> dict[str, int]:
    config = preset("tiny")
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Embedder(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    )
    params = nnx.to_pure_dict(state)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    lead = (batch // chunk, chunk, 2)
    rows = {
        "tokens": shape(*lead, ROW.tokens, dtype=jnp.int32),
        "token_mask": shape(*lead, ROW.tokens, dtype=bool),
        "positions": shape(*lead, 3, ROW.tokens, dtype=jnp.int32),
        "patches": shape(*lead, ROW.patches, config.vision.patch_dim),
        "patch_positions": shape(*lead, ROW.patches, 2, dtype=jnp.int32),
        "patch_segments": shape(*lead, ROW.patches, dtype=jnp.int32),
        "patch_grids": shape(*lead, ROW.patches, 2, dtype=jnp.int32),
    }
    side = {
        "product": shape(batch, dtype=jnp.int32),
        "terms": shape(batch, ROW.terms, dtype=jnp.int32),
        "query_weights": shape(batch, ROW.terms),
        "document_weights": shape(batch, ROW.terms),
    }

    def embed(params, rows):
        flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in rows.items()}
        return nnx.merge(graphdef, params)(flat).reshape(chunk, 2, -1)

    def step(params, rows, side):
        return gradcache(embed, lambda _, e: loss(e, side))(params, rows)

    memory = jax.jit(step).lower(params, rows, side).compile().memory_analysis()
    return {
        "batch": batch,
        "temporary_bytes": memory.temp_size_in_bytes,
        "method_bytes": 4 * batch * batch + 2 * 4 * batch * 2 * config.text.hidden_size,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk", type=int, default=32, help="pairs")
    chunk = parser.parse_args().chunk
    rows = [measure(batch, chunk) for batch in (256, 4096)]
    for row in rows:
        print(json.dumps(row))
    small, large = (row["temporary_bytes"] - row["method_bytes"] for row in rows)
    ratio = large / small
    print(f"temporary less method's bytes, at 4,096 / at 256: {ratio:.3f} (limit {LIMIT})")
    write("gradcache_memory", {"chunk": chunk, "rows": rows, "ratio": ratio})
    if ratio > LIMIT:
        raise SystemExit(f"memory grows with the batch: {ratio:.2f}")


if __name__ == "__main__":
    main()
