"""Times a contrastive training step, on CPU also that of transformers' Qwen-VL with torch.

    python benchmarks/train_step.py                   tiny, on CPU, both libraries on the same batch
    python benchmarks/train_step.py --preset tiny_qwen3            another family; or tiny_qwen2_5
    python benchmarks/train_step.py --accelerator     qwen2_vl_2b, random weights, GradCache, 1 GPU
    python benchmarks/train_step.py --accelerator --preset qwen2_5_vl_3b --remat full --lora-rank 16

A step embeds queries and targets, takes InfoNCE over the batch, computes and clips gradients, and
updates all parameters with AdamW (with --lora-rank only the decoder's adapters, on a frozen base).
Both libraries begin with the same parameters and must compute the same loss. Their steps alternate,
so that the machine's other work slows both alike. Compilation is not timed, and the batch is
already on the device. Prints a table, writes JSON.

Axes: A micro-batches · C pairs of a micro-batch · V = 2 views (query, target) · B = A · C pairs.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from afmrl_jax.configs import agcl
from afmrl_jax.core.chips import chip_of
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.losses.contrastive import Contrastive, contrastive_loss
from afmrl_jax.models import lora
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.planning import cost
from afmrl_jax.training.gradients import gradcache
from afmrl_jax.weights import hf_weights

Rows = dict[str, np.ndarray]
Step = Callable[[], float]  # one training step; returns its loss

TEMPERATURE, WEIGHT_DECAY, CLIP_NORM = 0.02, 0.05, 1.0
# Small: one batch is learnt by heart in five steps at 1e-4, and then numbers too small to be
# normal floats would be timed.
LEARNING_RATE = 1e-6
PLAIN = dataclasses.replace(
    Contrastive.of(agcl.get_config("vlm2vec")), temperature=TEMPERATURE, symmetric=False
)
DECODER = r"^layers\."  # which kernels --lora-rank adapts
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "torch", "numpy")
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event for each compilation
REST = 0.2  # seconds between two libraries' steps, for the first library's threads to stop spinning


def parse_args() -> argparse.Namespace:
    """The flags; the defaults depend on --accelerator."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--accelerator", action="store_true", help="ours alone, utilisation, memory"
    )
    parser.add_argument("--preset", help="a name of afmrl_jax.models.presets")
    parser.add_argument("--batch", type=int, help="pairs of the global batch")
    parser.add_argument(
        "--micro-batches", type=int, help="GradCache: pieces of the batch; 1 = direct"
    )
    parser.add_argument("--steps", type=int, help="timed steps, after two that are not")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), help="of computation")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--lora-rank", type=int, default=0, help="ours alone; 0 = all parameters")
    parser.add_argument("--max-tokens", type=int, help="of a row, its image's included")
    parser.add_argument("--max-patches", type=int, help="of a row; an image fills 3/4 or more")
    parser.add_argument("--out", type=Path, help="the JSON file, else benchmarks/results/...")
    on_cpu = {
        "preset": "tiny", "batch": 64, "micro_batches": 1, "steps": 20, "dtype": "both",
        "max_tokens": 56, "max_patches": 64,
    }  # fmt: skip
    on_accelerator = {
        "preset": "qwen2_vl_2b", "batch": 1024, "micro_batches": 64, "steps": 3,
        "dtype": "bfloat16", "max_tokens": 208, "max_patches": 576,
    }  # fmt: skip
    chosen, _ = parser.parse_known_args()
    parser.set_defaults(**on_accelerator if chosen.accelerator else on_cpu)
    args = parser.parse_args()
    if min(args.batch, args.micro_batches, args.steps) < 1 or args.batch % args.micro_batches:
        parser.error(
            f"--batch {args.batch} must be a multiple of --micro-batches {args.micro_batches}"
        )
    return args


def make_rows(args: argparse.Namespace) -> tuple[QwenVLConfig, Rows]:
    """The model's configuration, and rows [A, C, V, ...] as the processor makes them.

    Photos are noise, in three aspect ratios; texts have random tokens and lengths, so that every
    row is padded.
    """
    random = np.random.default_rng(0)
    tokenizer = train_tokenizer([], 270)
    config = preset(args.preset).replace(**special_token_ids(tokenizer))
    area = args.max_patches * config.vision.patch_size**2
    processor = Processor(
        tokenizer,
        config,
        max_tokens=args.max_tokens,
        max_patches=args.max_patches,
        min_pixels=area * 3 // 4,
        max_pixels=area,
    )
    rows = []
    for _ in range(2 * args.batch):
        aspect = random.choice([3 / 4, 1, 4 / 3])
        size = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        rows.append(
            Row("x" * int(random.integers(args.max_tokens // 4, args.max_tokens)), (image,))
        )
    batch = processor(rows)
    # Random ids, because the tiny tokenizer's ids would look up only a few rows of a large table.
    text = batch["tokens"] == tokenizer.token_to_id("x")
    batch["tokens"][text] = random.integers(270, config.vocab_size, text.sum())
    shape = (args.micro_batches, args.batch // args.micro_batches, 2)
    return config, {name: array.reshape(*shape, *array.shape[1:]) for name, array in batch.items()}


def infonce(embeddings: jax.Array) -> tuple[jax.Array, None]:
    """Mean InfoNCE of queries -> targets; embeddings: float32[A, C, V, E]."""
    flat = embeddings.reshape(-1, *embeddings.shape[2:])
    products = jnp.arange(flat.shape[0])
    info = {"query_product": products, "target_product": products}
    total, count, _ = contrastive_loss(flat[:, 0], flat[:, 1], info, PLAIN)
    return total / count, None


def make_model(config: QwenVLConfig, rank: int, **options: str) -> Embedder:
    """A random model, the same at each call: float32 parameters, a frozen base in `dtype`."""
    rngs = nnx.Rngs(0)
    if not rank:
        return Embedder(config, rngs=rngs, **options)
    model = Embedder(config, rngs=rngs, param_dtype=options["dtype"], **options)
    lora.adapt(model, lora.LoRA(rank, 2 * rank, DECODER), rngs)
    return model


def fresh_params(make: Callable[[], Embedder]) -> dict:
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()


def jax_step(
    config: QwenVLConfig, rows: Rows, dtype: str, remat: str, rank: int
) -> tuple[Step, dict]:
    """This project's step, compiled; numbers of parameters, bytes of arguments and temporaries."""
    make = functools.partial(make_model, config, rank, dtype=dtype, remat=remat)
    graph, _ = nnx.split(nnx.eval_shape(make))

    def embed(params, chunk):
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in chunk.items()}
        vectors = nnx.merge(graph, params)(flat)
        return vectors.reshape(*chunk["tokens"].shape[:2], -1)

    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, frozen, rows):
        trained, opt_state = state
        gradient = gradcache(
            lambda trained, chunk: embed(lora.join(trained, frozen), chunk),
            lambda _, embeddings: infonce(embeddings),
        )
        (loss, _), gradients = gradient(trained, rows)
        changes, opt_state = optimizer.update(gradients, opt_state, trained)
        return (optax.apply_updates(trained, changes), opt_state), loss

    trained, frozen = lora.split(fresh_params(make))
    counts = {"trained": count(trained), "frozen": count(frozen)}
    state, on_device = (trained, jax.jit(optimizer.init)(trained)), jax.device_put(rows)
    memory = update.lower(state, frozen, on_device).compile().memory_analysis()

    def step() -> float:
        nonlocal state
        state, loss = jax.block_until_ready(update(state, frozen, on_device))
        return float(loss)

    return step, {
        "parameters": counts,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def count(params: dict) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def torch_step(config: QwenVLConfig, rows: Rows, dtype: str) -> tuple[Step, dict]:
    """The same step with transformers' model without its language head; bfloat16 by autocast.

    It gets only real patches, and M-RoPE positions, so that it does not compute them again.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = config.to_hf()
    settings = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModel.from_config(settings, dtype=torch.float32).train()
    weights = hf_weights.to_hf(fresh_params(functools.partial(make_model, config, 0)), config)
    # Names in files: model.layers... and visual..., or model.language_model... and model.visual...
    place = re.compile(r"^(model\.)?((visual|language_model)\.)?")
    model.load_state_dict(
        {
            place.sub(lambda m: m[2] or "language_model.", name): torch.from_numpy(array.copy())
            for name, array in weights
        }
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    flat = {name: array.reshape(-1, *array.shape[3:]) for name, array in rows.items()}
    real = flat["patch_segments"] > 0
    sides = np.where(real[..., None], flat["patch_positions"], -1).max(1) + 1  # one image a row
    inputs = {
        "input_ids": torch.tensor(flat["tokens"]).long(),
        "attention_mask": torch.tensor(flat["token_mask"]).long(),
        "mm_token_type_ids": torch.tensor(flat["tokens"] == config.image_token_id).int(),
        "position_ids": torch.tensor(flat["positions"]).long().transpose(0, 1),
        "pixel_values": torch.tensor(flat["patches"][real]),
        "image_grid_thw": torch.tensor(np.insert(sides, 0, 1, axis=1)).long(),
    }
    last = torch.tensor(flat["token_mask"].sum(1) - 1)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        with mixed:
            hidden = model(**inputs, use_cache=False).last_hidden_state
        pooled = hidden[torch.arange(len(last)), last].float()
        queries, targets = (
            torch.nn.functional.normalize(pooled, dim=-1).view(-1, 2, pooled.shape[1]).unbind(1)
        )
        scores = queries @ targets.T / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return float(loss.detach())

    return step, {"parameters": {"trained": sum(p.numel() for p in model.parameters())}}


def first_losses(steps: dict[str, Step]) -> dict[str, float]:
    """The loss of each library before any update. Exits if two float32 losses differ."""
    losses = {name: step() for name, step in steps.items()}
    exact = [loss for name, loss in losses.items() if name.endswith("float32")]
    if not np.allclose(exact, exact[:1], rtol=1e-3):
        sys.exit(f"the libraries do not compute the same: first losses {losses}")
    return losses


def time_steps(steps: dict[str, Step], count: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of `count` steps of each library, taken in turn, after one untimed step; and the
    number of compilations during the timed steps."""
    compilations = 0

    def listen(event: str, duration: float, **_) -> None:
        nonlocal compilations
        compilations += event == COMPILED

    for step in steps.values():
        step()
    jax.monitoring.register_event_duration_secs_listener(listen)
    seconds = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            time.sleep(REST if len(steps) > 1 else 0)
            start = time.perf_counter()
            loss = step()
            seconds[name].append(time.perf_counter() - start)
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss became {loss}")
    jax.monitoring.unregister_event_duration_listener(listen)
    return seconds, compilations


def utilisation(config: QwenVLConfig, rows: Rows, args: argparse.Namespace, seconds: float) -> dict:
    """Useful FLOP/s as `planning.cost` counts them, their share of the chip's peak in bf16, and
    the peak of memory."""
    make = functools.partial(make_model, config, args.lora_rank, dtype="float32")
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make())))
    memory = jax.devices()[0].memory_stats() or {}
    counted = {name: rows[name] for name in ("token_mask", "patch_segments", "patch_positions")}
    work = jax.jit(functools.partial(cost.work, config))(counted)
    amount = {name: float(value) for name, value in work.items()}
    flops = cost.step_flops(config, params, amount, gradcache=args.micro_batches > 1)
    chip = chip_of(jax.devices()[0])
    peak = chip.flops if chip else None
    return {
        "amount": amount,
        "useful_flops_per_step": flops,
        "useful_tflops_per_second": flops / seconds / 1e12,
        "utilisation": flops / seconds / peak if peak else None,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def summarise(seconds: dict[str, list[float]], batch: int) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of each library, and pairs per second by the median."""
    return {
        name: {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "max_ms": 1e3 * max(times),
            "pairs_per_second": batch / statistics.median(times),
        }
        for name, times in seconds.items()
    }


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Torch's time divided by JAX's: by the medians, and the least and most of a single round."""
    ratios_by_pair = {}
    for ours in (name for name in seconds if name.startswith("jax")):
        for theirs in (name for name in seconds if name.startswith("torch")):
            rounds = [b / a for a, b in zip(seconds[ours], seconds[theirs])]
            medians = statistics.median(seconds[theirs]) / statistics.median(seconds[ours])
            ratios_by_pair[f"{theirs} / {ours}"] = {
                "medians": medians, "min": min(rounds), "max": max(rounds),
            }  # fmt: skip
    return ratios_by_pair


def environment() -> dict:
    """The command, machine and versions that the figures depend on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "XLA_FLAGS")},
        "python": platform.python_version(),
        "versions": installed,
    }


def report(result: dict) -> None:
    """Prints the table."""
    print(f"\n{'':18}{'median ms':>11}{'min':>9}{'max':>9}{'pairs/s':>10}{'first loss':>12}")
    for name, row in result["steps"].items():
        print(
            f"{name:18}{row['median_ms']:11.1f}{row['min_ms']:9.1f}{row['max_ms']:9.1f}"
            f"{row['pairs_per_second']:10.1f}{result['first_losses'][name]:12.4f}"
        )
    for name, row in result["ratios"].items():
        print(f"{name}: {row['medians']:.2f}x  (one round: {row['min']:.2f} to {row['max']:.2f})")
    for name, use in result["utilisation"].items():
        share = f"{use['utilisation']:.1%} of peak" if use["utilisation"] else "peak not known"
        memory = f"{use['peak_bytes'] / 2**30:.1f} GiB" if use["peak_bytes"] else "not reported"
        print(
            f"{name}: {use['useful_tflops_per_second']:.2f} useful TFLOP/s, {share}, "
            f"peak memory {memory}"
        )
    print(f"compilations during the timed steps: {result['compilations']}")


def main() -> None:
    args = parse_args()
    config, rows = make_rows(args)
    if args.accelerator:
        rows["patches"] = rows["patches"].astype(jnp.bfloat16)  # as the first layer does
    dtypes = ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,)
    steps, details = {}, {}
    for dtype in dtypes:
        steps[f"jax {dtype}"], details[f"jax {dtype}"] = jax_step(
            config, rows, dtype, args.remat, args.lora_rank
        )
        if not args.accelerator and not args.lora_rank:
            name = f"torch {dtype}"
            steps[name], details[name] = torch_step(config, rows, dtype)
    losses = first_losses(steps)
    seconds, compilations = time_steps(steps, args.steps)
    result = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "shapes": {name: [*array.shape, array.dtype.name] for name, array in rows.items()},
        "real_share": {
            "tokens": float(rows["token_mask"].mean()),
            "patches": float((rows["patch_segments"] > 0).mean()),
        },
        "models": details,
        "steps": summarise(seconds, args.batch),
        "ratios": ratios(seconds),
        "utilisation": {
            name: utilisation(config, rows, args, statistics.median(times))
            for name, times in seconds.items()
            if name.startswith("jax")
        },
        "first_losses": losses,
        "compilations": compilations,
        "seconds": seconds,
    }
    report(result)
    adapted = "_lora" if args.lora_rank else ""
    default = f"train_step_{args.preset}{adapted}_{jax.default_backend()}.json"
    out = args.out or Path(__file__).parent / "results" / default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")
    if compilations:
        sys.exit("the step was compiled again after its first calls")


if __name__ == "__main__":
    main()
