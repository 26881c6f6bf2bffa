"""SmoothQuant: for W8A8, move outliers of the activations into the weights.

``s = x^a / w^(1-a)`` with the largest magnitudes of a channel's activations and weights. The inputs
become ``x / s`` (``folding`` moves that into the layer before), the kernels ``s * W``; ``a``
divides the difficulty between them.

References:
  Xiao et al., SmoothQuant, arXiv:2211.10438.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.stats import ChannelStats
from qjax.formats import QuantFormat
from qjax.quantize import quantize
from qjax.typing import Array

ALPHAS = tuple(i / 10 for i in range(1, 10))


class SmoothScale(NamedTuple):
    """Result of ``search_smooth_scale``; fields as of ``AWQScale``."""

    scale: Array
    channel_scale: Array
    before: Array
    after: Array


def smooth_scale(
    kernels: Sequence[Array],
    stats: ChannelStats,
    alpha: Array | float,
    *,
    sources: Array | None = None,
) -> Array:
    """The factors for one exponent.

    Args:
      kernels: ``(k, n_i)``, all with the same input.
      stats: Statistics of that input.
      alpha: 0 leaves all difficulty with the activations, 1 moves all of it to the weights.
      sources: int32 ``(k,)``: producing channel of each input channel; one to one by default.

    Returns:
      float32, one per producing channel; 1 where activations or weights are all zero.
    """
    k = stats.absmax.shape[0]
    source = jnp.arange(k) if sources is None else sources
    count = k if sources is None else int(np.max(np.asarray(sources))) + 1
    return _factors(tuple(kernels), stats, jnp.float32(alpha), source, count)


def _factors(
    kernels: tuple[Array, ...], stats: ChannelStats, alpha: Array, source: Array, count: int
) -> Array:
    w = jnp.zeros(stats.absmax.shape, jnp.float32)
    for kernel in kernels:
        w = jnp.maximum(w, jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=1))
    x = jax.ops.segment_max(stats.absmax, source, count)
    w = jax.ops.segment_max(w, source, count)
    live = (x > 0) & (w > 0) & jnp.isfinite(x)
    x, w = jnp.where(live, x, 1.0), jnp.where(live, w, 1.0)
    log_s = alpha * jnp.log(x) - (1 - alpha) * jnp.log(w)
    # A common factor is free: centred, the norm's weights stay where they were.
    middle = (jnp.max(log_s) + jnp.min(log_s)) / 2
    return jnp.where(live, jnp.exp(jnp.clip(log_s - middle, -9.0, 9.0)), 1.0)


def search_smooth_scale(
    kernels: Sequence[Array],
    stats: ChannelStats,
    x: Array,
    fmt: QuantFormat,
    *,
    sources: np.ndarray | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> SmoothScale:
    """Find the exponent by the output error with quantized weights and activations.

    Args:
      kernels: ``(k, n_i)``, all with the same input.
      stats: Statistics of that input over all tokens.
      x: ``(tokens, k)``, a sample of it; some hundred tokens are enough.
      fmt: Weight format with an ``activation`` format.
      sources: As of ``smooth_scale``.
      alphas: Exponents to try.

    Returns:
      The factors with the least error on the sample; never worse than none.

    Raises:
      ValueError: If the format does not quantize activations.
    """
    if fmt.activation is None:
        raise ValueError(f"{fmt.name} does not quantize activations; use W8A8_INT8 or W8A8_FP8")
    k = stats.absmax.shape[0]
    source = np.arange(k, dtype=np.int32) if sources is None else sources
    return _search(
        tuple(kernels),
        stats,
        x,
        jnp.asarray(source),
        jnp.asarray(alphas, jnp.float32),
        fmt=fmt,
        count=int(source.max()) + 1,
    )


@functools.partial(jax.jit, static_argnames=("fmt", "count"))
def _search(
    kernels: tuple[Array, ...],
    stats: ChannelStats,
    x: Array,
    source: Array,
    alphas: Array,
    *,
    fmt: QuantFormat,
    count: int,
) -> SmoothScale:
    assert fmt.activation is not None
    activation = fmt.activation
    x = x.astype(jnp.float32)

    def error(scale: Array) -> Array:
        s = scale[source]
        inputs = quantize(x / s[None, :], activation, axis=-1).dequantize()
        total = jnp.float32(0)
        for kernel in kernels:
            w = kernel.astype(jnp.float32)
            approximate = inputs @ quantize(w * s[:, None], fmt).dequantize()
            total = total + jnp.sum((approximate - x @ w) ** 2)
        return total

    def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = _factors(kernels, stats, alphas[i], source, count)
        new = error(scale)
        better = new < best[0]
        return jnp.where(better, new, best[0]), jnp.where(better, scale, best[1])

    ones = jnp.ones((count,), jnp.float32)
    before = error(ones)
    after, scale = jax.lax.fori_loop(0, alphas.shape[0], body, (before, ones))
    return SmoothScale(scale, scale[source], before, after)
