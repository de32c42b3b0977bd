"""What every Python does first that tests start.

It hides torch: users have none, and to import it takes as long as everything else together. A
process that is one of several takes all cores, where its tests keep to one (conftest.py). Its
programs are compiled with less effort, which changes roundings at most, and by the first process
for all: that would take most of their time.
"""

import gc
import importlib.util
import os
import sys

sys.modules["torch"] = None
gc.set_threshold(200_000, 50, 100)  # as in conftest.py


class OneKeyForAllProcesses:
    """JAX's keys of compiled programs hold, on CPUs alone, which of several processes asks."""

    def find_spec(self, name, path=None, target=None):
        if name != "jax._src.cache_key":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module._hash_accelerator_config = module._hash_devices

        spec.loader.exec_module = exec_module
        return spec


if "NUM_PROCESSES" in os.environ:
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quickly}"
    os.environ["JAX_SHARE_BINARY_BETWEEN_HOSTS"] = "1"
    sys.meta_path.insert(0, OneKeyForAllProcesses())
    if cores := os.environ.get("TESTS_CORES"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
