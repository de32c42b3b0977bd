"""What stays of a text that is too long for its row: attributes before all else, and each whole.

A listing's text is title, category, attributes, description. What is cut of any text is its end, so
that the description goes first; a title alone would then push attributes out of the row.
"""

import re
from collections.abc import Callable, Sequence

# Title and category keep this part of the room, however many attributes there are: without their
# first words nobody knows what the attributes are of.
KEPT_AHEAD = 1 / 4
# What is left of a word that is cut may be another word. Longer ones have no blanks between words.
_CUT_WORD = re.compile(r"\s\S{1,20}\Z")


def fit_attributes(
    text: str, attributes: Sequence[tuple[int, int]], room: int, count: Callable[[str], int]
) -> tuple[str, int]:
    """A shorter text that fits, and how many of its attributes it still holds.

    attributes: where in `text` each of them stands, at least one: its first character and behind
    its last. room: tokens, fewer than all up to the last attribute takes. count: text -> tokens.
    What stands behind the attributes is left out, then the end of what stands before them, down to
    KEPT_AHEAD of the room; then those attributes that do not fit any more, each in its turn. Where
    none of them fits the text is as it would be without attributes.
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
    """Those of the pieces that fit into so many tokens, each in its turn: a long one is left out
    and shorter ones behind it are not.

    count: text -> tokens. put_together: some of the pieces, with `between` between two of them, and
    what else stands there -> the text that has to fit.
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
    # Put together they may be other tokens than one by one.
    while kept and count(put_together(kept)) > room:
        kept.pop()
    return kept


def longest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from low to high that fits, where those do that are smaller; low is taken
    to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
