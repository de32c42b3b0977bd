"""Asks a multimodal model behind an OpenAI-compatible endpoint about many rows at once.

A server's replies are not trusted: they are bounded in size and time, and the key is removed from
them before they are shown or kept. A refused row need not mean that the server is at fault, and an
unavailable server not that a row is. So if many consecutive rows get no answer, a request without a
row (the probe) decides which of the two it is.
"""

import base64
import contextlib
import io
import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import httpx2
import openai
from PIL import Image

from afmrl_jax.annotation.options import Api
from afmrl_jax.annotation.pace import FIRST_WAIT, LONGEST_WAIT, Pace
from afmrl_jax.annotation.replies import Kind, Reply, quoted, read_reply
from afmrl_jax.catalog.validation import quote
from afmrl_jax.core.errors import TryAgain, UserError
from afmrl_jax.core.logs import duration
from afmrl_jax.data.processor import Row

GIVE_UP = 10  # consecutive rows without an answer before the probe is sent
CONNECT_SECONDS = 10.0  # limit for a connection; a running server accepts sooner
SHORT_SECONDS = 15.0  # wait for a server that never replied, and hence will hardly come
QUOTA_SECONDS = 75.0  # wait for a quota, as some servers report a used-up minute as no credit
# Keys from this length on are removed from texts. A shorter key, such as "x" for a server that
# needs none, may be any word.
SECRET_CHARACTERS = 8
MAX_BYTES = 1 << 20  # limit for a response's body; an answer takes a few thousand bytes
JPEG_QUALITY = 90
RESERVED = ("model", "messages", "stream", "n")  # fields of a request that `options` may not set
# Errors that mean that the server is unreachable for any request.
UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)
ACCEPTED = (Kind.ANSWERED, Kind.STOPPED)  # replies of a server that works and took the request
WRONG_KEY = "refuses the key ({}); put the right one into the environment variable that "
WRONG_KEY += "api.key_variable names"
# Replies that every other row would get as well: the reason, and what to do about it.
HOPELESS = {
    Kind.WRONG_KEY: WRONG_KEY,
    Kind.FORBIDDEN: WRONG_KEY,
    Kind.WRONG_ADDRESS: "has no model {model!r}, or is no such endpoint ({}); correct api.model or "
    "api.base_url",
    Kind.OUT_OF_CREDIT: "says that the account has nothing left ({}), and waiting brings nothing; "
    "raise its limit there, and give the same command again",
}

log = logging.getLogger(__name__)


class _Stop(openai.OpenAIError):
    """Raised instead of sending a request; a subclass of the client's error, since the client
    retries all other errors."""


@dataclass
class Budget:
    """Limits for requests (retries count) and tokens, and what was used of them; 0 = no limit.

    Tokens are counted by the server, prompts and images included. If it reports no count, the
    characters of prompt and answer are counted instead. The count arrives with an answer, so
    requests under way may exceed the limit.
    """

    max_requests: int
    max_tokens: int
    requests: int = 0
    tokens: int = 0

    @property
    def spent(self) -> str | None:
        """The limit that is used up, in words; None if none is."""
        for used, limit, unit in (
            (self.requests, self.max_requests, "requests"),
            (self.tokens, self.max_tokens, "tokens"),
        ):
            if limit and used >= limit:
                return f"{limit:,} {unit}"
        return None


class Endpoint:
    """A model at an address.

    api.options: JSON object of fields that are sent with each request, such as {"max_tokens": 256}.
    key: a secret in printable ASCII; "" for a server that needs none. api.timeout: seconds that a
    server may be silent, or take for one response's body. api.retries: number of retries of a
    request that fails (408, 409, 5xx, broken connections), with waits that double. prompt: text
    before that of each row.

    If the server is busy for all requests (429, 502, 503, unreachable), all threads wait together,
    as long as the server says or with waits that double, until `patience` seconds have passed
    without an answer. Raises UserError for an address or options that can't be right.
    """

    def __init__(self, api: Api, key: str, *, prompt: str, budget: Budget):
        _check_address(api.base_url)
        self.budget = budget
        # Seconds that a silent request may take in all.
        self.patience = api.timeout * (api.retries + 1)
        self._api, self._prompt, self._key = api, prompt, key
        self._options = _parse_options(api.options)
        self._lock = threading.Lock()
        self._was_reached = self._has_answered = self._shows_images = False
        self._error: Exception | None = None
        timeouts = httpx2.Timeout(api.timeout, connect=min(api.timeout, CONNECT_SECONDS))
        self._client = openai.OpenAI(
            base_url=api.base_url,
            api_key=key or "none",  # the client refuses an empty key
            timeout=timeouts,
            max_retries=0,  # the client's retries would not be coordinated with other threads
            # A small compressed body could hold gigabytes.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [self._count_request], "response": [self._bound_body]},
                limits=httpx2.Limits(max_connections=api.concurrency),
                timeout=timeouts,
            ),
        )
        self._pace = Pace(str(self._client.base_url), api.concurrency, lambda: bool(budget.spent))

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[int, Reply]]:
        """Yields (the row's number, its reply) as replies arrive; rows are drawn as needed.

        A refusal is held back until it is known to be about the row: until a later row is answered,
        or the probe is. Ends early, without an error, when the budget is spent. Raises UserError if
        no row can be answered (the key, address, model or any request is refused), and TryAgain if
        the server is unavailable; replies of requests under way are yielded first.
        """
        refusals: list[tuple[int, Reply]] = []  # held back
        unanswered = 0  # consecutive replies without an answer
        try:
            with contextlib.closing(self._arrivals(rows)) as arrivals:
                for number, reply in arrivals:
                    unanswered = 0 if reply.kind in ACCEPTED else unanswered + 1
                    if reply.kind is Kind.REFUSED:
                        refusals.append((number, reply))
                    else:
                        yield number, reply
                    if unanswered == GIVE_UP:
                        self._probe(refusals, unanswered, reply)
                    if unanswered in (0, GIVE_UP):
                        unanswered = 0
                        yield from refusals
                        refusals.clear()
            if refusals and not self._pace.over:
                self._probe(refusals, len(refusals), refusals[-1][1])
        finally:
            self._pace.stop()
        if self._has_answered or self._error is None:
            yield from refusals
        if self._error is not None:
            raise self._error

    def _arrivals(self, rows: Iterable[Row]) -> Iterator[tuple[int, Reply]]:
        """Sends the rows by threads; yields the replies in the order in which they arrive."""
        todo: SimpleQueue = SimpleQueue()
        done: SimpleQueue = SimpleQueue()
        for _ in range(self._api.concurrency):
            # Daemon threads, so that Ctrl-C need not wait for a silent server.
            threading.Thread(target=self._work, args=(todo, done), daemon=True).start()
        under_way = 0  # rows that are queued or being asked
        try:
            for item in enumerate(rows):
                if self._pace.over:
                    break
                todo.put(item)
                under_way += 1
                # One row is queued, so that no thread is idle.
                if under_way > self._api.concurrency:
                    under_way -= 1
                    yield from self._result(done)
            for _ in range(under_way):
                yield from self._result(done)
        finally:
            for _ in range(self._api.concurrency):
                todo.put(None)

    def _result(self, done: SimpleQueue) -> Iterator[tuple[int, Reply]]:
        number, reply = done.get()
        if isinstance(reply, Exception):
            self._stop_sending(reply)
        elif reply is not None:
            yield number, reply

    def _stop_sending(self, error: Exception) -> None:
        """Sends nothing more; `answers` raises the error at its end. Requests under way may already
        be charged, so their replies are awaited first."""
        self._pace.stop()
        if self._error is None and self._pace.sending:
            log.warning("waiting for the answers under way (%d)", self._pace.sending)
        self._error = self._error or error

    def _work(self, todo: SimpleQueue, done: SimpleQueue) -> None:
        while (item := todo.get()) is not None:
            number, row = item
            try:
                done.put((number, self._explain_forbidden(self._ask(row))))
            except Exception as error:  # `answers` raises it again
                self._pace.stop()
                done.put((number, error))

    def _probe(self, refusals: list[tuple[int, Reply]], count: int, last: Reply) -> None:
        """Sends a request without a row. If it gets no answer either, stops sending and drops the
        refusals, since they were not about their rows.

        count: number of rows without an answer. last: the last reply to them.
        """
        try:
            reply = self._ask(self._probe_row())
        except UserError as error:
            refusals.clear()
            return self._stop_sending(error)
        if reply is None or reply.kind in ACCEPTED:
            return None
        refusals.clear()
        reasons = "; then ".join(dict.fromkeys((last.reason, reply.reason)))
        return self._stop_sending(
            (TryAgain if reply.kind is Kind.FAILED else UserError)(
                f"{self._client.base_url} gave no answer to {count} listings in a row, and none "
                f"where it is asked without a listing ({reasons}); mend that and give the same "
                "command again"
            )
        )

    def _probe_row(self) -> Row:
        """A harmless row that no server has a reason to refuse, with an image if other rows have
        images."""
        images = [Image.new("RGB", (224, 224), "red")] if self._shows_images else []
        return Row("red mug", tuple(images))

    def _explain_forbidden(self, reply: Reply | None) -> Reply | None:
        """Decides by a probe whether a status 403 is about the row (moderation and firewalls send
        it, too) or about the key. Raises UserError for the key; other replies are returned as they
        are."""
        if reply is None or reply.kind is not Kind.FORBIDDEN:
            return reply
        probe = self._ask(self._probe_row())
        if probe is None:
            return None
        if probe.kind is Kind.FORBIDDEN:
            raise self._hopeless_error(probe)
        return replace(reply, kind=Kind.REFUSED if probe.kind in ACCEPTED else Kind.FAILED)

    def _ask(self, row: Row) -> Reply | None:
        """The final reply to a row, after retries; None if sending ended before the row's turn.

        Raises UserError if no row would be answered, and TryAgain if the server stays unavailable.
        """
        self._shows_images |= bool(row.images)
        content = [
            *({"type": "image_url", "image_url": {"url": data_url(i)}} for i in row.images),
            {"type": "text", "text": f"{self._prompt}\n\n{row.text}"},
        ]
        failures, first_busy = 0, math.inf
        while (number := self._pace.start()) is not None:
            reply = self._send(content)
            if reply is None:
                self._pace.failed()
                return None
            if reply.kind in (Kind.BUSY, Kind.OUT_OF_CREDIT):
                patience = self._patience(reply)
                after = reply.after if (reply.after or 0) <= patience else None
                if not self._pace.busy(number, reply.reason, after, patience):
                    raise self._unavailable_error(reply)
                first_busy = min(first_busy, time.monotonic())
                # Other rows were answered meanwhile, else `busy` would have ended the wait.
                if time.monotonic() - first_busy > self.patience:
                    return replace(reply, kind=Kind.FAILED)
            elif reply.kind is Kind.FAILED:
                self._pace.failed()
                failures += 1
                if failures > self._api.retries:
                    return reply
                wait = reply.after or FIRST_WAIT * 2 ** (failures - 1)
                self._pace.rest(min(wait, LONGEST_WAIT))
            else:
                self._pace.answered()
                self._has_answered |= reply.kind in ACCEPTED
                if reply.kind in (Kind.WRONG_KEY, Kind.WRONG_ADDRESS):
                    raise self._hopeless_error(reply)
                return reply
        return None

    def _send(self, content: list[dict[str, Any]]) -> Reply | None:
        """The reply to one request; None if it was not sent because sending has ended."""
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._api.model,
                messages=[{"role": "user", "content": content}],
                extra_body=self._options,
            )
        except _Stop:
            return None
        except openai.APIStatusError as error:
            response = error.response
        except openai.OpenAIError as error:
            reason = quoted(f"{error} {error.__cause__ or ''}", self._without_key)
            is_unreachable = isinstance(error.__cause__, UNREACHABLE)
            return Reply(Kind.BUSY if is_unreachable else Kind.FAILED, reason=reason)
        self._was_reached = True
        reply = read_reply(
            response.status_code, response.headers, response.content, self._without_key
        )
        if response.status_code < 400:
            is_counted = reply.tokens is not None
            tokens = reply.tokens if is_counted else len(content[-1]["text"]) + len(reply.text)
            with self._lock:
                self.budget.tokens += tokens
        return reply

    def _patience(self, reply: Reply) -> float:
        """Seconds to wait for a busy server as long as no request is answered."""
        if reply.kind is Kind.OUT_OF_CREDIT:
            return QUOTA_SECONDS if self._has_answered else 0.0
        is_promising = self._was_reached and (reply.after or 0) <= self.patience
        return self.patience if is_promising else min(self.patience, SHORT_SECONDS)

    def _hopeless_error(self, reply: Reply) -> UserError:
        """An error that says why no row would be answered, and what to do."""
        explanation = HOPELESS[reply.kind].format(reply.reason, model=self._api.model)
        return UserError(f"{self._client.base_url} {explanation}")

    def _unavailable_error(self, reply: Reply) -> UserError:
        """An error that says why waiting for the server has ended, and what to do."""
        if reply.kind is Kind.OUT_OF_CREDIT:
            return self._hopeless_error(reply)
        if not self._was_reached:
            return UserError(
                f"{self._client.base_url} can't be reached ({reply.reason}): start it, or correct "
                "api.base_url"
            )
        why = f"answered no request for {duration(self._patience(reply))}"
        if reply.after:
            why += f" and wants to be asked again in {duration(reply.after)}"
        return TryAgain(
            f"{self._client.base_url} {why} ({reply.reason}): give the same command again later. "
            f"At most {duration(self.patience)} are waited, (api.retries + 1) * api.timeout"
        )

    def _without_key(self, text: str) -> str:
        is_secret = len(self._key) >= SECRET_CHARACTERS
        return text.replace(self._key, "***") if is_secret else text

    def _count_request(self, _: httpx2.Request) -> None:
        """Counts a request before it is sent; raises _Stop if none may be sent any more."""
        with self._lock:
            if self._pace.over:
                raise _Stop
            self.budget.requests += 1

    def _bound_body(self, response: httpx2.Response) -> None:
        response.stream = _Bounded(response.stream, time.monotonic() + self._api.timeout)


class _Bounded(httpx2.SyncByteStream):
    """A body of at most MAX_BYTES that must end in time, since a server could send a few bytes at a
    time for ever. end: limit on `time.monotonic()`."""

    def __init__(self, stream: httpx2.SyncByteStream, end: float):
        self._stream, self._end = stream, end

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if size > MAX_BYTES:
                raise httpx2.ReadError(f"the response is longer than {MAX_BYTES:,} bytes")
            if time.monotonic() > self._end:
                raise httpx2.ReadTimeout("the response did not end in time")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _check_address(base_url: str) -> None:
    try:
        url = httpx2.URL(base_url)
        is_valid = url.scheme in ("http", "https") and url.host and not url.userinfo
    except httpx2.InvalidURL:
        is_valid = False
    if not is_valid:
        raise UserError(
            "api.base_url must be an address as http://localhost:8000/v1, without a name and "
            "password in it"
        )


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict) or any(name in options for name in RESERVED):
        raise UserError(
            f"api.options is {quote(text)}: write a JSON object as '{{\"max_tokens\": 256}}', "
            f"without {', '.join(RESERVED)}"
        )
    return options


def data_url(image: Image.Image) -> str:
    """The image as JPEG in a data: URL."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
