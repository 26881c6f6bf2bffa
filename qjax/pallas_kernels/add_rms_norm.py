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

from qjax.pallas_kernels import _token_codes
from qjax.pallas_kernels._once import lowered_once
from qjax.typing import Array, DType

_THREADS = 128
# Registers that a thread has for its part of a row: residual, weight and a partial sum in flight.
MAX_COLUMNS = 64 * _THREADS
# Only compiled so far, but for multiples of 1024 up to 6144: others run where they are asked for by
# this module's function. To be True once tests/kernels/test_gpu_token_codes.py has passed.
ALL_SIZES = False


def unsupported_reason(
    rows: int, columns: int, dtype: DType, codes: str | None = None, blocks: bool = False
) -> str | None:
    """Why this kernel cannot normalise ``(rows, columns)``; None if it can.

    Args:
      rows: Tokens.
      columns: Values of each.
      dtype: Their type.
      codes: Type of codes for them, if they are to be quantized.
      blocks: Whether they are to have a scale for each 128 values, rather than for a token.
    """
    unit = 8 * _token_codes.BLOCK if blocks else _THREADS
    reason = _token_codes.unsupported_reason(rows, dtype, codes, blocks)
    if reason is None and (columns % unit or not 0 < columns <= MAX_COLUMNS):
        return f"{columns} columns; it takes multiples of {unit} up to {MAX_COLUMNS}"
    return reason


def has_run(columns: int) -> bool:
    """Whether rows of such a size have been normalised on a GPU."""
    return ALL_SIZES or (columns % 1024 == 0 and columns <= 6144)


@lowered_once("eps", "codes", "blocks", "interpret")
def add_rms_norm(
    residual: Array,
    delta: Array,
    weight: Array,
    eps: float,
    *,
    codes: str | None = None,
    blocks: bool = False,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The sum and its normalisation.

    Args:
      residual: ``(m, d)``, bfloat16 or float16.
      delta: ``(s, m, d)``, float32 or the type of ``residual``: partial sums, added in order and
        rounded to that type before they are added.
      weight: float32 ``(d,)``.
      eps: Added to the mean square.
      codes: Give the normalised rows, rounded to the type of ``residual``, as codes of this type:
        one of ``_token_codes.KINDS``.
      blocks: With ``codes``: a scale for each 128 values of a row, rather than for the row.
      interpret: Run in the Pallas interpreter.

    Returns:
      The new residual and the normalised rows, both ``(m, d)`` in the type of ``residual``. With
      ``codes`` the new residual, codes and scales, the latter two as from ``token_codes``.

    Raises:
      NotImplementedError: If the kernel does not take the arguments; says why.
    """
    rows, columns = residual.shape
    reason = unsupported_reason(rows, columns, residual.dtype, codes, blocks)
    if reason is not None:
        raise NotImplementedError(f"add_rms_norm: {reason}")
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    dtype, splits = residual.dtype, delta.shape[0]
    if blocks:
        view: tuple[int, ...] = columns // _token_codes.BLOCK, _token_codes.BLOCK
        layout = _token_codes.layout_of_blocks()
    else:
        view = (columns,)
        layout = plgpu.Layout.WG_STRIDED(view, vec_size=_token_codes.vector(columns))

    def kernel(residual: Any, delta: Any, weight: Any, out: Any, *outs: Any) -> None:
        out_row = lax.axis_index("row")
        row = out_row if codes is None else jnp.minimum(out_row, rows - 1)

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
        squares = wide * wide
        mean_square = jnp.sum(jnp.sum(squares, 1) if blocks else squares) / columns
        normed = (wide * lax.rsqrt(mean_square + eps) * load(weight)).astype(dtype)
        if codes is None:
            outs[0][row] = normed
            return
        wide = normed.astype(jnp.float32)
        scale = _token_codes.scale_of(_token_codes.absmax(wide, 1 if blocks else None), codes)
        outs[0][out_row] = _token_codes.encode(wide, scale, codes)
        _token_codes.store_scales(scale, outs[1], slice(None), out_row, outs[0].shape[0])

    grid = rows if codes is None else _token_codes.padded_rows(rows)
    out_types = [jax.ShapeDtypeStruct((rows, *view), dtype)]
    out_types.append(jax.ShapeDtypeStruct((grid, *view), jnp.dtype(codes or dtype)))
    if codes is not None:
        out_types.append(_token_codes.scales_type(rows, columns, blocks))
    names = "add_rms_norm", dtype.name, codes, "blocks" if blocks else None
    run = plgpu.kernel(
        kernel,
        out_type=tuple(out_types),
        grid=(grid,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name="_".join(filter(None, names)),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    out, normed, *scales = run(
        residual.reshape(rows, *view), delta.reshape(splits, rows, *view), weight.reshape(view)
    )
    return out.reshape(rows, columns), normed.reshape(grid, columns), *scales
