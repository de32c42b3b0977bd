"""Several devices within the process of a test: CPUs that JAX makes out of this one."""

import contextlib
from collections.abc import Iterator

import jax
from jax.extend import backend


@contextlib.contextmanager
def devices(count: int) -> Iterator[None]:
    """Within it, jax.devices() are so many; arrays from before can still be read, and computed with
    by one of them. What is jitted is compiled anew."""
    before = jax.config.jax_num_cpu_devices
    _make(count)
    try:
        yield
    finally:
        _make(before)


def _make(count: int) -> None:
    backend.clear_backends()
    jax.clear_caches()
    jax.config.update("jax_num_cpu_devices", count)
