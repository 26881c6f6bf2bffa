"""Aliases shared by the whole package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
DType = Any
"""Anything ``jnp.dtype`` accepts."""
PyTree = Any
Params = Mapping[str, Any]
"""Nested dictionaries of arrays and ``QuantizedArray`` leaves, as Flax Linen keeps them."""
