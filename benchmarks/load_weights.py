"""Measures the memory of loading a checkpoint: at most the parameters, one shard and 2 GB.

python benchmarks/load_weights.py [--preset qwen2_vl_2b] [--shard_gb 1] [--folder /tmp]

Writes a checkpoint of random bfloat16 numbers in shards of at most --shard_gb to a temporary
folder, and loads it as bfloat16 in a fresh process. A thread samples that process's resident
memory, which includes pages of mapped files. Every tensor is compared with the one that the
safetensors library reads.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from running import write
from safetensors import safe_open

from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.weights import hf_weights

GB = 1e9
ALLOWED = 2 * 10**9  # bytes above the parameters and one shard


def abstract_params(config: QwenVLConfig) -> dict:
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    return nnx.to_pure_dict(nnx.state(model))


def write_checkpoint(folder: Path, config: QwenVLConfig, shard_bytes: int) -> None:
    random = np.random.default_rng(0)

    def numbers(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """±.0078 to ±.12: bfloat16 of random sign, mantissa and last two bits of the exponent."""
        bits = random.integers(0, 2**16, leaf.shape, np.uint16)
        np.bitwise_and(bits, 0x81FF, out=bits)
        np.bitwise_or(bits, 0x3C00, out=bits)
        return jnp.asarray(bits.view(ml_dtypes.bfloat16))

    params = jax.tree.map(numbers, abstract_params(config))
    hf_weights.save(folder, params, config, max_shard_bytes=shard_bytes)


def resident() -> int:
    """This process's resident bytes, including pages of mapped files (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def resident_memory(every: float = 0.01):
    """Samples (seconds, bytes) of `resident` until the block ends."""
    samples, end = [], threading.Event()
    start = time.perf_counter()

    def sample() -> None:
        while not end.wait(every):
            samples.append((time.perf_counter() - start, resident()))

    thread = threading.Thread(target=sample)
    thread.start()
    yield samples
    end.set()
    thread.join()


def load(folder: Path, config: QwenVLConfig) -> dict:
    abstract = abstract_params(config)
    jnp.zeros(1).block_until_ready()
    before = resident()
    with resident_memory() as samples:
        params = jax.block_until_ready(hf_weights.load(folder, abstract, config))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = max(rss for _, rss in samples)
    ours = dict.fromkeys(json.loads((folder / hf_weights.INDEX).read_text())["weight_map"], False)
    files = {file: safe_open(file, "numpy") for file in folder.glob("*.safetensors")}
    place = {name: file for file, opened in files.items() for name in opened.keys()}  # noqa: SIM118, no dict
    for name, tensor in hf_weights.to_hf(params, config):
        theirs = files[place[name]].get_tensor(name)
        ours[name] = np.array_equal(theirs.view(np.uint16), tensor.view(np.uint16))
    return {
        "tensors": len(ours),
        "equal_tensors": sum(ours.values()),
        "parameter_bytes": size,
        "largest_shard_bytes": max(file.stat().st_size for file in files),
        "shards": len(files),
        "before_bytes": before,
        "peak_bytes": peak,
        "peak_less_parameters_bytes": peak - size,
        "seconds": samples[-1][0],
        "curve": samples,
    }


def in_a_fresh_process(call, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2_vl_2b")
    parser.add_argument("--shard_gb", type=float, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    config = preset(options.preset)
    needed = sum(2 * np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
    free = shutil.disk_usage(options.folder).free
    if free < 1.1 * needed:
        raise SystemExit(f"{options.folder} has {free / GB:.1f} GB free, {needed / GB:.1f} needed")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        shard_bytes = int(options.shard_gb * GB)
        in_a_fresh_process(write_checkpoint, Path(name), config, shard_bytes)
        result = in_a_fresh_process(load, Path(name), config)
    curve = result.pop("curve")
    chosen = [curve[i] for i in np.linspace(0, len(curve) - 1, 21).astype(int)]
    print(f"{'seconds':>8} {'resident, GB':>13}")
    for seconds, rss in chosen:
        print(f"{seconds:8.1f} {rss / GB:13.2f} {'#' * round(8 * rss / GB)}")
    above, limit = result["peak_less_parameters_bytes"], result["largest_shard_bytes"] + ALLOWED
    print(
        f"{result['tensors']} tensors, {result['equal_tensors']} equal; parameters "
        f"{result['parameter_bytes'] / GB:.2f} GB, peak {result['peak_bytes'] / GB:.2f} GB: "
        f"{above / GB:.2f} GB above (limit {limit / GB:.2f}), {result['seconds']:.1f} s"
    )
    rounded = [[round(seconds, 2), rss] for seconds, rss in chosen]
    write(
        "load_weights", {"preset": options.preset, **result, "limit_bytes": limit, "curve": rounded}
    )
    if above > limit or result["equal_tensors"] < result["tensors"]:
        raise SystemExit("loading took too much memory, or changed numbers")


if __name__ == "__main__":
    main()
