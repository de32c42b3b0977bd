"""Shortens a text that is too long for its row: attributes are kept before all else, each whole.

A listing's text is title, category, attributes, description. A text is cut from its end, so that
the description goes first; next a long title would push attributes out of the row, and is cut here.
"""

import re
from collections.abc import Callable, Sequence

# Title and category keep this part of the room, however many attributes there are: without their
# first words nobody knows which product the attributes describe.
KEPT_AHEAD = 1 / 4
# A word that is cut in the middle may read as another word, so it is dropped. More than 20 letters
# are no word: the script writes no blanks.
_CUT_WORD = re.compile(r"\s\S{1,20}\Z")


def fit_attributes(
    text: str, attributes: Sequence[tuple[int, int]], room: int, count: Callable[[str], int]
) -> tuple[str, int]:
    """A shorter text that fits, and how many of its attributes it still holds.

    attributes: the span of each in `text`, (first character, behind the last), at least one. room:
    tokens, fewer than the text up to the last attribute takes. count: text -> tokens.
    Left out are the text behind the attributes; then the end of the text before them, down to
    KEPT_AHEAD of the room; then each attribute that does not fit into the rest. Where no attribute
    fits, the text is as it would be without attributes.
    """
    first, last = attributes[0][0], attributes[-1][1]
    ahead, gap = text[: max(first - 1, 0)], text[max(first - 1, 0) : first]
    between = text[attributes[0][1] : attributes[1][0]] if len(attributes) > 1 else ""

    def put_together(characters: int, pieces: Sequence[str]) -> str:
        start = ahead[:characters]
        if ahead[characters:] and not ahead[characters].isspace():
            start = _CUT_WORD.sub("", start)
        start = start.rstrip()
        return (start and start + gap) + between.join(pieces)

    empty = count("")
    least = empty + int(KEPT_AHEAD * (room - empty))
    short = longest(0, len(ahead), lambda n: count(ahead[:n]) <= least)
    pieces = [text[start:end] for start, end in attributes]
    pieces = fitting(pieces, between, room, count, lambda some: put_together(short, some))
    if not pieces:
        return (ahead + text[last:] if ahead else text[last + 1 :]), 0
    most = longest(short, len(ahead), lambda n: count(put_together(n, pieces)) <= room)
    return put_together(most, pieces), len(pieces)


def fitting(
    pieces: Sequence[str],
    between: str,
    room: int,
    count: Callable[[str], int],
    put_together: Callable[[Sequence[str]], str],
) -> list[str]:
    """The pieces that fit into `room` tokens, taken in order: a long piece is left out, and shorter
    ones behind it are still taken.

    count: text -> tokens. put_together: some of the pieces -> the text that has to fit, in which
    `between` joins them.
    """
    if count(put_together(pieces)) <= room:
        return list(pieces)
    kept: list[str] = []
    left, alone = room - count(put_together(kept)), count("")
    for piece in pieces:
        if left <= 0:
            break
        if (tokens := count(between * bool(kept) + piece) - alone) <= left:
            kept.append(piece)
            left -= tokens
    # The joined text may have more tokens than its pieces one by one.
    while kept and count(put_together(kept)) > room:
        kept.pop()
    return kept


def longest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from low to high that fits, by bisection. fits: True up to some number;
    low is assumed to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
