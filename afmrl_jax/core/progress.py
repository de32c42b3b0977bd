"""The progress of a long loop."""

import logging
import time
from collections.abc import Iterator

SILENCE = 10.0  # seconds between two messages
log = logging.getLogger(__name__)


def with_progress(starts: range, total: int, items: str) -> Iterator[int]:
    """The starts of blocks of `total` items; every SILENCE seconds logs how many are done.

    items: the items and what is done to them, as "listings embedded".
    """
    spoken = time.monotonic()
    for start in starts:
        if time.monotonic() - spoken >= SILENCE:
            log.info("%d of %d %s", start, total, items)
            spoken = time.monotonic()
        yield start
