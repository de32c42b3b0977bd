"""What an encoder's wrong first answers differ in from their queries.

python benchmarks/wrong_first.py RUN [RUN ...]     # prints a table, and writes wrong_first.json

Each listing of the validation split of agcl_ladder.py's catalogue looks for its product among the
others, with image and text. Where another product comes first, the two products' true attributes
are compared:
  another category   the first answer is another kind of thing
  hidden alone       they differ in attributes that no photo shows
  one shown          they differ in one attribute that each photo shows; the table names it
  more shown         they differ in several of these
"""

import argparse
from collections import Counter

import numpy as np
from agcl_ladder import JUDGED
from running import write

import afmrl_jax as aj
from afmrl_jax.catalog.builtin.vocabulary import CATEGORIES
from afmrl_jax.catalog.listings import Catalog, Listing
from afmrl_jax.core.tables import markdown_table

NAMED = 8  # attributes in the table
FIRST = ("another category", "hidden alone", "more shown")
HIDDEN = {category.path: category.hidden for category in CATEGORIES.values()}


def difference(asked: Listing, answer: Listing) -> str:
    """The kind of difference between a query's product and its wrong first answer's."""
    if asked.category != answer.category:
        return "another category"
    shown = [
        name
        for name in asked.attributes.keys() | answer.attributes.keys()
        if asked.attributes.get(name) != answer.attributes.get(name)
        and name not in HIDDEN[asked.category]
    ]
    if not shown:
        return "hidden alone"
    return f"one shown: {shown[0]}" if len(shown) == 1 else "more shown"


def judged(run: str, catalog: Catalog) -> dict[str, object]:
    """R@1 and the shares of the kinds of differences among the wrong first answers of a run."""
    indices = catalog.indices("validation")
    listings = [catalog.listing(int(index)) for index in indices]
    vectors = aj.load(run).embed_catalog(catalog, indices)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    first = cosines.argmax(1)
    products = np.array([listing.product_id for listing in listings])
    wrong = np.flatnonzero(products[first] != products)
    kinds = Counter(difference(listings[i], listings[first[i]]) for i in wrong)
    shares = {kind: count / len(wrong) for kind, count in kinds.most_common()}
    return {"run": run, "queries": len(listings), "wrong": len(wrong), "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    runs = parser.parse_args().runs
    shape = {name.removeprefix("data."): value for name, value in JUDGED.items()}
    catalog = aj.open_catalog("builtin", **shape)
    rows = [judged(run, catalog) for run in runs]
    kinds = sum((Counter(row["shares"]) for row in rows), Counter())
    named = [kind for kind, _ in kinds.most_common() if kind.startswith("one shown")]
    lines = []
    for row in rows:
        shares = row["shares"]
        one = sum(share for kind, share in shares.items() if kind.startswith("one shown"))
        cells = [shares.get(kind, 0) for kind in (*FIRST, *named[:NAMED])]
        cells.insert(len(FIRST), one)
        right = 1 - row["wrong"] / row["queries"]
        lines.append([row["run"], f"{right:.3f}", *(f"{share:.1%}" for share in cells)])
    names = [kind.removeprefix("one shown: ") for kind in named[:NAMED]]
    print(markdown_table(["run", "R@1", *FIRST, "one shown", *names], lines))
    write("wrong_first", {"runs": rows})


if __name__ == "__main__":
    main()
