"""Estimates the time of a step of the published sizes on TPU pods, by XLA's TPU compiler.

python benchmarks/scaling.py                       # the plan tables, and how cost grows with chips
python benchmarks/scaling.py --only agcl scaling   # some of: agcl, rar, scaling, slices

Compiles without a TPU (pip install -e ".[tpu-plan]"); nothing is run on a TPU. Cycles are the
compiler's estimates, the bytes of exchanges come from the compiled program, and the bandwidth of a
link from the data sheet. AGCL's rows are full: 208 tokens, 144 of them of an image of 576 patches.
"""

import argparse
import itertools
import json
import time
from dataclasses import asdict
from typing import Any

from running import RESULTS, write

from afmrl_jax.configs import agcl, rar
from afmrl_jax.programs import plan

ROW = {"max_tokens": 208, "max_patches": 576}
PODS = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8")
# Chip -> remat policies in the order in which they are tried -> the most pairs per chip and
# micro-batch with which the policy may fit. A micro-batch is not made smaller for a policy.
REMAT = {
    "v5e": {"dots": 4, "attention": 32, "full": 32},
    "v5p": {"dots": 16, "attention": 128},
    "v6e": {"dots": 8, "attention": 32, "full": 64},
}
BATCHES = (1024, 8192, 32768)
WEAK = 32  # pairs per chip in the rows where the batch grows with the number of chips
GROWING = ("v5e:4x4", "v5e:8x8", "v5e:16x16")
SLICES = ("1xv5e:8x8", "2xv5e:8x8", "4xv5e:8x8")


def planned(config: Any, topology: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The reports of a configuration on a topology, by part. Reports that an earlier call has
    written are reused."""
    began, path = time.monotonic(), RESULTS / "scaling.json"
    earlier = json.loads(path.read_text())["result"] if path.exists() else {}
    for entry in itertools.chain.from_iterable(earlier.values()):
        if (entry["topology"], entry["fields"]) == (topology, fields):
            return entry
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    devices = plan.devices_of(topology)
    parts = {report.name: asdict(report) for report in plan.reports_of(config, devices)}
    print(f"{topology} {fields}: compiled in {time.monotonic() - began:.0f} s", flush=True)
    return {"topology": topology, "chips": len(devices), "fields": fields, "parts": parts}


def encoder(topology: str, batch: int) -> dict[str, Any]:
    """The 2B AGCL step, all parameters trained, with the first remat policy that fits."""
    name = topology.partition("x")[2] if topology[0].isdigit() else topology
    slices = int(topology[0]) if topology[0].isdigit() else 1
    chips = slices * len(plan.devices_of(name))
    policies = REMAT[name.partition(":")[0]]
    pairs = min(batch // chips, max(policies.values()))  # per chip and micro-batch
    for remat in (policy for policy, most in policies.items() if most >= pairs):
        fields = {
            "model.preset": "qwen2_vl_2b",
            "model.dtype": "bfloat16",
            "model.remat": remat,
            "batch": batch,
            "micro_batches": batch // chips // pairs,
            "mesh.slice": slices,
            "mesh.fsdp": 16,
            "eval.batch": max(128, chips),
            **{f"data.{k}": v for k, v in ROW.items()},
        }
        entry = planned(agcl.get_config(), topology, fields)
        if all(part["needed"] <= part["limit"] for part in entry["parts"].values()):
            break
    return entry


def generator(topology: str) -> dict[str, Any]:
    """The 3B RAR step, all parameters trained: 8 answers per query, 4 queries per chip."""
    chips = len(plan.devices_of(topology))
    fields = {
        "generator": "qwen2_5_vl_3b",
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "queries": 4 * chips,
        "samples": 8,
        "micro_batches": 4,
        "mesh.fsdp": 16,
        "data.max_answer": 64,
        **{f"data.{k}": v for k, v in ROW.items()},
    }
    return planned(rar.get_config(), topology, fields)


def row(entry: dict[str, Any], part: str) -> list[str]:
    report, fields = entry["parts"][part], entry["fields"]
    cells = [entry["topology"], str(fields.get("batch", fields.get("queries"))), part]
    cells += [
        fields["model.remat"],
        str(fields["micro_batches"]),
        f"{report['needed'] / 2**30:.1f}",
    ]
    if report["seconds"] is None:
        return [*cells, "no", *[""] * 6]
    floors = [f"{report['floors'][name]:.2f}" for name in ("products", "memory", "exchanges")]
    sent = sum(exchange["bytes"] for exchange in report["exchanges"]) / 2**30
    fits = "yes" if report["needed"] <= report["limit"] else "no"
    return [
        *cells, fits, f"{report['seconds']:.2f}", *floors, f"{report['utilisation']:.0%}",
        f"{sent:.1f}",
    ]  # fmt: skip


HEAD = (
    "topology", "batch", "part", "remat", "micro_batches", "GiB", "fits", "seconds", "products",
    "memory", "exchanges", "utilisation", "GiB exchanged",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["agcl", "rar", "scaling", "slices"])
    args = parser.parse_args()
    path = RESULTS / "scaling.json"
    earlier = json.loads(path.read_text())["result"] if path.exists() else {}
    result = dict(earlier)
    jobs = {
        "agcl": [lambda t=t, b=b: encoder(t, b) for t in PODS for b in BATCHES],
        "rar": [lambda: generator("v5e:16x16"), lambda: generator("v5p:4x4x4")],
        "scaling": [lambda t=t: encoder(t, WEAK * len(plan.devices_of(t))) for t in GROWING],
        "slices": [lambda t=t: encoder(t, WEAK * 64 * int(t[0])) for t in SLICES],
    }
    for name in args.only:
        done: list[dict[str, Any]] = []
        for job in jobs[name]:
            done.append(job())
            # Entries of an earlier call stay in the file until they are replaced.
            result[name] = done + [entry for entry in earlier.get(name, []) if entry not in done]
            write("scaling", {"result": result})
        result[name] = done
        write("scaling", {"result": result})
    for name in args.only:
        lines = [row(entry, part) for entry in result[name] for part in entry["parts"]]
        print(f"\n{name}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


if __name__ == "__main__":
    main()
