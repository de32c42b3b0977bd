"""Generation: G answers to each prompt, with the log-probs that reinforcement learning needs.

`prefill` reads every prompt once and draws the first token of each of its samples; `decode` is one
while loop, a token a step, that ends when all answers have. The samples of a prompt share its
cache: their queries are an axis of one product with the prompt's keys, which are never copied.
Axes: N prompts (rows) · G samples of a prompt · S prompt tokens · T generated tokens · V vocabulary
· H query heads · K key/value heads · R = H / K · D head size.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from tokenizers import Tokenizer

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import BATCH_AXES
from afmrl_jax.models.config import VISION_TOKEN
from afmrl_jax.models.embedder import pool_last
from afmrl_jax.models.partition import MATRIX, param_shardings, shard_rows
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.rope import Angles, rotary_angles, rotate, text_frequencies

KeyValue = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when an answer ends; static, so each value compiles its own loop.

    Forbidden ids are taken out first; the temperature divides what is left.
    """

    max_new_tokens: int  # T; an answer cut here is marked as truncated
    stop: tuple[int, ...]  # an answer ends with the first of these ids, itself included
    forbidden: tuple[int, ...] = ()  # never drawn: a sampled image token breaks the next forward
    pad: int = 0  # stands behind an answer's end
    temperature: float = 1.0  # 0 takes the most probable token

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": self.max_new_tokens >= 1 or "at least 1",
            "temperature": self.temperature >= 0 or "0 (greedy) or more",
            "stop": not set(self.stop) & set(self.forbidden) or "without any forbidden id",
        }
        for name, met in bounds.items():
            if met is not True:
                raise UserError(f"sampling: {name} is {getattr(self, name)}; it must be {met}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Answers, with what a policy gradient needs of each token.

    tokens: int32[N, G, T], `pad` behind the end. mask: bool[N, G, T], True through the stop token.
    log_probs: float32[N, G, T], of the policy: log-softmax of the model's own logits over all ids,
    not tempered, forbidden ids *not* taken out. A trainer that applies log-softmax to
    its logits gets these very numbers and needs to know nothing of how tokens were drawn.
    sampling_log_probs: float32[N, G, T], of the distribution that the token was drawn from: after
    forbidden ids and temperature; 0 when greedy. At temperature 1 the two differ by the probability
    of the forbidden ids alone. Both are 0 behind the end.
    truncated: bool[N, G], no stop token within T.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    sampling_log_probs: jax.Array
    truncated: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What passes from prefill to decode and around its loop."""

    tokens: jax.Array  # int32[N, G, T]
    log_probs: jax.Array  # float32[N, G, T]
    sampling_log_probs: jax.Array  # float32[N, G, T]
    lengths: jax.Array  # int32[N, G], tokens of each answer so far
    done: jax.Array  # bool[N, G]
    step: jax.Array  # int32[], tokens drawn so far
    keys: jax.Array  # key[N, G]
    first_position: jax.Array  # int32[N], of the first token generated
    prompt_mask: jax.Array  # bool[N, S]
    prompt_cache: tuple[KeyValue, ...]  # a layer: keys and values [N, K, S, D]
    cache: tuple[KeyValue, ...]  # a layer: keys and values [N, K, G, T, D]


def forbidden_ids(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Ids that no answer may hold: image, video and vision tokens, which would ask the next forward
    pass for features that there are not, and ids of the table for which there is no token.

    vocab_size: of the model, at least the tokenizer's.
    """
    named = tokenizer.get_vocab().items()
    vision = sorted(i for name, i in named if VISION_TOKEN.fullmatch(name))
    return (*vision, *range(max(i for _, i in named) + 1, vocab_size))


def sample_keys(key: jax.Array, rows: Sequence[int] | jax.Array, num_samples: int) -> jax.Array:
    """A random key for each answer, from the prompt's own number and the sample's.

    key: jax.random.key(seed). rows: int[N], each prompt's number in the whole run, so that an
    answer does not depend on the mesh, the batch or the prompts beside it. Returns key[N, G].
    """

    def of_row(row: jax.Array) -> jax.Array:
        row_key = jax.random.fold_in(key, row)
        samples = jnp.arange(num_samples)
        return jax.vmap(lambda sample: jax.random.fold_in(row_key, sample))(samples)

    return jax.vmap(of_row)(jnp.asarray(rows))


def generate(
    graph: nnx.GraphDef,
    params: Any,
    rows: Mapping[str, jax.Array],
    keys: jax.Array,
    sampling: Sampling,
) -> Samples:
    """Answers to prompts.

    graph, params: nnx.split of a QwenVL with its head. rows: as QwenVL reads them, padded left or
    right; a row without any token is filling, and gets no answer. keys: key[N, G] of `sample_keys`.
    Under `jax.set_mesh` rows, caches and answers are split by rows, and heads over `tensor`.
    """
    state = prefill(graph, params, rows, keys, sampling)
    return samples_of(decode(graph, params, state, sampling))


@functools.partial(jax.jit, static_argnames=("graph", "sampling"))
def prefill(
    graph: nnx.GraphDef,
    params: Any,
    rows: Mapping[str, jax.Array],
    keys: jax.Array,
    sampling: Sampling,
) -> DecodeState:
    """Reads the prompts and draws every answer's first token; arguments as `generate`'s."""
    model, mask = nnx.merge(graph, params), rows["token_mask"]
    _check_ids(sampling, model.config.vocab_size)
    (prompts, num_samples), length = keys.shape, sampling.max_new_tokens
    hidden, stacked = model.read(rows, cache=True)
    last = pool_last(hidden, mask)[:, None]  # [N, 1, D]
    prompt_cache = tuple(
        tuple(_shard_cache(jnp.swapaxes(part[layer], 1, 2)) for part in group)
        for group in stacked
        for layer in range(group[0].shape[0])
    )
    kv_heads, head_dim = prompt_cache[0][0].shape[1], prompt_cache[0][0].shape[3]
    empty = _shard_cache(
        jnp.zeros((prompts, kv_heads, num_samples, length, head_dim), prompt_cache[0][0].dtype)
    )
    numbers = jnp.zeros((prompts, num_samples, length), jnp.float32)
    positions = jnp.where(mask[:, None], rows["positions"], -1)
    state = DecodeState(
        tokens=jnp.full((prompts, num_samples, length), sampling.pad, jnp.int32),
        log_probs=numbers,
        sampling_log_probs=numbers,
        lengths=jnp.zeros((prompts, num_samples), jnp.int32),
        done=jnp.broadcast_to(~mask.any(axis=1)[:, None], (prompts, num_samples)),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        first_position=positions.max(axis=(1, 2)) + 1,
        prompt_mask=mask,
        prompt_cache=prompt_cache,
        cache=tuple((empty, empty) for _ in prompt_cache),
    )
    return _add_token(state, model.logits(last), sampling)


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="state")
def decode(graph: nnx.GraphDef, params: Any, state: DecodeState, sampling: Sampling) -> DecodeState:
    """Draws tokens until every answer has ended; the state is given up for the one returned."""
    model = _for_decoding(nnx.merge(graph, params))
    # Straight code, not a scan, which would cut each layer's weights and cache out of a stack at
    # every token: seen to take 1.4 times as long on a CPU, and 7 times with the cache in its carry.
    layers = [layer for group in model.layers for layer in _unstack(group)]
    frequencies = text_frequencies(model.config.text)

    def step(state: DecodeState) -> DecodeState:
        at = state.step - 1  # of the last token drawn, which the cache does not hold yet
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, at, axis=2, keepdims=False)
        x = shard_rows(model.embed_tokens(tokens))
        positions = jnp.broadcast_to((state.first_position + at)[:, None, None], (*tokens.shape, 3))
        angles = rotary_angles(positions, *frequencies)
        cache = []
        for layer, prompt, answers in zip(layers, state.prompt_cache, state.cache):
            mix = functools.partial(_attend, prompt, answers, state.prompt_mask, at, angles)
            x, answers = layer(x, mix)
            x = shard_rows(x)
            cache.append(answers)
        state = dataclasses.replace(state, cache=tuple(cache))
        return _add_token(state, model.logits(model.norm(x)), sampling)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < sampling.max_new_tokens) & ~state.done.all()

    return jax.lax.while_loop(unfinished, step, state)


def samples_of(state: DecodeState) -> Samples:
    """The answers of a finished state."""
    return Samples(
        tokens=state.tokens,
        mask=jnp.arange(state.tokens.shape[2]) < state.lengths[..., None],
        log_probs=state.log_probs,
        sampling_log_probs=state.sampling_log_probs,
        truncated=~state.done,
    )


def sampling_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that tokens are drawn from, -inf for forbidden ids.

    logits: float32[..., V], the model's.
    """
    if sampling.forbidden:
        forbidden = np.isin(np.arange(logits.shape[-1]), sampling.forbidden)
        logits = jnp.where(forbidden, -jnp.inf, logits)
    if sampling.temperature:
        logits = logits / sampling.temperature
    return logits


def _check_ids(sampling: Sampling, vocab_size: int) -> None:
    for name in ("stop", "forbidden"):
        if wrong := [i for i in getattr(sampling, name) if not 0 <= i < vocab_size]:
            raise UserError(
                f"sampling: {name} ids {wrong} are outside the vocabulary of {vocab_size} tokens; "
                "take them from the model's own config and tokenizer"
            )


def _add_token(state: DecodeState, logits: jax.Array, sampling: Sampling) -> DecodeState:
    """Draws one more token of each sample; logits: float32[N, G or 1, V]."""
    allowed = sampling_logits(logits, sampling)
    if sampling.temperature:
        keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, state.step)))(state.keys)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
        token = _highest(allowed + noise)  # a draw, by Gumbel's trick
        sampling_log_prob = _log_prob(allowed, token)
    else:
        token = jnp.broadcast_to(_highest(allowed), state.done.shape)
        sampling_log_prob = jnp.zeros(token.shape, jnp.float32)

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(buffer, state.step, axis=2, keepdims=False)
        value = jnp.where(state.done, old, value)
        return jax.lax.dynamic_update_index_in_dim(buffer, value, state.step, axis=2)

    return dataclasses.replace(
        state,
        tokens=put(state.tokens, token),
        log_probs=put(state.log_probs, _log_prob(logits, token)),
        sampling_log_probs=put(state.sampling_log_probs, sampling_log_prob),
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.isin(token, jnp.asarray(sampling.stop, jnp.int32)),
        step=state.step + 1,
    )


def _highest(x: jax.Array) -> jax.Array:
    """Where along the last axis the highest number is, the first of equals; int32.

    As argmax, by two plain reductions: on a CPU argmax took half of a greedy step.
    """
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    highest = x == x.max(axis=-1, keepdims=True)
    return jnp.where(highest, places, x.shape[-1] - 1).min(axis=-1)


def _log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """log softmax(logits)[token]; logits: float32[N, G or 1, V], token: int32[N, G]."""
    chosen = jnp.take_along_axis(
        jnp.broadcast_to(logits, (*token.shape, logits.shape[-1])), token[..., None], axis=-1
    )
    return chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _attend(
    prompt: KeyValue,
    answers: KeyValue,
    prompt_mask: jax.Array,
    at: jax.Array,
    angles: Angles,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
) -> tuple[jax.Array, KeyValue]:
    """One token of each sample attends to its prompt and to what the sample has generated.

    query: [N, G, H, D]; key, value: [N, G, K, D], which go into the answers' cache at token `at`.
    Returns [N, G, H, D] and the filled cache. One float32 softmax over both parts, as `attend`'s.
    """
    query, key = rotate(query, angles), rotate(key, angles)
    answers = tuple(
        _shard_cache(
            jax.lax.dynamic_update_index_in_dim(cache, jnp.swapaxes(new, 1, 2), at, axis=3)
        )
        for cache, new in zip(answers, (key, value))
    )
    prompts, num_samples, heads, size = query.shape
    groups, length = answers[0].shape[1], answers[0].shape[3]
    query = jnp.moveaxis(query.reshape(prompts, num_samples, groups, heads // groups, size), 1, 2)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_prompt = einsum("nkgrd,nksd->nkgrs", query, prompt[0])
    to_answer = einsum("nkgrd,nkgtd->nkgrt", query, answers[0])
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.concatenate(
        [
            jnp.where(prompt_mask[:, None, None, None], to_prompt, lowest),
            jnp.where(jnp.arange(length) <= at, to_answer, lowest),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores * size**-0.5).astype(value.dtype)
    to_prompt, to_answer = jnp.split(weights, [to_prompt.shape[-1]], axis=-1)
    mixed = einsum("nkgrs,nksd->nkgrd", to_prompt, prompt[1])
    mixed = mixed + einsum("nkgrt,nkgtd->nkgrd", to_answer, answers[1])
    mixed = jnp.moveaxis(mixed, 2, 1).reshape(prompts, num_samples, heads, size)
    return mixed.astype(value.dtype), answers


def _for_decoding(model: QwenVL) -> QwenVL:
    """The model with its matrices in the dtype of computation and gathered over `fsdp`.

    Every token reads every weight: both are done once before the loop instead of at each step. The
    split over `tensor` stays. Numbers do not change: matrices are cast so at each use.
    """
    graph, state = nnx.split(model)
    mesh = jax.sharding.get_abstract_mesh()

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.astype(model.dtype) if MATRIX.search(name) else leaf

    state = jax.tree_util.tree_map_with_path(cast, state)
    if all(axis in mesh.shape for axis in BATCH_AXES):
        state = jax.tree.map(
            lambda leaf, sharding: jax.lax.with_sharding_constraint(
                leaf, PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.spec))
            ),
            state,
            param_shardings(state, mesh),
        )
    return nnx.merge(graph, state)


def _unstack(group: nnx.Module) -> list[nnx.Module]:
    graph, state = nnx.split(group)
    leaves, tree = jax.tree.flatten(state)
    return [nnx.merge(graph, jax.tree.unflatten(tree, layer)) for layer in zip(*map(list, leaves))]


def _shard_cache(x: jax.Array) -> jax.Array:
    """Rows, the first axis, split as activations are; heads, the second, over `tensor`.

    Each only where the mesh divides it; nothing outside `jax.set_mesh`.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if not all(axis in sizes for axis in (*BATCH_AXES, "tensor")):
        return x
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    rows = BATCH_AXES if x.shape[0] % shards == 0 else None
    heads = "tensor" if x.shape[1] % sizes["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, heads))
