"""The contrastive losses: InfoNCE (VLM2Vec), attribute-guided (AGCL), hardness-weighted (LLaVE).

One formula, of which all are settings: with w the weights, t the temperature, N_i the negatives
that the masks leave,
    L_i = -log( w_ii e^(s_ii/t) / (w_ii e^(s_ii/t) + sum over j in N_i of w_ij e^(s_ij/t)) ).

Axes: B queries · M = B (1 + k) targets, the first B the queries' positives, then k mined hard
negatives a query · E embedding · T attribute terms.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from afmrl_jax.attributes.bm25 import bm25_matrix
from afmrl_jax.core.masked import masked_quantiles
from afmrl_jax.core.options import Options, among, between

# The logit of a masked candidate: its exponential is exactly 0, and no inf - inf can arise.
MASKED = -1e30

# A listing that scores less than this against itself says next to nothing (no attributes, or such
# as nearly every product has): agreeing with it must not count as full agreement.
SELF_SCORE_FLOOR = 1.0

Side = Mapping[str, jax.Array]  # one side's product, terms, query_weights, document_weights


@dataclass(frozen=True)
class Contrastive(Options, section="loss"):
    """Which contrastive loss. A mask whose threshold nothing can pass is off and costs nothing:
    2 of cosines and of their margins, 1 of agreements."""

    temperature: float = between(1e-4, 10)
    negative_weight: str = among("none", "bm25", "similarity")  # InfoNCE, AGCL, LLaVE
    weight_scale: str = among("self", "raw")  # B_ij / BM25(a_i, a_i), in [0, 1], or B_ij
    weight_strength: float = between(0, 100)  # a of w = exp(a (1 + tanh(B)))
    similarity_strength: float = between(0, 100)  # LLaVE's alpha: logit + alpha * stop_gradient(s)
    boost_positive: bool  # bm25: w_ii as any w_ij (the paper), else w_ii = 1
    mask_target_similarity: float = between(-1, 2)  # drop j if cos(d_j, d_i) is above
    mask_margin: float = between(-2, 2)  # drop j if s_ij > s_ii + margin
    mask_attributes: float = between(0, 2)  # drop j if attributes agree, both ways, above this
    same_product: str = among("drop", "positive", "keep")  # listings of one product
    symmetric: bool  # average with targets -> queries over the first B targets

    @property
    def masks_target_similarity(self) -> bool:
        return self.mask_target_similarity < 2

    @property
    def masks_margin(self) -> bool:
        return self.mask_margin < 2

    @property
    def masks_attributes(self) -> bool:
        return self.mask_attributes < 1


def contrastive_loss(
    queries: jax.Array,
    targets: jax.Array,
    info: Mapping[str, jax.Array],
    options: Contrastive,
    past: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The contrastive loss of a global batch, with gradient to queries and targets.

    queries float[B, E] and targets float[M, E], L2-normalised; targets[i] for i < B is the
    positive of queries[i]. info: query_product int32[B], target_product int32[M], and for BM25
    query_terms int32[B, T], query_query_weights and query_document_weights float32[B, T], the same
    for target_ with M rows (`CorpusStatistics.encode`); only what the options need is read.
    past: targets of batches before as P further candidates of the queries, without a gradient:
    embedding float[P, E], product and terms and weights as the targets have them, and filled
    bool[P], False of a slot that holds nothing. They are no candidates of the direction targets ->
    queries. None or {} without.

    Returns (sum of the rows' losses, B, metrics), all scalars; computed in float32, or in float64
    where the embeddings are. The metrics, of queries -> targets of this batch:
      accuracy            share of queries nearer to their positive than to any other product's
                          target, masked or not: comparable between options
      accuracy_unmasked   the same among the negatives that the masks leave
      masked              share of the M - 1 other candidates of a query that the masks drop
      masked_by_RULE      the same for each rule that is on: target_similarity, margin, attributes,
                          same_product; a candidate may fall under several
      precision_of_RULE   share of those that truly are the same product; 0 where none was dropped
      weight_p10 .. p99   quantiles of w over the negatives left, unless negative_weight is none

    Queries, and all query_ arrays, may be sharded by rows with the targets' replicated: no [B, M]
    matrix is gathered; the devices exchange sums over columns (symmetric) and gradients.
    """
    n, m = queries.shape[0], targets.shape[0]
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    queries, targets = queries.astype(dtype), targets.astype(dtype)
    asking, asked = _side(info, "query_"), _side(info, "target_")
    masks = {}
    if past:
        targets = jnp.concatenate([targets, lax.stop_gradient(past["embedding"]).astype(dtype)])
        asked = {name: jnp.concatenate([array, past[name]]) for name, array in asked.items()}
        masks["empty"] = jnp.concatenate([jnp.zeros(m, bool), ~past["filled"]])[None, :]
    scores, scores_back = _bm25_both_ways(asking, asked, options)
    same = asking["product"][:, None] == asked["product"][None, :]
    if past:
        same &= ~masks["empty"]
    if options.masks_attributes:
        agreement = jnp.minimum(
            _agreement(scores, asking, axis=1), _agreement(scores_back, asked, axis=0)
        )
        masks["attributes"] = agreement > options.mask_attributes
    if options.same_product == "drop":
        masks["same_product"] = same
    similarity = _cosines(queries, targets)
    # Not the diagonal of the matrix above: cutting it from shards would gather them.
    positive = jnp.sum(queries * targets[:n], axis=1)
    weights = _bm25_log_weights(scores, asking, options, axis=1)
    losses, outcome = _one_way(similarity, positive, targets, same, masks, weights, options, axis=1)
    metrics = _metrics(similarity, positive, same, outcome, m)
    if options.symmetric:
        masks = {rule: mask[:, :n] for rule, mask in masks.items()}
        weights = _bm25_log_weights(scores_back, asked, options, axis=0)
        weights = None if weights is None else weights[:, :n]
        similarity, same = similarity[:, :n], same[:, :n]
        back, _ = _one_way(similarity, positive, queries, same, masks, weights, options, axis=0)
        losses = (losses + back) / 2
    return jnp.sum(losses), jnp.asarray(n, losses.dtype), metrics


class _Outcome(NamedTuple):
    """What became of the candidates, [B, M] each: the positives, what is dropped or a positive, the
    masks by rule, and log w if candidates are weighed."""

    own: jax.Array
    dropped: jax.Array
    masks: dict[str, jax.Array]
    weights: jax.Array | None


def _one_way(
    similarity: jax.Array,
    positive: jax.Array,
    candidates: jax.Array,
    same: jax.Array,
    masks: Mapping[str, jax.Array],
    weights: jax.Array | None,
    options: Contrastive,
    axis: int,
) -> tuple[jax.Array, _Outcome]:
    """Losses [B] of one side against the other's candidates, which lie along `axis`.

    similarity float[B, M], rows the queries in either direction; positive [B]; candidates [M, E],
    the asked side's embeddings; same bool[B, M]; masks by the rules that know no embedding; weights
    log w [B, M] by BM25 if any. Axis 1: queries ask targets; axis 0: the reverse, M = B.
    """
    own = jnp.arange(same.shape[0])[:, None] == jnp.arange(same.shape[1])[None, :]  # the positives
    frozen, frozen_positive = lax.stop_gradient((similarity, positive))
    masks = dict(masks)
    if options.masks_target_similarity:
        fixed = lax.stop_gradient(candidates)
        to_positive = _cosines(fixed[: same.shape[0]], fixed)
        masks["target_similarity"] = to_positive > options.mask_target_similarity
    if options.masks_margin:
        limit = jnp.expand_dims(frozen_positive, axis) + options.mask_margin
        masks["margin"] = frozen > limit
    extra = same & ~own  # the product's other listings
    dropped = functools.reduce(jnp.logical_or, masks.values(), own)
    if options.same_product == "positive":
        dropped = dropped | extra

    if options.negative_weight == "similarity":
        weights = options.similarity_strength * frozen
    boost = weights if options.boost_positive and options.negative_weight == "bm25" else None
    logits = similarity / options.temperature
    # log w joins the logit; w itself would overflow where strengths are large.
    negatives = jnp.where(dropped, MASKED, _plus(logits, weights))
    negatives = jax.nn.logsumexp(negatives, axis=axis)  # [B]
    positives = positive / options.temperature
    if boost is not None:
        positives += jnp.sum(jnp.where(own, boost, 0.0), axis=axis)
    # -log(e^p / (e^p + e^n)) = softplus(n - p): exactly 0 without negatives.
    losses = jax.nn.softplus(negatives - positives)
    if options.same_product == "positive":
        others = jax.nn.softplus(jnp.expand_dims(negatives, axis) - _plus(logits, boost))
        others = jnp.sum(jnp.where(extra, others, 0.0), axis=axis)
        losses = (losses + others) / (1 + jnp.sum(extra, axis=axis))

    return losses, _Outcome(own, dropped, masks, weights)


def _plus(logits: jax.Array, log_weights: jax.Array | None) -> jax.Array:
    return logits if log_weights is None else logits + log_weights


def _side(info: Mapping[str, jax.Array], prefix: str) -> Side:
    """The arrays of one side, without its prefix."""
    return {k.removeprefix(prefix): v for k, v in info.items() if k.startswith(prefix)}


def _cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Cosines [B, M] of unit vectors; at t = .02 half precision would cost .1 of a logit."""
    return jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)


def _bm25_both_ways(
    asking: Side, asked: Side, options: Contrastive
) -> tuple[jax.Array | None, jax.Array | None]:
    """BM25 of targets for queries, and of queries for targets, both [B, M]; None if not needed."""
    weighed = options.negative_weight == "bm25"
    there = back = None
    if weighed or options.masks_attributes:
        there = bm25_matrix(
            asking["terms"], asking["query_weights"], asked["terms"], asked["document_weights"]
        )
    if (weighed and options.symmetric) or options.masks_attributes:
        # The weights change places and the terms do not: it is born as [B, M], its rows sharded.
        back = bm25_matrix(
            asking["terms"], asking["document_weights"], asked["terms"], asked["query_weights"]
        )
    return there, back


def _agreement(scores: jax.Array, side: Side, axis: int) -> jax.Array:
    """Scores as shares, in [0, 1], of what each of the asking side scores against itself.

    Not of B_ii: that is the score of another listing, tiny where its attributes are missing.
    """
    own = jnp.sum(side["query_weights"] * side["document_weights"], axis=1)
    return jnp.clip(scores / jnp.expand_dims(jnp.maximum(own, SELF_SCORE_FLOOR), axis), 0.0, 1.0)


def _bm25_log_weights(
    scores: jax.Array | None, side: Side, options: Contrastive, axis: int
) -> jax.Array | None:
    """log w = a (1 + tanh(B)), [B, M], B scaled or raw; None where BM25 does not weigh."""
    if options.negative_weight != "bm25":
        return None
    scaled = _agreement(scores, side, axis) if options.weight_scale == "self" else scores
    return options.weight_strength * (1 + jnp.tanh(scaled))


def _metrics(
    similarity: jax.Array, positive: jax.Array, same: jax.Array, outcome: _Outcome, columns: int
) -> dict[str, jax.Array]:
    """Accuracies, what each mask drops, and quantiles of weights; see `contrastive_loss`.

    columns: M, the first candidates, which are the batch's targets: of them alone it tells.
    """
    frozen, positive = lax.stop_gradient((similarity, positive))
    own, dropped, masks, weights = outcome
    if columns < frozen.shape[1]:
        frozen, same, own, dropped = (x[:, :columns] for x in (frozen, same, own, dropped))
        masks = {rule: mask[:, :columns] for rule, mask in masks.items() if rule != "empty"}
        weights = None if weights is None else weights[:, :columns]
    n_rows, n_columns = own.shape
    candidates = max(n_rows * (n_columns - 1), 1)

    def count(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask & ~own, dtype=jnp.float32)

    best = jnp.max(jnp.where(same | own, -jnp.inf, frozen), axis=1)
    best_left = jnp.max(jnp.where(same | dropped, -jnp.inf, frozen), axis=1)
    metrics = {
        # Strictly nearer: a collapsed encoder, to which all is equal, scores 0 and not 1.
        "accuracy": jnp.mean(positive > best, dtype=jnp.float32),
        "accuracy_unmasked": jnp.mean(positive > best_left, dtype=jnp.float32),
        "masked": count(functools.reduce(jnp.logical_or, masks.values())) / candidates
        if masks
        else jnp.zeros(()),
    }
    for rule, mask in masks.items():
        metrics[f"masked_by_{rule}"] = count(mask) / candidates
        if rule != "same_product":
            metrics[f"precision_of_{rule}"] = count(mask & same) / jnp.maximum(count(mask), 1.0)
    if weights is not None:
        levels = {"weight_p10": 0.1, "weight_p50": 0.5, "weight_p90": 0.9, "weight_p99": 0.99}
        quantiles = masked_quantiles(weights, ~dropped, tuple(levels.values()))
        metrics |= dict(zip(levels, jnp.exp(quantiles)))
    return metrics
