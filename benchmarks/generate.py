"""Times generation against transformers' `generate`, or against the limit of memory bandwidth.

    python benchmarks/generate.py                     tiny, on CPU, both libraries, same prompts
    python benchmarks/generate.py --accelerator       qwen2_5_vl_3b, random weights, bf16, 1 GPU

Prompts hold an image and text of several lengths; no answer ends before its last token. Prefill is
timed, compilation is not. On CPU both libraries have the same weights and must give the same greedy
tokens; their runs alternate. If the machine is busy with other work, torch's threads wait for each
other at every operation and become many times slower: then bind the run to one core (`taskset -c
0`). On an accelerator a decode step is compared with its floor: the bytes of weights and cache that
it must read, divided by the bandwidth of a measured copy. In every case the log-probs are compared
with those of the trainer's full forward pass.

Axes: N prompts · G samples per prompt · S prompt tokens · T tokens of an answer · P patches.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from running import write

from afmrl_jax.models import sampler
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.sampler import Sampling
from afmrl_jax.weights import hf_weights

Rows = dict[str, np.ndarray]

COPIED = 2**30  # bf16 numbers in the array whose copy measures bandwidth
REST = 0.2  # seconds between two libraries' runs, for the first library's threads to stop spinning


def parse_args() -> argparse.Namespace:
    """The flags; the defaults depend on --accelerator."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", action="store_true", help="ours alone, against the floor")
    parser.add_argument("--preset", help="of the model; its weights are random")
    parser.add_argument("--workloads", help="N x G, as 16x1,4x8")
    parser.add_argument("--prompt", type=int, help="S, the image's tokens included")
    parser.add_argument("--new", type=int, help="T")
    parser.add_argument("--grid", type=int, help="patches a side of the prompt's square image")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    on_cpu = {"preset": "tiny", "workloads": "16x1,4x8", "prompt": 48, "new": 64, "grid": 8}
    on_accelerator = {
        "preset": "qwen2_5_vl_3b", "workloads": "8x1,8x8,16x8,32x8", "prompt": 384, "new": 256,
        "grid": 24,
    }  # fmt: skip
    chosen, _ = parser.parse_known_args()
    parser.set_defaults(**on_accelerator if chosen.accelerator else on_cpu)
    args = parser.parse_args()
    args.workloads = [tuple(map(int, pair.split("x"))) for pair in args.workloads.split(",")]
    return args


def make_rows(config: QwenVLConfig, count: int, length: int, grid: int) -> Rows:
    """Prompts of one image and random text, padded left: two thirds of `length` or more."""
    random, side = np.random.default_rng(0), grid // config.vision.merge_size
    image = side * side
    at = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1)
    merge = config.vision.merge_size
    at = at.reshape(side, merge, side, merge, 2).swapaxes(1, 2).reshape(-1, 2)
    tokens = random.integers(5, config.vocab_size - 1000, (count, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (count, 3, length)).copy()
    lengths = random.integers(length * 2 // 3, length + 1, count)
    mask = np.arange(length) >= length - lengths[:, None]
    rows, columns = (axis.ravel() for axis in np.mgrid[:side, :side])
    for row, start in enumerate(length - lengths):
        tokens[row, :start] = config.pad_token_id
        tokens[row, start] = config.vision_start_token_id
        tokens[row, start + 1 : start + 1 + image] = config.image_token_id
        tokens[row, start + 1 + image] = config.vision_end_token_id
        positions[row, :, start] = 0
        positions[row, :, start + 1 : start + 1 + image] = 1 + np.stack([0 * rows, rows, columns])
        behind = length - start - 1 - image
        positions[row, :, start + 1 + image :] = 1 + side + np.arange(behind)
    patches = random.normal(size=(count, grid * grid, config.vision.patch_dim))
    return {
        "tokens": tokens,
        "token_mask": mask,
        "positions": positions,
        "patches": patches.astype(np.float32),
        "patch_positions": np.broadcast_to(at.astype(np.int32), (count, *at.shape)).copy(),
        "patch_segments": np.ones((count, grid * grid), np.int32),
        "patch_grids": np.full((count, grid * grid, 2), grid, np.int32),
    }


def make_model(config: QwenVLConfig, dtype: str, param_dtype: str) -> tuple[nnx.GraphDef, dict]:
    """Random parameters, made on the device."""

    def make() -> QwenVL:
        return QwenVL(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)

    graph, _ = nnx.split(nnx.eval_shape(make))
    return graph, jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()


def run_ours(
    graph: nnx.GraphDef, params: dict, rows: dict[str, jax.Array], keys: jax.Array, sampling
) -> tuple[sampler.Samples, float, float]:
    """Generates with this project: the answers, and the seconds of prefill and of decode."""
    start = time.perf_counter()
    state = jax.block_until_ready(sampler.prefill(graph, params, rows, keys, sampling))
    middle = time.perf_counter()
    state = jax.block_until_ready(sampler.decode(graph, params, state, sampling))
    return sampler.samples_of(state), middle - start, time.perf_counter() - middle


def their_generate(config: QwenVLConfig, params: dict, rows: Rows) -> Callable:
    """A function (samples, sampling) -> int[N, G, T] by transformers with the same parameters."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        hf_weights.save(Path(folder), params, config)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    grid = rows["patch_grids"][:, 0]
    inputs = {
        "input_ids": torch.from_numpy(rows["tokens"]).long(),
        "attention_mask": torch.from_numpy(rows["token_mask"]).long(),
        "mm_token_type_ids": torch.from_numpy(rows["tokens"] == config.image_token_id).int(),
        "pixel_values": torch.from_numpy(rows["patches"]).flatten(0, 1),
        "image_grid_thw": torch.from_numpy(np.insert(grid, 0, 1, axis=1)).long(),
    }

    def generate(samples: int, sampling: Sampling) -> np.ndarray:
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        out = model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=samples,
            suppress_tokens=list(sampling.forbidden),
            pad_token_id=config.pad_token_id,
            **drawn if sampling.temperature else {"do_sample": False},
        )
        new = out[:, rows["tokens"].shape[1] :].numpy()
        return new.reshape(len(rows["tokens"]), samples, -1)

    return generate


@functools.partial(jax.jit, static_argnames="graph")
def log_prob_difference(graph, params, rows, answers: sampler.Samples) -> jax.Array:
    """float32[N, T]: |log-prob when sampled - log-prob by the full forward pass| of each token of
    each prompt's first answer."""
    tokens = answers.tokens[:, 0]
    length, new = rows["tokens"].shape[1], tokens.shape[1]
    first = rows["positions"].max(axis=(1, 2)) + 1  # the padding's positions are lower
    positions = jnp.broadcast_to(first[:, None, None] + jnp.arange(new), (len(tokens), 3, new))
    whole = {
        **rows,
        "tokens": jnp.concatenate([rows["tokens"], tokens], axis=1),
        "token_mask": jnp.pad(rows["token_mask"], ((0, 0), (0, new)), constant_values=True),
        "positions": jnp.concatenate([rows["positions"], positions], axis=2),
    }
    model = nnx.merge(graph, params)
    logits = model.logits(model(whole)[:, length - 1 : -1])
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.abs(chosen - jax.nn.logsumexp(logits, axis=-1) - answers.log_probs[:, 0])


def agreement(graph, params, rows, answers) -> dict[str, float]:
    difference = np.asarray(log_prob_difference(graph, params, rows, answers))
    return {"max": float(difference.max()), "mean": float(difference.mean())}


def against_transformers(args: argparse.Namespace, config: QwenVLConfig) -> dict:
    """Times both libraries in turn: greedy with one sample per prompt, else at temperature 1."""
    graph, params = make_model(config, "float32", "float32")
    halved, _ = nnx.split(
        nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    )
    results = {}
    for prompts, samples in args.workloads:
        rows = make_rows(config, prompts, args.prompt, args.grid)
        theirs = their_generate(config, params, rows)
        keys = sampler.sample_keys(jax.random.key(0), range(prompts), samples)
        sampling = sampling_of(config, args.new, temperature=float(samples > 1))
        answers, *_ = run_ours(graph, params, rows, keys, sampling)
        their_tokens = theirs(samples, sampling)
        if not sampling.temperature and not np.array_equal(answers.tokens, their_tokens):
            raise AssertionError("the libraries greedily give different tokens")
        runs = {
            "ours": functools.partial(run_ours, graph, params, rows, keys, sampling),
            "transformers": functools.partial(theirs, samples, sampling),
        }
        seconds, used = {name: [] for name in runs}, {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                time.sleep(REST)
                start = time.perf_counter(), time.process_time()
                run()
                seconds[name].append(time.perf_counter() - start[0])
                used[name].append(time.process_time() - start[1])
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rounds = [b / a for a, b in zip(seconds["ours"], seconds["transformers"])]
        in_bf16, *_ = run_ours(halved, params, rows, keys, sampling)
        results[f"{prompts}x{samples}"] = {
            "tokens_per_second": {
                name: prompts * samples * args.new / median for name, median in medians.items()
            },
            "ratio": medians["transformers"] / medians["ours"],
            "ratio_of_one_round": [min(rounds), max(rounds)],
            "log_prob_difference": agreement(graph, params, rows, answers),
            "log_prob_difference_bf16": agreement(halved, params, rows, in_bf16),
            "ratio_of_cpu_seconds": statistics.median(used["transformers"])
            / statistics.median(used["ours"]),
            "seconds": seconds,
            "cpu_seconds": used,
        }
    return results


def against_memory(args: argparse.Namespace, config: QwenVLConfig) -> dict:
    """Compares decode steps with their floor."""
    graph, params = make_model(config, "bfloat16", "bfloat16")
    bandwidth = measured_bandwidth()
    results = {"copy_bandwidth_bytes_per_second": bandwidth}
    for prompts, samples in args.workloads:
        rows = jax.device_put(make_rows(config, prompts, args.prompt, args.grid))
        keys = sampler.sample_keys(jax.random.key(0), range(prompts), samples)
        sampling = sampling_of(config, args.new, temperature=1.0)
        start = time.perf_counter()
        answers, *_ = run_ours(graph, params, rows, keys, sampling)
        first = time.perf_counter() - start
        times = [run_ours(graph, params, rows, keys, sampling)[1:] for _ in range(args.rounds)]
        prefill, decode = map(statistics.median, zip(*times))
        read = bytes_a_step(config, params, rows["token_mask"], samples, args.new)
        floor, step = sum(read.values()) / bandwidth, decode / (args.new - 1)
        memory = jax.devices()[0].memory_stats() or {}
        results[f"{prompts}x{samples}"] = {
            "first_run_seconds": first,
            "prefill_seconds": prefill,
            "step_ms": 1e3 * step,
            "floor_ms": 1e3 * floor,
            "share_of_limit": floor / step,
            "bytes_a_step": read,
            "tokens_per_second": prompts * samples * args.new / (prefill + decode),
            "log_prob_difference_bf16": agreement(graph, params, rows, answers),
            "peak_bytes": memory.get("peak_bytes_in_use"),
            "seconds": times,
        }
    return results


def sampling_of(config: QwenVLConfig, new: int, temperature: float) -> Sampling:
    vision = (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)
    return Sampling(
        new, stop=(), forbidden=vision, pad=config.pad_token_id, temperature=temperature
    )


def bytes_a_step(
    config: QwenVLConfig, params: dict, token_mask: jax.Array, samples: int, new: int
) -> dict[str, float]:
    """Bytes that a decode step must read in bf16: the decoder's weights, and the keys and values of
    real tokens.

    Of the answers' cache half is counted, since half is filled on average. A tied embedding table
    is counted once, as the head; of an untied table only a few rows are read, so it is left out.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(p, simple=True, separator="."): x.size for p, x in leaves}
    table = "embed." if config.tie_embeddings else "lm_head."
    weights = sum(
        size for name, size in names.items() if name.startswith(("layers.", "norm.", table))
    )
    text = config.text
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    answers = len(token_mask) * samples * new / 2
    return {
        "weights": 2.0 * weights,
        "prompt_cache": 2.0 * token * int(token_mask.sum()),
        "answer_cache": 2.0 * token * answers,
    }


def measured_bandwidth() -> float:
    """Bytes per second, read and written, of the fastest of ten copies."""
    x = jnp.zeros(COPIED, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(copy(x))
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def report(results: dict) -> None:
    """Prints the table."""
    for name, row in results.items():
        if not isinstance(row, dict):
            print(f"{name}: {row:.4g}")
            continue
        shown = {key: value for key, value in row.items() if "seconds" not in key or "ratio" in key}
        print(f"\n{name} (prompts x samples)")
        for key, value in shown.items():
            print(f"  {key:28}{value}")


def main() -> None:
    args = parse_args()
    load = os.getloadavg()
    config = preset(args.preset)
    measure = against_memory if args.accelerator else against_transformers
    results = measure(args, config)
    report(results)
    about = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "settings": vars(args),
    }
    write(f"generate_{args.preset}_{jax.default_backend()}", {**about, "workloads": results})


if __name__ == "__main__":
    main()
