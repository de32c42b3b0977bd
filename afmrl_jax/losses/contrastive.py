"""The contrastive losses: InfoNCE (VLM2Vec), attribute-guided (AGCL), hardness-weighted (LLaVE).

One formula, of which all are settings: with w the weights, t the temperature, N_i the negatives
that the masks leave,
    L_i = -log( w_ii e^(s_ii/t) / (w_ii e^(s_ii/t) + sum over j in N_i of w_ij e^(s_ij/t)) ).

Axes: B queries · M = B (1 + k) targets, the first B the queries' positives, then k mined hard
negatives a query · E embedding · T attribute terms.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax import lax

from afmrl_jax.attributes.bm25 import bm25_matrix
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.masked import masked_mean, masked_quantiles

# The logit of a masked candidate: its exponential is exactly 0, and no inf - inf can arise.
MASKED = -1e30

# A listing that scores less than this against itself says next to nothing (no attributes, or such
# as nearly every product has): agreeing with it must not count as full agreement.
SELF_SCORE_FLOOR = 1.0

CHOICES = {
    "negative_weight": ("none", "bm25", "similarity"),
    "weight_scale": ("self", "raw"),
    "same_product": ("drop", "positive", "keep"),
}
RANGES = {  # field -> (lowest, highest), both allowed
    "temperature": (1e-4, 10.0),
    "weight_strength": (0.0, 100.0),
    "similarity_strength": (0.0, 100.0),
    "mask_target_similarity": (-1.0, 1.0),
    "mask_margin": (-2.0, 2.0),
    "mask_attributes": (0.0, 1.0),
}
SWITCHES = ("boost_positive", "symmetric")
CAN_BE_OFF = ("mask_target_similarity", "mask_margin", "mask_attributes")


@dataclass(frozen=True)
class Options:
    """Which contrastive loss; raises UserError for a value that no loss has."""

    temperature: float = 0.02  # VLM2Vec-V2
    negative_weight: str = "bm25"  # none (InfoNCE) | bm25 (AGCL) | similarity (LLaVE)
    weight_scale: str = "self"  # self: B_ij / BM25(a_i, a_i), in [0, 1] | raw: the paper's B_ij
    weight_strength: float = 1.0  # a of w = exp(a (1 + tanh(B))); 1 is the paper's
    similarity_strength: float = 9.0  # LLaVE's alpha: negative logit + alpha * stop_gradient(s)
    boost_positive: bool = True  # bm25: w_ii as any w_ij (the paper), else w_ii = 1
    mask_target_similarity: float | None = None  # drop j if cos(d_j, d_i) is above; RzenEmbed .95
    mask_margin: float | None = None  # drop j if s_ij > s_ii + margin; UniME .1
    mask_attributes: float | None = 0.95  # drop j if attributes agree, both ways, above this
    same_product: str = "drop"  # listings of one product: drop | positive (all pull) | keep
    symmetric: bool = False  # average with targets -> queries over the first B targets

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in CHOICES:
                _check_choice(name, value)
            elif name in SWITCHES:
                if not isinstance(value, bool):
                    raise UserError(f"loss option {name} is {value!r}; set it to True or False")
            elif value is not None or name not in CAN_BE_OFF:
                _check_number(name, value)


def _check_choice(name: str, value: object) -> None:
    if value not in CHOICES[name]:
        close = difflib.get_close_matches(str(value), CHOICES[name], n=1, cutoff=0.5)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise UserError(
            f"loss option {name} is {value!r}, expected one of {', '.join(CHOICES[name])}{hint}"
        )


def _check_number(name: str, value: object) -> None:
    low, high = RANGES[name]
    off = " or None for off" if name in CAN_BE_OFF else ""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise UserError(
            f"loss option {name} is {value!r}, expected a number from {low:g} to {high:g}{off}"
        )


def contrastive_loss(
    queries: jax.Array, targets: jax.Array, info: Mapping[str, jax.Array], options: Options
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The contrastive loss of a global batch, with gradient to queries and targets.

    queries float[B, E] and targets float[M, E], L2-normalised; targets[i] for i < B is the
    positive of queries[i]. info: query_product int32[B], target_product int32[M], and for BM25
    query_terms int32[B, T], query_query_weights and query_document_weights float32[B, T], the same
    for target_ with M rows (`CorpusStatistics.encode`); only what the options need is read.

    Returns (sum of the rows' losses, B, metrics), float32 scalars (float64 for float64 inputs).
    metrics, all of queries -> targets:
      accuracy            share of queries nearer to their positive than to any other product's
                          target, masked or not: comparable between options
      accuracy_unmasked   the same among the negatives that the masks leave
      masked              share of the M - 1 candidates a query that the masks drop
      masked_by_RULE      the same for each rule that is on: target_similarity, margin, attributes,
                          same_product; a candidate may fall under several
      precision_of_RULE   share of those that truly are the same product; 0 where none was dropped
      weight_p10 .. p99   quantiles of w over the negatives left, unless negative_weight is none

    The queries may be sharded by rows: every reduction over [B, M] is along its rows, so no such
    matrix is gathered, and the way back adds [M, E] gradients.
    """
    query_side, target_side = _side(info, "query_"), _side(info, "target_")
    losses, metrics = _one_way(queries, targets, query_side, target_side, options)
    if options.symmetric:
        n = queries.shape[0]
        positives = {name: array[:n] for name, array in target_side.items()}
        back, _ = _one_way(targets[:n], queries, positives, query_side, options)
        losses = (losses + back) / 2
    return jnp.sum(losses), jnp.asarray(losses.shape[0], losses.dtype), metrics


def _side(info: Mapping[str, jax.Array], prefix: str) -> dict[str, jax.Array]:
    """The arrays of one side, without its prefix."""
    return {k.removeprefix(prefix): v for k, v in info.items() if k.startswith(prefix)}


def _one_way(
    rows: jax.Array,
    columns: jax.Array,
    row_side: Mapping[str, jax.Array],
    column_side: Mapping[str, jax.Array],
    options: Options,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Losses [B] of the rows against the columns, whose first B are the rows' positives."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    rows, columns = rows.astype(dtype), columns.astype(dtype)
    n_rows, n_columns = rows.shape[0], columns.shape[0]
    similarity = _cosines(rows, columns)  # [B, M]
    positive = jnp.sum(rows * columns[:n_rows], axis=1)  # [B]; not a diagonal cut from a shard
    own = jnp.arange(n_rows)[:, None] == jnp.arange(n_columns)[None, :]  # each row's positive
    same = row_side["product"][:, None] == column_side["product"][None, :]

    frozen = lax.stop_gradient(similarity)
    masks = _masks(frozen, lax.stop_gradient(positive), columns, row_side, column_side, options)
    if options.same_product == "drop":
        masks["same_product"] = same
    dropped = own
    for mask in masks.values():
        dropped = dropped | mask
    extra = same & ~own  # the product's other listings
    if options.same_product == "positive":
        dropped = dropped | extra

    log_weights = _log_weights(frozen, row_side, column_side, options)  # [B, M], or 0
    boosted = log_weights if options.boost_positive and options.negative_weight == "bm25" else 0.0
    own_log_weight = jnp.sum(jnp.where(own, boosted, 0.0), axis=1)
    # log w joins the logit; w itself would overflow where strengths are large.
    negatives = jnp.where(dropped, MASKED, similarity / options.temperature + log_weights)
    negatives = jax.nn.logsumexp(negatives, axis=1)  # [B]
    # -log(e^p / (e^p + e^n)) = softplus(n - p): exactly 0 for a row without negatives.
    losses = jax.nn.softplus(negatives - positive / options.temperature - own_log_weight)
    if options.same_product == "positive":
        logits = similarity / options.temperature + boosted
        others = jnp.where(extra, jax.nn.softplus(negatives[:, None] - logits), 0.0)
        losses = (losses + jnp.sum(others, axis=1)) / (1 + jnp.sum(extra, axis=1))

    metrics = _metrics(frozen, lax.stop_gradient(positive), own, same, dropped, masks)
    if options.negative_weight != "none":
        levels = {"weight_p10": 0.1, "weight_p50": 0.5, "weight_p90": 0.9, "weight_p99": 0.99}
        quantiles = masked_quantiles(log_weights, ~dropped, tuple(levels.values()))
        metrics |= dict(zip(levels, jnp.exp(quantiles)))
    return losses, metrics


def _cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Cosines [B, M] of unit vectors; at t = .02 half precision would cost .1 of a logit."""
    return jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)


def _agreement(rows: Mapping[str, jax.Array], columns: Mapping[str, jax.Array], scale: str):
    """BM25 of the columns for the rows, float32[B, M]; "self" divides by what the row scores
    against itself (floored) and clips to [0, 1]. Not by B_ii: that is the score of another listing,
    tiny where its attributes are missing."""
    scores = bm25_matrix(
        rows["terms"], rows["query_weights"], columns["terms"], columns["document_weights"]
    )
    if scale == "raw":
        return scores
    own = jnp.sum(rows["query_weights"] * rows["document_weights"], axis=1, keepdims=True)
    return jnp.clip(scores / jnp.maximum(own, SELF_SCORE_FLOOR), 0.0, 1.0)


def _log_weights(frozen, row_side, column_side, options: Options) -> jax.Array | float:
    """log w of each pair, [B, M]: METHOD section 3's formula, LLaVE's, or 0."""
    if options.negative_weight == "bm25":
        agreement = _agreement(row_side, column_side, options.weight_scale)
        return options.weight_strength * (1 + jnp.tanh(agreement))
    if options.negative_weight == "similarity":
        return options.similarity_strength * frozen
    return 0.0


def _masks(
    frozen: jax.Array,
    positive: jax.Array,
    columns: jax.Array,
    row_side: Mapping[str, jax.Array],
    column_side: Mapping[str, jax.Array],
    options: Options,
) -> dict[str, jax.Array]:
    """What each rule that is on takes for a false negative, bool[B, M]."""
    masks = {}
    if options.mask_target_similarity is not None:
        columns = lax.stop_gradient(columns)
        almost_positive = _cosines(columns[: frozen.shape[0]], columns)
        masks["target_similarity"] = almost_positive > options.mask_target_similarity
    if options.mask_margin is not None:
        masks["margin"] = frozen > positive[:, None] + options.mask_margin
    if options.mask_attributes is not None:
        there = _agreement(row_side, column_side, "self")
        back = _agreement(column_side, row_side, "self").T
        masks["attributes"] = jnp.minimum(there, back) > options.mask_attributes
    return masks


def _metrics(frozen, positive, own, same, dropped, masks) -> dict[str, jax.Array]:
    """Accuracies, and what each mask drops; see `contrastive_loss`."""
    best = jnp.max(jnp.where(same | own, -jnp.inf, frozen), axis=1)
    best_left = jnp.max(jnp.where(same | dropped, -jnp.inf, frozen), axis=1)
    metrics = {
        # Strictly nearer: a collapsed encoder, to which all is equal, scores 0 and not 1.
        "accuracy": jnp.mean(positive > best, dtype=jnp.float32),
        "accuracy_unmasked": jnp.mean(positive > best_left, dtype=jnp.float32),
        "masked": masked_mean(dropped, ~own),
    }
    for rule, mask in masks.items():
        metrics[f"masked_by_{rule}"] = masked_mean(mask, ~own)
        if rule != "same_product":
            metrics[f"precision_of_{rule}"] = masked_mean(same, mask & ~own)
    return metrics
