"""What the replies of OpenAI-compatible servers mean: each is sorted by what can be done about it.

Servers agree on little: on what they call the end of an answer, on statuses, even on where an error
stands. What is not known to be an answer is none.
"""

import email.utils
import enum
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What servers call the end of an answer (`finish_reason`; OpenAI, vLLM, SGLang, TGI, Ollama,
# llama.cpp, Gemini, Anthropic, Cohere, Mistral and the proxies before them).
ENDED = {"stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete"}
CUT = {"length", "max_tokens", "model_length", "model_context_window_exceeded"}
BROKEN = {
    "abort", "aborted", "cancelled", "canceled", "error", "load", "unload",
    "insufficient_system_resource", "network_error", "timeout",
}  # fmt: skip
AWAY = {429, 502, 503, 521, 522, 523, 529}  # of the server as a whole; 52x are Cloudflare's
OUT_OF_CREDIT = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "exceeded_current_quota_error",
    "arrearage",
)
QUOTED = 300  # characters of a server's words that are repeated


class Kind(enum.Enum):
    """What came back, by what can be done about it."""

    ANSWERED = "answered"  # until the model's own end, or the limit of tokens
    STOPPED = "stopped"  # an answer, by something else: a filter, the model itself, a tool call
    REFUSED = "refused"  # this request, by the server: the next time too
    UNREADABLE = "unreadable"  # no reply of a chat model
    FAILED = "failed"  # it may pass, and may be this request's own doing: a timeout, a status 500
    BUSY = "busy"  # it may pass, and holds for every request: too many, or nobody there
    OUT_OF_CREDIT = "out of credit"  # some servers say so of a minute's quota too
    WRONG_KEY = "wrong key"
    FORBIDDEN = "forbidden"  # the key, or this request: moderation and firewalls say 403 too
    WRONG_ADDRESS = "wrong address"


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    closed: the answer ended by itself, not by the limit of tokens. reason: why it is no answer, in
    words. after: seconds to wait as the server says. tokens: as the server counts, else None.
    """

    kind: Kind
    text: str = ""
    closed: bool = True
    reason: str = ""
    after: float | None = None
    tokens: int | None = None


def read_reply(
    status: int, headers: Mapping[str, str], body: bytes, hide: Callable[[str], str]
) -> Reply:
    """The meaning of a response, which may hold anything. hide: takes secrets out of a text."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        payload = None
    if status < 400:
        passed_on = _status_within(payload)
        if passed_on is None:
            return _read_choice(payload, body, hide)
        status = passed_on
    reason = f"status {status}: {quoted(body, hide)}"
    return Reply(_kind_of(status, body), reason=reason, after=_retry_after(headers))


def quoted(text: str | bytes, hide: Callable[[str], str]) -> str:
    """A server's words, short, on one line, without secrets."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return json.dumps(hide(text)[:QUOTED])


def _kind_of(status: int, body: bytes) -> Kind:
    words = body.decode(errors="replace").lower()
    if status == 402 or (status < 500 and any(f'"{code}"' in words for code in OUT_OF_CREDIT)):
        return Kind.OUT_OF_CREDIT
    if status == 429 and "request too large" in words:  # for a minute's tokens, OpenAI says
        return Kind.REFUSED
    if status in AWAY:
        return Kind.BUSY
    if status in (408, 409, 425) or status >= 500:
        return Kind.FAILED
    named = {401: Kind.WRONG_KEY, 403: Kind.FORBIDDEN}
    return named.get(status, Kind.WRONG_ADDRESS if status in (404, 405, 410) else Kind.REFUSED)


def _status_within(payload: Any) -> int | None:
    """The status that a proxy passes on inside a response of status 200, as OpenRouter does."""
    places = [payload]
    if isinstance(payload, dict) and isinstance(payload.get("choices"), list):
        places += payload["choices"][:1]
    for place in places:
        error = place.get("error") if isinstance(place, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        if type(code) is int and 400 <= code < 600:
            return code
    return None


def _read_choice(payload: Any, body: bytes, hide: Callable[[str], str]) -> Reply:
    """The first answer of a chat completion."""
    try:
        choice = payload["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = _parts(message.get("content")), message.get("refusal")
        usage = payload.get("usage")
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    except (LookupError, TypeError, AttributeError):
        text, tokens = None, None
    tokens = tokens if type(tokens) is int and 0 <= tokens < 10**9 else None
    if text is None:
        words = quoted(body[:2000], hide)
        return Reply(Kind.UNREADABLE, reason=f"no answer of a chat model: {words}", tokens=tokens)
    text = hide(text)
    if isinstance(refusal, str) and refusal.strip():
        reason = f"the model refuses: {quoted(refusal, hide)}"
        return Reply(Kind.STOPPED, text, reason=reason, tokens=tokens)
    end = finish.lower() if isinstance(finish, str) else ""
    if end in ENDED or end in CUT:
        return Reply(Kind.ANSWERED, text, closed=end in ENDED, tokens=tokens)
    reason = (
        f"finish_reason {quoted(finish, hide)}" if end else "no finish_reason says that it ended"
    )
    kind = Kind.FAILED if end in BROKEN else Kind.STOPPED
    return Reply(kind, text, closed=False, reason=reason, tokens=tokens)


def _parts(content: Any) -> str | None:
    """A message's text, which may stand in parts; None where there is none to read.

    Null is an empty text: what a model that thinks leaves where the limit comes before its answer.
    """
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part["text"] for part in parts)
    return content if isinstance(content, str) else "" if content is None else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server wants left alone, above 0; None where it says none that can be."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if 0 < seconds < math.inf else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (ValueError, OverflowError):
        return None
    try:  # by the server's own clock, where it tells the time
        now = email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return date - now if date > now else None
