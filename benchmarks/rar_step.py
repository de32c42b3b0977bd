"""Times RAR's step by its parts: rollout, parse, embed, search, update.

    python benchmarks/rar_step.py --out W           tiny: a real run on the built-in catalogue, CPU
    python benchmarks/rar_step.py --out W --generator W/sft --encoder W/agcl    with trained models
    python benchmarks/rar_step.py --accelerator     qwen2_5_vl_3b rewarded by qwen2_vl_2b, 1 GPU
    python benchmarks/rar_step.py --accelerator --preset tiny      the same path with a tiny model

The tiny run is configs/rar.py with its gallery. Its log is read, without the first two steps, which
compile. If --generator or --encoder is missing, that model is trained first, for --learn steps. On
an accelerator the weights are random, in bfloat16, and no answer ends before its last token; the
answers that are parsed are as long as those that are drawn. That needs no library beyond JAX, Flax,
Optax, transformers' tokenizers and Pillow. A decoded token is compared with its floor: the bytes of
weights and cache that a step must read, divided by the chip's bandwidth (of a measured copy if the
chip is not known).

Axes: A micro-batches · C prompts of a micro-batch · N = A C prompts · G answers per prompt · S
prompt tokens · T tokens of an answer · B = N G answers · E embedding.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from generate import bytes_a_step, make_rows, measured_bandwidth, run_ours, sampling_of
from PIL import Image
from running import train, write

from afmrl_jax.attributes.text import format_attributes, parse
from afmrl_jax.configs.rar import get_config
from afmrl_jax.core.chips import CHIPS, chip_of
from afmrl_jax.data.processor import Processor, Row, RowSizes
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.losses.policy import PolicyGradient, policy_loss
from afmrl_jax.models import lora, sampler
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.retrieval.exact import ExactIndex
from afmrl_jax.rl.advantages import group_advantages
from afmrl_jax.rl.rewards import Completion, Retrieved, Reward, rewards
from afmrl_jax.rl.scoring import score_answers
from afmrl_jax.training.gradients import accumulate

PARTS = ("rollout", "parse", "embed", "search", "update")
UNTIMED = 2  # first steps, which compile
VOCABULARY_CHUNK = 16  # as configs/rar.py
OPTIONS = dataclasses.replace(PolicyGradient.of(get_config()), kl=0.02)
# Answers and titles of as many words as are wanted; what they say does not matter here.
WORDS = "neckline closure sleeve volume colour fabric red blue cotton zip round long short large"
WATCH_NOTHING = {
    "copied": 1.0, "leaked": 1.0, "answer_diversity": 0.0, "pair_diversity": 0.0,
    "held_out_gain": -2.0,
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The flags; the defaults depend on whether the preset is tiny."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", action="store_true", help="random weights, see above")
    parser.add_argument("--steps", type=int, default=8, help="timed, after two that are not")
    parser.add_argument("--encoder", help="a run's workdir; with --accelerator a preset")
    parser.add_argument("--out", type=Path, help="of the tiny run: holds workdirs and logs")
    parser.add_argument("--generator", help="of the tiny run: a run's workdir")
    parser.add_argument("--learn", type=int, default=100, help="steps of a model not given")
    parser.add_argument("--preset", default="qwen2_5_vl_3b", help="the generator's")
    parser.add_argument("--dtype", default="bfloat16", help="of computation")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 = all parameters, the paper's")
    parser.add_argument("--queries", type=int, help="N")
    parser.add_argument("--samples", type=int, default=8, help="G")
    parser.add_argument("--micro-batches", type=int, help="A")
    parser.add_argument("--prompt", type=int, help="S, the image's tokens included")
    parser.add_argument("--new", type=int, help="T")
    parser.add_argument("--grid", type=int, help="patches a side of a square image")
    parser.add_argument("--gallery", type=int, help="listings searched; exact below 50,000")
    parser.add_argument("--embed-batch", type=int, help="rows embedded at once")
    tiny = {
        "queries": 4, "micro_batches": 2, "prompt": 64, "new": 24, "grid": 8, "gallery": 4000,
        "embed_batch": 36,
    }  # fmt: skip
    large = {
        "queries": 32, "micro_batches": 16, "prompt": 384, "new": 128, "grid": 24,
        "gallery": 49_000, "embed_batch": 96,
    }  # fmt: skip
    chosen, _ = parser.parse_known_args()
    parser.set_defaults(**tiny if chosen.preset.startswith("tiny") else large)
    args = parser.parse_args()
    if not args.accelerator and not args.out:
        parser.error("the tiny run needs --out, a folder for its workdirs")
    if args.queries % args.micro_batches:
        parser.error(
            f"--queries {args.queries} must be a multiple of --micro-batches {args.micro_batches}"
        )
    return args


# ---- a real run


def real_run(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict]:
    """Part -> seconds of each timed step of a run of configs/rar.py, and figures about answers."""
    models = {"generator": args.generator, "encoder": args.encoder}
    for name, config in (("generator", "sft"), ("encoder", "agcl")):
        if models[name] is None:
            models[name] = str((args.out / config).absolute())
            fields = {"steps": args.learn, "checkpoint_every": 50}
            train(f"configs/{config}.py", args.out / config, fields)
    fields = {"steps": args.steps + UNTIMED, "eval_every": 0, "checkpoint_every": 0}
    fields |= {"eval.validation_listings": 32, "eval.listings": 32} | models
    fields |= {f"watch.{name}": limit for name, limit in WATCH_NOTHING.items()}
    train("configs/rar.py", args.out / "rar", fields)
    lines = (args.out / "rar" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][UNTIMED:]
    config = json.loads((args.out / "rar" / "config.json").read_text())
    gallery = max(
        (args.out / "rar" / "gallery").glob("*.npy"), key=lambda path: path.stat().st_size
    )
    answers = config["queries"] * config["samples"]
    rate = [answers * row["answer_tokens"] / row["seconds_rollout"] for row in rows]
    return {part: [row[f"seconds_{part}"] for row in rows] for part in PARTS}, {
        "answers": answers,
        "answer_tokens": statistics.fmean(row["answer_tokens"] for row in rows),
        "valid": statistics.fmean(row["valid"] for row in rows),
        "gallery": len(np.load(gallery, mmap_mode="r")),
        "tokens_per_second": statistics.median(rate),
    }


# ---- one step's parts with random weights


def random_step(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict]:
    """Part -> seconds of each timed step, and decoding compared with its floor."""
    config, count, samples = preset(args.preset), args.queries, args.samples
    rows = jax.device_put(make_rows(config, count, args.prompt, args.grid))
    graph, params, update = make_update(config, args)
    sampling = sampling_of(config, args.new, temperature=1.0)
    answers, listings = make_texts(args, count * samples), make_listings(args, count)
    embed, tokenizer = make_embedder(args)
    token_ids = [tokenizer.encode(text).ids[: args.new] for text in answers]
    search = make_search(embed(listings[:1], [""]).shape[1], args)

    seconds = {part: [] for part in (*PARTS, "prefill", "decode")}
    for number in range(UNTIMED + args.steps):
        keys = sampler.sample_keys(jax.random.key(number), range(count), samples)
        clock = [time.perf_counter()]
        drawn, prefill, decode = run_ours(graph, params(), rows, keys, sampling)
        drawn = jax.block_until_ready(drawn)
        clock.append(time.perf_counter())
        parsed = [parse(tokenizer.decode(ids)) for ids in token_ids]
        clock.append(time.perf_counter())
        texts = [text for n in range(count) for text in ["", *answers[n * samples :][:samples]]]
        vectors = embed([listing for listing in listings for _ in range(samples + 1)], texts)
        clock.append(time.perf_counter())
        values = search(vectors.reshape(count, samples + 1, -1), parsed)
        clock.append(time.perf_counter())
        loss = update(rows, drawn, group_advantages(values, scale=True))
        clock.append(time.perf_counter())
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss}")
        times = dict(zip(PARTS, np.diff(clock).tolist())) | {"prefill": prefill, "decode": decode}
        if number >= UNTIMED:
            for part, duration in times.items():
                seconds[part].append(duration)
    prefill, decode = (statistics.median(seconds.pop(part)) for part in ("prefill", "decode"))
    read = bytes_a_step(
        config, lora.without_adapters(params()), rows["token_mask"], samples, args.new
    )
    return seconds, against_memory(args, read, prefill, decode)


def against_memory(args: argparse.Namespace, read: dict, prefill: float, decode: float) -> dict:
    """Tokens per second, and their limit by reading weights and cache, here and on other chips."""
    device, answers = jax.devices()[0], args.queries * args.samples
    chip = chip_of(device)
    bandwidth = chip.bandwidth if chip else measured_bandwidth()
    bandwidths = {name: CHIPS[name].bandwidth for name in ("NVIDIA H200", "TPU v5e")}
    bandwidths["here"] = bandwidth
    limit = {name: answers * speed / sum(read.values()) for name, speed in bandwidths.items()}
    rate = answers * (args.new - 1) / decode
    return {
        "bandwidth": bandwidth,
        "bytes_a_decode_step": read,
        "seconds_prefill": prefill,
        "seconds_decode": decode,
        "tokens_per_second": answers * args.new / (prefill + decode),
        "decoded_tokens_per_second": rate,
        "limit_tokens_per_second": limit,
        "share_of_limit": rate / limit["here"],
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def make_update(config: QwenVLConfig, args: argparse.Namespace):
    """Returns the generator's graph, a function that returns its parameters, and a function that
    updates them: (rows [N, ...], Samples, Advantages) -> loss. The reference model is the generator
    before its first update."""
    rank, full = args.lora_rank, not args.lora_rank

    def make(rank: int) -> QwenVL:
        rngs = nnx.Rngs(0)
        param_dtype = "float32" if full else args.dtype  # only trained parameters need float32
        options = {"dtype": args.dtype, "param_dtype": param_dtype, "remat": args.remat}
        model = QwenVL(config, rngs=rngs, **options)
        if rank:
            lora.adapt(model, lora.LoRA(rank, 2 * rank, r"^layers\."), rngs)
        return model

    graph, plain = (nnx.split(nnx.eval_shape(functools.partial(make, r)))[0] for r in (rank, 0))
    trained, frozen = lora.split(jax.jit(lambda: nnx.to_pure_dict(nnx.state(make(rank))))())
    dtype = jnp.dtype(args.dtype)
    # Copies, also where the dtype is the same: a step gives up what it trains.
    reference = jax.tree.map(lambda x: jnp.array(x, dtype), trained) if full else frozen
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    state = trained, jax.jit(optimizer.init)(trained)
    score = functools.partial(score_answers, chunk=VOCABULARY_CHUNK, temperature=1.0)

    def loss(params, frozen, part):
        rows, answers = part
        scores = score(graph, lora.join(params, frozen), rows, answers)
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in answers.items()}
        log_probs, entropy = (x.reshape(-1, x.shape[-1]) for x in scores)
        flat["old_log_probs"] = jax.lax.stop_gradient(log_probs)
        return policy_loss(log_probs, entropy, flat, OPTIONS)[:2]

    @jax.jit
    def refer(params, rows, answers):
        parts = (rows, {name: answers[name] for name in ("tokens", "mask")})
        return jax.lax.map(lambda part: score(plain, params, *part)[0], parts)

    @functools.partial(jax.jit, donate_argnums=0)
    def learn(state, frozen, rows, answers):
        params, moments = state
        gradient = accumulate(lambda params, part: loss(params, frozen, part))
        (value, _), gradients = gradient(params, (rows, answers))
        changes, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, changes), moments), value

    def update(rows, drawn, advantages) -> float:
        nonlocal state
        zero = np.repeat(advantages.zero_variance[:, None], args.samples, 1)
        answers = {
            "tokens": drawn.tokens, "mask": drawn.mask, "truncated": drawn.truncated,
            "sampler_log_probs": drawn.log_probs, "zero_variance": zero,
            "advantages": np.repeat(advantages.values[..., None], args.new, -1),
        }  # fmt: skip
        rows, answers = jax.tree.map(
            lambda x: jnp.reshape(x, (args.micro_batches, -1, *x.shape[1:])), (rows, answers)
        )
        answers["reference_log_probs"] = refer(reference, rows, answers)
        state, value = learn(state, frozen, rows, answers)
        return float(value)

    return graph, lambda: lora.join(state[0], frozen), update


def make_texts(args: argparse.Namespace, count: int) -> list[str]:
    """Texts of attributes, each of at least T tokens of a byte-level tokenizer with few words."""
    random, words = np.random.default_rng(0), WORDS.split()

    def make_text() -> str:
        pairs = {f"{name} {n}": " ".join(random.choice(words, 2)) for n, name in enumerate(words)}
        return format_attributes(pairs)

    return [make_text() for _ in range(count)]


def make_listings(args: argparse.Namespace, count: int) -> list[Row]:
    """The queries' titles, of random words, and photos, of noise."""
    random, side = np.random.default_rng(1), args.grid * 14
    return [
        Row(
            " ".join(random.choice(WORDS.split(), 10)),
            (Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)),),
        )
        for _ in range(count)
    ]


def make_embedder(args: argparse.Namespace):
    """Returns a function (listings, attributes' texts) -> float32[n, E] with a random encoder, in
    which a thread makes the next batch's rows as in a real run; and the tokenizer, which is used
    for the answers, too."""
    name = args.encoder or ("tiny" if args.preset.startswith("tiny") else "qwen2_vl_2b")
    tokenizer = train_tokenizer([WORDS] * 4, 400)
    config = preset(name).replace(**special_token_ids(tokenizer))
    area, dtype = (args.grid * config.vision.patch_size) ** 2, args.dtype
    sizes = RowSizes(args.prompt + args.new, args.grid**2, min_pixels=area // 2, max_pixels=area)
    processor = Processor(tokenizer, config, sizes)

    def make() -> Embedder:
        return Embedder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    graph, _ = nnx.split(nnx.eval_shape(make))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    compiled = jax.jit(lambda params, rows: nnx.merge(graph, params)(rows))

    def embed(listings: list[Row], texts: list[str]) -> np.ndarray:
        size = args.embed_batch
        rows = [Row(f"{row.text}\n{text}", row.images) for row, text in zip(listings, texts)]
        filled = rows + rows[:1] * (-len(rows) % size)
        batches = [filled[start : start + size] for start in range(0, len(filled), size)]
        with ThreadPoolExecutor(max_workers=1) as pool:
            vectors = [compiled(params, batch) for batch in pool.map(processor, batches)]
        return np.concatenate([np.asarray(x, np.float32) for x in vectors])[: len(rows)]

    return embed, tokenizer


def make_search(width: int, args: argparse.Namespace) -> Callable[..., np.ndarray]:
    """Returns a function (vectors float32[N, G + 1, E], parsed answers) -> rewards float32[N, G]
    that searches in a random gallery in
    which each query has one right listing."""
    random, options = (
        np.random.default_rng(2),
        dataclasses.replace(Reward.of(get_config()), kind="margin"),
    )
    vectors = random.normal(size=(args.gallery, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ExactIndex("random").build(vectors, np.arange(args.gallery))

    def find(queries: np.ndarray, right: np.ndarray) -> Retrieved:
        ids, scores = index.search(queries, options.k + 2)
        right_scores = (queries * vectors[right]).sum(1, keepdims=True)
        return Retrieved(ids, scores, right[:, None], right_scores, np.full(len(right), -1))

    def search(queries: np.ndarray, parsed: list) -> np.ndarray:
        count, samples = queries.shape[0], queries.shape[1] - 1
        right = np.arange(count)
        enriched = find(queries[:, 1:].reshape(count * samples, -1), np.repeat(right, samples))
        plain = find(queries[:, 0], right)
        completions = [Completion.of("", answer, args.new) for answer in parsed]
        asking: list = []  # the measures do not look at the listings
        return rewards(completions, asking, enriched, plain, options)[0].reshape(count, samples)

    return search


# ---- the report


def summary(seconds: dict[str, list[float]]) -> dict:
    """Median and extremes of each part, and its share of all steps' seconds."""
    steps = [sum(parts) for parts in zip(*seconds.values())]
    searched = [a + b for a, b in zip(seconds["parse"], seconds["search"])]
    shares = [part / whole for part, whole in zip(searched, steps)]
    return {
        "step_seconds": statistics.median(steps),
        "parts": {
            part: {
                "median_ms": 1e3 * statistics.median(times),
                "min_ms": 1e3 * min(times),
                "max_ms": 1e3 * max(times),
                "share": sum(times) / sum(steps),
            }
            for part, times in seconds.items()
        },
        "search_and_parse_share": {
            "of_all_steps": sum(searched) / sum(steps), "min": min(shares), "max": max(shares),
        },
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    load = os.getloadavg()
    seconds, figures = (random_step if args.accelerator else real_run)(args)
    result = summary(seconds)
    print(f"{'':10}{'median ms':>11}{'min':>9}{'max':>9}{'share':>8}")
    for part, row in result["parts"].items():
        numbers = f"{row['median_ms']:11.1f}{row['min_ms']:9.1f}{row['max_ms']:9.1f}"
        print(f"{part:10}{numbers}{row['share']:8.1%}")
    share = result["search_and_parse_share"]
    print(f"search and parse: {share['of_all_steps']:.2%} of a step (at most {share['max']:.2%})")
    for name, value in figures.items():
        print(f"{name}: {value}")
    # Only --steps applies to the real run; its sizes are those of configs/rar.py.
    names = [*vars(args)] if args.accelerator else ["steps"]
    about = {
        "device": jax.devices()[0].device_kind,
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "settings": {name: getattr(args, name) for name in names if name != "out"},
    }
    kind = f"_{args.preset}_{jax.default_backend()}" if args.accelerator else ""
    write(f"rar_step{kind}", {**about, **figures, **result, "seconds": seconds})


if __name__ == "__main__":
    main()
