"""Listings and their products: who belongs together, who can be found, and whole products of a
split.

Axes: N listings · P products · Q queries · R listings of a product, padded with -1.
"""

import math

import numpy as np

from afmrl_jax.catalog.listings import Catalog


class Members:
    """The rows of an array by their value, such as a gallery's listings by their product."""

    def __init__(self, values: np.ndarray):
        """values: int64[N], one a row."""
        self._rows = np.argsort(values, kind="stable")
        self._sorted = values[self._rows]

    def counts(self, values: np.ndarray) -> np.ndarray:
        """int64[Q]: how many rows have each of values, int64[Q]."""
        return self._ends(values) - self._starts(values)

    def rows(self, values: np.ndarray, *, powers_of_two: bool = False) -> np.ndarray:
        """int64[Q, R]: the rows that have each of values, int64[Q], ascending.

        R is 1 or more; with powers_of_two rounded up to one, so that few shapes are compiled.
        """
        starts, counts = self._starts(values)[:, None], self.counts(values)[:, None]
        width = int(max(1, counts.max(initial=1)))
        if powers_of_two:
            width = 1 << (width - 1).bit_length()
        columns = np.arange(width)
        rows = self._rows[np.minimum(starts + columns, len(self._rows) - 1)]
        return np.where(columns < counts, rows, -1)

    def _starts(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._sorted, values, "left")

    def _ends(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._sorted, values, "right")


def group_by_product(catalog: Catalog, listings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Listings, int64[N], side by side with the others of their product, and each product's start
    (+ the end): int64[P + 1]. Products ascend by the catalogue's product code."""
    codes = catalog.products[listings]
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    return listings[order], np.append(starts, len(order))


def listings_by_product(catalog: Catalog, split: str) -> tuple[np.ndarray, np.ndarray]:
    """`group_by_product` of a split's listings; no product for an empty split."""
    return group_by_product(catalog, catalog.indices(split))


def whole_products(
    catalog: Catalog, listings: np.ndarray, limit: int, *, several: bool = False
) -> np.ndarray:
    """int64, ascending: the listings of some products, the same at each call.

    listings: int64[N]. limit: products are drawn until they have so many listings. several: draws
    products with several listings alone, where there is one.
    """
    listings, starts = group_by_product(catalog, listings)
    sizes = np.diff(starts)
    order = np.random.default_rng(0).permutation(len(sizes))
    if several and (sizes > 1).any():
        order = order[sizes[order] > 1]
    order = order[: int(np.searchsorted(np.cumsum(sizes[order]), limit)) + 1]
    return _listings_of(order, listings, starts)


def share_of_products(catalog: Catalog, listings: np.ndarray, share: float) -> np.ndarray:
    """int64, ascending: all listings of a share of the products, at least one, the same at each
    call. A larger share holds the smaller one's. listings: int64[N]."""
    listings, starts = group_by_product(catalog, listings)
    n_products = len(starts) - 1
    order = np.random.default_rng(0).permutation(n_products)[: math.ceil(share * n_products)]
    return _listings_of(order, listings, starts)


def _listings_of(products: np.ndarray, listings: np.ndarray, starts: np.ndarray) -> np.ndarray:
    parts = [listings[starts[product] : starts[product + 1]] for product in products]
    return np.sort(np.concatenate(parts)) if parts else listings


def has_another(
    catalog: Catalog, queries: np.ndarray, gallery: np.ndarray, *, exclude_self: bool = True
) -> np.ndarray:
    """bool[Q]: whether the gallery, int64[N], holds another listing of each query's product.

    queries: int64[Q]. exclude_self: False lets the query's own listing count as another.
    """
    products = Members(catalog.products[gallery])
    counts = products.counts(catalog.products[queries])
    if exclude_self:
        counts = counts - np.isin(catalog.identities[queries], catalog.identities[gallery])
    return counts > 0


def askers(catalog: Catalog, split: str, gallery: np.ndarray) -> np.ndarray:
    """int64: the listings of a split whose product has another listing in the gallery, int64[N]."""
    listings = catalog.indices(split)
    return listings[has_another(catalog, listings, gallery)]
