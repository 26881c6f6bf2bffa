"""What calibration remembers of the activations: pure accumulators.

Every accumulator has ``init``, ``update`` (a batch of activations in) and ``merge`` (two halves of
the data). Sums are kept, not means, so that merging is an addition.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qjax.typing import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["hessian", "count"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class HessianStats:
    """``X^T X`` of the activations that meet one weight, half the Hessian of ``|X W - X W_q|^2``.

    Attributes:
      hessian: float32 ``(k, k)``, the sum over tokens.
      count: int32 scalar, the number of tokens.
    """

    hessian: Array
    count: Array

    @property
    def in_features(self) -> int:
        return self.hessian.shape[-1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["absmax", "sum_squares", "count"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ChannelStats:
    """Largest magnitude and sum of squares of every channel.

    Attributes:
      absmax: float32 ``(k,)``.
      sum_squares: float32 ``(k,)``.
      count: int32 scalar, the number of tokens.
    """

    absmax: Array
    sum_squares: Array
    count: Array

    @property
    def mean_square(self) -> Array:
        """float32 ``(k,)``; zeros before the first token."""
        return self.sum_squares / jnp.maximum(self.count, 1).astype(jnp.float32)


def init_hessian(in_features: int) -> HessianStats:
    """Statistics of no tokens."""
    return HessianStats(jnp.zeros((in_features, in_features), jnp.float32), jnp.int32(0))


@jax.jit
def update_hessian(stats: HessianStats, x: Array, valid: Array | None = None) -> HessianStats:
    """Add a batch of activations.

    Args:
      stats: What was seen before.
      x: ``(..., k)`` activations. bfloat16 and float16 are multiplied as they are, which is exact,
        with float32 sums; float32 is multiplied in full precision.
      valid: Boolean ``(...)``: tokens to count. All by default.

    Returns:
      New statistics.
    """
    rows, count = _rows(x, valid)
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    gram = jax.lax.dot_general(
        rows,
        rows,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return HessianStats(stats.hessian + gram, stats.count + count)


def merge_hessian(a: HessianStats, b: HessianStats) -> HessianStats:
    """Statistics of both sets of tokens."""
    return HessianStats(a.hessian + b.hessian, a.count + b.count)


def init_channel(in_features: int) -> ChannelStats:
    """Statistics of no tokens."""
    zeros = jnp.zeros((in_features,), jnp.float32)
    return ChannelStats(zeros, zeros, jnp.int32(0))


@jax.jit
def update_channel(stats: ChannelStats, x: Array, valid: Array | None = None) -> ChannelStats:
    """Add a batch of activations ``(..., k)``; arguments as of ``update_hessian``."""
    rows, count = _rows(x, valid)
    rows = rows.astype(jnp.float32)
    return ChannelStats(
        # `initial`: an empty batch is legal.
        jnp.maximum(stats.absmax, jnp.max(jnp.abs(rows), axis=0, initial=0.0)),
        stats.sum_squares + jnp.sum(rows * rows, axis=0),
        stats.count + count,
    )


def merge_channel(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    """Statistics of both sets of tokens."""
    return ChannelStats(
        jnp.maximum(a.absmax, b.absmax), a.sum_squares + b.sum_squares, a.count + b.count
    )


def _rows(x: Array, valid: Array | None) -> tuple[Array, Array]:
    """Activations as ``(tokens, k)``, uncounted tokens zeroed, and the number counted."""
    rows = x.reshape(-1, x.shape[-1])
    if valid is None:
        return rows, jnp.int32(rows.shape[0])
    mask = valid.reshape(-1)
    # `where`, not a product: what stands in padding may be NaN.
    rows = jnp.where(mask[:, None], rows, jnp.zeros((), rows.dtype))
    return rows, jnp.sum(mask, dtype=jnp.int32)


@jax.jit
def output_error(weight: Array, approximation: Array, stats: HessianStats) -> Array:
    """Relative output error ``|X W - X W_q| / |X W|`` over the calibration tokens, from the
    Hessian.

    Args:
      weight: ``(k, n)``.
      approximation: ``(k, n)``, dequantized.
      stats: Hessian of the activations.

    Returns:
      float32 scalar; 0 if ``X W`` is zero and so is the error.
    """
    weight = weight.astype(jnp.float32)
    delta = weight - approximation.astype(jnp.float32)
    error = quadratic(delta, stats.hessian)
    size = quadratic(weight, stats.hessian)
    return jnp.sqrt(error / jnp.where(size > 0, size, jnp.float32(1)))


def quadratic(delta: Array, hessian: Array) -> Array:
    """``trace(delta^T H delta)``, the squared output error of a weight error ``(k, n)``."""
    product = jnp.matmul(hessian, delta, precision=jax.lax.Precision.HIGHEST)
    # A rounding error of a semidefinite form can come out below zero.
    return jnp.maximum(jnp.vdot(delta, product, precision=jax.lax.Precision.HIGHEST), 0.0)
