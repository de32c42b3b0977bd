"""Paces the requests to a server: if it is busy for one request, all other requests wait, too."""

import logging
import threading
import time
from collections.abc import Callable

from afmrl_jax.core.logs import duration

FIRST_WAIT = 1.0  # seconds; each consecutive wait is twice as long, up to LONGEST_WAIT
LONGEST_WAIT = 60.0  # seconds; most quotas are per minute
QUIET_WAIT = 5.0  # seconds without an answer, including the next wait, that are not logged

log = logging.getLogger(__name__)


class Pace:
    """Decides when the threads that share a server may send requests, and when they must wait.

    If the server is busy, the limit of concurrent requests is halved and all threads wait. Each
    answer raises the limit by one and halves the next wait. is_over: returns True once no request
    may be sent any more.
    """

    def __init__(self, address: str, concurrency: int, is_over: Callable[[], bool]):
        self._address, self._max_limit, self._is_over = address, concurrency, is_over
        self._changed = threading.Condition()
        self._limit, self.sending = concurrency, 0  # requests at once: allowed, under way
        # The number of the current wait. A request sent before it began brings no news about the
        # server when it fails during the wait.
        self._round = 0
        self._wait, self._resume = 0.0, 0.0  # seconds of the last wait; monotonic time of its end
        # Monotonic time of the first busy reply since the last answer; None if there is none.
        self._busy_since: float | None = None
        self._stopped = self._has_warned = False

    @property
    def over(self) -> bool:
        """Whether no request may be sent any more."""
        return self._stopped or self._is_over()

    def stop(self) -> None:
        """Ends all waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def start(self) -> int | None:
        """Waits for a request's turn. Returns the round's number, for `busy`; None if no request
        may be sent any more.

        After the request the thread must call one of `answered`, `failed` and `busy`.
        """
        with self._changed:
            while not self.over:
                seconds = self._resume - time.monotonic()
                if seconds <= 0 and self.sending < self._limit:
                    self.sending += 1
                    return self._round
                self._changed.wait(seconds if seconds > 0 else None)
        return None

    def answered(self) -> None:
        """Reports that the server answered a request."""
        with self._changed:
            self._limit = min(self._limit + 1, self._max_limit)
            self._wait /= 2
            if self._busy_since is not None and self._has_warned:
                busy_time = duration(time.monotonic() - self._busy_since)
                log.warning("%s answers again after %s", self._address, busy_time)
            self._busy_since, self._has_warned = None, False
            self._finish_request()

    def failed(self) -> None:
        """Reports that a request failed in a way that says nothing about other requests."""
        with self._changed:
            self._finish_request()

    def busy(self, number: int, reason: str, after: float | None, patience: float) -> bool:
        """Reports that the server was too busy for a request. Returns False if it has been busy for
        longer than `patience`, so that the caller should give up.

        number: the result of `start`. reason: the server's reply, for the log. after: seconds that
        the server asks to wait; None if it does not say. patience: seconds that the server may be
        busy without answering any request.
        """
        with self._changed:
            self._finish_request()
            if number != self._round or self._stopped:
                return True
            now = time.monotonic()
            self._busy_since = now if self._busy_since is None else self._busy_since
            remaining = self._busy_since + patience - now
            if remaining <= 0:
                return False
            if after is None:
                self._wait = min(max(FIRST_WAIT, 2 * self._wait), LONGEST_WAIT)
                after = self._wait
            after = min(after, remaining)
            self._limit = max(1, self._limit // 2)
            self._round += 1
            self._resume = now + after
            is_long = now - self._busy_since + after >= QUIET_WAIT
            self._has_warned |= is_long
            if is_long or self._round == 1:
                log.warning(
                    "%s is busy or away (%s): all requests wait %s more; without an answer for "
                    "%s, at most %s",
                    self._address,
                    reason,
                    *(duration(seconds) for seconds in (after, now - self._busy_since, patience)),
                )
            return True

    def rest(self, seconds: float) -> None:
        """Waits for this time, or until no request may be sent any more."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self.over and (remaining := end - time.monotonic()) > 0:
                self._changed.wait(remaining)

    def _finish_request(self) -> None:
        self.sending -= 1
        self._changed.notify_all()
