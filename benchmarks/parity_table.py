"""Prints the difference of each family's results from transformers', as the parity tests measure.

    python benchmarks/parity_table.py

For float32: max |difference|. For bf16: relative error and lowest cosine of the embeddings against
float32, of this project and of transformers, which rounds as much. Writes
benchmarks/results/parity.json.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import transformers
from running import ROOT, write

sys.path.insert(0, str(ROOT / "tests" / "parity"))
from qwen_cases import CASES, CHECKS, bfloat16_embeddings, make_case, torch_bfloat16_embeddings


def measure(name: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(name, Path(folder))
        result = {check: difference(case) for check, difference in CHECKS.items()}
        for library, embeddings in (
            ("bf16", bfloat16_embeddings),
            ("transformers' bf16", torch_bfloat16_embeddings),
        ):
            error, cosine = embeddings(case)
            result |= {f"{library}: relative error": error, f"{library}: cosine": cosine}
    return result


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    table = {name: measure(name) for name in CASES}
    print(f"{'':34}", *(f"{name:>16}" for name in table))
    for check in next(iter(table.values())):
        digits = ".5f" if "cosine" in check else ".1e"
        print(f"{check:34}", *(f"{row[check]:16{digits}}" for row in table.values()))
    versions = {package: version(package) for package in ("torch", "transformers")}
    write("parity", {**versions, "max_difference": table})


if __name__ == "__main__":
    main()
