"""Models with their parameters on a mesh: rows and listings to vectors, listings to answers.

All processes call a loaded model's methods together, with the same arguments, and get the same.
Axes: N rows · E embedding · B rows of a batch, all processes'.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from afmrl_jax.assembly.description import Description, describe
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Answer, Generator, batches_of
from afmrl_jax.assembly.model import Assembly, abstract_params
from afmrl_jax.assembly.options import EncoderOptions
from afmrl_jax.assembly.pretrained import Pretrained, find_pretrained
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.names import SPLITS
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import local_rows, put_batch, replicated
from afmrl_jax.core.pixels import upright_rgb
from afmrl_jax.core.progress import with_progress
from afmrl_jax.core.types import Params, Rows
from afmrl_jax.data.processor import Row
from afmrl_jax.data.views import (
    VIEWS,
    AttributeCuts,
    catalogue_attributes,
    evaluation_row,
    listing_images,
    view_row,
)
from afmrl_jax.models import lora
from afmrl_jax.models.sampler import generate, sample_keys

CACHED = 64  # listings whose photos stay in memory, for the next rows of the same listing

Arrays = dict[str, np.ndarray]


class Embedded(NamedTuple):
    """vectors: float32[N, E]. cuts: of the attributes in the rows that this process made."""

    vectors: np.ndarray
    cuts: AttributeCuts


class LoadedEncoder:
    """An encoder with its parameters on a mesh: `embed` makes vectors of unit length.

    batch: rows embedded at once, by all processes; the last batch is padded, so that one shape is
    compiled for rows with photos and one for texts alone.
    """

    def __init__(self, encoder: Encoder, params: Params, mesh: Mesh, batch: int):
        """params: `abstract_params(encoder, mesh)` describes them. Raises UserError where the mesh
        cannot split the batch, or rows of the encoder's sizes hold no image."""
        self.encoder, self.params, self.mesh, self.batch = encoder, params, mesh, batch
        self.processor = encoder.processor()
        self._local = local_rows(mesh, batch, "eval.batch")
        self._compiled = jax.jit(encoder.embed(), out_shardings=replicated(mesh))
        self._warned: set[tuple[str, bool]] = set()  # the texts, and whether an attribute was lost

    @classmethod
    def of(
        cls, source: Pretrained[Encoder], mesh: Mesh, batch: int, options: EncoderOptions | None
    ) -> Self:
        """Reads the parameters. options: of a model without a run, else not used."""
        encoder = source.with_options(options)
        return cls(encoder, source.load(abstract_params(encoder, mesh)), mesh, batch)

    def with_params(self, params: Params) -> Self:
        """The same encoder with other parameters, and the same compiled functions."""
        encoder = copy.copy(self)
        encoder.params = params
        encoder.__dict__.pop("version", None)
        return encoder

    @functools.cached_property
    def version(self) -> str:
        """A hash of all that the vectors depend on but the batch: 32 hexadecimal digits."""
        return version_of(self.encoder, self.params)

    def embed(self, rows: str | Row | Sequence[str | Row]) -> np.ndarray:
        """Vectors of texts and images, float32[N, E], each of length 1; one row alone gives [1, E].

            model.embed(["navy dress", Row("red mug", (photo,))])

        Raises UserError for a value that is no row, and where there are no rows.
        """
        if isinstance(rows, str | Row):
            rows = [rows]
        checked = [_checked_row(number, row) for number, row in enumerate(rows)]
        if not checked:
            raise UserError("there is nothing to embed: give at least one text or Row")
        text_only = not any(row.images for row in checked)
        return self._in_batches(
            lambda numbers: [checked[n] for n in numbers], np.arange(len(checked)), text_only
        )

    def embed_listings(
        self,
        catalog: Catalog,
        listings: np.ndarray,
        view: str = "image+text",
        *,
        attributes: Callable[[int], Mapping[str, str]] | None = None,
        draws: np.ndarray | None = None,
        where: str = "",
    ) -> Embedded:
        """Vectors of a view of listings, int64[N], with attributes in their texts.

        attributes: n -> the attributes of the n-th listing; None: no text has any. draws: int64[N],
        as `Catalog.listing` takes them; 0 by default. where: names the texts in the warning of
        attributes that do not fit, which is logged once; the view by default.
        """
        cuts = AttributeCuts(self.processor)

        @functools.lru_cache(CACHED)
        def photos(index: int, draw: int) -> tuple[Image.Image, ...]:
            return listing_images(catalog, index, self.processor.max_images, draw)

        def row(number: int) -> Row:
            index, draw = int(listings[number]), 0 if draws is None else int(draws[number])
            images = photos(index, draw) if "image" in view else ()
            carried = attributes(number) if attributes and "text" in view else {}
            return view_row(catalog.listing(index, draw), view, images, carried)

        vectors = self._in_batches(
            lambda numbers: cuts.made(numbers, row), np.arange(len(listings)), view == "text"
        )
        self._warn_of_cuts(cuts, where or view)
        return Embedded(vectors, cuts)

    def embed_catalog(
        self,
        catalog: Catalog,
        listings: str | np.ndarray,
        view: str = "image+text",
        attributes: str | Sequence[Mapping[str, str]] | None = None,
    ) -> np.ndarray:
        """Vectors of listings, float32[N, E], each of length 1, in the order of the listings.

            vectors = model.embed_catalog(catalog, "test", view="image+text")

        listings: a split (train, validation, test, all), or indices int64[N]. view: image, text or
        image+text. attributes: are appended to the texts: "oracle" for the catalogue's, or one
        mapping a listing, as a generator's descriptions give them. Raises UserError for other
        values.
        """
        listings = chosen_listings(catalog, listings)
        if view not in VIEWS:
            raise UserError(f"view is {view!r}: give one of {', '.join(VIEWS)}")
        if isinstance(attributes, str) and attributes != "oracle":
            raise UserError(
                f'attributes is {attributes!r}: give "oracle", for those of the catalogue, or one '
                "mapping a listing"
            )
        if attributes is None:
            return self.embed_listings(catalog, listings, view).vectors
        if attributes == "oracle":
            oracle = catalogue_attributes(catalog)
            return self.embed_listings(
                catalog, listings, view, attributes=lambda number: oracle(int(listings[number]))
            ).vectors
        if len(attributes) != len(listings):
            raise UserError(
                f"{len(attributes)} mappings of attributes came for {len(listings)} listings: give "
                "one a listing, {} where it has none"
            )
        return self.embed_listings(catalog, listings, view, attributes=attributes.__getitem__)[0]

    def _in_batches(
        self, make: Callable[[np.ndarray], list[Row]], numbers: np.ndarray, text_only: bool
    ) -> np.ndarray:
        """Vectors of rows, float32[N, E].

        make: some of the numbers -> their rows. text_only: whether no row has an image; the same on
        all processes.
        """
        buckets = [self.processor.text_bucket] if text_only else []

        def rows(batch: np.ndarray) -> Arrays:
            return self.processor(make(batch[self._local]), buckets)

        def embed(rows: Arrays) -> jax.Array:
            with jax.set_mesh(self.mesh):
                return self._compiled(
                    self.params, put_batch(rows, self.mesh, axis=0, rows=self.batch)
                )

        return embed_in_batches(embed, rows, numbers, self.batch)

    def _warn_of_cuts(self, cuts: AttributeCuts, where: str) -> None:
        """Warns of cut attributes once for the same texts, however often they are embedded."""
        key = where, bool(cuts.losing)
        if key not in self._warned and cuts.tell(where):
            self._warned.add(key)


class LoadedGenerator:
    """A generator with its parameters on a mesh: `describe` gives attributes of listings, greedily.

    batch: listings answered at once, by all processes.
    """

    def __init__(self, generator: Generator, params: Params, mesh: Mesh, batch: int):
        """params: `abstract_params(generator, mesh)` describes them. Raises UserError where the
        mesh cannot split the batch."""
        self.generator, self.params, self.mesh, self.batch = generator, params, mesh, batch
        self._local = local_rows(mesh, batch, "eval.batch")
        self._processor = generator.processor(answers=False)
        graph, sampling = generator.graph(), generator.sampling()

        def answer(params: Params, rows: Rows, numbers: jax.Array):
            keys = sample_keys(jax.random.key(0), numbers, 1)
            samples = generate(graph, params, rows, keys, sampling)
            lengths = samples.mask.sum(-1, dtype=np.int32)
            return samples.tokens, samples.log_probs, lengths, samples.truncated

        self._compiled = jax.jit(answer, out_shardings=replicated(mesh))

    @classmethod
    def of(cls, source: Pretrained[Generator], mesh: Mesh, batch: int) -> Self:
        """Reads the parameters. Raises UserError where the generator's prompt is not known."""
        generator = source.model
        if generator.options is None:
            raise UserError(
                f"{source.label} is not known to answer with attributes: name what configs/sft.py "
                "or configs/rar.py has trained"
            )
        return cls(generator, source.load(abstract_params(generator, mesh)), mesh, batch)

    def with_params(self, params: Params) -> Self:
        """The same generator with other parameters, and the same compiled functions."""
        generator = copy.copy(self)
        generator.params = params
        return generator

    def describe(self, catalog: Catalog, listings: str | np.ndarray) -> list[Description]:
        """The generator's description of each listing, with the confidence of each attribute.

            for description in model.describe(catalog, "test"):
                print(description.attributes, description.confidence)

        listings: a split (train, validation, test, all), or indices int64[N].
        """
        listings = chosen_listings(catalog, listings)
        tokenizer = self.generator.tokenizer
        return [describe(answer, tokenizer) for answer in self.answers(catalog, listings)]

    def answers(
        self, catalog: Catalog, listings: np.ndarray, view: str = "image+text"
    ) -> Iterator[Answer]:
        """The answers to a view of the listings, int64[N], in their order, batch by batch."""
        previous: tuple[tuple[jax.Array, ...], int] | None = None
        for batch, real in batches_of(listings, self.batch):
            # Returns at once: the device computes while the host makes the next batch.
            current = self._begin(catalog, batch, view), real
            if previous:
                yield from self._read(*previous)
            previous = current
        if previous:
            yield from self._read(*previous)

    def _begin(self, catalog: Catalog, batch: np.ndarray, view: str) -> tuple[jax.Array, ...]:
        most = self._processor.max_images
        shown = batch[self._local].tolist()
        local = [evaluation_row(catalog, index, most, view=view) for index in shown]
        with jax.set_mesh(self.mesh):
            rows = put_batch(self._processor(local), self.mesh, axis=0, rows=self.batch)
            return self._compiled(self.params, rows, batch.astype(np.int32))

    def _read(self, out: tuple[jax.Array, ...], real: int) -> Iterator[Answer]:
        """Waits for the answers of a batch. real: the number of its rows without padding."""
        tokens, log_probs, lengths, truncated = (np.asarray(x)[:, 0] for x in out)
        for n in range(real):
            end = lengths[n]
            yield self.generator.read(tokens[n, :end], log_probs[n, :end], truncated[n])


def load_generator(path: str, mesh: Mesh, batch: int) -> LoadedGenerator:
    """The generator that `path` names, as in `find_pretrained`. Of a workdir it is the checkpoint
    that is best on validation: a generator that was rewarded for too long may answer nothing.

    Raises UserError where there is none, or where the mesh cannot split the batch.
    """
    return LoadedGenerator.of(find_pretrained(path, Generator, best=None), mesh, batch)


def version_of(model: Assembly, params: Params) -> str:
    """A hash of all that a model's vectors or answers depend on: 32 hexadecimal digits."""
    parts = [
        lora.fingerprint(params),
        dataclasses.asdict(model.options),
        model.model_config.to_hf(),
        model.tokenizer.to_str(),
        model.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def chosen_listings(catalog: Catalog, listings: str | np.ndarray) -> np.ndarray:
    """The listings of a split, or those of the indices; int64[N].

    Raises UserError for another word, for a split without listings, and for indices outside the
    catalogue.
    """
    if isinstance(listings, str):
        if listings not in (*SPLITS, "all"):
            raise UserError(
                f"{listings!r} is no split: give one of {', '.join(SPLITS)}, all, or indices of "
                "listings"
            )
        indices = catalog.indices(listings)
        if not len(indices):
            raise UserError(f"{catalog.name} has no listings in its {listings} split")
        return indices
    indices = np.asarray(listings)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError("listings are a split's name, or whole numbers, an index each")
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(catalog):
        raise UserError(f"{catalog.name} has listings 0 to {len(catalog) - 1} alone")
    return indices.astype(np.int64)


def embed_in_batches(
    embed: Callable[[Arrays], jax.Array],
    make_rows: Callable[[np.ndarray], Arrays],
    numbers: np.ndarray,
    batch: int,
) -> np.ndarray:
    """Embeds rows in batches; a thread makes the next batch while the device computes.

    embed: a jitted function, rows -> float[B, E]. make_rows: numbers int64[B] -> rows, always of
    the same shapes. numbers: int64[N], N > 0. Returns float32[N, E].
    The last batch is padded with its last row, so that nothing compiles twice.
    """
    if len(numbers) == 0:
        raise ValueError("there are no listings to embed")
    starts = range(0, len(numbers), batch)
    vectors: list[np.ndarray] = []
    on_device = None
    with ThreadPoolExecutor(max_workers=1) as pool:

        def rows_from(start: int):
            piece = numbers[start : start + batch]
            return pool.submit(make_rows, np.pad(piece, (0, batch - len(piece)), mode="edge"))

        upcoming = rows_from(0)
        for start in with_progress(starts, len(numbers), "listings embedded"):
            rows = upcoming.result()
            if start + batch < len(numbers):
                upcoming = rows_from(start + batch)
            previous, on_device = on_device, embed(rows)  # dispatched, not yet waited for
            if previous is not None:
                vectors.append(np.asarray(previous, np.float32))
    vectors.append(np.asarray(on_device, np.float32))
    return np.concatenate(vectors)[: len(numbers)]


def _checked_row(number: int, row: object) -> Row:
    """The row for the processor, its images upright and RGB. Raises UserError for another value."""
    if isinstance(row, str):
        return Row(row)
    if not isinstance(row, Row) or not isinstance(row.text, str):
        raise UserError(
            f"row {number} is {type(row).__name__}: give a text, or Row(text, images), whose text "
            "may be empty"
        )
    if not isinstance(row.images, tuple | list) or not all(
        isinstance(image, Image.Image) for image in row.images
    ):
        raise UserError(f"the images of row {number} are no tuple of PIL images: give (image,)")
    return dataclasses.replace(row, images=tuple(upright_rgb(image) for image in row.images))
