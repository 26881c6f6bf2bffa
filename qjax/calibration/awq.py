"""AWQ: make the weights of active channels larger before rounding, so that they round better.

With ``s = x^a / w^(1-a)``, ``x`` a channel's activation magnitude and ``w`` its weight magnitude,
the kernels become ``s * W`` and the inputs ``x / s`` (``folding`` moves that into the layer
before). The exponent is found by trying: every candidate is judged by the error of the layer's
output, ``sum over kernels of trace(D^T H D)``, which needs the Hessian only and not the
activations.

References:
  Lin et al., AWQ, arXiv:2306.00978.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.scale_search import search_scale_output
from qjax.calibration.stats import HessianStats, quadratic
from qjax.formats import QuantFormat
from qjax.quantize import quantize
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array

GRID = 20


class AWQScale(NamedTuple):
    """Result of ``search_awq_scale``.

    Attributes:
      scale: float32 ``(sources,)`` factors of the producing channels, 1 if nothing was better.
      channel_scale: float32 ``(k,)`` the same, one per input channel of the kernels.
      before: float32 scalar, squared output error without scaling.
      after: float32 scalar, squared output error with it.
    """

    scale: Array
    channel_scale: Array
    before: Array
    after: Array


def search_awq_scale(
    kernels: Sequence[Array],
    stats: HessianStats,
    fmt: QuantFormat,
    *,
    sources: np.ndarray | None = None,
    grid: int = GRID,
) -> AWQScale:
    """Find the per-channel factors for kernels that share their input.

    Args:
      kernels: ``(k, n_i)`` each: q, k and v, or gate and up, or a single one.
      stats: Statistics of their common input.
      fmt: Format they will be quantized in.
      sources: int32 ``(k,)``: the producing channel of each input channel, where several come from
        one (``folding.gqa_sources``). One to one by default.
      grid: Exponents tried, with and without regard to the weights' magnitude.

    Returns:
      The factors with the least error; never worse than none.

    Raises:
      ValueError: If shapes do not fit.
    """
    k = stats.in_features
    if any(kernel.ndim != 2 or kernel.shape[0] != k for kernel in kernels):
        shapes = [kernel.shape for kernel in kernels]
        raise ValueError(f"kernels of {shapes} do not all have the statistics' {k} input channels")
    source = np.arange(k, dtype=np.int32) if sources is None else sources
    if source.shape != (k,):
        raise ValueError(f"{source.shape=} must be ({k},), one producer for each channel")
    count = int(source.max()) + 1
    return _search(
        tuple(kernels), stats, jnp.asarray(source), fmt=fmt, num_sources=count, grid=grid
    )


@functools.partial(jax.jit, static_argnames=("fmt", "num_sources", "grid"))
def _search(
    kernels: tuple[Array, ...],
    stats: HessianStats,
    source: Array,
    *,
    fmt: QuantFormat,
    num_sources: int,
    grid: int,
) -> AWQScale:
    tokens = jnp.maximum(stats.count, 1).astype(jnp.float32)
    members = jax.ops.segment_sum(jnp.ones(source.shape, jnp.float32), source, num_sources)
    mean_square = jnp.diagonal(stats.hessian) / tokens
    activity = jnp.sqrt(jax.ops.segment_sum(mean_square, source, num_sources) / members)
    size = jax.ops.segment_sum(_relative_size(kernels, fmt), source, num_sources) / members
    live = (activity > 0) & (size > 0)
    log_x = jnp.log(jnp.where(live, activity, 1.0))
    log_w = jnp.log(jnp.where(live, size, 1.0))

    def candidate(i: Array) -> Array:
        exponent = (i // 2 + 1).astype(jnp.float32) / grid
        use_weights = (i % 2).astype(jnp.float32)
        log_s = exponent * log_x - use_weights * (1 - exponent) * log_w
        # Centred, so that the factors neither grow nor shrink the kernel as a whole.
        high = jnp.max(jnp.where(live, log_s, -jnp.inf))
        low = jnp.min(jnp.where(live, log_s, jnp.inf))
        log_s = jnp.where(live, log_s - (high + low) / 2, 0.0)
        return jnp.exp(jnp.clip(log_s, -9.0, 9.0))

    def error(scale: Array) -> Array:
        s = scale[source][:, None]
        total = jnp.float32(0)
        for kernel in kernels:
            w = kernel.astype(jnp.float32)
            delta = quantize(w * s, fmt).dequantize() / s - w
            total = total + quadratic(delta, stats.hessian)
        return total

    def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = candidate(i)
        new = error(scale)
        better = new < best[0]
        return jnp.where(better, new, best[0]), jnp.where(better, scale, best[1])

    ones = jnp.ones((num_sources,), jnp.float32)
    before = error(ones)
    after, scale = jax.lax.fori_loop(0, 2 * grid, body, (before, ones))
    return AWQScale(scale, scale[source], before, after)


def _relative_size(kernels: tuple[Array, ...], fmt: QuantFormat) -> Array:
    """Mean of ``|w| / absmax of its tile`` per input channel, float32 ``(k,)``."""
    total = jnp.zeros((kernels[0].shape[0],), jnp.float32)
    for kernel in kernels:
        w = jnp.abs(kernel.astype(jnp.float32))
        tile = fmt.tiles(w.shape, 0)[0]
        groups = -(-w.shape[0] // tile)
        padded = jnp.pad(w, ((0, groups * tile - w.shape[0]), (0, 0)))
        view = padded.reshape(groups, tile, -1)
        top = view.max(1, keepdims=True)
        view = view / jnp.where(top > 0, top, 1.0)
        total = total + view.reshape(padded.shape)[: w.shape[0]].sum(1)
    return total / sum(kernel.shape[1] for kernel in kernels)


@functools.partial(jax.jit, static_argnames=("fmt",))
def quantize_clipped(weight: Array, stats: HessianStats, fmt: QuantFormat) -> QuantizedArray:
    """Round to nearest with clipping: every tile's range is the one with the least output error.

    Args:
      weight: ``(k, n)`` kernel.
      stats: Statistics of its inputs.
      fmt: The format.

    Returns:
      The structure of ``qjax.quantize``.
    """
    scale, zero_point = search_scale_output(weight, stats.hessian, fmt)
    return quantize(weight, fmt, scale=scale, zero_point=zero_point)
