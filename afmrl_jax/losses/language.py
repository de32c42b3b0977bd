"""Log-probabilities of given tokens, and the cross-entropy of answers (SFT).

The vocabulary's logits of all positions, float32[N, S, V], would be the largest array of a language
model's training. Here a chunk of positions has them at a time, forward and backward.
Axes: N rows · S tokens · A chunks of positions · C positions of a chunk · D width · V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

LogitsFn = Callable[[jax.Array], jax.Array]  # hidden [N, C, D] -> logits float32[N, C, V]


def token_log_probs(
    hidden: jax.Array,
    logits_fn: LogitsFn,
    tokens: jax.Array,
    chunk: int,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(logits / temperature)[token] at each position, and the distribution's entropy.

    hidden: [N, S, D], where position s predicts tokens[:, s] (the caller shifts). logits_fn: the
    model's head, `QwenVL.logits`; gradients reach the parameters that it closes over. tokens:
    int32[N, S]. chunk: positions of each row at a time; N x chunk x V float32 are alive at once.
    temperature: the sampler's, where old and new log-probs are compared (`losses.policy`). mask:
    bool[N, S], the positions to score, by default all. The others give 0; a chunk in which no row
    has a position to score costs nothing.

    Returns (log_probs, entropy), float32[N, S] each, in nats; the entropy carries no gradient.
    The backward pass computes a chunk's logits once more instead of keeping them.
    """
    rows, length = tokens.shape
    chunk = min(chunk, length)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask

    def cut(x: jax.Array) -> jax.Array:
        """[N, S, ...] -> [A, N, C, ...]: chunks of positions, so that rows stay where they lie."""
        padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(rows, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    # The loop itself keeps XLA from merging the recomputation with the forward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def score_chunk(hidden: jax.Array, tokens: jax.Array, mask: jax.Array):
        score = functools.partial(_score, logits_fn, temperature)
        shapes = jax.eval_shape(score, hidden, tokens)

        def zeros(*_):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return lax.cond(mask.any(), score, zeros, hidden, tokens)

    chunks = lax.map(lambda x: score_chunk(*x), (cut(hidden), cut(tokens), cut(mask)))
    log_probs, entropy = (jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length] for x in chunks)
    return jnp.where(mask, log_probs, 0), jnp.where(mask, entropy, 0)


def _score(
    logits_fn: LogitsFn, temperature: float, hidden: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [N, C] of one chunk."""
    logits = logits_fn(hidden)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(logits / temperature)
    # A sum over a comparison: taking by index would gather a vocabulary that is split by devices,
    # and its gradient would scatter into zeros of the logits' size.
    ids = lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(ids == tokens[..., None], log_probs, 0), axis=-1)
    frozen = lax.stop_gradient(log_probs)
    return chosen, -jnp.sum(jnp.exp(frozen) * frozen, axis=-1)


def answer_cross_entropy(
    hidden: jax.Array, logits_fn: LogitsFn, tokens: jax.Array, answer_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """-log p of the answers' tokens, given all before them in their row.

    hidden: [N, S, D], the model's states at these tokens. Position s predicts token s + 1; this
    function makes the shift. tokens: int32[N, S]. answer_mask: bool[N, S], True at the answer's
    tokens, the stop token included; a row's first token has nothing before it and never counts.
    chunk, logits_fn: as `token_log_probs` takes them.
    Returns (sum in nats, number of answer tokens), float32 scalars: sums over micro-batches, then
    one division, give the gradient of the whole batch.
    """
    next_tokens, next_mask = jnp.roll(tokens, -1, axis=1), jnp.roll(answer_mask, -1, axis=1)
    next_mask = next_mask.at[:, -1].set(False)
    log_probs, _ = token_log_probs(hidden, logits_fn, next_tokens, chunk, mask=next_mask)
    return -jnp.sum(log_probs), jnp.sum(next_mask, dtype=log_probs.dtype)
