"""Log-probs and entropies of answers, under the model that drew them or under another.

The answers to a prompt follow it in one row, each masked from the others: photos and prompt are
read once, whatever the number of answers.
Axes: C prompts · G answers of a prompt · S prompt tokens · T answer tokens · D width.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afmrl_jax.core.types import Params
from afmrl_jax.losses.language import token_log_probs
from afmrl_jax.models.partition import shard_rows


def score_answers(
    graph: nnx.GraphDef,
    params: Params,
    rows: Mapping[str, jax.Array],
    answers: Mapping[str, jax.Array],
    *,
    chunk: int,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the answers' tokens, and entropies, float32[C, G, T]; 0 outside the mask.

    graph, params: nnx.split of a QwenVL with its head. rows: the prompts, padded left. answers:
    `tokens` int32[C, G, T] and `mask` bool[C, G, T] of the sampler. chunk, temperature: as
    `token_log_probs` takes them.
    """
    tokens, mask = answers["tokens"], answers["mask"]
    model, (prompts, samples, length) = nnx.merge(graph, params), tokens.shape
    behind, size = samples * length, rows["tokens"].shape[1]
    x, deepstack = model.embed_rows(rows)
    x = jnp.concatenate([x, model.embed_tokens(tokens.reshape(prompts, behind))], axis=1)
    if deepstack is not None:
        deepstack = jnp.pad(deepstack, ((0, 0), (0, 0), (0, behind), (0, 0)))
    # An answer's positions follow the prompt's, one more a token on all axes, as in the sampler.
    shown = jnp.where(rows["token_mask"][:, None], rows["positions"], -1)
    positions = shown.max(axis=(1, 2), keepdims=True) + 1 + jnp.tile(jnp.arange(length), samples)
    positions = jnp.broadcast_to(positions, (prompts, rows["positions"].shape[1], behind))
    real = jnp.concatenate([rows["token_mask"], mask.reshape(prompts, behind)], axis=1)
    # 0 for tokens of the prompt, which all tokens see; else the number of the answer.
    segments = np.concatenate([np.zeros(size, int), 1 + np.arange(behind) // length])
    seen = (segments == 0) | (segments[:, None] == segments)
    packed = {
        "positions": jnp.concatenate([rows["positions"], positions], axis=2),
        "attention_mask": real[:, None] & seen,
    }
    hidden, _ = model.read(packed, cache=False, embedded=(shard_rows(x), deepstack))
    # Each token is predicted at the token before it, the first of an answer at the prompt's last.
    last = jnp.broadcast_to(hidden[:, None, size - 1 : size], (prompts, samples, 1, x.shape[2]))
    hidden = hidden[:, size:].reshape(prompts, samples, length, -1)
    hidden = jnp.concatenate([last, hidden[:, :, :-1]], axis=2).reshape(-1, length, x.shape[2])
    tokens, mask = (x.reshape(-1, length) for x in (tokens, mask))
    scores = token_log_probs(hidden, model.logits, tokens, chunk, temperature, mask)
    log_probs, entropy = (x.reshape(prompts, samples, length) for x in scores)
    return log_probs, entropy
