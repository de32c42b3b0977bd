"""Measures the time to convert a large catalogue and to open it again, and the memory it takes.

    python benchmarks/catalogue.py --listings 10000000

Makes JSON lines without images, converts them, and opens them a second time in a fresh process;
prints a table and writes benchmarks/results/catalogue.json. Memory is the growth of the process's
resident memory by opening, including the pages of the memory map that were touched.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "catalogue.json"
TOUCHED = 10_000  # listings read after opening, spread over the catalogue


def write_listings(path: Path, count: int) -> None:
    """Writes JSON lines of about 400 bytes, three listings per product."""
    description = "Hand-made stoneware, glazed twice and fired at 1,240 degrees. Dishwasher-proof. "
    colors = ("navy blue", "olive", "crimson", "sand", "charcoal")
    with path.open("w") as file:
        for i in range(count):
            row = {
                "listing_id": f"listing-{i:09d}",
                "product_id": f"product-{i // 3:09d}",
                "title": f"Mug {colors[i % 5]} no. {i // 3}",
                "description": description * 2,
                "category": "Home/Kitchen/Mugs",
                "attributes": {"color": colors[i % 5], "volume": f"{i % 7}00 ml"},
                "images": [],
            }
            file.write(json.dumps(row) + "\n")


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_open(folder: Path, cache: Path) -> dict[str, float]:
    """Seconds and bytes of memory for opening, and for reading TOUCHED listings afterwards."""
    from afmrl_jax.catalog.listings import open_catalog

    before, start = resident_bytes(), time.perf_counter()
    catalog = open_catalog(folder, cache_dir=cache)
    seconds, opened = time.perf_counter() - start, resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    for index in range(0, len(catalog), max(1, len(catalog) // TOUCHED)):
        catalog.listing(index)
    read = time.perf_counter() - start
    catalog.products.sum()
    catalog.indices("train")
    return {
        "seconds": seconds,
        "opened_bytes": opened - before,
        "peak_bytes": peak - before,
        "read_seconds": read / TOUCHED,
        "used_bytes": resident_bytes() - before,
    }


def in_fresh_process(folder: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder), str(cache)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--listings", type=int, default=100_000)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_open(*arguments.measure)))
        return
    count = arguments.listings
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary) / "shop", Path(temporary) / "cache"
        folder.mkdir()
        write_listings(folder / "products.jsonl", count)
        first = in_fresh_process(folder, cache)
        second = in_fresh_process(folder, cache)
    result = {
        "listings": count,
        "conversion_seconds": first["seconds"],
        "conversion_peak_bytes_per_listing": first["peak_bytes"] / count,
        "open_seconds": second["seconds"],
        "open_bytes_per_listing": second["opened_bytes"] / count,
        "used_bytes_per_listing": second["used_bytes"] / count,
        "listing_microseconds": second["read_seconds"] * 1e6,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
    }
    for name, value in result.items():
        print(f"{name:36} {value:,.3f}" if isinstance(value, float) else f"{name:36} {value}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
