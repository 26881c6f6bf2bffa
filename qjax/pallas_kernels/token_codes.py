"""8-bit codes of the values of each token, or of a gated pair of them, in one pass, on Hopper.

::

  scale[m] = max_k |x[m, k]| / bound                    codes[m, k] = round(x[m, k] / scale[m])
  with gated: x[m, k] = round(silu(pair[m, k])) * pair[m, k + d / 2]

XLA needs three kernels for the first, four for the second, each shorter than its start. One CTA, or
where rows are few a cluster of 2 or 4, has one row in registers, cut into parts of one warpgroup
each, which tell each other their largest magnitude through shared memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qjax.pallas_kernels import _token_codes
from qjax.pallas_kernels._once import lowered_once
from qjax.typing import Array, DType

_THREADS = 128
_MAX_PER_THREAD = 64


def warpgroups(columns: int, blocks: bool) -> int | None:
    """Parts into which a row is cut: many, but with loads of 8 bytes. None if none does."""
    unit = 8 * _token_codes.BLOCK if blocks else _THREADS
    found = [
        (min(_token_codes.vector(columns // count), 4), count)
        for count in (1, 2, 4)
        if columns % (count * unit) == 0 and columns <= count * _THREADS * _MAX_PER_THREAD
    ]
    return max(found)[1] if found else None


def _takes(columns: int, ctas: int) -> bool:
    """Whether so many CTAs can share a row, with loads of 8 bytes or more."""
    part, odd = divmod(columns, ctas)
    count = None if odd else warpgroups(part, blocks=False)
    return count is not None and _token_codes.vector(part // count) >= 4


def unsupported_reason(
    rows: int, columns: int, dtype: DType, kind: str, blocks: bool = False
) -> str | None:
    """Why this kernel cannot give codes of ``(rows, columns)`` values; None if it can.

    Args:
      rows: Tokens.
      columns: Values of each, those that are quantized.
      dtype: Their type.
      kind: Type of the codes.
      blocks: Whether there is a scale for each 128 values of a token.
    """
    reason = _token_codes.unsupported_reason(rows, dtype, kind, blocks)
    if reason is None and (columns < 1 or warpgroups(columns, blocks) is None):
        unit = 8 * _token_codes.BLOCK if blocks else _THREADS
        most = _THREADS * _MAX_PER_THREAD
        return f"{columns} columns; it takes multiples of {unit} up to {most}, and 2 or 4 times one"
    return reason


@lowered_once("kind", "blocks", "gated", "interpret")
def token_codes(
    x: Array, *, kind: str, blocks: bool = False, gated: bool = False, interpret: bool = False
) -> tuple[Array, Array]:
    """Codes and scales of every row.

    Args:
      x: ``(m, d)``, or ``(m, 2 d)`` if gated: bfloat16 or float16.
      kind: Type of the codes, one of ``_token_codes.KINDS``.
      blocks: A scale for each 128 values of a row, rather than for the row.
      gated: Quantize ``silu`` of the left half times the right half, computed in float32 and
        rounded to the type of ``x``.
      interpret: Run in the Pallas interpreter.

    Returns:
      Codes ``(_token_codes.padded_rows(m), d)``, rows beyond ``m`` repeating the last one; and
      float32 scales ``(_token_codes.padded_scales(m),)``, with blocks ``(d / 128, ...)``.

    Raises:
      NotImplementedError: If the kernel does not take the arguments; says why.
    """
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    reason = unsupported_reason(rows, columns, x.dtype, kind, blocks)
    padded, ctas = _token_codes.padded_rows(rows), 1
    if not blocks and not interpret:  # the interpreter has no memory that CTAs share
        ctas = _token_codes.ctas_per_row(padded, columns, functools.partial(_takes, columns))
    count = warpgroups(columns // ctas, blocks)
    if reason is not None or count is None:
        raise NotImplementedError(f"token_codes: {reason}")
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    # A row as a matrix: of its blocks, or of what each warp has.
    block = _token_codes.BLOCK if blocks else columns // ctas // count // 4
    whole = columns // block
    height = whole // ctas // count
    if blocks:
        layout = _token_codes.layout_of_blocks()
    else:
        layout = _token_codes.layout_of_warps(_token_codes.vector(columns // ctas // count))

    def kernel(x: Any, codes: Any, scales: Any, *exchange: Any) -> None:
        row = lax.axis_index("row")
        part = lax.axis_index("warpgroup")
        if ctas > 1:
            part = part + lax.axis_index("part") * count
        source = jnp.minimum(row, rows - 1)
        own = pl.ds(part * height, height)

        def load(half: int) -> Array:
            at = pl.ds(half * whole + part * height, height)
            return plgpu.load(x.at[source, at], layout=layout, optimized=False)

        values = load(0)
        if gated:
            gate, up = values.astype(jnp.float32), load(1).astype(jnp.float32)
            values = (gate / (1 + jnp.exp(-gate)) * up).astype(x.dtype)
        wide = values.astype(jnp.float32)
        largest = _token_codes.absmax(wide, 1)
        if not blocks:
            largest = _token_codes.of_the_row(jnp.maximum, largest, exchange, own)
        scale = _token_codes.scale_of(largest, kind)
        codes[row, own] = _token_codes.encode(wide, scale, kind)
        _token_codes.store_scales(scale, scales, own, row, codes.shape[0])

    names = "gated" if gated else "token", "codes", x.dtype.name, kind, "blocks" if blocks else ""
    run = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((padded, whole, block), jnp.dtype(kind)),
            _token_codes.scales_type(rows, columns, blocks),
        ),
        grid=(padded,),
        grid_names=("row",),
        **({"cluster": (ctas,), "cluster_names": ("part",)} if ctas > 1 else {}),
        num_threads=count,
        thread_name="warpgroup",
        scratch_types=() if blocks else _token_codes.exchange(whole, count, ctas),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name="_".join(filter(None, names)),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    codes, scales = run(x.reshape(rows, -1, block))
    return codes.reshape(padded, columns), scales
