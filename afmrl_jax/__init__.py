"""Products' embeddings and attributes: train models, load them, search with them.

    import afmrl_jax as aj

    model = aj.load("runs/agcl")
    vectors = model.embed(["navy dress", aj.Row("red mug", (photo,))])
    index = aj.build_index(vectors, model=model)
    ids, scores = index.search(model.embed("blue dress"), k=1)

Nothing else is imported until one of these names is used: no flag is defined, no device started.
"""

import importlib
from typing import Any

__all__ = [
    "LoadedEncoder",
    "LoadedGenerator",
    "Row",
    "UserError",
    "build_index",
    "evaluate",
    "load",
    "load_index",
    "open_catalog",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("afmrl_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
