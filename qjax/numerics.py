"""Casts that saturate, and the scale and zero point of a tile.

What happens to unusual inputs, for every format (tests/test_quantize.py):

============  ==================================================================================
input         result
============  ==================================================================================
zeros         code 0, scale 1 (a tile of zeros has no range of its own); dequantizes to exact 0
tiny (1e-30)  kept: the scale is small but a normal float32 as long as absmax / bound is; below
              that the tile counts as zeros
huge (1e30)   kept: absmax / bound is finite in float32
inf           saturates to the end of its tile's *finite* range on its side; the scale is computed
              from the finite values only, so one inf does not ruin its neighbours
NaN           code 0: a NaN carries no magnitude, and fp8 NaNs would poison whole dot products
============  ==================================================================================

With ``scale_steps`` this holds of a whole column, whose largest magnitude decides about its step.
Within it a group is rounded as if its magnitude were at least a sixteenth (``1 / scale_steps``) of
the column's: zeros stay exact zeros, with the step as their scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax.formats import QuantFormat
from qjax.typing import Array, DType

TINY = float(jnp.finfo(jnp.float32).tiny)
_SPARE_BITS = 6  # of a step's mantissa are zeros, so that multiples up to 64 are exact


def bound(dtype: DType) -> float:
    """Largest finite magnitude of a storage type: 7, 127, 448 (e4m3), 57344 (e5m2)."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return float(jnp.iinfo(dtype).max)
    return float(jnp.finfo(dtype).max)


def cast_saturating(
    x: Array, dtype: DType, *, lower: float | None = None, upper: float | None = None
) -> Array:
    """Cast to a narrow type: round to nearest even, clip to the finite range, NaN becomes 0.

    JAX's own casts overflow to NaN (e4m3) or inf (e5m2), and wrap for integers.

    Args:
      x: Floating-point values of any shape.
      dtype: Target type.
      lower: Smallest result; the type's finite minimum by default.
      upper: Largest result; the type's finite maximum by default.

    Returns:
      Values of the same shape in ``dtype``, all finite.
    """
    dtype = jnp.dtype(dtype)
    upper = bound(dtype) if upper is None else upper
    lower = -bound(dtype) if lower is None else lower
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.isnan(x), jnp.float32(0), jnp.clip(x, lower, upper))
    if jnp.issubdtype(dtype, jnp.integer):
        # int8 first: XLA's direct float -> int4 conversion is not supported on every backend.
        return jnp.rint(x).astype(jnp.int8).astype(dtype)
    return x.astype(dtype)


def tile_view(x: Array, tiles: tuple[int, ...], fill: float = 0.0) -> Array:
    """Reshape ``(d0, d1, ...)`` into ``(ceil(d0/t0), t0, ceil(d1/t1), t1, ...)``.

    A last tile that is cut short is padded with ``fill``.
    """
    counts = [-(-size // tile) for size, tile in zip(x.shape, tiles, strict=True)]
    pad = [(0, n * t - size) for n, t, size in zip(counts, tiles, x.shape, strict=True)]
    if any(after for _, after in pad):
        x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape([extent for pair in zip(counts, tiles, strict=True) for extent in pair])


def expand_tiles(scale: Array, shape: tuple[int, ...], tiles: tuple[int, ...]) -> Array:
    """Repeat one value per tile to one per element (axes of a single tile stay of length one)."""
    for axis, (size, tile) in enumerate(zip(shape, tiles, strict=True)):
        if scale.shape[axis] not in (1, size):
            scale = jnp.repeat(scale, tile, axis=axis)
            scale = jax.lax.slice_in_dim(scale, 0, size, axis=axis)
    return scale


def tile_reduce(x: Array, tiles: tuple[int, ...]) -> tuple[Array, Array]:
    """Minimum and maximum of the finite values of every tile, in float32.

    Returns:
      ``(low, high)``, each with one entry per tile and the rank of ``x``; both 0 where a tile has
      no finite value. Zero always lies inside the range.
    """
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.isfinite(x), x, jnp.float32(0))
    view = tile_view(x, tiles)
    axes = tuple(range(1, view.ndim, 2))
    zero = jnp.float32(0)
    return jnp.minimum(view.min(axes), zero), jnp.maximum(view.max(axes), zero)


def tile_absmax(x: Array, tiles: tuple[int, ...]) -> Array:
    """Largest finite magnitude of every tile, float32; 0 where a tile has no finite value.

    One reduction in the type of ``x``: XLA's CPU backend takes four times as long for the two of
    ``tile_reduce``, and this is most of the time of quantizing a weight.
    """
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.zeros((), x.dtype))
    view = tile_view(magnitude, tiles)
    return view.max(tuple(range(1, view.ndim, 2))).astype(jnp.float32)


def round_scale(scale: Array, dtype: str) -> Array:
    """Round a float32 scale to the type it is held in; never to zero, infinity or NaN."""
    if dtype == "float32":
        return scale
    if dtype == "float8_e8m0fnu":
        # A power of two, rounded up so that the largest value still fits (OCP MX rounds down and
        # saturates instead).
        exponent = jnp.clip(jnp.ceil(jnp.log2(scale)), -127.0, 127.0)
        return jnp.exp2(exponent).astype(jnp.float8_e8m0fnu)
    info = jnp.finfo(dtype)
    # The smallest normal, not the smallest subnormal: a subnormal scale has lost its precision.
    return jnp.clip(scale, float(info.tiny), float(info.max)).astype(dtype)


def absmax_scale(absmax: Array, fmt: QuantFormat, step: Array | None = None) -> Array:
    """Symmetric scale, ``absmax / bound``, in ``fmt.scale_dtype``; 1 for a tile of zeros.

    With ``step`` (``scale_step``; needed if ``fmt.scale_steps`` is set) the nearest multiple of it.
    """
    scale = absmax / jnp.float32(fmt.bound)
    if fmt.scale_steps is None:
        scale = jnp.where(scale < TINY, jnp.float32(1), scale)
    return fit_scale(scale, fmt, step)


def fit_scale(scale: Array, fmt: QuantFormat, step: Array | None = None) -> Array:
    """Round float32 scales to what the format holds: its type, or a multiple of ``step``."""
    if fmt.scale_steps is None:
        return round_scale(scale, fmt.scale_dtype)
    assert step is not None, "formats with scale_steps need the step of each column"
    return whole_scale(scale, step, fmt.scale_steps)


def scale_step(absmax: Array, fmt: QuantFormat, axis: int) -> Array | None:
    """The step of which all scales along ``axis`` are multiples; None without ``scale_steps``.

    The largest scale is ``scale_steps`` times it. Its last bits are zeros, so that multiples are
    exact.

    Args:
      absmax: float32, one per tile; 0 for tiles of zeros.
      fmt: The format.
      axis: Contraction axis.

    Returns:
      float32 in the shape of ``absmax`` but for a length of one along ``axis``; 1 for zeros.
    """
    if fmt.scale_steps is None:
        return None
    step = absmax.max(axis, keepdims=True) / jnp.float32(fmt.bound * fmt.scale_steps)
    return round_step(jnp.where(step < TINY, jnp.float32(1), step))


def round_step(step: Array) -> Array:
    """The nearest float32 of which multiples are exact; positive and well below the maximum."""
    bits = jax.lax.bitcast_convert_type(step, jnp.int32) + (1 << _SPARE_BITS >> 1)
    return jax.lax.bitcast_convert_type(bits & ~((1 << _SPARE_BITS) - 1), jnp.float32)


def whole_scale(scale: Array, step: Array, steps: int) -> Array:
    """The multiple of ``step``, from 1 to ``steps``, that is nearest to ``scale``: exact."""
    return jnp.clip(jnp.rint(scale / step), 1, steps) * step


def find_scale_step(scale: Array, steps: int) -> tuple[Array, Array]:
    """The step of scales that are multiples of one, as ``whole_scale`` makes them.

    Args:
      scale: float32 ``(groups, n)``: all groups of a column or some of them.
      steps: The largest multiple.

    Returns:
      ``(step, exact)``, each ``(1, n)``: a step and whether every scale is a multiple of it, to the
      last bit. If none fits, the finest step.
    """
    largest = scale.max(0, keepdims=True)

    def body(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        step, exact = found
        # Rounded, as XLA divides with an error of up to two units in the last place.
        tried = round_step(largest / (steps - i).astype(jnp.float32))
        fits = jnp.all(whole_scale(scale, tried, steps) == scale, axis=0, keepdims=True)
        return jnp.where(fits & ~exact, tried, step), exact | fits

    start = round_step(largest / jnp.float32(steps)), jnp.zeros(largest.shape, bool)
    return jax.lax.fori_loop(0, steps, body, start)


def minmax_scale(low: Array, high: Array, fmt: QuantFormat) -> tuple[Array, Array]:
    """Asymmetric scale and zero point: ``[low, high]`` is spread over all ``2**bits`` codes.

    Returns:
      ``(scale, zero_point)``: scale in ``fmt.scale_dtype``, zero point int8 in ``[qmin, qmax]``,
      so that 0.0 is represented exactly.
    """
    # Halves first: high - low may overflow when both are near the float32 limits.
    scale = (high / 2 - low / 2) / jnp.float32((fmt.qmax - fmt.qmin) / 2)
    scale = round_scale(jnp.where(scale < TINY, jnp.float32(1), scale), fmt.scale_dtype)
    zero_point = jnp.rint(jnp.float32(fmt.qmin) - low / scale.astype(jnp.float32))
    return scale, jnp.clip(zero_point, fmt.qmin, fmt.qmax).astype(jnp.int8)
