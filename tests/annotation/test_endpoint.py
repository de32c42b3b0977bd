"""Against a real HTTP server, that refuses, is busy, or goes away."""

import os
import signal
import threading
import time

import pytest
from openai_server import Server, said

from afmrl_jax.annotation import endpoint as endpoints
from afmrl_jax.annotation import pace
from afmrl_jax.annotation.endpoint import GIVE_UP, Budget, Endpoint
from afmrl_jax.annotation.options import Api
from afmrl_jax.annotation.replies import Kind
from afmrl_jax.core.errors import TryAgain, UserError
from afmrl_jax.data.processor import Row

QUOTA = b'{"error": {"code": "insufficient_quota"}}'


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(pace, "FIRST_WAIT", 0.05)
    with Server() as server:
        server.extra = {}
        yield server


def endpoint(server, *, key="", concurrency=4, timeout=5.0, retries=1, requests=0):
    api = Api(
        base_url=server if isinstance(server, str) else server.address,
        model="a-model",
        key_variable="KEY",
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        options="{}",
    )
    return Endpoint(api, key, prompt="Name them.", budget=Budget(requests, 0))


def kinds(model, rows=40):
    """What came back for rows with the texts 0, 1, ..."""
    return {n: reply.kind for n, reply in model.answers(Row(str(n)) for n in range(rows))}


def number(server, n):
    """Of the row that the n-th request asks for; -1 where it asks without a row."""
    last = server.texts()[n].rpartition("\n")[2]
    return int(last) if last.isdigit() else -1


def test_rows_that_are_refused_say_nothing_of_the_others(server):
    """More than are asked at once, and than may stand in a row."""

    def reply(n):
        return (400, b"bad image") if 0 <= number(server, n) < 3 * GIVE_UP else said("a: b")

    server.reply = reply
    got = kinds(endpoint(server))
    assert got == {n: Kind.REFUSED if n < 3 * GIVE_UP else Kind.ANSWERED for n in range(40)}
    # At each GIVE_UP in a row one without a row; the last is spared where an answer came before.
    assert len(server.payloads) - 40 in (2, 3)


@pytest.mark.parametrize("rows", [40, 3])
def test_what_every_request_is_refused_for_is_not_laid_to_the_rows(rows, server):
    server.reply = lambda n: (400, b"max_tokens is not supported")
    got = []
    with pytest.raises(UserError, match="max_tokens is not supported") as error:
        got.extend(endpoint(server).answers(Row(str(n)) for n in range(rows)))
    assert not got and not isinstance(error.value, TryAgain)
    assert len(server.payloads) <= min(rows, GIVE_UP + 4) + 1


def test_a_row_that_the_server_forbids_is_not_the_key_s_fault(server):
    server.reply = lambda n: (403, b"flagged") if number(server, n) == 0 else said("a: b")
    got = kinds(endpoint(server), 5)
    assert got == {0: Kind.REFUSED, **dict.fromkeys(range(1, 5), Kind.ANSWERED)}


def test_a_row_that_breaks_the_server_stays_unanswered_and_ends_nothing(server):
    server.extra = {"retry-after-ms": "1"}
    broken = range(2 * GIVE_UP)
    server.reply = lambda n: (500, b"") if number(server, n) in broken else said("a: b")
    got = kinds(endpoint(server))
    assert got == {n: Kind.FAILED if n in broken else Kind.ANSWERED for n in range(40)}


def test_a_busy_server_makes_all_wait_together_and_every_row_is_answered(server, caplog):
    """The server is busy for 0.3 s: waits of 50, 100, 200 ms, half as many requests after each."""
    asked = []

    def reply(n):
        asked.append(time.monotonic())
        return (429, b"") if asked[-1] < asked[0] + 0.3 else said("a: b")

    server.reply = reply
    got = kinds(endpoint(server, concurrency=16))
    assert got == dict.fromkeys(range(40), Kind.ANSWERED)
    assert 40 < len(server.payloads) <= 40 + 16 + 8 + 4 + 2
    assert "is busy or away (status 429" in caplog.text and "at most 0:10" in caplog.text


def test_a_server_that_stays_away_ends_the_run_which_may_go_on_later(server):
    server.reply = lambda n: said("a: b") if n < 4 else (503, b"<html>down")
    got = []
    started = time.monotonic()
    with pytest.raises(TryAgain, match=r"answered no request for 0:01 \(status 503.*down"):
        model = endpoint(server, timeout=1.0, retries=0)
        got.extend(model.answers(Row(str(n)) for n in range(40)))
    assert len(got) == 4 and time.monotonic() - started >= 1


def test_the_wait_that_a_server_asks_for_is_kept(server):
    server.extra = {"Retry-After": "0.3"}
    server.reply = lambda n: (429, b"") if n == 0 else said("a: b")
    started = time.monotonic()
    assert kinds(endpoint(server, concurrency=1), 2) == dict.fromkeys(range(2), Kind.ANSWERED)
    assert time.monotonic() - started >= 0.3


def test_a_wait_beyond_all_measure_is_not_kept_once_and_believed_in_the_end(server, monkeypatch):
    monkeypatch.setattr(endpoints, "SHORT_SECONDS", 0.2)
    server.extra = {"Retry-After": "1000000"}
    server.reply = lambda n: (429, b"") if n == 0 else said("a: b")
    assert len(kinds(endpoint(server))) == 40
    server.reply = lambda n: (429, b"")
    with pytest.raises(TryAgain, match="wants to be asked again in 277:46:40"):
        kinds(endpoint(server))


def test_an_account_with_nothing_left_ends_the_run_at_once(server):
    server.reply = lambda n: (429, QUOTA)
    with pytest.raises(UserError, match="account has nothing left"):
        kinds(endpoint(server))
    assert len(server.payloads) <= 4


def test_a_minute_s_quota_is_waited_for_under_whatever_name(server):
    busy_until = time.monotonic() + 0.3
    busy = range(4, 1000)
    server.reply = lambda n: (
        (429, QUOTA) if n in busy and time.monotonic() < busy_until else said("a: b")
    )
    assert kinds(endpoint(server, concurrency=1), 8) == dict.fromkeys(range(8), Kind.ANSWERED)


def test_what_is_under_way_is_given_out_before_the_run_ends(server):
    first_is_asked = threading.Event()

    def reply(n):
        if number(server, n) == 0:
            first_is_asked.set()
            time.sleep(0.2)
            return said("a: b")
        first_is_asked.wait(10)
        return 401, b""

    server.reply = reply
    got = []
    with pytest.raises(UserError, match="refuses the key"):
        got.extend(endpoint(server, concurrency=2).answers(Row(str(n)) for n in range(40)))
    assert [(n, reply.kind) for n, reply in got] == [(0, Kind.ANSWERED)]
    assert len(server.payloads) == 2


def test_an_address_where_nobody_is_ends_soon(server, monkeypatch):
    monkeypatch.setattr(endpoints, "SHORT_SECONDS", 0.2)
    address = server.address
    server.server_close()
    with pytest.raises(UserError, match=r"can't be reached .*correct api\.base_url"):
        kinds(endpoint(address, timeout=60.0))


@pytest.fixture
def ctrl_c():
    """A timer that presses it once; workers of a parallel run of the tests take no notice of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_wait_at_once(server, ctrl_c):
    server.extra = {"Retry-After": "100"}

    def reply(n):
        if n == 0:
            ctrl_c.start()
        return 429, b""

    server.reply = reply
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        kinds(endpoint(server, concurrency=1, timeout=60.0))
    assert time.monotonic() - started < 50


def test_waits_count_within_the_budget(server):
    server.extra = {"retry-after-ms": "1"}
    server.reply = lambda n: (429, b"")
    model = endpoint(server, requests=9)
    assert not kinds(model) and model.budget.requests == len(server.payloads) == 9


def test_a_word_that_serves_as_key_stays_in_the_answers(server):
    server.reply = lambda n: said("color: red")
    ((_, reply),) = endpoint(server, key="red").answers([Row("0")])
    assert reply.text == "color: red"


def test_what_the_defaults_wait_for_outlasts_a_quota_of_minutes():
    from afmrl_jax.configs.annotate import get_config

    api = get_config().api
    model = endpoint("http://localhost/v1", timeout=api.timeout, retries=api.retries)
    assert model.patience == 720
