"""How far a long loop is."""

import logging
import time
from collections.abc import Iterator

SILENCE = 10.0  # seconds after which a wait says how far it is
log = logging.getLogger(__name__)


def with_progress(starts: range, total: int, what: str) -> Iterator[int]:
    """The starts of blocks of `total` things; what takes long says every SILENCE seconds how far it
    is."""
    spoken = time.monotonic()
    for start in starts:
        if time.monotonic() - spoken >= SILENCE:
            log.info("%d of %d %s", start, total, what)
            spoken = time.monotonic()
        yield start
