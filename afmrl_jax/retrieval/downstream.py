"""Categories from embeddings: how well a linear probe and clusters reproduce listings' categories.

Axes: N judged listings · L listings that the probe learns from · E embedding · K categories.

The texts are embedded without the category (`Unlabelled`): that word alone would give it away.

1. A logistic regression on standardised embeddings learns the categories of training listings;
   `accuracy` is the share of judged listings whose category it predicts. A category that no
   training listing has counts as wrong.
2. k-means puts the judged listings into K clusters, as many as they have categories; `nmi`
   (arithmetic mean), `ari` and `purity` say how well clusters and categories agree.

Intervals are half the width of a 95% interval over listings: Wilson's for `accuracy`, the
bootstrap's for the other metrics. A metric has no bootstrap interval where all resamples are equal,
as where clusters are categories. Probe and clusters are held fixed: the intervals leave out that a
probe would learn otherwise from other listings, and that listings of one product are similar.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from afmrl_jax.catalog.listings import Catalog, Listing, Overlay
from afmrl_jax.core.errors import UserError
from afmrl_jax.retrieval.metrics import interval95
from afmrl_jax.retrieval.scores import Scores
from afmrl_jax.retrieval.tasks import parts_of

RESAMPLES = 500
STARTS = 10  # of k-means, from other centres each; the tightest clusters are kept


class Unlabelled(Overlay):
    """A catalogue without the categories of its listings; otherwise the same."""

    def __init__(self, catalog: Catalog):
        super().__init__(catalog, catalog.fingerprint)

    def listing(self, index: int, draw: int = 0) -> Listing:
        return dataclasses.replace(super().listing(index, draw), category="")


class CategoryTask:
    """Scores embeddings by the categories of some listings of a catalogue."""

    name = "category"

    def __init__(
        self,
        catalog: Catalog,
        training: np.ndarray,
        judged: np.ndarray,
        view: str,
        limit: int,
        seed: int,
    ):
        """training, judged: int64, indices of listings. The probe learns from at most `limit` of
        the training listings that are not judged. A listing without a category, or without the text
        or image that the view shows, is neither learned from nor judged.

        Raises UserError where the training or the judged listings have fewer than two categories.
        """
        training = np.setdiff1d(training, judged)
        drawn = np.random.default_rng(seed).permutation(training)[:limit]
        self.probe, self._learned = _with_category(catalog, np.sort(drawn), view)
        self._judged, self._categories = _with_category(catalog, judged, view)
        self._kept = np.flatnonzero(np.isin(judged, self._judged))
        self._seed = seed
        for categories, listings, field in (
            (self._learned, "training listings beside the queries", "eval.queries"),
            (self._categories, "queries", "eval.query_split"),
        ):
            if len(np.unique(categories)) < 2:
                raise UserError(
                    f"{catalog.name} has {len(categories)} {listings} with a category, of "
                    f"{len(np.unique(categories))} categories, among those with {view}: there is "
                    f"nothing to tell apart; choose another {field}, or set eval.downstream=False"
                )

    def scores(self, vectors: Callable[[np.ndarray], np.ndarray]) -> Scores:
        """vectors: listings int64[n] -> float32[n, E], of the `Unlabelled` catalogue.

        Returns `accuracy` as value, and as extra `nmi`, `ari`, `purity`, the intervals of all four
        (`_ci95`), `n_probe` and `n_categories`."""
        judged = vectors(self._judged)
        right = probe(vectors(self.probe), self._learned, judged, self._seed) == self._categories
        clusters = cluster(judged, len(np.unique(self._categories)), self._seed)
        extra = agreement(self._categories, clusters)
        rng, drawn = np.random.default_rng(self._seed), []
        for _ in range(RESAMPLES):
            again = rng.integers(len(right), size=len(right))
            drawn.append(agreement(self._categories[again], clusters[again]))
        extra["accuracy_ci95"] = interval95(right)
        for name in drawn[0]:
            low, high = np.quantile([resample[name] for resample in drawn], [0.025, 0.975])
            if high > low:
                extra[f"{name}_ci95"] = float(high - low) / 2
        extra |= {"n_probe": len(self.probe), "n_categories": len(np.unique(self._categories))}
        return Scores(self._kept, {"accuracy": right.astype(np.float64)}, extra)


def probe(vectors: np.ndarray, categories: np.ndarray, judged: np.ndarray, seed: int) -> np.ndarray:
    """The categories [N] that a logistic regression predicts for judged: float32[N, E]. It learns
    from vectors: float32[L, E] and their categories [L]."""
    # Imported here, as in `cluster`: an evaluation without a probe need not wait for it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(max_iter=1000, random_state=seed)
    model = make_pipeline(StandardScaler(), regression)
    model.fit(vectors.astype(np.float64), categories)
    return model.predict(judged.astype(np.float64))


def cluster(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The k-means cluster, int32[N], of each of vectors: float32[N, E]."""
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=STARTS, random_state=seed).fit_predict(vectors)


def agreement(categories: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """`nmi`: mutual information over the mean of the two entropies; `ari`: the share of pairs on
    which both agree, 0 by chance (Hubert and Arabie, 1985); `purity`: the share of listings that
    are of their cluster's most frequent category. categories [N], clusters [N]."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(categories, clusters)  # [K, clusters]
    return {
        "nmi": float(normalized_mutual_info_score(categories, clusters)),
        "ari": float(adjusted_rand_score(categories, clusters)),
        "purity": float(table.max(axis=0).sum() / table.sum()),
    }


def _with_category(
    catalog: Catalog, listings: np.ndarray, view: str
) -> tuple[np.ndarray, np.ndarray]:
    """The listings that have a category and the text or image that the view shows, the category not
    counted as text. Returns them, int64[n], and their categories, str[n]."""
    listings = listings[parts_of(Unlabelled(catalog), listings)[view]]
    categories = np.array([catalog.listing(int(i)).category for i in listings], str)
    return listings[categories != ""], categories[categories != ""]
