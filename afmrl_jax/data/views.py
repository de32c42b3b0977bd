"""Views of a listing: the parts of it that a model reads.

A view is "image", "text" or "image+text". Text is the title, category and description; structured
attributes join it only where a caller passes them.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from afmrl_jax.attributes.text import format_attributes, normalise
from afmrl_jax.catalog.listings import Catalog, Listing
from afmrl_jax.core.options import Options, between
from afmrl_jax.data.processor import Processor, Row

VIEWS = ("image+text", "image", "text")
# What the two sides of a pair show where one listing stands on both.
PARTS = (
    "modalities",  # one its image, the other its text
    "halves",  # each a half of its words at random: some stand on both
    "words",  # each a half of its words: none stands on both
    "photo",  # as words, and the photo on one side alone
)
_PUNCTUATION = re.compile(r"\W")
SEPARATOR = "; "  # between attributes, as `format_attributes` writes it
SAMPLED = 200  # listings of which the cuts are counted
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Augmentation(Options, section="data"):
    """How a training view differs from the catalogue's listing."""

    crop_area: float = between(0.01, 1)  # least share of an image's area that a crop keeps
    flip_share: float = between(0, 1)  # share of images that are mirrored
    attribute_share: float = between(0, 1)  # share of texts that carry the attributes
    attribute_dropout: float = between(0, 1)  # share of those attributes that are left out
    attribute_noise: float = between(0, 1)  # share of values replaced by another listing's


Attributes = Callable[[int], Mapping[str, str]]  # of a listing, by its index
# category -> attributes of some of its listings: the source of attribute noise
OtherAttributes = Mapping[str, Sequence[Mapping[str, str]]]


def attribute_pairs(attributes: Mapping[str, str]) -> list[str]:
    """ "name: value" of each attribute; `format_attributes` joins these with SEPARATOR."""
    return [format_attributes({name: value}) for name, value in normalise(attributes).items()]


def listing_row(
    listing: Listing,
    images: Sequence[Image.Image] = (),
    attributes: Mapping[str, str] | None = None,
) -> Row:
    """Title, category, attributes if any, description: the most important first.

    It makes every text with attributes, so that training, evaluation and rewards read the same.
    """
    lines = [line for line in (listing.title, listing.category) if line]
    pairs, places = attribute_pairs(attributes or {}), []
    start = sum(len(line) + 1 for line in lines)
    for pair in pairs:
        places.append((start, start + len(pair)))
        start += len(pair) + len(SEPARATOR)
    lines += [line for line in (SEPARATOR.join(pairs), listing.description) if line]
    return Row("\n".join(lines), tuple(images), attributes=tuple(places))


def listing_text(listing: Listing, attributes: Mapping[str, str] | None = None) -> str:
    """The text of `listing_row`."""
    return listing_row(listing, (), attributes).text


def catalogue_attributes(catalog: Catalog) -> Attributes:
    """The attributes that the catalogue holds: the oracle's."""
    return lambda index: catalog.listing(index).attributes


def evaluation_row(
    catalog: Catalog,
    index: int,
    max_images: int,
    draw: int = 0,
    *,
    view: str = "image+text",
    attributes: Mapping[str, str] | None = None,
) -> Row:
    """The listing without augmentation: its first `max_images` images, and its text with the
    attributes.

    A part that the listing lacks is left out, even if the row is then empty. draw: as
    `TrainingViews.row`'s.
    """
    images = listing_images(catalog, index, max_images, draw) if "image" in view else ()
    return view_row(catalog.listing(index, draw), view, images, attributes)


def listing_images(
    catalog: Catalog, index: int, max_images: int, draw: int = 0
) -> tuple[Image.Image, ...]:
    """The first `max_images` images of a listing. draw: as `TrainingViews.row`'s."""
    shown = range(min(catalog.listing(index, draw).n_images, max_images))
    images = (catalog.image(index, which, draw) for which in shown)
    return tuple(image for image in images if image is not None)


def view_row(
    listing: Listing,
    view: str,
    images: Sequence[Image.Image],
    attributes: Mapping[str, str] | None = None,
) -> Row:
    """`listing_row` for a view that shows text; the images alone for other views.

    images: none where the view shows none. Evaluation and rewards make all rows by this function.
    """
    return listing_row(listing, images, attributes) if "text" in view else Row("", tuple(images))


@dataclass(frozen=True)
class TrainingViews:
    """Augmented views of a catalogue's listings."""

    catalog: Catalog
    options: Augmentation
    others: OtherAttributes

    def row(
        self,
        index: int,
        view: str,
        rng: np.random.Generator,
        *,
        draw: int,
        shorten: bool = False,
    ) -> Row:
        """A view of a listing, with at most one image.

        draw: the number of a rendering, for a rendered catalogue. shorten: keeps a random half of
        the text's words. A listing without the part that `view` names shows the part that it has.
        """
        listing = self.catalog.listing(index, draw)
        image = self._image(index, listing, view, rng, draw)
        row = Row("")
        if "text" in view or image is None:
            row = self._text(listing, rng)
            if shorten:
                words = rng.permutation(len(row.text.split()))
                row = _shortened(row, words[: max(1, len(words) // 2)])
        return self._with_image(row, image, rng)

    def apart(
        self, index: int, views: Sequence[str], rng: np.random.Generator, *, draw: int
    ) -> list[Row]:
        """Two views of one rendering of a listing. Each word of its text is in one of them at most,
        whatever its case and however often it stands there, and each chooses and crops a photo for
        itself. Text and attributes are as `row` makes them. A text of a single word stands in both.
        """
        listing = self.catalog.listing(index, draw)
        text = self._text(listing, rng)
        words = [_PUNCTUATION.sub("", word).lower() for word in text.text.split()]
        distinct, numbers = np.unique(np.array(words, str), return_inverse=True)
        is_first = (rng.permutation(len(distinct)) < len(distinct) / 2)[numbers]
        rows = []
        for view, is_kept in zip(views, (is_first, ~is_first), strict=True):
            image = self._image(index, listing, view, rng, draw)
            row = Row("")
            if "text" in view or image is None:
                row = _shortened(text, np.flatnonzero(is_kept if is_kept.any() else ~is_kept))
            rows.append(self._with_image(row, image, rng))
        return rows

    def _image(
        self, index: int, listing: Listing, view: str, rng: np.random.Generator, draw: int
    ) -> Image.Image | None:
        if listing.n_images and ("image" in view or not listing_text(listing)):
            return self.catalog.image(index, int(rng.integers(listing.n_images)), draw)
        return None

    def _text(self, listing: Listing, rng: np.random.Generator) -> Row:
        attributes = None
        if rng.random() < self.options.attribute_share:
            others = self.others.get(listing.category, ())
            attributes = _corrupted(listing, rng, self.options, others)
        return listing_row(listing, (), attributes)

    def _with_image(self, row: Row, image: Image.Image | None, rng: np.random.Generator) -> Row:
        images = () if image is None else (_augmented(image, rng, self.options),)
        return dataclasses.replace(row, images=images)


def _shortened(row: Row, kept: np.ndarray) -> Row:
    """The words of these numbers, in the text's order; each kept word of an attribute becomes an
    attribute."""
    words, kept = row.text.split(), np.sort(kept)
    first = last = 0  # words of attributes: from `first`, before `last`
    if row.attributes:
        first = len(row.text[: row.attributes[0][0]].split())
        last = len(row.text[: row.attributes[-1][1]].split())
    places, start = [], 0
    for i in kept:
        if first <= i < last:
            places.append((start, start + len(words[i])))
        start += len(words[i]) + 1
    return Row(" ".join(words[i] for i in kept), attributes=tuple(places))


def _corrupted(
    listing: Listing,
    rng: np.random.Generator,
    options: Augmentation,
    others: Sequence[Mapping[str, str]],
) -> dict[str, str]:
    """Attributes as a generator would write them: some missing, some with a wrong value."""
    shown = {}
    for name, value in listing.attributes.items():
        if rng.random() < options.attribute_dropout:
            continue
        if rng.random() < options.attribute_noise and others:
            value = others[int(rng.integers(len(others)))].get(name, value)
        shown[name] = value
    return shown


def _augmented(image: Image.Image, rng: np.random.Generator, options: Augmentation) -> Image.Image:
    area = rng.uniform(options.crop_area, 1.0)
    side = np.sqrt(area)
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    mirrored = rng.random() < options.flip_share
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


class AttributeCuts:
    """Counts rows whose attributes do not all fit, or whose title is cut to make room for them.

    enriched: rows with attributes. losing: rows among them that lose an attribute; bare: that lose
    all; shorter: that lose the end of title and category. needed: the max_tokens with which no row
    would lose any.
    """

    def __init__(self, processor: Processor):
        self._processor = processor
        self.enriched = self.losing = self.bare = self.shorter = 0
        self.needed = processor.max_tokens

    def made(self, numbers: np.ndarray, make_row: Callable[[int], Row]) -> list[Row]:
        """Makes and counts the rows of numbers, int[N]. A repeated number, such as those that fill
        up a batch, is made and counted once."""
        rows = {number: make_row(number) for number in dict.fromkeys(numbers.tolist())}
        for row in rows.values():
            if row.attributes:
                shown = self._processor.shown(row)
                self.enriched += 1
                self.losing += shown.attributes < len(row.attributes)
                self.bare += not shown.attributes
                self.shorter += bool(shown.attributes) and shown.text != row.text
                self.needed = max(self.needed, shown.needed)
        return [rows[number] for number in numbers.tolist()]

    @property
    def share(self) -> float:
        """Share of the rows with attributes that lose any; 0 without such rows."""
        return self.losing / max(self.enriched, 1)

    @property
    def none_is_read(self) -> bool:
        """Whether rows have attributes, and the model reads none of them."""
        return 0 < self.enriched == self.bare

    def __str__(self) -> str:
        return (
            f"{self.losing} of {self.enriched} texts lose attributes ({self.bare} of them all), "
            f"{self.shorter} the end of their title, because the encoder's rows end at "
            f"data.max_tokens={self._processor.max_tokens}, images included; trained with "
            f"{self.needed} it would read all of theirs"
        )

    def tell(self, where: str) -> bool:
        """Logs the losses, if any: as a warning where a row loses an attribute. where: the texts
        that were cut, in words. Returns whether there were losses."""
        lost = bool(self.losing or self.shorter)
        if lost:
            log.log(logging.WARNING if self.losing else logging.INFO, "%s: %s", where, self)
        return lost


def sampled_cuts(
    catalog: Catalog, split: str, processor: Processor, max_images: int
) -> AttributeCuts:
    """The cuts in rows of a sample of a split's listings, with attributes and photos."""
    cuts = AttributeCuts(processor)

    def row(index: int) -> Row:
        attributes = catalog.listing(index).attributes
        # Only rows with attributes count, so the others need no photos.
        view = "image+text" if attributes else "text"
        return evaluation_row(catalog, index, max_images, view=view, attributes=attributes)

    cuts.made(np.random.default_rng(0).permutation(catalog.indices(split))[:SAMPLED], row)
    return cuts
