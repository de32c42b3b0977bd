"""Opens what a configuration names as its catalogue."""

import os
from dataclasses import dataclass
from pathlib import Path

from afmrl_jax.catalog.concat import ConcatCatalog
from afmrl_jax.catalog.listings import Catalog, open_catalog
from afmrl_jax.catalog.names import SPLITS
from afmrl_jax.catalog.overlays import open_attributes
from afmrl_jax.catalog.synthetic import Shape, SyntheticCatalog, open_world
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import Options, among, between


@dataclass(frozen=True)
class BuiltIn(Options, section="data.builtin"):
    """The size and shape of the built-in catalogue."""

    train_families: int = between(0)
    validation_families: int = between(0)
    test_families: int = between(0)
    family_products: int = between(1)  # products at most of a family
    bestseller_share: float = between(0, 1)  # share of the training products
    bestseller_listings: int = between(1)  # listings of each of these

    def open(self, cache_dir: Path) -> SyntheticCatalog:
        families = {split: getattr(self, f"{split}_families") for split in SPLITS}
        shape = Shape(self.family_products, self.bestseller_share, self.bestseller_listings)
        return SyntheticCatalog(families=families, shape=shape, cache_dir=cache_dir)


@dataclass(frozen=True)
class ListingOptions(Options, section="data"):
    """Which listings, and how they are read."""

    path: str  # "builtin", "world", folders, Parquet files, tfds:NAME, by commas
    shared_ids: bool  # whether several catalogues mean the same by one id
    cache_dir: str  # "" = afmrl_jax in the user's cache folder
    builtin: BuiltIn
    on_bad_listing: str = among("error", "skip")

    @property
    def cache_folder(self) -> Path:
        return cache_folder(self.cache_dir)


@dataclass(frozen=True)
class CatalogOptions(ListingOptions, section="data"):
    """Which listings, and whose attributes they have."""

    attributes: str  # a JSONL file of them; "" = the catalogue's


def cache_folder(cache_dir: str) -> Path:
    """The folder, with "" afmrl_jax in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afmrl_jax"


def catalogue_names(text: str) -> list[str]:
    """The catalogues that a field of the configuration names, joined by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def open_listings(options: ListingOptions, report_dir: Path) -> Catalog:
    """One catalogue, or several joined by commas, with the attributes that they have themselves.

    report_dir: where bad listings are listed. Raises UserError as `open_catalog` does.
    """
    cache = options.cache_folder
    names = catalogue_names(options.path)
    if not names:
        raise UserError('no catalogue is named: set data.path to "builtin", a folder or a file')
    rendered = {"builtin": options.builtin.open, "world": open_world}
    catalogues = [
        rendered[name](cache_dir=cache)
        if name in rendered
        else open_catalog(
            name,
            cache_dir=cache,
            on_bad_listing=options.on_bad_listing,
            report_dir=report_dir,
        )
        for name in names
    ]
    return catalogues[0] if len(catalogues) == 1 else ConcatCatalog(catalogues, options.shared_ids)


def with_attributes(catalogue: Catalog, options: CatalogOptions, report_dir: Path) -> Catalog:
    """The catalogue with the attributes of the file `options.attributes`; as it is with "".

    Raises UserError as `open_attributes` does.
    """
    if not options.attributes:
        return catalogue
    return open_attributes(
        catalogue,
        options.attributes,
        cache_dir=options.cache_folder,
        on_bad_listing=options.on_bad_listing,
        report_dir=report_dir,
    )


def open_catalogue(options: CatalogOptions, report_dir: Path) -> Catalog:
    """`open_listings`, `with_attributes` where the options name some."""
    return with_attributes(open_listings(options, report_dir), options, report_dir)
