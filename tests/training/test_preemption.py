"""What tells a run that its machine goes away."""

import os
import signal
import threading
import time

import pytest
from metadata_server import MAINTENANCE, PREEMPTED, serving

from afmrl_jax.training import preemption
from afmrl_jax.training.preemption import Preemption


@pytest.fixture
def metadata(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.address)
        monkeypatch.setattr(preemption, "POLL_SECONDS", 0.02)
        yield server


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


def ask_all(metadata):
    """Returns when every value was asked for, and more."""
    for _ in range(6):
        metadata.asked.clear()
        assert metadata.asked.wait(20)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE", "a notice of maintenance"),
        (PREEMPTED, "TRUE", "a notice of preemption"),
    ],
)
def test_a_notice_of_the_metadata_server_asks_to_stop(metadata, name, value, reason):
    with Preemption() as preemption:
        assert metadata.asked.wait(20)
        assert not preemption.asked
        metadata.values[name] = value
        assert wait_for(lambda: preemption.asked)
        assert preemption.reason == reason


def test_a_migration_that_a_machine_lives_through_does_not(metadata):
    metadata.values[MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
    with Preemption() as preemption:
        ask_all(metadata)
        assert not preemption.asked


def test_maintenance_that_a_run_before_heard_of_does_not_stop_the_next_one(metadata):
    metadata.values[MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
    with Preemption() as preemption:
        ask_all(metadata)
        assert not preemption.asked
        metadata.values[PREEMPTED] = "TRUE"
        assert wait_for(lambda: preemption.asked)


def test_a_server_that_answers_nothing_is_asked_again(metadata):
    values, metadata.values = metadata.values, {}
    with Preemption() as preemption:
        assert metadata.asked.wait(20)
        metadata.values = values | {PREEMPTED: "TRUE"}
        assert wait_for(lambda: preemption.asked)


def test_its_questions_end_with_the_run(metadata):
    with Preemption():
        assert metadata.asked.wait(20)
    time.sleep(0.1)  # the last one, on its way
    metadata.asked.clear()
    assert not metadata.asked.wait(0.3)


def test_sigterm_asks_and_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked
        assert preemption.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_elsewhere_than_on_google_cloud_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    product = tmp_path / "product_name"
    for told in (tmp_path / "none", product):
        product.write_text("Standard PC\n")
        monkeypatch.setattr(preemption, "_PRODUCT", told)
        threads = threading.active_count()
        with Preemption():
            assert threading.active_count() == threads
    product.write_text("Google Compute Engine\n")
    assert preemption._metadata_server() == "metadata.google.internal"
