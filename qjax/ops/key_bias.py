"""Keys stored without the bias of their projection, whose part of the logits is added apart.

Some models (Qwen2 and Qwen2.5, mostly in their first and last layers) add a bias of several hundred
to a few features of every key. Quantized with the rest it sets the scale, or in fp8 the size of the
rounding errors, and what distinguishes one token from another is lost. But it is known: with the
rotation ``R(n)`` of position ``n``::

    q . R(n) (W x + b)  =  q . R(n) W x  +  q . R(n) b          cache       this file

The second term needs no stored value. Over a page or chunk that begins at position ``s`` it is
``(R(-s) q) . (R(i) b)`` for offsets ``i``, one small product with the same table for all pages.
Over all positions ``n`` it is a sum of ``cos(n w)`` and ``sin(n w)`` over the frequencies ``w``
with coefficients of each query: one large product with a table that knows nothing of the model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qjax.ops.rotary import turn
from qjax.typing import Array


def rotate(x: Array, angles: Array, factor: float = 1.0) -> Array:
    """Rotate pairs of features in the half-split layout.

    Args:
      x: float32 ``[..., head_dim]``.
      angles: float32, broadcastable to ``[..., head_dim // 2]`` and of the same rank.
      factor: Multiplies the result.

    Returns:
      float32 ``[..., head_dim]``.
    """
    cos, sin = jnp.cos(angles) * jnp.float32(factor), jnp.sin(angles) * jnp.float32(factor)
    return turn(x, cos, sin)


@dataclasses.dataclass(frozen=True)
class KeyBias:
    """A bias that keys in the cache lack, and how positions rotate it.

    Attributes:
      bias: float32 ``[kv_heads, head_dim]``, before the rotation.
      frequencies: float32 ``[head_dim // 2]``, angle per position; of NumPy.
      factor: What the rotation multiplies keys with (YaRN).
    """

    bias: Array
    frequencies: np.ndarray
    factor: float = 1.0

    def table(self, length: int) -> Array:
        """float32 ``[kv_heads, length, head_dim]``: the bias at the first positions."""
        angles = np.arange(length, dtype=np.float32)[None, :, None] * self.frequencies
        return rotate(self.bias[:, None, :], jnp.asarray(angles), self.factor)

    def logits(self, q: Array, start: Array, table: Array) -> Array:
        """Products of rotated queries with the bias at some positions.

        Args:
          q: ``[b, kv_heads, ..., head_dim]``, the queries, rotated to their own positions.
          start: int32 ``[b]``, or ``[1]`` for all alike: first position of the keys.
          table: ``table(length)``.

        Returns:
          float32 ``[b, kv_heads, ..., length]``, to be multiplied like the other logits.
        """
        angles = -start.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies)[None, :]
        angles = angles.reshape(start.shape[0], *(1,) * (q.ndim - 2), -1)
        back = rotate(q.astype(jnp.float32), angles)
        # Not rounded to bfloat16 or TF32: the bias is large, and its errors would be too.
        return jnp.einsum("bk...d,ksd->bk...s", back, table, precision=jax.lax.Precision.HIGHEST)

    def all_logits(self, q: Array, length: int, multiplier: float) -> Array:
        """Products of rotated queries with the bias at the first positions, for a kernel.

        Both operands are split into two parts of TF32's 11 bits, and three of the four products
        are computed. GPUs round operands of a float32 product to TF32, which is exact for the first
        parts: relative to the largest terms errors are about 2**-22, and tensor cores take three
        products in less than half the time of float32 units.

        Args:
          q: ``[b, kv_heads, ratio, head_dim]``, the queries, rotated to their own positions.
          length: How many positions.
          multiplier: Of the results.

        Returns:
          float32 ``[b, kv_heads, ratio, length]``.
        """
        q1, q2 = jnp.split(q.astype(jnp.float32), 2, axis=-1)
        b1, b2 = jnp.split(self.bias[None, :, None, :], 2, axis=-1)
        coefficients = jnp.concatenate([q1 * b1 + q2 * b2, q2 * b1 - q1 * b2], axis=-1)
        coefficients = coefficients * jnp.float32(self.factor * multiplier)
        # The angles of the model's own rotation, rounded alike.
        positions = jnp.arange(length, dtype=jnp.float32)
        angles = positions[:, None] * jnp.asarray(self.frequencies)[None, :]
        table = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x, dx = _split(coefficients)
        y, dy = _split(table)
        # One product, so that its result is written once; small terms first.
        return jnp.einsum(
            "bkgd,sd->bkgs",
            jnp.concatenate([dx, x, x], axis=-1),
            jnp.concatenate([y, dy, y], axis=-1),
            precision=jax.lax.Precision.DEFAULT,
        )


def _split(x: Array) -> tuple[Array, Array]:
    """float32 as a number of TF32's 11 bits and the rest, exactly."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # By its bits: XLA may leave out a conversion to a narrower type and back.
    high = (bits + jnp.uint32(0x1000)) & jnp.uint32(0xFFFFE000)
    first = jax.lax.bitcast_convert_type(high, jnp.float32)
    return first, x - first
