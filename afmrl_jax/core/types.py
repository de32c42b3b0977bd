"""Names for the types that most rooms pass on."""

from typing import Any

import jax

Params = Any  # nested dicts of arrays
Rows = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
