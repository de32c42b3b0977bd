"""Asks a multimodal model behind an OpenAI-compatible endpoint, many rows at once.

Whatever comes back is somebody else's text: bounded in size and time, read without trust, and never
shown or kept with our key in it. That a row is refused says nothing of the server, and that the
server is away nothing of a row: where many rows in a row get no answer, a request without a row
tells which of the two it is.
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

from afmrl_jax.annotation.pace import FIRST_WAIT, LONGEST_WAIT, Pace
from afmrl_jax.annotation.replies import Kind, Reply, quoted, read_reply
from afmrl_jax.catalog.validation import quote
from afmrl_jax.core.errors import TryAgain, UserError
from afmrl_jax.core.logs import duration
from afmrl_jax.data.processor import Row

GIVE_UP = 10  # rows in a row without an answer, before a request without a row is sent
CONNECT_SECONDS = 10.0  # a server that is there takes a connection sooner
SHORT_SECONDS = 15.0  # of waiting for what will hardly come: nobody was there from the start
QUOTA_SECONDS = 75.0  # of waiting for a quota: some servers say of a minute's that it is used up
SECRET_CHARACTERS = 8  # of a key; a shorter one, as "x" where none is needed, may be any word
MAX_BYTES = 1 << 20  # of a response's body; an answer takes a few thousand
JPEG_QUALITY = 90
OURS = ("model", "messages", "stream", "n")  # what `options` may not say
AWAY = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)  # for any request
HEARD = (Kind.ANSWERED, Kind.STOPPED)  # the server works, and takes what it is asked
WRONG_KEY = "refuses the key ({}); put the right one into the environment variable that "
WRONG_KEY += "api.key_variable names"
ENDING = {  # what no other row would change: why, and what to do
    Kind.WRONG_KEY: WRONG_KEY,
    Kind.FORBIDDEN: WRONG_KEY,
    Kind.WRONG_ADDRESS: "has no model {model!r}, or is no such endpoint ({}); correct api.model or "
    "api.base_url",
    Kind.OUT_OF_CREDIT: "says that the account has nothing left ({}), and waiting brings nothing; "
    "raise its limit there, and give the same command again",
}

log = logging.getLogger(__name__)


class _Stop(openai.OpenAIError):
    """Raised instead of sending a request. The client retries any error but its own."""


@dataclass
class Budget:
    """What may be spent on requests, retries among them, and what was; 0 = no limit.

    Tokens are what the server counts, prompts and images included; where it does not say, the
    characters of prompt and answer. They are known once an answer is there, so that answers under
    way may pass the limit.
    """

    max_requests: int
    max_tokens: int
    requests: int = 0
    tokens: int = 0

    @property
    def spent(self) -> str | None:
        """What is used up, in words."""
        for used, limit, unit in (
            (self.requests, self.max_requests, "requests"),
            (self.tokens, self.max_tokens, "tokens"),
        ):
            if limit and used >= limit:
                return f"{limit:,} {unit}"
        return None


class Endpoint:
    """A model at an address.

    options: JSON of what is sent with each request beside the messages, as {"max_tokens": 256}.
    key: secret, printable ASCII, "" where the server wants none. concurrency: requests at once.
    timeout: seconds that a server may be silent, or take over one response's body. retries: of a
    request that fails (408, 409, 5xx, broken connections), with waits that double. Where the server
    has no time for any request (429, 502, 503, nobody there) all wait together, as long as it says
    or ever longer, up to `patience` without an answer. Raises UserError for what can't be right.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str,
        *,
        prompt: str,
        options: str,
        budget: Budget,
        concurrency: int,
        timeout: float,
        retries: int,
    ):
        _check_address(base_url)
        self.budget = budget
        self.patience = timeout * (retries + 1)  # seconds, as long as one silent request may take
        self._model, self._prompt, self._key = model, prompt, key
        self._options = _parse_options(options)
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._lock = threading.Lock()
        self._reached = self._answered = self._shows_images = False
        self._error: Exception | None = None
        timeouts = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",  # the client insists on one
            timeout=timeouts,
            max_retries=0,  # its own would know nothing of the other threads
            # Compressed, a small body could hold gigabytes.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [self._count], "response": [self._bound]},
                limits=httpx2.Limits(max_connections=concurrency),
                timeout=timeouts,
            ),
        )
        self._pace = Pace(str(self._client.base_url), concurrency, lambda: bool(budget.spent))

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[int, Reply]]:
        """(the row's number, what came back), as each arrives; rows are drawn as they are needed.

        What was refused is given out once it is known to be the row's own doing: where an answer
        came after it, or a request without a row is answered. Ends early, in order, when the budget
        is spent. Raises UserError where no row could be answered (key, address, model or whatever
        is asked refused), TryAgain where the server is away; before, gives out what was under way.
        """
        held: list[tuple[int, Reply]] = []
        unanswered = 0  # in a row
        try:
            with contextlib.closing(self._arrivals(rows)) as arrivals:
                for number, reply in arrivals:
                    unanswered = 0 if reply.kind in HEARD else unanswered + 1
                    if reply.kind is Kind.REFUSED:
                        held.append((number, reply))
                    else:
                        yield number, reply
                    if unanswered == GIVE_UP:
                        self._ask_without_a_row(held, unanswered, reply)
                    if unanswered in (0, GIVE_UP):
                        unanswered = 0
                        yield from held
                        held.clear()
            if held and not self._pace.over:
                self._ask_without_a_row(held, len(held), held[-1][1])
        finally:
            self._pace.stop()
        if self._answered or self._error is None:
            yield from held
        if self._error is not None:
            raise self._error

    def _arrivals(self, rows: Iterable[Row]) -> Iterator[tuple[int, Reply]]:
        todo: SimpleQueue = SimpleQueue()
        done: SimpleQueue = SimpleQueue()
        for _ in range(self._concurrency):
            # Daemons: Ctrl-C need not wait for a silent server.
            threading.Thread(target=self._work, args=(todo, done), daemon=True).start()
        waiting = 0
        try:
            for item in enumerate(rows):
                if self._pace.over:
                    break
                todo.put(item)
                waiting += 1
                if waiting > self._concurrency:  # one more than at work, so that none is idle
                    waiting -= 1
                    yield from self._result(done)
            for _ in range(waiting):
                yield from self._result(done)
        finally:
            for _ in range(self._concurrency):
                todo.put(None)

    def _result(self, done: SimpleQueue) -> Iterator[tuple[int, Reply]]:
        number, reply = done.get()
        if isinstance(reply, Exception):
            self._end(reply)
        elif reply is not None:
            yield number, reply

    def _end(self, error: Exception) -> None:
        """Has nothing more sent. What is under way may be paid: it is waited for, then the error is
        raised."""
        self._pace.stop()
        if self._error is None and self._pace.sending:
            log.warning("waiting for the answers under way (%d)", self._pace.sending)
        self._error = self._error or error

    def _work(self, todo: SimpleQueue, done: SimpleQueue) -> None:
        while (item := todo.get()) is not None:
            number, row = item
            try:
                done.put((number, self._judge(self._ask(row))))
            except Exception as error:  # raised again by whoever reads the answers
                self._pace.stop()
                done.put((number, error))

    def _ask_without_a_row(self, held: list[tuple[int, Reply]], count: int, last: Reply) -> None:
        """Ends the run, and drops what is held, where that gets no answer either."""
        try:
            reply = self._ask(self._plain_row())
        except UserError as error:
            held.clear()
            return self._end(error)
        if reply is None or reply.kind in HEARD:
            return None
        held.clear()
        reasons = "; then ".join(dict.fromkeys((last.reason, reply.reason)))
        return self._end(
            (TryAgain if reply.kind is Kind.FAILED else UserError)(
                f"{self._client.base_url} gave no answer to {count} listings in a row, and none "
                f"where it is asked without a listing ({reasons}); mend that and give the same "
                "command again"
            )
        )

    def _plain_row(self) -> Row:
        """What nobody could refuse, with an image where others have one."""
        images = [Image.new("RGB", (224, 224), "red")] if self._shows_images else []
        return Row("red mug", tuple(images))

    def _judge(self, reply: Reply | None) -> Reply | None:
        """A status 403 as the row's or, raised, the key's: moderation and firewalls say it too."""
        if reply is None or reply.kind is not Kind.FORBIDDEN:
            return reply
        plain = self._ask(self._plain_row())
        if plain is None:
            return None
        if plain.kind is Kind.FORBIDDEN:
            raise self._hopeless(plain)
        return replace(reply, kind=Kind.REFUSED if plain.kind in HEARD else Kind.FAILED)

    def _ask(self, row: Row) -> Reply | None:
        """What came back in the end; None where nothing more was to be sent at the row's turn.

        Raises UserError where no row would be answered.
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
                    raise self._away(reply)
                first_busy = min(first_busy, time.monotonic())
                if time.monotonic() - first_busy > self.patience:  # while others were answered
                    return replace(reply, kind=Kind.FAILED)
            elif reply.kind is Kind.FAILED:
                self._pace.failed()
                failures += 1
                if failures > self._retries:
                    return reply
                wait = reply.after or FIRST_WAIT * 2 ** (failures - 1)
                self._pace.rest(min(wait, LONGEST_WAIT))
            else:
                self._pace.answered()
                self._answered |= reply.kind in HEARD
                if reply.kind in (Kind.WRONG_KEY, Kind.WRONG_ADDRESS):
                    raise self._hopeless(reply)
                return reply
        return None

    def _send(self, content: list[dict[str, Any]]) -> Reply | None:
        """What came back for one request; None where it was not sent any more."""
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                extra_body=self._options,
            )
        except _Stop:
            return None
        except openai.APIStatusError as error:
            response = error.response
        except openai.OpenAIError as error:
            reason = quoted(f"{error} {error.__cause__ or ''}", self._without_key)
            away = isinstance(error.__cause__, AWAY)
            return Reply(Kind.BUSY if away else Kind.FAILED, reason=reason)
        self._reached = True
        reply = read_reply(
            response.status_code, response.headers, response.content, self._without_key
        )
        if response.status_code < 400:
            known = reply.tokens is not None
            spent = reply.tokens if known else len(content[-1]["text"]) + len(reply.text)
            with self._lock:
                self.budget.tokens += spent
        return reply

    def _patience(self, reply: Reply) -> float:
        """Seconds without any answer that are waited out."""
        if reply.kind is Kind.OUT_OF_CREDIT:
            return QUOTA_SECONDS if self._answered else 0.0
        hopeful = self._reached and (reply.after or 0) <= self.patience
        return self.patience if hopeful else min(self.patience, SHORT_SECONDS)

    def _hopeless(self, reply: Reply) -> UserError:
        """Why no row would be answered, and what to do."""
        told = ENDING[reply.kind].format(reply.reason, model=self._model)
        return UserError(f"{self._client.base_url} {told}")

    def _away(self, reply: Reply) -> UserError:
        """Why the server is not waited for any longer, and what to do."""
        if reply.kind is Kind.OUT_OF_CREDIT:
            return self._hopeless(reply)
        if not self._reached:
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
        secret = len(self._key) >= SECRET_CHARACTERS
        return text.replace(self._key, "***") if secret else text

    def _count(self, _: httpx2.Request) -> None:
        with self._lock:
            if self._pace.over:
                raise _Stop
            self.budget.requests += 1

    def _bound(self, response: httpx2.Response) -> None:
        response.stream = _Bounded(response.stream, time.monotonic() + self._timeout)


class _Bounded(httpx2.SyncByteStream):
    """A body of at most MAX_BYTES, read by a time; a server that drips never ends otherwise."""

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
        right = url.scheme in ("http", "https") and url.host and not url.userinfo
    except httpx2.InvalidURL:
        right = False
    if not right:
        raise UserError(
            "api.base_url must be an address as http://localhost:8000/v1, without a name and "
            "password in it"
        )


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict) or any(name in options for name in OURS):
        raise UserError(
            f"api.options is {quote(text)}: write a JSON object as '{{\"max_tokens\": 256}}', "
            f"without {', '.join(OURS)}"
        )
    return options


def data_url(image: Image.Image) -> str:
    """The image as JPEG in a data: URL."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
