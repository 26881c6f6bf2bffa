"""Scales that minimise a weighted rounding error instead of covering the whole range (clipping).

A tile with one outlier is represented better if the outlier saturates and everything else gets a
finer grid. Candidates are shrunken ranges; each tile keeps the one with the least error. Two error
measures:

* ``search_scale``: ``sum_k importance[k] * (w - w_q)[k]^2``, importance being the Hessian's
  diagonal (what llama.cpp calls an importance matrix), or ones for the plain mean square error;
* ``search_scale_output``: the error of the tile's own partial output, ``delta^T H_tile delta``
  (AWQ's clip search).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qjax import numerics
from qjax.formats import QuantFormat
from qjax.quantize import encode
from qjax.typing import Array

SYMMETRIC_STEPS = 40
"""Shrink factors tried for symmetric and float formats."""
ASYMMETRIC_STEPS = 12
"""Shrink factors tried for each end of an asymmetric range (their product is evaluated)."""


def shrink_factors(fmt: QuantFormat) -> np.ndarray:
    """float32 ``(candidates, 2)``: factors on the low and the high end of the range, 1 first.

    The fewer the codes, the more a range may shrink: with 2 bits a third of it is often best.
    """
    floor = {2: 0.25, 3: 0.4}.get(fmt.bits, 0.5)
    if fmt.symmetric:
        factors = np.linspace(1.0, floor, SYMMETRIC_STEPS, dtype=np.float32)
        return np.stack([factors, factors], axis=1)
    factors = np.linspace(1.0, floor, ASYMMETRIC_STEPS, dtype=np.float32)
    low, high = np.meshgrid(factors, factors, indexing="ij")
    return np.stack([low.ravel(), high.ravel()], axis=1)


def range_scale(
    low: Array, high: Array, fmt: QuantFormat, step: Array | None = None
) -> tuple[Array, Array | None]:
    """Scale and zero point (None if symmetric) of tiles with the given ranges.

    ``step``: see ``numerics.absmax_scale``.
    """
    if fmt.symmetric:
        return numerics.absmax_scale(jnp.maximum(-low, high), fmt, step), None
    return numerics.minmax_scale(low, high, fmt)


def decode(code: Array, scale: Array, zero_point: Array | None) -> Array:
    """float32 values of codes; the parameters are already one per element (or broadcast axes)."""
    value = code.astype(jnp.float32)
    if zero_point is not None:
        value = value - zero_point.astype(jnp.float32)
    return value * scale.astype(jnp.float32)


def rounding_error(
    w: Array, scale: Array, zero_point: Array | None, fmt: QuantFormat, tiles: tuple[int, ...]
) -> Array:
    """``w - w_q`` in float32 for given scales."""
    code = encode(w, scale, zero_point, fmt, tiles)
    wide = numerics.expand_tiles(scale, w.shape, tiles)
    offset = None if zero_point is None else numerics.expand_tiles(zero_point, w.shape, tiles)
    return w.astype(jnp.float32) - decode(code, wide, offset)


def search_scale(
    w: Array, importance: Array, fmt: QuantFormat, step: Array | None = None
) -> tuple[Array, Array | None]:
    """Scales with the least importance-weighted square error.

    Args:
      w: ``(k, n)`` weights.
      importance: float32 ``(k,)``, non-negative. Where it is zero over a whole tile, the full range
        is kept.
      fmt: The format.
      step: With ``fmt.scale_steps``, float32 ``(1, n)``: take multiples of these, not of the steps
        that the range of ``w`` gives.

    Returns:
      ``(scale, zero_point)`` as of ``qjax.quantize.compute_scale``.
    """
    tiles = fmt.tiles(w.shape, 0)

    def tile_error(scale: Array, zero_point: Array | None) -> Array:
        delta = rounding_error(w, scale, zero_point, fmt, tiles)
        weighted = delta * delta * importance[:, None]
        return numerics.tile_view(weighted, tiles).sum((1, 3))

    return _search(w, fmt, tiles, tile_error, step)


def search_scale_output(w: Array, hessian: Array, fmt: QuantFormat) -> tuple[Array, Array | None]:
    """Scales with the least error of every tile's own contribution to the output.

    Args:
      w: ``(k, n)`` weights.
      hessian: float32 ``(k, k)``, ``X^T X``.
      fmt: The format.

    Returns:
      ``(scale, zero_point)`` as of ``qjax.quantize.compute_scale``.
    """
    tiles = fmt.tiles(w.shape, 0)
    blocks = diagonal_blocks(hessian, tiles[0])

    def tile_error(scale: Array, zero_point: Array | None) -> Array:
        delta = rounding_error(w, scale, zero_point, fmt, tiles)
        view = numerics.tile_view(delta, (tiles[0], w.shape[1]))[:, :, 0, :]
        product = jnp.einsum("gij,gjn->gin", blocks, view)
        return numerics.tile_view(jnp.sum(view * product, axis=1), (1, tiles[1])).sum((1, 3))

    return _search(w, fmt, tiles, tile_error)


def diagonal_blocks(matrix: Array, tile: int) -> Array:
    """Diagonal blocks ``(groups, tile, tile)`` of a square matrix, the last padded with zeros."""
    groups = -(-matrix.shape[0] // tile)
    pad = groups * tile - matrix.shape[0]
    view = jnp.pad(matrix, ((0, pad), (0, pad))).reshape(groups, tile, groups, tile)
    index = jnp.arange(groups)
    return view[index, :, index, :]


def _search(
    w: Array,
    fmt: QuantFormat,
    tiles: tuple[int, ...],
    tile_error: Callable[[Array, Array | None], Array],
    step: Array | None = None,
) -> tuple[Array, Array | None]:
    low, high = numerics.tile_reduce(w, tiles)
    factors = jnp.asarray(shrink_factors(fmt))
    if step is None:
        step = numerics.scale_step(jnp.maximum(-low, high), fmt, 0)
    scale, zero_point = range_scale(low, high, fmt, step)

    # A loop, not a batch of candidates: memory stays at one copy of the error.
    def body(i: Array, best: tuple[Array, Array, Array | None]) -> tuple:
        best_error, best_scale, best_zero = best
        scale, zero_point = range_scale(low * factors[i, 0], high * factors[i, 1], fmt, step)
        error = tile_error(scale, zero_point)
        better = error < best_error  # False for NaN: the full range stays
        if zero_point is not None and best_zero is not None:
            zero_point = jnp.where(better, zero_point, best_zero)
        return (
            jnp.where(better, error, best_error),
            jnp.where(better, scale, best_scale),
            zero_point,
        )

    start = (tile_error(scale, zero_point), scale, zero_point)
    _, scale, zero_point = jax.lax.fori_loop(1, factors.shape[0], body, start)
    return scale, zero_point
