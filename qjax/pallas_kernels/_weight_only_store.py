"""The end of ``weight_only``: sums in registers are scaled, gated and copied to the output."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels._layout import BLOCK_N
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu


def all_rows(index: Array, rows: int) -> Any:
    """Rows 0 to ``rows``, which may be more than there are.

    The start is not known at compile time to be zero, so nothing but TMA compares it with the
    number of rows.
    """
    return pl.ds(pl.multiple_of(lax.min(index, jnp.int32(0)), 8), rows)


def scale_sums(acc: Array, gmem: dict[str, Any], warpgroup: Array, config: Any) -> Array:
    """Apply the scales of the output to one warpgroup's ``(64, rows)``."""
    layout = plgpu.Layout.WGMMA
    if "column" in gmem:
        features = pl.ds(_tile(warpgroup, config) * BLOCK_N, BLOCK_N)
        column = plgpu.load(gmem["column"].at[features], layout=layout.reduce(1), optimized=False)
        acc = acc * lax.broadcast_in_dim(column, acc.shape, [0])
    if "row_scale" in gmem:
        row = plgpu.load(gmem["row_scale"], layout=layout.reduce(0), optimized=False)
        acc = acc * lax.broadcast_in_dim(row, acc.shape, [1])
    return acc


def _tile(warpgroup: Array, config: Any) -> Array:
    return lax.axis_index("n") * config.warpgroups + warpgroup


def store(
    out: Array, out_gmem: Any, scratch: dict[str, Any], warpgroup: Array, config: Any
) -> None:
    """Transpose and copy one warpgroup's ``(64, rows)`` to the output."""
    if config.splits > 1:
        out_gmem = out_gmem.at[lax.axis_index("split")]
    out_smem = scratch["out_smem"].at[warpgroup]
    out_smem.T[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    _copy_out(out_smem, out_gmem, _tile(warpgroup, config))


def _copy_out(out_smem: Any, out_gmem: Any, tile: Array) -> None:
    plgpu.commit_smem()
    rows = all_rows(lax.axis_index("n"), out_smem.shape[0])
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[rows, pl.ds(tile * BLOCK_N, BLOCK_N)])
    plgpu.wait_smem_to_gmem(0)


def store_gated(
    out: Array, out_gmem: Any, scratch: dict[str, Any], warpgroup: Array, config: Any
) -> None:
    """The same for ``silu(gate) * up``: even warpgroups have a tile of gate, odd ones that of up.

    Both are rounded to the output's type first, as they are where two kernels do this.
    """
    pair = warpgroup // 2
    layout = plgpu.Layout.WGMMA_TRANSPOSED
    out = plgpu.layout_cast(out, layout)
    out_smem, paired = scratch["out_smem"], scratch["paired"].at[pair]

    @pl.when(lax.rem(warpgroup, jnp.int32(2)) == 1)
    def _up() -> None:
        out_smem.at[warpgroup].T[...] = out
        plgpu.commit_smem()
        plgpu.barrier_arrive(paired)

    @pl.when(lax.rem(warpgroup, jnp.int32(2)) == 0)
    def _gate() -> None:
        plgpu.barrier_wait(paired)
        up = plgpu.load(out_smem.at[warpgroup + 1].T, layout=layout).astype(jnp.float32)
        gate = out.astype(jnp.float32)
        mine = out_smem.at[warpgroup]
        mine.T[...] = (gate / (1.0 + jnp.exp(-gate)) * up).astype(out.dtype)
        _copy_out(mine, out_gmem, lax.axis_index("n") * (config.warpgroups // 2) + pair)
