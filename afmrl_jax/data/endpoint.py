"""Asks a multimodal model behind an OpenAI-compatible endpoint, many rows at once.

Whatever comes back is somebody else's text: bounded in size and time, read without trust, and never
shown or kept with our key in it.
"""

import base64
import io
import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import httpx2
import openai
from PIL import Image

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Row
from afmrl_jax.data.validation import quote

MAX_BYTES = 1 << 20  # of a response's body; an answer takes a few thousand
JPEG_QUALITY = 90
OURS = ("model", "messages", "stream", "n")  # what `options` may not say


@dataclass(frozen=True)
class Answer:
    """What the model said to one row; or `problem`: why it has no answer and may be asked again.

    closed: it ended by itself, not by a limit of tokens.
    """

    text: str = ""
    closed: bool = True
    problem: str = ""


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
    request, by the client's own rules (408, 409, 429, 5xx, broken connections; it waits as the
    server says, else 0.5 s doubling up to 8 s). Raises UserError for what can't be right.
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
        self._model, self._prompt, self._key = model, prompt, key
        self._options = _parse_options(options)
        self._concurrency, self._timeout = concurrency, timeout
        self._lock = threading.Lock()
        self._stopped = False
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",  # the client insists on one
            timeout=timeout,
            max_retries=retries,
            # Compressed, a small body could hold gigabytes.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [self._count], "response": [self._bound]},
                limits=httpx2.Limits(max_connections=concurrency),
                timeout=timeout,
            ),
        )

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[int, Answer]]:
        """(the row's number, its answer), as each arrives; rows are drawn as they are needed.

        Ends early, in order, when the budget is spent. Raises UserError where no row could ever be
        answered (key, address or model refused).
        """
        self._stopped = False
        todo: SimpleQueue = SimpleQueue()
        done: SimpleQueue = SimpleQueue()
        for _ in range(self._concurrency):
            # Daemons: Ctrl-C need not wait for a silent server.
            threading.Thread(target=self._work, args=(todo, done), daemon=True).start()
        waiting = 0
        try:
            for item in enumerate(rows):
                if self.budget.spent:
                    break
                todo.put(item)
                waiting += 1
                if waiting > self._concurrency:  # one more than at work, so that none is idle
                    waiting -= 1
                    yield from _result(done)
            for _ in range(waiting):
                yield from _result(done)
        finally:
            self._stopped = True
            for _ in range(self._concurrency):
                todo.put(None)

    def _work(self, todo: SimpleQueue, done: SimpleQueue) -> None:
        while (item := todo.get()) is not None:
            number, row = item
            try:
                done.put((number, self._ask(row)))
            except Exception as error:  # raised again by whoever reads the answers
                done.put((number, error))

    def _ask(self, row: Row) -> Answer | None:
        """None where the budget was spent before the row's turn."""
        text = f"{self._prompt}\n\n{row.text}"
        content = [
            *({"type": "image_url", "image_url": {"url": data_url(i)}} for i in row.images),
            {"type": "text", "text": text},
        ]
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                extra_body=self._options,
            )
        except _Stop:
            return None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{self._client.base_url} refuses the key ({self._told(error)}); put the "
                "right one into the environment variable that api.key_variable names"
            ) from None
        except openai.NotFoundError as error:
            raise UserError(
                f"{self._client.base_url} has no model {self._model!r}, or is no such endpoint "
                f"({self._told(error)}); correct api.model or api.base_url"
            ) from None
        except openai.OpenAIError as error:
            return Answer(problem=self._told(error))
        return self._read(response.content, text)

    def _read(self, body: bytes, prompt: str) -> Answer:
        """The answer in a response's body, which may hold anything."""
        try:
            payload = json.loads(body)
            choice = payload["choices"][0]
            text, closed = choice["message"]["content"], choice.get("finish_reason") != "length"
            usage = payload.get("usage")
            tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            text, tokens = (), None
        known = type(tokens) is int and 0 <= tokens < 10**9
        with self._lock:
            self.budget.tokens += tokens if known else len(prompt) + len(text or "")
        if text is not None and not isinstance(text, str):
            return Answer(problem=f"no answer of a chat model: {self._safe(body[:2000])}")
        text = text or ""  # null where a model refuses
        return Answer(self._without_key(text), closed)

    def _told(self, error: openai.OpenAIError) -> str:
        """What the server said, or what broke on the way to it."""
        if isinstance(error, openai.APIStatusError):
            return f"status {error.status_code}: {self._safe(error.response.content)}"
        return self._safe(f"{error} {error.__cause__ or ''}")

    def _safe(self, text: str | bytes) -> str:
        """A server's words, short, on one line, without our key."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return json.dumps(self._without_key(text)[:300])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _count(self, _: httpx2.Request) -> None:
        with self._lock:
            if self._stopped or self.budget.spent:
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


def _result(done: SimpleQueue) -> Iterator[tuple[int, Answer]]:
    number, answer = done.get()
    if isinstance(answer, Exception):
        raise answer
    if answer is not None:
        yield number, answer


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
