"""Residual addition and RMS normalisation of a few rows in one pass, on Hopper.

::

  residual'[m] = residual[m] + round(sum_s delta[s, m])
  normed[m]    = residual'[m] / sqrt(mean(residual'[m] ** 2) + eps) * weight

In decoding every kernel of XLA's three for this (sum and add, mean square, scale) takes longer to
start than to run. One CTA has one row in registers, with as many warpgroups as find 16 bytes for
every thread; or, where rows are few, a cluster of 2 or 4 CTAs, since partial sums of a row are more
than one multiprocessor reads at once: eight of 4096 are 128 KiB. The time is that of one load, of
one sum over the row and of one store: for one row in a decode step on an H200 2.2 us, with one CTA
2.7 us.

What did not help: 192 further CTAs that ask for 12 MB of the next weight (TMA prefetch to the L2
cache), since the memory is idle meanwhile. Products after it became 0.7 us faster, this kernel
1.8 us slower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qjax.pallas_kernels import _token_codes
from qjax.pallas_kernels._once import lowered_once
from qjax.typing import Array, DType

_THREADS = 128
_VALUES = 8 * _THREADS
# What a warpgroup has registers for: residual, weight and a partial sum in flight.
_COLUMNS = 48 * _THREADS
MAX_COLUMNS = 2 * _COLUMNS


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
    unit = warpgroups(columns) * (8 * _token_codes.BLOCK if blocks else _THREADS)
    reason = _token_codes.unsupported_reason(rows, dtype, codes, blocks)
    if reason is None and (columns % unit or not 0 < columns <= MAX_COLUMNS):
        return f"{columns} columns; it takes multiples of {unit} up to {MAX_COLUMNS}"
    return reason


def warpgroups(columns: int) -> int:
    """Warpgroups for a row: each of their threads loads 8 values at a time, at best once."""
    least = 1 if columns <= _COLUMNS else 2
    return max((n for n in range(least, 9) if columns % (n * _VALUES) == 0), default=least)


@lowered_once("eps", "codes", "blocks", "normed_dtype", "interpret")
def add_rms_norm(
    residual: Array,
    delta: Array,
    weight: Array,
    eps: float,
    *,
    codes: str | None = None,
    blocks: bool = False,
    normed_dtype: DType | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The sum and its normalisation.

    Args:
      residual: ``(m, d)``, bfloat16 or float16.
      delta: ``(s, m, d)``, float32 or the type of ``residual``: partial sums, added in order and
        rounded to that type before they are added.
      weight: ``(d,)``, float32 or 16-bit floats.
      eps: Added to the mean square.
      codes: Give the normalised rows, rounded to the type of ``residual``, as codes of this type:
        one of ``_token_codes.KINDS``.
      blocks: With ``codes``: a scale for each 128 values of a row, rather than for the row.
      normed_dtype: Type of the normalised rows without ``codes``; that of ``residual`` by default.
      interpret: Run in the Pallas interpreter.

    Returns:
      The new residual and the normalised rows, both ``(m, d)``. With
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
    grid = rows if codes is None else _token_codes.padded_rows(rows)
    ctas = 1
    if not blocks and not interpret:  # the interpreter has no memory that CTAs share
        ctas = _token_codes.ctas_per_row(grid, columns, lambda n: columns % (n * _VALUES) == 0)
    count = warpgroups(columns // ctas)
    alone = ctas * count == 1 and not blocks
    # A row as a matrix: of its blocks, or of what each warp has. One warpgroup has it as it is.
    if blocks:
        view: tuple[int, ...] = columns // _token_codes.BLOCK, _token_codes.BLOCK
        layout = _token_codes.layout_of_blocks()
    elif alone:
        view = (columns,)
        layout = plgpu.Layout.WG_STRIDED(view, vec_size=_token_codes.vector(columns))
    else:
        view = 4 * ctas * count, columns // ctas // count // 4
        layout = _token_codes.layout_of_warps(_token_codes.vector(columns // ctas // count))

    def kernel(residual: Any, delta: Any, weight: Any, out: Any, *refs: Any) -> None:
        outs, exchanges = refs[: len(out_types) - 1], refs[len(out_types) - 1 :]
        out_row = lax.axis_index("row")
        row = out_row if codes is None else jnp.minimum(out_row, rows - 1)
        own: Any = slice(None)
        if ctas * count > 1:
            height = view[0] // ctas // count
            part = lax.axis_index("warpgroup") if count > 1 else jnp.int32(0)
            if ctas > 1:
                part = part + lax.axis_index("part") * count
            own = pl.ds(part * height, height)

        def load(ref: Any) -> Array:
            return plgpu.load(ref.at[own], layout=layout, optimized=False)

        def of_the_row(reduce: Any, combine: Any, values: Array, exchange: Any) -> Array:
            if alone:
                return reduce(values)
            return _token_codes.of_the_row(combine, reduce(values, 1), exchange, own)

        # All that is loaded, before the first sum over the row: loads do not move over its barrier.
        factor, before = load(weight).astype(jnp.float32), load(residual.at[row])
        total = load(delta.at[0, row]).astype(jnp.float32)
        for split in range(1, splits):
            total = total + load(delta.at[split, row]).astype(jnp.float32)
        # Rounded as the product alone would be, and again as the residual is stored.
        added = total.astype(dtype).astype(jnp.float32)
        x = (before.astype(jnp.float32) + added).astype(dtype)
        wide = x.astype(jnp.float32)
        mean_square = of_the_row(jnp.sum, jnp.add, wide * wide, exchanges[:used]) / columns
        normed = wide * lax.rsqrt(mean_square + eps) * factor
        out[row, own] = x
        if codes is None:
            outs[0][row, own] = normed.astype(outs[0].dtype)
            return
        normed = normed.astype(dtype)
        wide = normed.astype(jnp.float32)
        if blocks:
            largest = _token_codes.absmax(wide, 1)
        else:
            largest = of_the_row(_token_codes.absmax, jnp.maximum, wide, exchanges[used:])
        scale = _token_codes.scale_of(largest, codes)
        outs[0][out_row, own] = _token_codes.encode(wide, scale, codes)
        _token_codes.store_scales(scale, outs[1], own, out_row, outs[0].shape[0])

    out_types = [jax.ShapeDtypeStruct((rows, *view), dtype)]
    out_types.append(jax.ShapeDtypeStruct((grid, *view), jnp.dtype(codes or normed_dtype or dtype)))
    if codes is not None:
        out_types.append(_token_codes.scales_type(rows, columns, blocks))
    exchange = () if alone else _token_codes.exchange(view[0], count, ctas)
    used = len(exchange)
    names = "add_rms_norm", dtype.name, codes, "blocks" if blocks else None
    run = plgpu.kernel(
        kernel,
        out_type=tuple(out_types),
        grid=(grid,),
        grid_names=("row",),
        **({"cluster": (ctas,), "cluster_names": ("part",)} if ctas > 1 else {}),
        **({"num_threads": count, "thread_name": "warpgroup"} if count > 1 else {}),
        scratch_types=exchange if blocks or codes is None else 2 * exchange,
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
