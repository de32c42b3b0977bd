"""How fast a server is asked: where it has no time for one request, all the others wait too."""

import logging
import threading
import time
from collections.abc import Callable

from afmrl_jax.core.logs import duration

FIRST_WAIT = 1.0  # seconds; each further one in a row is twice as long, up to the longest
LONGEST_WAIT = 60.0  # most quotas are of a minute
QUIET_WAIT = 5.0  # seconds without an answer, before and to come, that are not worth a line

log = logging.getLogger(__name__)


class Pace:
    """Lets the threads that share a server send their requests, or wait.

    A busy server halves the requests at once and makes all of them wait; each answer lets one more
    be sent, and halves the wait to come. over: whether nothing is to be sent any more.
    """

    def __init__(self, address: str, concurrency: int, over: Callable[[], bool]):
        self._address, self._most, self._is_over = address, concurrency, over
        self._changed = threading.Condition()
        self._limit, self.sending = concurrency, 0
        self._round = 0  # of waits; what was sent before one began says nothing that is new after
        self._wait, self._resume = 0.0, 0.0
        self._since: float | None = None  # when the server became busy, since its last answer
        self._stopped = self._spoke = False

    @property
    def over(self) -> bool:
        """Whether nothing is to be sent any more."""
        return self._stopped or self._is_over()

    def stop(self) -> None:
        """Ends all waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def start(self) -> int | None:
        """Waits for a request's turn. Its number for `busy`, None where no more are to be sent.

        After each, one of `answered`, `failed` and `busy` is to be called.
        """
        with self._changed:
            while not self.over:
                left = self._resume - time.monotonic()
                if left <= 0 and self.sending < self._limit:
                    self.sending += 1
                    return self._round
                self._changed.wait(left if left > 0 else None)
        return None

    def answered(self) -> None:
        """The server had time for a request."""
        with self._changed:
            self._limit = min(self._limit + 1, self._most)
            self._wait /= 2
            if self._since is not None and self._spoke:
                away = duration(time.monotonic() - self._since)
                log.warning("%s answers again after %s", self._address, away)
            self._since, self._spoke = None, False
            self._ended()

    def failed(self) -> None:
        """A request failed, which says nothing about others."""
        with self._changed:
            self._ended()

    def busy(self, number: int, reason: str, after: float | None, patience: float) -> bool:
        """The server had no time for a request; whether it is still worth waiting.

        number: that `start` gave. after: seconds that the server asks for, None = none. patience:
        the most seconds that it may be busy without any answer.
        """
        with self._changed:
            self._ended()
            if number != self._round or self._stopped:
                return True
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            left = self._since + patience - now
            if left <= 0:
                return False
            if after is None:
                self._wait = min(max(FIRST_WAIT, 2 * self._wait), LONGEST_WAIT)
                after = self._wait
            after = min(after, left)
            self._limit = max(1, self._limit // 2)
            self._round += 1
            self._resume = now + after
            long = now - self._since + after >= QUIET_WAIT
            self._spoke |= long
            if long or self._round == 1:
                log.warning(
                    "%s is busy or away (%s): all requests wait %s more; without an answer for "
                    "%s, at most %s",
                    self._address,
                    reason,
                    *(duration(seconds) for seconds in (after, now - self._since, patience)),
                )
            return True

    def rest(self, seconds: float) -> None:
        """Waits, less where no more is to be sent."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self.over and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _ended(self) -> None:
        self.sending -= 1
        self._changed.notify_all()
