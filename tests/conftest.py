"""How tests compile, what their workers share, a small catalogue, and the smallest run of AGCL."""

import collections
import gc
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from artifacts import made_once, smallest_agcl
from PIL import Image

# Where the TPU compiler is installed, for planning, JAX would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling what runs a few times: nothing is made fast, but in modules
# that say COMPILED_AS_FOR_USERS, and what is compiled once, however small, is kept for all workers,
# for the processes that they start, and for the next run of the tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(sys.prefix) / "compiled_by_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# XLA's older generator of code for what it fuses takes a third of the newer one's time, and one
# part a program less than many. jaxlib 0.12 has the newer one alone, and ends where it is told of
# another. --slow leaves both as users have them.
SIMPLE_CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

# Python's collector walks through all that JAX has traced, and takes a tenth of the time.
gc.set_threshold(200_000, 50, 100)

# Workers beside each other, and what each starts, keep to their own cores: where all use all of
# them, threads of one wait for threads of another.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    if own := cores[worker :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
        os.environ["TESTS_CORES"] = ",".join(map(str, cores))
        os.sched_setaffinity(0, own)

TESTS = Path(__file__).parent
DURATIONS = TESTS / "durations.txt"  # of the slowest tests: seconds and name
SLOWEST = 40
QUICK = ("attributes", "configs", "core", "losses", "retrieval", "rl", "training")  # rooms

# An example that is slow on a busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="runs the tests marked slow as well")
    told = f"writes the {SLOWEST} slowest tests to tests/{DURATIONS.name}"
    parser.addoption("--write-durations", action="store_true", help=told)


def pytest_configure(config):
    known = metadata.version("jaxlib").startswith("0.10.")
    if known and not config.getoption("slow"):  # JAX reads it when it makes its devices
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SIMPLE_CODE}".strip()


def pytest_collection_modifyitems(config, items):
    """Files that take long come first, so that no worker ends alone with one of them."""
    seconds = collections.Counter()
    if DURATIONS.exists():
        for line in DURATIONS.read_text().splitlines():
            duration, name = line.split(maxsplit=1)
            seconds[name.partition("::")[0]] += float(duration)

    def file_of(item):
        return item.nodeid.partition("::")[0]

    items.sort(key=lambda item: -seconds[file_of(item)])  # a stable sort
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: --slow runs it"))
        elif item.path.parent.name in QUICK and not seconds[file_of(item)]:
            item.add_marker(pytest.mark.quick)


def pytest_sessionfinish():
    gc.freeze()  # pytest collects five times at the end, each time through all that JAX has traced


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("write_durations"):
        return
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):  # of what comes before a test, of it, and behind it
                seconds[report.nodeid] += report.duration
    lines = [f"{duration:6.1f} {name}\n" for name, duration in seconds.most_common(SLOWEST)]
    DURATIONS.write_text("".join(lines))


@pytest.fixture(scope="session", autouse=True)
def what_is_started():
    """See started/sitecustomize.py; this process itself has torch, to compare with. toy.py can be
    started by its name."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (TESTS, TESTS / "started"):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module", autouse=True)
def as_for_users(request):
    """Where a module says COMPILED_AS_FOR_USERS, XLA optimizes as it does for them."""
    if not getattr(request.module, "COMPILED_AS_FOR_USERS", False):
        yield
        return
    import jax

    name = "jax_disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "0")
        jax.config.update(name, False)
        jax.clear_caches()  # or what other modules compiled would be used here, and not there
        yield
    jax.config.update(name, True)
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run of the tests that all workers see, for `made_once`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache_dir(shared_folder) -> str:
    """config.data.cache_dir of runs: one for all."""
    return str(shared_folder / "cache")


COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "grey": (120,) * 3}
KINDS = ("mug", "shirt", "lamp", "shoe", "hat")


@pytest.fixture(scope="session")
def catalogue_folder(shared_folder) -> Path:
    """20 products (5 kinds in 4 colours), two listings each, with textured photos of two sizes."""
    return made_once(shared_folder / "catalogue", write_catalogue)


def write_catalogue(folder):
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for k, kind in enumerate(KINDS):
        for c, (colour, rgb) in enumerate(COLOURS.items()):
            product = f"{kind}-{colour}"
            for n, size in enumerate([(40, 40), (48, 36)]):
                noise = rng.integers(-30, 30, (size[1], size[0], 3))
                pixels = np.clip(np.asarray(rgb) + noise, 0, 255).astype(np.uint8)
                pixels[: 8 + 4 * k, : 8 + 4 * c] = 255
                Image.fromarray(pixels).save(folder / "images" / f"{product}-{n}.png")
                lines.append(
                    {
                        "listing_id": f"{product}-{n}",
                        "product_id": product,
                        "title": f"{colour} {kind}" if n else f"{kind.upper()} new",
                        "description": "A fine thing." if n else "",
                        "category": kind,
                        "attributes": {"color": colour, "type": kind},
                        "images": [f"images/{product}-{n}.png"],
                        "split": "train" if c < 3 else "test" if k % 2 else "validation",
                    }
                )
    (folder / "products.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def agcl_config(catalogue_folder, cache_dir):
    return smallest_agcl(catalogue_folder, cache_dir)
