"""Views of a listing: what the encoder is shown of it.

A view is "image", "text" or "image+text". Text is the title, category and description; structured
attributes join it only when asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from afmrl_jax.attributes.text import format_attributes
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.catalog import Catalog, Listing
from afmrl_jax.data.processor import Row

VIEWS = ("image+text", "image", "text")


def parse_mixture(text: str, field: str) -> tuple[tuple[str, ...], np.ndarray]:
    """ "image+text 0.7, text 0.3" -> the views and their shares, which must sum to 1.

    Raises UserError, naming `field`, for an unknown view or shares that do not sum to 1.
    """
    views, shares = [], []
    for part in text.split(","):
        view, _, share = part.strip().partition(" ")
        try:
            shares.append(float(share or 1))
        except ValueError:
            raise UserError(f"{field}: {share!r} after {view!r} is not a number") from None
        if view not in VIEWS:
            raise UserError(f"{field}: {view!r} is not a view; use {', '.join(VIEWS)}")
        views.append(view)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{field}: the shares of {text!r} sum to {sum(shares):g}, not 1")
    return tuple(views), np.asarray(shares)


@dataclass(frozen=True)
class Augmentation:
    """How a training view differs from the listing as it stands."""

    crop_area: float  # least share of the image's area that a crop keeps
    flip_share: float  # of images mirrored
    attribute_share: float  # of texts that carry the structured attributes
    attribute_dropout: float  # of those, attributes left out
    attribute_noise: float  # of those, values replaced by those of another of its category
    # category -> attributes of some of its listings, whence other values come
    others: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)


def listing_text(listing: Listing, attributes: Mapping[str, str] | None = None) -> str:
    """Title, category, attributes where given, description: what matters most stands first."""
    parts = [listing.title, listing.category, format_attributes(attributes or {})]
    return "\n".join(part for part in [*parts, listing.description] if part)


def evaluation_row(
    catalog: Catalog,
    index: int,
    view: str,
    *,
    max_images: int,
    attributes: Mapping[str, str] | None = None,
    draw: int = 0,
) -> Row:
    """The listing as it stands, with its first `max_images` images; attributes join its text.

    A part that it lacks is left out, even if the row is then empty. draw: as `training_row`'s.
    """
    listing = catalog.listing(index, draw)
    images = []
    if "image" in view:
        shown = range(min(listing.n_images, max_images))
        images = [catalog.image(index, which, draw) for which in shown]
    text = listing_text(listing, attributes) if "text" in view else ""
    return Row(text, tuple(image for image in images if image is not None))


def training_row(
    catalog: Catalog,
    index: int,
    draw: int,
    view: str,
    rng: np.random.Generator,
    options: Augmentation,
    *,
    shorten: bool = False,
) -> Row:
    """One augmented view, with one image; `shorten` keeps a random half of the text's words.

    draw: asks a rendered catalogue for a fresh rendering. A listing without the part that `view`
    asks for shows the part that it has.
    """
    listing = catalog.listing(index, draw)
    image = None
    if listing.n_images and ("image" in view or not listing_text(listing)):
        image = catalog.image(index, int(rng.integers(listing.n_images)), draw)
    text = ""
    if "text" in view or image is None:
        attributes = None
        if rng.random() < options.attribute_share:
            attributes = _corrupted(listing, rng, options)
        text = listing_text(listing, attributes)
        if shorten:
            words = text.split()
            kept = np.sort(rng.permutation(len(words))[: max(1, len(words) // 2)])
            text = " ".join(words[i] for i in kept)
    return Row(text, () if image is None else (_augmented(image, rng, options),))


def _corrupted(listing: Listing, rng: np.random.Generator, options: Augmentation) -> dict[str, str]:
    """Attributes as a generator would give them: some missing, some with another's value."""
    shown, others = {}, options.others.get(listing.category, ())
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
