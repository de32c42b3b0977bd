"""Decides which listings of several catalogues are the same listing.

Two listings are the same if their listing_id and product_id are equal and they share a photo (or,
if one of them has no photo, their text). They must be recognised because a query of one catalogue
must not find itself in another. Two listings that are both the same as a third are the same, too.

Equal ids alone are not enough. Two different listings may have got the same id. And one catalogue
may show a listing by a customer's photo and another by a studio's photo: finding the one by the
other is a real query.

Axes: N listings of all catalogues · P products of all catalogues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from afmrl_jax.catalog.conversion import text_hash

if TYPE_CHECKING:
    from afmrl_jax.catalog.listings import Catalog

# The halves of a key that stand for no text and for no photos. Two listings that both lack a text
# (or photos) are not alike in it.
NO_TEXT, NO_PHOTOS = f"{text_hash('', '', ''):016x}", "0" * 16
EXAMPLES = 3  # ids that a report quotes


class Content(NamedTuple):
    """A listing's content as 64-bit hashes: one of its text, and one of each photo's file."""

    text: int
    photos: frozenset[int]

    @property
    def key(self) -> str:
        """32 hex digits that change with the text or the photos, equal on every machine."""
        photos = 0
        for photo in self.photos:
            photos ^= photo
        return f"{self.text:016x}{photos:016x}"


def match_keys(old: str, new: str) -> Literal["whole", "part", "none"]:
    """How much of a listing is unchanged: its text and its photos, one of the two, or neither.

    old, new: the listing's `Content.key` at two times.
    """
    if old == new:
        return "whole"
    half = len(new) // 2
    same_text = old[:half] == new[:half] != NO_TEXT
    same_photos = old[half:] == new[half:] != NO_PHOTOS
    return "part" if same_text or same_photos else "none"


@dataclass(frozen=True)
class Identities:
    """The listings and products of several catalogues, with equal ones recognised.

    Listings are numbered through all catalogues, one catalogue after the other.
    """

    listings: np.ndarray  # int32[N]: the number of the first listing that is the same
    products: np.ndarray  # int32[N]: dense codes of products
    # For reports, ids that several catalogues have:
    merged: list[str]  # listing_ids of listings that are the same
    apart: list[str]  # listing_ids of listings that are different
    disputed: list[str]  # listing_ids of listings that differ only in their product_id
    shared_products: list[str]  # product_ids

    def report(self) -> str:
        """A sentence about the shared ids and what they are taken for; "" if none are shared."""
        parts = (
            (self.merged, "listings stand in several of them and count once"),
            (self.apart, "listing_ids name different listings, which stay apart"),
            (self.shared_products, "product_ids stand in several and name one product each"),
        )
        return "; ".join(
            f"{len(ids):,} {meaning} (as {', '.join(map(repr, ids[:EXAMPLES]))})"
            for ids, meaning in parts
            if ids
        )


def identify_listings(catalogs: Sequence["Catalog"]) -> Identities:
    """The identities if equal ids in two catalogues mean the same listing or product."""
    starts = np.cumsum([0, *map(len, catalogs)])
    products, shared_products = _products(catalogs)
    listings = np.arange(starts[-1], dtype=np.int32)
    merged, apart, disputed = [], [], []
    ids = pa.chunked_array([catalog.listing_ids for catalog in catalogs], pa.large_string())
    for listing_id, rows in _repeated(ids):
        contents = []
        for row in rows:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            contents.append(catalogs[number].content(int(row - starts[number])))
        groups = _group_contents(contents)
        for group in groups:
            listings[rows[group]] = rows[group[0]]
        if any(len(group) > 1 for group in groups):
            merged.append(listing_id)
        if any(len(set(products[rows[group]])) > 1 for group in groups):
            disputed.append(listing_id)
        if len(groups) > 1:
            apart.append(listing_id)
    return Identities(listings, products, merged, apart, disputed, shared_products)


def keep_apart(catalogs: Sequence["Catalog"]) -> Identities:
    """The identities if each catalogue has its own numbering: no listing or product is shared."""
    counts = [len(catalog.product_ids) for catalog in catalogs]
    parts = [catalog.products + start for catalog, start in zip(catalogs, np.cumsum([0, *counts]))]
    products = np.concatenate(parts).astype(np.int32)
    return Identities(np.arange(len(products), dtype=np.int32), products, [], [], [], [])


def _group_contents(contents: Sequence[Content]) -> list[list[int]]:
    """Groups the contents of the same listing. A group holds indices, ascending; the groups are
    ordered by their first index. Two contents that are both the same as a third are in one group,
    whatever their order."""
    groups: list[list[int]] = []
    for index, content in enumerate(contents):
        apart, joined = [], [index]
        for group in groups:
            if any(_same_content(contents[other], content) for other in group):
                joined += group
            else:
                apart.append(group)
        groups = sorted([*apart, sorted(joined)])
    return groups


def _same_content(left: Content, right: Content) -> bool:
    if left.photos and right.photos:
        return bool(left.photos & right.photos)
    return left.text == right.text


def _products(catalogs: Sequence["Catalog"]) -> tuple[np.ndarray, list[str]]:
    """int32[N], the code of each listing's product, and the product_ids of several catalogues."""
    ids = pa.chunked_array([catalog.product_ids for catalog in catalogs], pa.large_string())
    codes = _codes(ids)
    parts = np.split(codes, np.cumsum([len(catalog.product_ids) for catalog in catalogs])[:-1])
    products = [part[catalog.products] for part, catalog in zip(parts, catalogs)]
    return np.concatenate(products), [product_id for product_id, _ in _repeated(ids)]


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """int32[n]: codes, equal for equal values, in order of first appearance."""
    chunks = values.combine_chunks().dictionary_encode()
    return chunks.indices.to_numpy().astype(np.int32)


def _repeated(values: pa.ChunkedArray) -> list[tuple[str, np.ndarray]]:
    """The values that occur more than once, each with its row numbers, ascending."""
    codes = _codes(values)
    rows = np.flatnonzero(np.bincount(codes)[codes] > 1)
    rows = rows[np.argsort(codes[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(codes[rows])) + 1) if len(rows) else []
    return [(values[int(group[0])].as_py(), group) for group in groups]
