"""Which listings of several catalogues are the same listing, and which only look so.

Two listings are the same where their listing_id and product_id are equal and they share a photo, or
their text where one of them has no photo: a query of one catalogue must not find itself in another.
Two that are the same as a third are one as well.

Equal ids alone are not enough. One id may have been given to two listings, and one listing may be
shown by a customer's photo here and by a studio's there, which is a query worth asking.

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

# What stands in a key for no text and for no photos: nothing is alike in these.
NO_TEXT, NO_PHOTOS = f"{text_hash('', '', ''):016x}", "0" * 16
EXAMPLES = 3  # ids that a report quotes


class Content(NamedTuple):
    """What a listing shows, as hashes of 64 bits: of its text, and of each photo's file."""

    text: int
    photos: frozenset[int]

    @property
    def key(self) -> str:
        """32 hex digits that change with the text or the photos, equal on every machine."""
        photos = 0
        for photo in self.photos:
            photos ^= photo
        return f"{self.text:016x}{photos:016x}"


def match_keys(written: str, now: str) -> Literal["whole", "part", "none"]:
    """How much of a listing is still as it was: its text and photos, one of them, or none.

    written, now: its `Content.key` at two times.
    """
    if written == now:
        return "whole"
    half = len(now) // 2
    same_text = written[:half] == now[:half] != NO_TEXT
    same_photos = written[half:] == now[half:] != NO_PHOTOS
    return "part" if same_text or same_photos else "none"


@dataclass(frozen=True)
class Identities:
    """Who is who in several catalogues, listed one after the other.

    listings: int32[N], the number of the first listing that is the same one. products: int32[N],
    dense codes. The rest are ids for a report, those that several catalogues have.
    """

    listings: np.ndarray
    products: np.ndarray
    merged: list[str]  # listing_ids of listings that are the same
    apart: list[str]  # listing_ids of listings that are not
    disputed: list[str]  # of listings that are the same but for their product_id
    shared_products: list[str]

    def report(self) -> str:
        """What is shared and how it is taken, in a sentence; "" where nothing is."""
        parts = (
            (self.merged, "listings stand in several of them and count once"),
            (self.apart, "listing_ids name different listings, which stay apart"),
            (self.shared_products, "product_ids stand in several and name one product each"),
        )
        return "; ".join(
            f"{len(ids):,} {what} (as {', '.join(map(repr, ids[:EXAMPLES]))})"
            for ids, what in parts
            if ids
        )


def identify_listings(catalogs: Sequence["Catalog"]) -> Identities:
    """Who is who where equal ids of the catalogues mean the same."""
    starts = np.cumsum([0, *map(len, catalogs)])
    products, shared_products = _products(catalogs)
    listings = np.arange(starts[-1], dtype=np.int32)
    merged, apart, disputed = [], [], []
    ids = pa.chunked_array([catalog.listing_ids for catalog in catalogs], pa.large_string())
    for listing_id, rows in _repeated(ids):
        contents = []
        for row in rows:
            which = int(np.searchsorted(starts, row, side="right")) - 1
            contents.append(catalogs[which].content(int(row - starts[which])))
        groups = _alike(contents)
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
    """Who is who where each catalogue numbers its own: nobody is in two of them."""
    counts = [len(catalog.product_ids) for catalog in catalogs]
    parts = [catalog.products + start for catalog, start in zip(catalogs, np.cumsum([0, *counts]))]
    products = np.concatenate(parts).astype(np.int32)
    return Identities(np.arange(len(products), dtype=np.int32), products, [], [], [], [])


def _alike(contents: Sequence[Content]) -> list[list[int]]:
    """Which of the contents are of one listing: groups of their numbers, ascending, the first one's
    first. Whatever two have in common with a third makes them one too, in whichever order."""
    groups: list[list[int]] = []
    for place, content in enumerate(contents):
        apart, joined = [], [place]
        for group in groups:
            if any(_same_content(contents[other], content) for other in group):
                joined += group
            else:
                apart.append(group)
        groups = sorted([*apart, sorted(joined)])
    return groups


def _same_content(one: Content, other: Content) -> bool:
    if one.photos and other.photos:
        return bool(one.photos & other.photos)
    return one.text == other.text


def _products(catalogs: Sequence["Catalog"]) -> tuple[np.ndarray, list[str]]:
    """int32[N], the code of each listing's product, and the product_ids that several have."""
    ids = pa.chunked_array([catalog.product_ids for catalog in catalogs], pa.large_string())
    codes = _codes(ids)
    parts = np.split(codes, np.cumsum([len(catalog.product_ids) for catalog in catalogs])[:-1])
    products = [part[catalog.products] for part, catalog in zip(parts, catalogs)]
    return np.concatenate(products), [product_id for product_id, _ in _repeated(ids)]


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """int32[n]: equal for equal values, in order of first appearance."""
    chunks = values.combine_chunks().dictionary_encode()
    return chunks.indices.to_numpy().astype(np.int32)


def _repeated(values: pa.ChunkedArray) -> list[tuple[str, np.ndarray]]:
    """The values that stand more than once, each with its places, ascending."""
    codes = _codes(values)
    places = np.flatnonzero(np.bincount(codes)[codes] > 1)
    places = places[np.argsort(codes[places], kind="stable")]
    groups = np.split(places, np.flatnonzero(np.diff(codes[places])) + 1) if len(places) else []
    return [(values[int(rows[0])].as_py(), rows) for rows in groups]
