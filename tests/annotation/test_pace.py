import threading
import time

import pytest

from afmrl_jax.annotation import pace
from afmrl_jax.annotation.pace import Pace


@pytest.fixture
def eight(monkeypatch):
    """Of eight requests at once, whose first wait is of 50 ms."""
    monkeypatch.setattr(pace, "FIRST_WAIT", 0.05)
    return Pace("server", 8, lambda: False)


def busy(pace, number, after=None, patience=60.0):
    return pace.busy(number, "status 429", after, patience)


def test_many_that_find_the_server_busy_at_once_are_one_piece_of_news(eight):
    for number in [eight.start() for _ in range(8)]:
        assert busy(eight, number)
    assert eight._wait == 0.05  # not doubled seven times


def test_a_busy_server_gets_half_as_many_and_each_answer_one_more(eight):
    numbers = [eight.start() for _ in range(8)]
    for number in numbers:
        busy(eight, number)
    for _ in range(4):
        eight.start()
    fifth = threading.Thread(target=eight.start, daemon=True)
    fifth.start()
    fifth.join(0.05)
    assert fifth.is_alive() and eight.sending == 4
    eight.answered()
    fifth.join(5)
    assert not fifth.is_alive() and eight.sending == 4
    sixth = threading.Thread(target=eight.start, daemon=True)  # four halved from eight, and one
    sixth.start()
    sixth.join(5)
    assert not sixth.is_alive() and eight.sending == 5


def test_waits_double_and_an_answer_halves_the_next(eight):
    waits = []
    for answered in (False, False, True, False):
        number = eight.start()
        if answered:
            eight.answered()
            number = eight.start()
        busy(eight, number)
        waits.append(eight._wait)
    assert waits == [0.05, 0.1, 0.1, 0.2]


def test_patience_ends_only_without_an_answer(eight):
    number = eight.start()
    assert busy(eight, number, after=0.02, patience=0.05)
    time.sleep(0.06)
    eight.start()
    eight.answered()
    number = eight.start()
    assert busy(eight, number, after=0.02, patience=0.05)  # it begins anew
    time.sleep(0.06)
    assert not busy(eight, eight.start(), after=0.02, patience=0.05)


def test_a_stop_ends_all_waits(eight):
    busy(eight, eight.start(), after=60.0)
    threading.Timer(0.05, eight.stop).start()
    start = time.monotonic()
    assert eight.start() is None
    eight.rest(60.0)
    assert time.monotonic() - start < 5
