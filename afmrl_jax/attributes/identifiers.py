"""Attributes that tell products apart and nothing of them: sku, ean, the address of a page.

Two offers of one thing differ in them. As the rarest of all terms they would outweigh in BM25
everything that agrees, so they are found by their uniqueness and left out.
"""

import re
from collections import Counter
from collections.abc import Mapping

# Nearly every product has a value of its own, and there are so many that this is no chance. Of
# those named as identifiers are, few can tell. Of others the values must look like codes too: the
# models' names of a catalogue may be all different and still agree in their words.
DISTINCT = 0.98  # of the products that have it
CODES = 0.9  # of its values
NAMED_PRODUCTS = 10
PRODUCTS = 100
NUMBERING = 5  # numbers to choose from, a product: drawn by chance, one in ten would stand twice

_NAMED = re.compile(
    r"(?<![^\W_])(?:ids?|uuid|guid|asin|sku|ean|upc|gtin|isbn|issn|mpn|url|uri|href|slug|barcode"
    r"|(?:ean|gtin|isbn)[ -]?\d\d?|(?:item|article|part|product|catalogu?e|model|reference|serial"
    r"|style|stock)[ _-]?(?:code|no|nr|number))(?![^\W_])"
)
_URL = re.compile(r"(?:\w+://|www\.)\S+")
_LONG_WORD = re.compile(r"[^\W\d_]{3,}")  # of letters alone
# Prices, sizes and the like ("12,5 cm", "67\"w x 20\"d", "rs. 999"): few products may all differ in
# one. A dimension may stand before its number ("w 20 h 30").
_NUMBER = r"\d{1,5}(?:[.,]\d{1,4})*"
_UNIT = r"(?: ?(?:[\"'°]{1,2}[a-z]?|[^\W\d_]{1,4}\d?|[%€£$¥₹]))?\.?"
_AMOUNT = re.compile(
    r"(?:(?:us|ca|au|hk|nz|s|r)?[$€£¥₹₽<>~+-]|(?:rs|inr|usd|eur|gbp|chf|kr|ca|approx)\.?|[約约])? ?"
    rf"(?:{_NUMBER}{_UNIT}(?:[ x/*,-]{{1,3}}{_NUMBER}{_UNIT}){{0,5}}"
    rf"|[a-zø]:? ?{_NUMBER}{_UNIT}(?:[ x/*,-]{{1,3}}[a-zø]:? ?{_NUMBER}{_UNIT}){{1,5}})"
)


def find_identifiers(document_frequencies: Mapping[str, int]) -> dict[str, int]:
    """The names of identifiers, each with the number of products that have it, most first.

    document_frequencies: term -> products that hold it, of which "name=value" are read; see
    `bm25.attribute_terms`. An identifier of listings, not of products, is found as well: of each
    product one value is read.
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
    """Whether a folded value could be an identifier: an address, or a digit and no two words."""
    if _URL.fullmatch(value):
        return True
    has_words = " " in value and _LONG_WORD.search(value)
    return any(map(str.isdigit, value)) and not has_words and not _AMOUNT.fullmatch(value)


def _is_numbering(values: list[str]) -> bool:
    """Whether all are whole numbers of a range so narrow that, drawn from it, many were equal."""
    if not all(value.isdigit() and len(value) < 12 for value in values):
        return False
    numbers = [int(value) for value in values]
    return max(numbers) - min(numbers) < NUMBERING * len(numbers)
