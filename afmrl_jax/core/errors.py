"""What a user got wrong, told in one sentence."""

import math
from collections.abc import Mapping


class UserError(Exception):
    """A mistake that the user can mend; its message says what was found, where, and what to do.

    `main` prints it on standard error without a traceback and exits with status 2.
    """


def check_ranges(values: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises UserError for the first field outside its (lowest, highest), both allowed."""
    for field, (low, high) in ranges.items():
        if not low <= values[field] <= high:
            allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"{field} is {values[field]!r}: give {allowed}")
