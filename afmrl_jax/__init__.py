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

MODULES = {  # public name -> the module that has it
    "LoadedEncoder": "assembly.loaded",
    "LoadedGenerator": "assembly.loaded",
    "Row": "data.processor",
    "UserError": "core.errors",
    "build_index": "api",
    "evaluate": "api",
    "load": "api",
    "load_index": "retrieval.indexes",
    "open_catalog": "api",
    "train": "api",
}
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(importlib.import_module(f"afmrl_jax.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
