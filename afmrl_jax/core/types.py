"""Names of the nested dicts that signatures carry."""

from typing import Any

import jax

# A nested dict of arrays, or of what describes or places them: `jax.ShapeDtypeStruct`, shardings.
Params = Any
Rows = dict[str, jax.Array]  # the arrays of a batch by name, as a Processor makes them
Metrics = dict[str, jax.Array]  # scalars by name
