"""Opens what a configuration names as its catalogue."""

import os
from pathlib import Path

from ml_collections import ConfigDict

from afmrl_jax.catalog.concat import ConcatCatalog
from afmrl_jax.catalog.listings import Catalog, open_catalog
from afmrl_jax.catalog.overlays import open_attributes
from afmrl_jax.catalog.synthetic import SyntheticCatalog
from afmrl_jax.core.errors import UserError


def cache_folder(config: ConfigDict) -> Path:
    """`config.cache_dir`, else afmrl_jax in the user's cache folder."""
    if config.cache_dir:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afmrl_jax"


def catalogue_names(text: str) -> list[str]:
    """The catalogues that a field of the configuration names, joined by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def open_listings(path: str, config: ConfigDict, report_dir: Path) -> Catalog:
    """One catalogue, or several joined by commas: "builtin", a folder, a Parquet file, tfds:NAME.

    config: the configuration's `data`. report_dir: where bad listings are listed.
    Raises UserError as `open_catalog` does.
    """
    cache = cache_folder(config)
    names = catalogue_names(path)
    if not names:
        raise UserError('no catalogue is named: set data.path to "builtin", a folder or a file')
    catalogues = [
        SyntheticCatalog(cache_dir=cache)
        if name == "builtin"
        else open_catalog(
            name,
            cache_dir=cache,
            on_bad_listing=config.on_bad_listing,
            report_dir=report_dir,
        )
        for name in names
    ]
    return catalogues[0] if len(catalogues) == 1 else ConcatCatalog(catalogues, config.shared_ids)


def with_attributes(catalogue: Catalog, config: ConfigDict, report_dir: Path) -> Catalog:
    """The catalogue with the attributes of the file `config.attributes`; as it is with "".

    Raises UserError as `open_attributes` does.
    """
    if not config.attributes:
        return catalogue
    return open_attributes(
        catalogue,
        config.attributes,
        cache_dir=cache_folder(config),
        on_bad_listing=config.on_bad_listing,
        report_dir=report_dir,
    )


def open_catalogue(path: str, config: ConfigDict, report_dir: Path) -> Catalog:
    """`open_listings`, `with_attributes` where the configuration names some."""
    return with_attributes(open_listings(path, config, report_dir), config, report_dir)
