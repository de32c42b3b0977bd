"""Draws the built-in catalogue's contact sheet: python benchmarks/contact_sheet.py sheet.png

Each row shows the listings of one family of look-alikes, product by product.
"""

import argparse

from PIL import Image

from afmrl_jax.catalog.synthetic import SyntheticCatalog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where to write the PNG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=160, help="pixels a photo")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--rows", type=int, default=12, help="families; categories take turns")
    options = parser.parse_args()

    families = {"test": options.rows}
    catalog = SyntheticCatalog(options.seed, families=families, image_size=options.size)
    step = options.size + 4
    sheet = Image.new("RGB", (options.columns * step, options.rows * step), "white")
    filled = [0] * options.rows
    for index in range(len(catalog)):
        row = catalog.family(index)
        if filled[row] < options.columns:
            sheet.paste(catalog.image(index), (filled[row] * step, row * step))
            filled[row] += 1
    sheet.save(options.path)


if __name__ == "__main__":
    main()
