"""Finds identifiers: attributes that tell products apart but do not describe them (sku, ean, url).

Two offers of one product differ in their identifiers. As the rarest terms of all, identifiers would
outweigh in BM25 everything that agrees, so they are found by their uniqueness and left out.
"""

import re
from collections import Counter
from collections.abc import Mapping

# An attribute is an identifier if nearly every product has a different value, and if there are so
# many products that this is no coincidence. If its name is an identifier's name, few products are
# enough. Otherwise its values must also look like codes: the model names of a catalogue may all
# differ and still agree in their words.
DISTINCT = 0.98  # least share of distinct values among the products that have the attribute
CODES = 0.9  # least share of the values that look like codes
NAMED_PRODUCTS = 10  # least number of products for an attribute with an identifier's name
PRODUCTS = 100  # least number of products for any other attribute
# A numbering uses fewer than NUMBERING numbers per product. Numbers drawn at random from a range
# that narrow would repeat: about one in ten would occur twice.
NUMBERING = 5

_NAMED = re.compile(
    r"(?<![^\W_])(?:ids?|uuid|guid|asin|sku|ean|upc|gtin|isbn|issn|mpn|url|uri|href|slug|barcode"
    r"|(?:ean|gtin|isbn)[ -]?\d\d?|(?:item|article|part|product|catalogu?e|model|reference|serial"
    r"|style|stock)[ _-]?(?:code|no|nr|number))(?![^\W_])"
)
_URL = re.compile(r"(?:\w+://|www\.)\S+")
_LONG_WORD = re.compile(r"[^\W\d_]{3,}")  # letters only
# Prices, sizes and the like ("12,5 cm", "67\"w x 20\"d", "rs. 999"): a small number of products may
# all differ in such an amount. A dimension may stand before its number ("w 20 h 30").
_NUMBER = r"\d{1,5}(?:[.,]\d{1,4})*"
_UNIT = r"(?: ?(?:[\"'°]{1,2}[a-z]?|[^\W\d_]{1,4}\d?|[%€£$¥₹]))?\.?"
_AMOUNT = re.compile(
    r"(?:(?:us|ca|au|hk|nz|s|r)?[$€£¥₹₽<>~+-]|(?:rs|inr|usd|eur|gbp|chf|kr|ca|approx)\.?|[約约])? ?"
    rf"(?:{_NUMBER}{_UNIT}(?:[ x/*,-]{{1,3}}{_NUMBER}{_UNIT}){{0,5}}"
    rf"|[a-zø]:? ?{_NUMBER}{_UNIT}(?:[ x/*,-]{{1,3}}[a-zø]:? ?{_NUMBER}{_UNIT}){{1,5}})"
)


def find_identifiers(document_frequencies: Mapping[str, int]) -> dict[str, int]:
    """The names of identifiers, each with the number of products that have it, most frequent first.

    document_frequencies: term -> number of products that hold it; only the terms "name=value" are
    read, see `bm25.attribute_terms`. Identifiers of listings (not of products) are found as well,
    because one value is read per product.
    """
    values: dict[str, list[str]] = {}
    products: Counter[str] = Counter()
    for term, count in document_frequencies.items():
        name, is_pair, value = term.partition("=")
        if is_pair:
            values.setdefault(name, []).append(value)
            products[name] += count
    return {
        name: count
        for name, count in products.most_common()
        if len(values[name]) >= DISTINCT * count and _tells_apart(name, values[name], count)
    }


def _tells_apart(name: str, values: list[str], products: int) -> bool:
    if _NAMED.search(name):
        return products >= NAMED_PRODUCTS
    if products < PRODUCTS:
        return False
    return sum(map(_is_code, values)) >= CODES * len(values) or _is_numbering(values)


def _is_code(value: str) -> bool:
    """Whether a folded value could be an identifier: an address, or a text with a digit that is
    neither several words nor an amount."""
    if _URL.fullmatch(value):
        return True
    has_words = " " in value and _LONG_WORD.search(value)
    return any(map(str.isdigit, value)) and not has_words and not _AMOUNT.fullmatch(value)


def _is_numbering(values: list[str]) -> bool:
    """Whether all values are whole numbers from a range so narrow that numbers drawn at random from
    it would repeat."""
    if not all(value.isdigit() and len(value) < 12 for value in values):
        return False
    numbers = [int(value) for value in values]
    return max(numbers) - min(numbers) < NUMBERING * len(numbers)
