"""bfloat16 rows for weights that are packed for float16."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax.pallas_kernels import _codes
from qjax.typing import Array


def float16_rows(x: Array) -> tuple[Array, Array]:
    """bfloat16 rows as float16 times a power of two each, ``(m, k)`` and float32 ``(m,)``.

    Exact for values down to 2**-29 of their row's largest; below that they lose bits one by one.
    """
    with jax.named_scope("float16_rows"):
        wide = x.astype(jnp.float32)
        absmax = jnp.abs(wide).max(axis=-1, keepdims=True)
        _, exponent = jnp.frexp(absmax)
        # Up to the last power of two that float16 has; rows of zeros, infinities and NaNs as they
        # are (an infinity stays one, and makes its row's sums infinite or NaN as it should).
        usable = jnp.isfinite(absmax) & (absmax > 2.0**-100)
        shift = jnp.where(usable, 15 - exponent.astype(jnp.int32), 0)
        narrow = _codes.times_power_of_two(wide, shift).astype(jnp.float16)
        row_scale = _codes.times_power_of_two(jnp.ones_like(absmax), -shift)
        return narrow, row_scale.reshape(-1)
