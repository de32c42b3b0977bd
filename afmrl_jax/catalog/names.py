"""The names that a catalogue uses, of fields, splits and identifiers; and nearly right ones."""

import difflib
import functools
import re
import unicodedata

FIELDS = (
    "listing_id",
    "product_id",
    "title",
    "description",
    "category",
    "attributes",
    "images",
    "split",
)
FIELD_NAMES = frozenset(FIELDS)
LONGEST = 60  # characters of a name that is looked at, or told
SPLITS = ("train", "validation", "test")
# What others call our fields. Qualifiers are taken off first: "main_image_path" is "image".
_SYNONYMS = {
    "listing_id": "id listing item_id offer_id sku asin",
    "product_id": "product pid group_id item_group_id product_group parent_id",
    "title": "name product_name item_name headline",
    "description": "desc descr",
    "category": "cat",
    "attributes": "attrs attr aspects specs specifications",
    "images": "img photo picture pic file_name filename",
}
_FIELD_OF = {
    synonym: field for field, synonyms in _SYNONYMS.items() for synonym in synonyms.split()
}
_QUALIFIERS = frozenset(
    ("product", "item", "listing", "main", "primary", "name", "path", "file", "filename", "list")
)
# As Hugging Face's datasets read them, but for "eval": validation to some, test to others.
_SPLIT_OF = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "development": "validation",
    "validate": "validation",
    "testing": "test",
}
_PICTURE = re.compile(r"image|img|photo|picture|thumbnail", re.IGNORECASE)


def similar_field(name: str) -> str | None:
    """The field of a listing that an unknown field's name stands for, or nearly spells."""
    return _similar_field(name) if len(name) <= LONGEST else None


@functools.lru_cache(maxsize=4096)
def _similar_field(name: str) -> str | None:
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", unicodedata.normalize("NFKC", name)).lower()
    plain = "_".join(re.findall(r"[^\W_]+", words))
    bare = "_".join(
        word
        for word in plain.split("_")
        if word.removesuffix("s") not in _QUALIFIERS and not word.isdigit()
    )
    for text in filter(None, (plain, bare)):
        for word in (text, text.removesuffix("s"), text + "s", re.sub("ies$", "y", text)):
            if word in FIELDS:
                return word
            if word in _FIELD_OF:
                return _FIELD_OF[word]
    # "category_id" and "subtitle" hold a field's name whole, and mean something else.
    others = [field for field in FIELDS if field.removesuffix("s") not in plain]
    return next(iter(difflib.get_close_matches(plain, others, n=1, cutoff=0.8)), None)


def may_hold_images(name: str) -> bool:
    """Whether an unknown field's name says that pictures, or their addresses, lie there."""
    return bool(_PICTURE.search(name)) or similar_field(name) == "images"


def split_name(split: str) -> str:
    """The split's name as catalogues keep it: "Valid " is "validation"."""
    plain = clean_identifier(split).casefold()
    return _SPLIT_OF.get(plain, plain)


def similar_splits(split: str) -> tuple[str, ...]:
    """Which splits a name, as `split_name` gives it, may be meant for; () where it stands for
    itself."""
    return _similar_splits(split) if len(split) <= LONGEST else ()


@functools.lru_cache(maxsize=4096)
def _similar_splits(split: str) -> tuple[str, ...]:
    if split in SPLITS:
        return ()
    if split in ("eval", "evaluation"):
        return "validation", "test"
    if split == "all":  # which means every listing wherever a split is asked for
        return SPLITS
    # "test2" and "train_small" hold a split's name whole, and are others.
    known = [name for name in (*SPLITS, *_SPLIT_OF) if name not in split]
    near = [name for name in known if sorted(name) == sorted(split)]
    near = near or difflib.get_close_matches(split, known, n=1, cutoff=0.8)
    return tuple(_SPLIT_OF.get(name, name) for name in near)


def clean_identifier(text: str) -> str:
    """An identifier without what nobody sees: NFC, no invisible characters, no blanks at its ends.

    Upper and lower case stay, and so do blanks within.
    """
    if text.isascii() and text.isprintable():
        return text.strip(" ")
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf") or c.isspace())
    return kept.strip()
