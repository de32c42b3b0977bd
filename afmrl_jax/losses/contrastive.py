"""The contrastive losses: InfoNCE (VLM2Vec), attribute-guided (AGCL), hardness-weighted (LLaVE).

All are settings of one formula. With w the weights, t the temperature, N_i the negatives that the
masks leave,
    L_i = -log( w_ii e^(s_ii/t) / (w_ii e^(s_ii/t) + sum over j in N_i of w_ij e^(s_ij/t)) ).

Axes: B queries · M = B (1 + k) targets, the first B the queries' positives, then k mined hard
negatives a query · E embedding · T term slots.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from afmrl_jax.attributes.bm25 import bm25_matrix
from afmrl_jax.core.options import Options, among, between
from afmrl_jax.core.types import Metrics
from afmrl_jax.losses.masked import masked_quantiles

# The logit of a masked candidate: its exponential is exactly 0, and no inf - inf can arise.
MASKED = -1e30

# A listing that scores less than this against itself has no attributes, or such as nearly every
# product has: agreement with it must not count as full agreement.
SELF_SCORE_FLOOR = 1.0

# product, true_product, terms, query_weights, document_weights of one side
Side = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Contrastive(Options, section="loss"):
    """Which contrastive loss. A mask is off, and costs nothing, where no candidate can exceed its
    threshold: 2 for cosines and for their margins, 1 for agreements."""

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
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The contrastive loss of a global batch, with gradient to queries and targets.

    queries float[B, E] and targets float[M, E], L2-normalised; targets[i] for i < B is the
    positive of queries[i]. info: query_product int32[B], target_product int32[M], and for BM25
    query_terms int32[B, T], query_query_weights and query_document_weights float32[B, T], the same
    for target_ with M rows (`CorpusStatistics.encode`); only what the options need is read.
    query_true_product and target_true_product: for metrics alone, where the products are ids.
    past: P targets of past batches, without gradient and candidates of queries alone: embedding
    float[P, E], filled bool[P], and all that info has of targets. None or {}: no past targets.

    Returns (sum of the rows' losses, B, metrics), all scalars; computed in float32, or in float64
    where the embeddings are. The metrics, of queries -> targets of this batch:
      accuracy            share of queries nearer to their positive than to any other product's
                          target, masked or not: comparable between options
      accuracy_unmasked   the same among the negatives that the masks leave
      masked              share of the M - 1 other candidates of a query that the masks drop
      masked_by_RULE      the same for each rule that is on: target_similarity, margin, attributes,
                          same_product; a candidate may fall under several
      precision_of_RULE   share of those that truly are the same product; 0 where none was dropped
      duplicates          share of the candidates that truly are the same product
      duplicates_masked, duplicates_masked_by_RULE   masked, masked_by_RULE of these alone
      weight_p10 .. p99   quantiles of w over the negatives left, unless negative_weight is none

    Queries, and all query_ arrays, may be sharded by rows with the targets' replicated: no [B, M]
    matrix is gathered; the devices exchange sums over columns (symmetric) and gradients.
    """
    n, m = queries.shape[0], targets.shape[0]
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    queries, targets = queries.astype(dtype), targets.astype(dtype)
    query_side, target_side = _side(info, "query_"), _side(info, "target_")
    if past:
        targets = jnp.concatenate([targets, lax.stop_gradient(past["embedding"]).astype(dtype)])
        target_side = {k: jnp.concatenate([x, past[k]]) for k, x in target_side.items()}
    scores = _bm25_both_ways(query_side, target_side, options)
    same_product = _equal(query_side, target_side, "product")
    masks = {}
    if past:
        masks["empty"] = jnp.concatenate([jnp.zeros(m, bool), ~past["filled"]])[None, :]
        same_product &= ~masks["empty"]
    masks |= _listing_masks(same_product, scores, (query_side, target_side), options)
    similarity = _cosines(queries, targets)
    # Not the diagonal of the matrix above: cutting it from shards would gather them.
    positive = jnp.sum(queries * targets[:n], axis=1)
    weights = _bm25_log_weights(scores[0], query_side, options, axis=1)
    candidates = _Candidates(similarity, positive, same_product, masks, weights, axis=1)
    losses, outcome = _one_way(candidates, targets, options)
    metrics = _metrics(candidates, _truly_same(query_side, target_side), outcome, m)
    if options.symmetric:
        weights = _bm25_log_weights(scores[1], target_side, options, axis=0)
        candidates = candidates._replace(weights=weights, axis=0).first(n)
        losses_back, _ = _one_way(candidates, queries, options)
        losses = (losses + losses_back) / 2
    return jnp.sum(losses), jnp.asarray(n, losses.dtype), metrics


class _Candidates(NamedTuple):
    """The candidates of one side's B rows on the other side.

    similarity: float[B, M], cosines; rows are the queries in either direction. positive: float[B],
    the cosine of each pair. same_product: bool[B, M]. masks: bool[B, M] or [1, M] by rule, True
    where a candidate is dropped. weights: float[B, M], log w; None where candidates are not
    weighted. axis: along which a row's candidates lie: 1, the targets of queries; 0, the queries of
    targets, where M = B.
    """

    similarity: jax.Array
    positive: jax.Array
    same_product: jax.Array
    masks: Mapping[str, jax.Array]
    weights: jax.Array | None
    axis: int

    def first(self, columns: int) -> Self:
        """The candidates in the first columns alone."""
        return self._replace(
            similarity=self.similarity[:, :columns],
            same_product=self.same_product[:, :columns],
            masks={rule: mask[:, :columns] for rule, mask in self.masks.items()},
            weights=None if self.weights is None else self.weights[:, :columns],
        )


class _Outcome(NamedTuple):
    """What became of the candidates, [B, M] each: the positives, what is dropped or a positive, the
    masks by rule, and log w if candidates are weighted."""

    positives: jax.Array
    dropped: jax.Array
    masks: dict[str, jax.Array]
    weights: jax.Array | None


def _one_way(
    candidates: _Candidates, embeddings: jax.Array, options: Contrastive
) -> tuple[jax.Array, _Outcome]:
    """Losses [B] of one side's rows against their candidates.

    candidates: with the masks that need no embedding, and with BM25's weights. embeddings:
    float[M, E], the candidates'.
    """
    similarity, positive, same_product, masks, weights, axis = candidates
    positives = jnp.arange(same_product.shape[0])[:, None] == jnp.arange(same_product.shape[1])
    frozen, frozen_positive = lax.stop_gradient((similarity, positive))
    masks = dict(masks)
    if options.masks_target_similarity:
        fixed = lax.stop_gradient(embeddings)
        to_positive = _cosines(fixed[: same_product.shape[0]], fixed)
        masks["target_similarity"] = to_positive > options.mask_target_similarity
    if options.masks_margin:
        limit = jnp.expand_dims(frozen_positive, axis) + options.mask_margin
        masks["margin"] = frozen > limit
    extra = same_product & ~positives  # the product's other listings
    dropped = functools.reduce(jnp.logical_or, masks.values(), positives)
    if options.same_product == "positive":
        dropped = dropped | extra

    if options.negative_weight == "similarity":
        weights = options.similarity_strength * frozen
    boost = weights if options.boost_positive and options.negative_weight == "bm25" else None
    logits = similarity / options.temperature
    # log w joins the logit; w itself would overflow where strengths are large.
    negative_logits = jnp.where(dropped, MASKED, _plus(logits, weights))
    negative_logits = jax.nn.logsumexp(negative_logits, axis=axis)  # [B]
    positive_logits = positive / options.temperature
    if boost is not None:
        positive_logits += jnp.sum(jnp.where(positives, boost, 0.0), axis=axis)
    # -log(e^p / (e^p + e^n)) = softplus(n - p): exactly 0 without negatives.
    losses = jax.nn.softplus(negative_logits - positive_logits)
    if options.same_product == "positive":
        others = jax.nn.softplus(jnp.expand_dims(negative_logits, axis) - _plus(logits, boost))
        others = jnp.sum(jnp.where(extra, others, 0.0), axis=axis)
        losses = (losses + others) / (1 + jnp.sum(extra, axis=axis))

    return losses, _Outcome(positives, dropped, masks, weights)


def _plus(logits: jax.Array, log_weights: jax.Array | None) -> jax.Array:
    return logits if log_weights is None else logits + log_weights


def _side(info: Mapping[str, jax.Array], prefix: str) -> Side:
    """The arrays of one side, without its prefix."""
    return {k.removeprefix(prefix): v for k, v in info.items() if k.startswith(prefix)}


def _equal(query_side: Side, target_side: Side, name: str) -> jax.Array:
    """bool[B, M]: where both sides have one number."""
    return query_side[name][:, None] == target_side[name][None, :]


def _truly_same(query_side: Side, target_side: Side) -> jax.Array:
    """bool[B, M]: where both sides are one product, whether or not their ids tell it."""
    name = "true_product" if "true_product" in query_side else "product"
    return _equal(query_side, target_side, name)


def _cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Cosines [B, M] of unit vectors; at t = .02 half precision would cost .1 of a logit."""
    return jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)


def _bm25_both_ways(
    query_side: Side, target_side: Side, options: Contrastive
) -> tuple[jax.Array | None, jax.Array | None]:
    """BM25 of targets for queries, and of queries for targets, both [B, M]; None if not needed."""
    weighted = options.negative_weight == "bm25"
    there = back = None
    if weighted or options.masks_attributes:
        there = bm25_matrix(
            query_side["terms"],
            query_side["query_weights"],
            target_side["terms"],
            target_side["document_weights"],
        )
    if (weighted and options.symmetric) or options.masks_attributes:
        # The weights change places and the terms do not: the matrix is made as [B, M], with its
        # rows sharded.
        back = bm25_matrix(
            query_side["terms"],
            query_side["document_weights"],
            target_side["terms"],
            target_side["query_weights"],
        )
    return there, back


def _listing_masks(
    same_product: jax.Array,
    scores: tuple[jax.Array | None, jax.Array | None],
    sides: tuple[Side, Side],
    options: Contrastive,
) -> dict[str, jax.Array]:
    """The masks, bool[B, M] by rule, that need the listings alone and not their embeddings.

    scores: of `_bm25_both_ways`. sides: the queries' and the targets'.
    """
    masks = {}
    if options.masks_attributes:
        agreement = _agreement(scores[0], sides[0], axis=1)
        agreement_back = _agreement(scores[1], sides[1], axis=0)
        masks["attributes"] = jnp.minimum(agreement, agreement_back) > options.mask_attributes
    if options.same_product == "drop":
        masks["same_product"] = same_product
    return masks


def _agreement(scores: jax.Array, side: Side, axis: int) -> jax.Array:
    """Scores as shares, in [0, 1], of each listing's score against itself.

    Not of B_ii: that is the score of another listing, tiny where its attributes are missing.
    side: the listings that the scores are of; axis: along which their candidates lie.
    """
    self_scores = jnp.sum(side["query_weights"] * side["document_weights"], axis=1)
    self_scores = jnp.maximum(self_scores, SELF_SCORE_FLOOR)
    return jnp.clip(scores / jnp.expand_dims(self_scores, axis), 0.0, 1.0)


def _bm25_log_weights(
    scores: jax.Array | None, side: Side, options: Contrastive, axis: int
) -> jax.Array | None:
    """log w = a (1 + tanh(B)), [B, M], B scaled or raw; None where BM25 gives no
    weights."""
    if options.negative_weight != "bm25":
        return None
    scaled = _agreement(scores, side, axis) if options.weight_scale == "self" else scores
    return options.weight_strength * (1 + jnp.tanh(scaled))


def _metrics(
    candidates: _Candidates, same_product: jax.Array, outcome: _Outcome, n_targets: int
) -> Metrics:
    """Accuracies, what each mask drops, and quantiles of weights; see `contrastive_loss`.

    same_product: bool[B, M], the truth. n_targets: the first candidates, which are the batch's
    targets; past ones are left out.
    """
    frozen, positive = lax.stop_gradient((candidates.similarity, candidates.positive))
    positives, dropped, masks, weights = outcome
    if n_targets < frozen.shape[1]:
        frozen, same_product, positives, dropped = (
            x[:, :n_targets] for x in (frozen, same_product, positives, dropped)
        )
        masks = {rule: mask[:, :n_targets] for rule, mask in masks.items() if rule != "empty"}
        weights = None if weights is None else weights[:, :n_targets]
    n_rows, n_columns = positives.shape
    n_candidates = max(n_rows * (n_columns - 1), 1)
    masked = functools.reduce(jnp.logical_or, masks.values(), jnp.zeros_like(positives))

    def count(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask & ~positives, dtype=jnp.float32)

    best = jnp.max(jnp.where(same_product | positives, -jnp.inf, frozen), axis=1)
    best_left = jnp.max(jnp.where(same_product | dropped, -jnp.inf, frozen), axis=1)
    metrics = {
        # Strictly nearer: a collapsed encoder, to which all is equal, scores 0 and not 1.
        "accuracy": jnp.mean(positive > best, dtype=jnp.float32),
        "accuracy_unmasked": jnp.mean(positive > best_left, dtype=jnp.float32),
        "masked": count(masked) / n_candidates,
        "duplicates": count(same_product) / n_candidates,
        "duplicates_masked": count(masked & same_product) / n_candidates,
    }
    for rule, mask in masks.items():
        caught = count(mask & same_product)
        metrics[f"masked_by_{rule}"] = count(mask) / n_candidates
        metrics[f"duplicates_masked_by_{rule}"] = caught / n_candidates
        if rule != "same_product":
            metrics[f"precision_of_{rule}"] = caught / jnp.maximum(count(mask), 1.0)
    if weights is not None:
        levels = {"weight_p10": 0.1, "weight_p50": 0.5, "weight_p90": 0.9, "weight_p99": 0.99}
        quantiles = masked_quantiles(weights, ~dropped, tuple(levels.values()))
        metrics |= dict(zip(levels, jnp.exp(quantiles)))
    return metrics
