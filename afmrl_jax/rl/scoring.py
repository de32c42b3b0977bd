"""Scores answers by the model that drew them, or by another: log-probs and entropies.

The answers to a prompt are scored in one row behind it, each blind to the others: photos and prompt
are read once, whatever the number of answers.
Axes: C prompts · G answers of a prompt · S prompt tokens · T answer tokens · D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afmrl_jax.losses.language import token_log_probs
from afmrl_jax.models.partition import shard_rows


def score_answers(
    graph: nnx.GraphDef,
    params: Any,
    rows: Mapping[str, jax.Array],
    tokens: jax.Array,
    mask: jax.Array,
    *,
    chunk: int,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the answers' tokens, and entropies, float32[C, G, T]; 0 outside the mask.

    graph, params: nnx.split of a QwenVL with its head. rows: the prompts, padded left. tokens:
    int32[C, G, T] and mask: bool[C, G, T], as the sampler gives them. chunk, temperature: as
    `token_log_probs` takes them.
    """
    model, (prompts, samples, length) = nnx.merge(graph, params), tokens.shape
    behind, size = samples * length, rows["tokens"].shape[1]
    x, deepstack = model.embed_rows(rows)
    x = jnp.concatenate([x, model.embed_tokens(tokens.reshape(prompts, behind))], axis=1)
    if deepstack is not None:
        deepstack = jnp.pad(deepstack, ((0, 0), (0, 0), (0, behind), (0, 0)))
    # Each answer's text goes on behind the prompt by one a token on all axes, as in the sampler.
    shown = jnp.where(rows["token_mask"][:, None], rows["positions"], -1)
    own = shown.max(axis=(1, 2), keepdims=True) + 1 + jnp.tile(jnp.arange(length), samples)
    own = jnp.broadcast_to(own, (prompts, rows["positions"].shape[1], behind))
    real = jnp.concatenate([rows["token_mask"], mask.reshape(prompts, behind)], axis=1)
    # Whose each token is: 0 the prompt's, which all see, else its answer's number.
    whose = np.concatenate([np.zeros(size, int), 1 + np.arange(behind) // length])
    seen = (whose == 0) | (whose[:, None] == whose)
    packed = {
        "positions": jnp.concatenate([rows["positions"], own], axis=2),
        "attention_mask": real[:, None] & seen,
    }
    hidden, _ = model.read(packed, cache=False, embedded=(shard_rows(x), deepstack))
    # A token is predicted at the one before it, an answer's first at the prompt's last.
    last = jnp.broadcast_to(hidden[:, None, size - 1 : size], (prompts, samples, 1, x.shape[2]))
    hidden = hidden[:, size:].reshape(prompts, samples, length, -1)
    hidden = jnp.concatenate([last, hidden[:, :, :-1]], axis=2).reshape(-1, length, x.shape[2])
    tokens, mask = (x.reshape(-1, length) for x in (tokens, mask))
    scores = token_log_probs(hidden, model.logits, tokens, chunk, temperature, mask)
    log_probs, entropy = (x.reshape(prompts, samples, length) for x in scores)
    return log_probs, entropy
