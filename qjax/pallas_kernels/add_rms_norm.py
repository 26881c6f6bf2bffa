"""Residual addition and RMS normalisation of a few rows in one pass, on Hopper.

::

  residual'[m] = residual[m] + round(sum_s delta[s, m])
  normed[m]    = residual'[m] / sqrt(mean(residual'[m] ** 2) + eps) * weight

In decoding every kernel of XLA's three for this (sum and add, mean square, scale) takes longer to
start than to run. One CTA of one warpgroup has one row in registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.pallas_kernels._once import lowered_once
from qjax.typing import Array, DType

MAX_ROWS = 256
_THREADS = 128
# Elements per load, 16 bytes of 16-bit values; and registers that a thread has for its part of a
# row: residual, weight and one partial sum in flight.
_VECTOR = 8
MAX_COLUMNS = 48 * _THREADS


def unsupported_reason(rows: int, columns: int, dtype: DType) -> str | None:
    """Why this kernel cannot normalise ``(rows, columns)``; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} activations; the kernel is for bfloat16 and float16"
    if not 1 <= rows <= MAX_ROWS:
        return f"{rows} rows; beyond {MAX_ROWS} XLA's kernels fill the device"
    if columns % (_THREADS * _VECTOR) or columns > MAX_COLUMNS:
        return f"{columns} columns; it takes multiples of {_THREADS * _VECTOR} up to {MAX_COLUMNS}"
    return None


@lowered_once("eps", "interpret")
def add_rms_norm(
    residual: Array, delta: Array, weight: Array, eps: float, *, interpret: bool = False
) -> tuple[Array, Array]:
    """The sum and its normalisation.

    Args:
      residual: ``(m, d)``, bfloat16 or float16.
      delta: ``(s, m, d)``, float32 or the type of ``residual``: partial sums, added in order and
        rounded to that type before they are added.
      weight: float32 ``(d,)``.
      eps: Added to the mean square.
      interpret: Run in the Pallas interpreter.

    Returns:
      The new residual and the normalised rows, both ``(m, d)`` in the type of ``residual``.

    Raises:
      NotImplementedError: If the kernel does not take the arguments; says why.
    """
    rows, columns = residual.shape
    reason = unsupported_reason(rows, columns, residual.dtype)
    if reason is not None:
        raise NotImplementedError(f"add_rms_norm: {reason}")
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    dtype, splits = residual.dtype, delta.shape[0]
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=_VECTOR)

    def kernel(residual: Any, delta: Any, weight: Any, out: Any, normed: Any) -> None:
        row = lax.axis_index("row")

        def load(ref: Any) -> Array:
            return plgpu.load(ref, layout=layout, optimized=False)

        total = load(delta.at[0, row]).astype(jnp.float32)
        for split in range(1, splits):
            total = total + load(delta.at[split, row]).astype(jnp.float32)
        # Rounded as the product alone would be, and again as the residual is stored.
        added = total.astype(dtype).astype(jnp.float32)
        x = (load(residual.at[row]).astype(jnp.float32) + added).astype(dtype)
        out[row] = x
        wide = x.astype(jnp.float32)
        mean_square = jnp.sum(wide * wide) / columns
        normed[row] = (wide * lax.rsqrt(mean_square + eps) * load(weight)).astype(dtype)

    shape = jax.ShapeDtypeStruct((rows, columns), dtype)
    run = plgpu.kernel(
        kernel,
        out_type=(shape, shape),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"add_rms_norm_{dtype.name}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(residual, delta, weight)
