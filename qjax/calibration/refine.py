"""Coordinate descent on the output error: improve codes and scales that exist already.

The output error ``trace(D^T H D)``, ``D = W_q - W``, is quadratic in every single weight and in
every scale. With the gradient ``G = H D`` kept up to date,

* row ``i`` has its optimum at ``w_i - G_i / H_ii``, which is rounded to the grid;
* the scale of a tile with decoded codes ``c`` (scale 1) has it at ``s - c.G / (c^T H c)``.

GPTQ walks the rows once and never looks back; a few sweeps over all rows, each of GPTQ's cost, find
what later rows made possible. The error cannot rise but for the rounding of scales and sums.

References:
  Behdin et al., QuantEase, arXiv:2309.01885; Nair and Suggala, CDQuant, arXiv:2406.17542.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.calibration.gptq import chunk_rows, normalize_hessian, plan_layout
from qjax.calibration.stats import HessianStats
from qjax.formats import QuantFormat
from qjax.quantize import encode
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array

_EXACT = jax.lax.Precision.HIGHEST


def refine(
    weight: Array,
    quantized: QuantizedArray,
    stats: HessianStats,
    *,
    sweeps: int = 4,
    scales: bool = True,
    damping: float = 1e-4,
) -> QuantizedArray:
    """Lower the output error of a quantized kernel by sweeps over its rows and scales.

    Args:
      weight: ``(k, n)`` kernel that is approximated.
      quantized: The starting point, without a permutation.
      stats: Statistics of the ``k`` input channels.
      sweeps: Passes over all rows; 0 returns the starting point.
      scales: Improve the scales too, before each sweep but the first.
      damping: Added to the Hessian's diagonal, as a fraction of its mean: how much a weight error
        in directions without activations counts.

    Returns:
      A ``QuantizedArray`` of the same structure.

    Raises:
      ValueError: If shapes do not fit or there is a permutation.
    """
    if weight.shape != quantized.shape or stats.in_features != weight.shape[0]:
        raise ValueError(
            f"{weight.shape=}, quantized of {quantized.shape} and statistics of "
            f"{stats.in_features} channels do not fit together"
        )
    if quantized.perm is not None or quantized.global_scale is not None:
        raise ValueError("refine needs an array without permutation and global scale")
    if sweeps == 0:
        return quantized
    code, scale = _refine(
        weight,
        quantized.qvalue,
        quantized.scale,
        quantized.zero_point,
        stats.hessian,
        jnp.float32(damping),
        fmt=quantized.fmt,
        sweeps=sweeps,
        scales=scales,
    )
    return dataclasses.replace(quantized, qvalue=code, scale=scale)


@functools.partial(jax.jit, static_argnames=("fmt", "sweeps", "scales"))
def _refine(
    weight: Array,
    code: Array,
    scale: Array,
    zero: Array | None,
    hessian: Array,
    damping: Array,
    *,
    fmt: QuantFormat,
    sweeps: int,
    scales: bool,
) -> tuple[Array, Array]:
    k, n = weight.shape
    tile, out_tile = fmt.tiles((k, n), 0)
    rows, tile, block = plan_layout(k, tile)
    groups = rows // tile
    chunk = chunk_rows(min(tile, block))
    pad_rows = ((0, rows - k), (0, 0))
    pad_groups = ((0, groups - scale.shape[0]), (0, 0))
    w = jnp.pad(weight.astype(jnp.float32), pad_rows)
    hessian, _, _ = normalize_hessian(hessian, rows)
    hessian = hessian + damping * jnp.eye(rows, dtype=jnp.float32)
    # Codes as float32 without their zero point, which stays as it is: c * scale is the value.
    offset = jnp.zeros(scale.shape, jnp.float32) if zero is None else zero.astype(jnp.float32)
    c = code.astype(jnp.float32) - numerics.expand_tiles(offset, (k, n), (tile, out_tile))
    c = jnp.pad(c, pad_rows)
    offset = jnp.pad(offset, pad_groups)
    step = None
    if fmt.scale_steps is not None:
        step, _ = numerics.find_scale_step(scale, fmt.scale_steps)
    scale = jnp.pad(scale.astype(jnp.float32), pad_groups, constant_values=1.0)

    def wide(values: Array) -> Array:
        """Per tile ``(1, groups of n)`` to per column ``(1, n)``."""
        return numerics.expand_tiles(values, (1, n), (1, out_tile))

    def all_rows(scale: Array) -> Array:
        return numerics.expand_tiles(scale, (rows, n), (tile, out_tile))

    def scale_step(g: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        c, scale, gradient = state
        first = g * tile
        c_tile = jax.lax.dynamic_slice_in_dim(c, first, tile)
        columns = jax.lax.dynamic_slice_in_dim(hessian, first, tile, axis=1)
        effect = jnp.matmul(columns, c_tile, precision=_EXACT)  # of one unit of scale on G
        slope = c_tile * jax.lax.dynamic_slice_in_dim(gradient, first, tile)
        curve = c_tile * jax.lax.dynamic_slice_in_dim(effect, first, tile)
        slope, curve = (numerics.tile_view(x, (tile, out_tile)).sum((1, 3)) for x in (slope, curve))
        old = jax.lax.dynamic_slice_in_dim(scale, g, 1)
        new = old - slope / jnp.where(curve > 0, curve, jnp.float32(1))
        # A scale that would change sign or explode belongs to a tile of next to no codes.
        new = jnp.where((new > old / 2) & (new < old * 2), new, old)
        new = numerics.fit_scale(new, fmt, step).astype(jnp.float32)
        # Narrow scale types and steps may round to where the error is larger than before.
        better = (2 * slope + curve * (new - old)) * (new - old) < 0
        new = jnp.where(better, new, old)
        gradient = gradient + effect * wide(new - old)
        return c, jax.lax.dynamic_update_slice_in_dim(scale, new, g, 0), gradient

    def round_rows(c: Array, gradient: Array, h: Array, s: Array, z: Array) -> tuple[Array, Array]:
        """New codes of a few rows in sequence and by how much their values change."""
        slope = [gradient[i][None] for i in range(chunk)]
        codes, steps = [], []
        for i in range(chunk):
            old = c[i][None]
            target = old * s - slope[i] / h[i, i]
            new = encode(target / s + z, jnp.ones((1, 1), jnp.float32), None, fmt, (1, 1))
            new = new.astype(jnp.float32) - z
            step = (new - old) * s
            for j in range(i + 1, chunk):
                slope[j] = slope[j] + h[i, j] * step
            codes.append(new)
            steps.append(step)
        return jnp.concatenate(codes), jnp.concatenate(steps)

    def block_step(b: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        c, scale, gradient = state
        first = b * block
        columns = jax.lax.dynamic_slice_in_dim(hessian, first, block, axis=1)
        h_block = jax.lax.dynamic_slice_in_dim(columns, first, block)

        def chunk_step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            c_block, g_block, moved = state
            top = i * chunk
            group = (first + top) // tile  # a chunk lies in one tile
            s = wide(jax.lax.dynamic_slice_in_dim(scale, group, 1))
            z = wide(jax.lax.dynamic_slice_in_dim(offset, group, 1))
            h = jax.lax.dynamic_slice_in_dim(h_block, top, chunk, axis=1)
            new, steps = round_rows(
                jax.lax.dynamic_slice_in_dim(c_block, top, chunk),
                jax.lax.dynamic_slice_in_dim(g_block, top, chunk),
                jax.lax.dynamic_slice_in_dim(h, top, chunk),
                s,
                z,
            )
            put = jax.lax.dynamic_update_slice_in_dim
            g_block = g_block + jnp.matmul(h, steps, precision=_EXACT)
            return put(c_block, new, top, 0), g_block, put(moved, steps, top, 0)

        start = (
            jax.lax.dynamic_slice_in_dim(c, first, block),
            jax.lax.dynamic_slice_in_dim(gradient, first, block),
            jnp.zeros((block, n), jnp.float32),
        )
        c_block, _, moved = jax.lax.fori_loop(0, block // chunk, chunk_step, start)
        gradient = gradient + jnp.matmul(columns, moved, precision=_EXACT)
        return jax.lax.dynamic_update_slice_in_dim(c, c_block, first, 0), scale, gradient

    def sweep(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        c, scale = state
        # Computed anew in each sweep, so that the rounding errors of updates do not pile up.
        gradient = jnp.matmul(hessian, c * all_rows(scale) - w, precision=_EXACT)
        full = (c, scale, gradient)
        if scales:
            full = jax.lax.cond(
                i > 0, lambda s: jax.lax.fori_loop(0, groups, scale_step, s), lambda s: s, full
            )
        c, scale, _ = jax.lax.fori_loop(0, rows // block, block_step, full)
        return c, scale

    c, scale = jax.lax.fori_loop(0, sweeps, sweep, (c, scale))
    code = (c + numerics.expand_tiles(offset, (rows, n), (tile, out_tile)))[:k]
    kept = -(-k // tile)
    return (
        numerics.cast_saturating(code, fmt.storage_dtype, lower=fmt.qmin, upper=fmt.qmax),
        scale[:kept].astype(fmt.scale_dtype),
    )
