"""Classifies the replies of OpenAI-compatible servers by what the client can do about them.

Servers differ in the names for the end of an answer, in statuses, and even in where they put an
error. So only a reply that is known to be an answer counts as one.
"""

import email.utils
import enum
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Values of `finish_reason` of OpenAI, vLLM, SGLang, TGI, Ollama, llama.cpp, Gemini, Anthropic,
# Cohere, Mistral and of proxies: the model ended its answer, the token limit cut it, or the server
# broke off.
ENDED = {"stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete"}
CUT = {"length", "max_tokens", "model_length", "model_context_window_exceeded"}
BROKEN = {
    "abort", "aborted", "cancelled", "canceled", "error", "load", "unload",
    "insufficient_system_resource", "network_error", "timeout",
}  # fmt: skip
# Statuses of a server that has no time for any request; 52x are Cloudflare's.
BUSY_STATUSES = {429, 502, 503, 521, 522, 523, 529}
OUT_OF_CREDIT = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "exceeded_current_quota_error",
    "arrearage",
)
QUOTED = 300  # characters of a server's text that are quoted


class Kind(enum.Enum):
    """The kinds of replies, by what the client can do about them."""

    ANSWERED = "answered"  # the answer ended by itself or at the token limit
    STOPPED = "stopped"  # a filter, a refusal by the model or a tool call stopped the answer
    REFUSED = "refused"  # the server refuses this request, and would refuse it again
    UNREADABLE = "unreadable"  # not the reply of a chat model
    FAILED = "failed"  # may be temporary, and may be due to this request: a timeout, a status 500
    BUSY = "busy"  # temporary, for every request: too many requests, or the server is unreachable
    OUT_OF_CREDIT = "out of credit"  # some servers also say so if a minute's quota is used up
    WRONG_KEY = "wrong key"
    FORBIDDEN = "forbidden"  # 403: the key is wrong, or moderation or a firewall refuses the row
    WRONG_ADDRESS = "wrong address"


@dataclass(frozen=True)
class Reply:
    """The reply to one request."""

    kind: Kind
    text: str = ""  # the answer
    closed: bool = True  # whether the answer ended by itself, not at the token limit
    reason: str = ""  # why there is no answer, in words
    after: float | None = None  # seconds that the server asks to wait
    tokens: int | None = None  # the server's count, if it sent one


def read_reply(
    status: int, headers: Mapping[str, str], body: bytes, hide: Callable[[str], str]
) -> Reply:
    """Classifies a response, whatever it holds. hide: removes secrets from a text."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        payload = None
    if status < 400:
        inner_status = _inner_status(payload)
        if inner_status is None:
            return _read_choice(payload, body, hide)
        status = inner_status
    reason = f"status {status}: {quoted(body, hide)}"
    return Reply(_kind_of(status, body), reason=reason, after=_retry_after(headers))


def quoted(text: str | bytes, hide: Callable[[str], str]) -> str:
    """The beginning of a server's text, on one line and without secrets."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return json.dumps(hide(text)[:QUOTED])


def _kind_of(status: int, body: bytes) -> Kind:
    text = body.decode(errors="replace").lower()
    if status == 402 or (status < 500 and any(f'"{code}"' in text for code in OUT_OF_CREDIT)):
        return Kind.OUT_OF_CREDIT
    if status == 429 and "request too large" in text:  # OpenAI: for the quota of tokens per minute
        return Kind.REFUSED
    if status in BUSY_STATUSES:
        return Kind.BUSY
    if status in (408, 409, 425) or status >= 500:
        return Kind.FAILED
    named = {401: Kind.WRONG_KEY, 403: Kind.FORBIDDEN}
    return named.get(status, Kind.WRONG_ADDRESS if status in (404, 405, 410) else Kind.REFUSED)


def _inner_status(payload: Any) -> int | None:
    """The error status inside a response of status 200; proxies such as OpenRouter put it there."""
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
    """A message's text, which may be a list of parts; None if it can't be read.

    Null is an empty text: thinking models send it if the token limit comes before their answer.
    """
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part["text"] for part in parts)
    return content if isinstance(content, str) else "" if content is None else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds (above 0) that the server asks to wait; None if it sends no usable number or date."""
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
    try:  # relative to the server's clock, if it sends a date
        now = email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return date - now if date > now else None
