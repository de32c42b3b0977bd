"""A small catalogue of real files, and the smallest run of the AGCL program on it."""

import json
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

# Where the TPU compiler is installed, for planning, JAX would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling: what one run has compiled no other need, however small.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Workers beside each other, and what each starts, keep to their own cores: where all use all of
# them, threads of one wait for threads of another.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    if own := cores[worker :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
        os.environ["TESTS_CORES"] = ",".join(map(str, cores))
        os.sched_setaffinity(0, own)

TESTS = Path(__file__).parent

# An example that is slow on a busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def what_is_started():
    """See started/sitecustomize.py; this process itself has torch, to compare with. toy.py can be
    started by its name."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (TESTS, TESTS / "started"):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    """config.data.cache_dir of runs: one for all, also of those beside each other, as what they
    compile is mostly the same."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")


COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "grey": (120,) * 3}
KINDS = ("mug", "shirt", "lamp", "shoe", "hat")


@pytest.fixture(scope="session")
def catalogue_folder(tmp_path_factory) -> Path:
    """20 products (5 kinds in 4 colours), two listings each, with textured photos of two sizes."""
    folder = tmp_path_factory.mktemp("catalogue")
    (folder / "images").mkdir()
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
    return folder


@pytest.fixture
def agcl_config(catalogue_folder, cache_dir):
    """configs/agcl.py at its smallest: 6 steps of 8 pairs, in one process."""
    from afmrl_jax.configs.agcl import get_config

    config = get_config()
    config.update(steps=6, batch=8, log_every=1, eval_every=3, checkpoint_every=2)
    config.data.update(
        path=str(catalogue_folder),
        cache_dir=cache_dir,
        workers=0,
        max_tokens=24,
        max_patches=16,
        min_pixels=256,
        max_pixels=1024,
        neighbours=4,
    )
    config.model.update(vocab_size=300, dtype="float32")
    config.optimizer.learning_rate = 5e-4
    config.eval.update(batch=8, tasks="image+text->image+text, image->text")
    return config
