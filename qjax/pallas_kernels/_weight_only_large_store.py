"""The end of a tile of ``weight_only_large``: sums are scaled, gated and copied to the output."""

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


def store(
    sums: Array,
    number: Array,
    feature: Array,
    token: Array,
    gmem: dict[str, Any],
    out: Any,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Any,
) -> None:
    """Scale, transpose and copy out a warpgroup's ``(64, columns)``, chunk by chunk.

    ``number`` counts the tiles of this CTA, from zero.
    """
    layout = plgpu.Layout.WGMMA
    features = pl.ds(feature, BLOCK_N)
    column = plgpu.load(gmem["column"].at[features], layout=layout.reduce(1), optimized=False)
    out_smem = scratch["out_smem"]
    buffers, chunk = out_smem.shape[1], config.chunk
    # The last tile's chunks must have left their buffers.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for index, start in enumerate(range(0, config.columns, chunk)):
        tokens = pl.ds(token + start, chunk)
        piece = sums if chunk == config.columns else sums[:, start : start + chunk]
        piece = piece * lax.broadcast_in_dim(column, piece.shape, [0])
        if "row_scale" in gmem:
            row = plgpu.load(gmem["row_scale"].at[tokens], layout=layout.reduce(0), optimized=False)
            piece = piece * lax.broadcast_in_dim(row, piece.shape, [1])
        narrow = piece.astype(out_smem.dtype)
        narrow = plgpu.layout_cast(narrow, plgpu.Layout.WGMMA_TRANSPOSED)
        if "paired" in scratch:
            # Before a buffer's first use there is no arrival to wait for.
            reused = number > 0 if index < buffers else None
            _store_gated(narrow, index, reused, feature, tokens, out, scratch, warpgroup)
        else:
            if index >= buffers:
                plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
            smem = out_smem.at[warpgroup, index % buffers]
            smem.T[...] = narrow
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, out.at[tokens, features])


def _store_gated(
    narrow: Array,
    index: int,
    reused: Array | None,
    feature: Array,
    tokens: Any,
    out: Any,
    scratch: dict[str, Any],
    warpgroup: Array,
) -> None:
    """Copy out a chunk of ``silu(gate) * up``: even warpgroups have that of gate, odd ones of up.

    Both were rounded to the output's type, as they are where two kernels do this. An odd warpgroup
    leaves its chunk in its buffer (``paired``), the even one reads it (``taken``) and puts the
    result into its own.

    Args:
      narrow: The warpgroup's chunk ``(64, chunk)``.
      index: Number of the chunk in its tile.
      reused: Whether the buffer was used before by this CTA; None if it was in this tile.
      feature: The warpgroup's first feature, of gate and up together.
      tokens: Rows of the output.
      out: The output ``(m, n / 2)``.
      scratch: Shared memory and barriers.
      warpgroup: Number of the warpgroup.
    """
    out_smem = scratch["out_smem"]
    buffers = out_smem.shape[1]
    buffer = index % buffers
    barrier = _barrier(warpgroup, buffer, buffers)
    paired, taken = scratch["paired"].at[barrier], scratch["taken"].at[barrier]

    @pl.when(lax.rem(warpgroup, jnp.int32(2)) == 1)
    def _up() -> None:
        if reused is None:
            plgpu.barrier_wait(taken)
        else:
            pl.when(reused)(lambda: plgpu.barrier_wait(taken))
        out_smem.at[warpgroup, buffer].T[...] = narrow
        plgpu.commit_smem()
        plgpu.barrier_arrive(paired)

    @pl.when(lax.rem(warpgroup, jnp.int32(2)) == 0)
    def _gate() -> None:
        plgpu.barrier_wait(paired)
        up = plgpu.load(
            out_smem.at[warpgroup + 1, buffer].T, layout=plgpu.Layout.WGMMA_TRANSPOSED
        ).astype(jnp.float32)
        plgpu.barrier_arrive(taken)
        gate = narrow.astype(jnp.float32)
        product = (gate / (1.0 + jnp.exp(-gate)) * up).astype(narrow.dtype)
        if index >= buffers:
            plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        mine = out_smem.at[warpgroup, buffer]
        mine.T[...] = product
        plgpu.commit_smem()
        # Tiles of gate and up alternate, so that a pair of them makes one tile of the output.
        features = pl.ds(lax.div(feature, jnp.int32(2 * BLOCK_N)) * BLOCK_N, BLOCK_N)
        plgpu.copy_smem_to_gmem(mine, out.at[tokens, features])


def _barrier(warpgroup: Array, buffer: int, buffers: int) -> Array:
    return lax.div(warpgroup, jnp.int32(2)) * buffers + buffer


def drain_taken(scratch: dict[str, Any], warpgroup: Array) -> None:
    """After the last tile: odd warpgroups see the last arrival of every buffer."""
    buffers = scratch["out_smem"].shape[1]

    @pl.when(lax.rem(warpgroup, jnp.int32(2)) == 1)
    def _up() -> None:
        for buffer in range(buffers):
            plgpu.barrier_wait(scratch["taken"].at[_barrier(warpgroup, buffer, buffers)])
