"""What every Python does first that tests start.

It hides torch: users have none, and to import it takes as long as everything else together. A
process that is one of several takes all cores, where its tests keep to one (conftest.py), and has
its programs compiled with less effort: each of them compiles for itself, which takes most of its
time, and what is spared changes roundings at most.
"""

import os
import sys

sys.modules["torch"] = None

if "NUM_PROCESSES" in os.environ:
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quickly}"
    if cores := os.environ.get("TESTS_CORES"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
