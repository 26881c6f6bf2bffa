"""Moving a per-channel factor from the input of a layer into whatever produces that input.

``y = x @ w`` is ``(x / s) @ (s * w)`` for any positive ``s``. The division is done once, offline,
by the layer before: the norm's weight, the columns of ``v_proj`` (attention mixes tokens, not
channels) or of ``up_proj`` (which multiplies the gate). The unquantized model computes the same as
before.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qjax.calibration.stats import HessianStats
from qjax.typing import Array


def fold_into_norm(weight: Array, scale: Array) -> tuple[Array, Array]:
    """Divide a norm's weight by ``scale``, and say by what it was really divided.

    The quotient is rounded to the weight's type, so the factor that the following kernels must take
    up is the quotient of what stands there now, not ``scale``: with it nothing is lost to that
    rounding.

    Args:
      weight: ``(k,)``.
      scale: float32 ``(k,)``, positive.

    Returns:
      ``(weight, factor)``: in the weight's type; float32, 1 where a weight is or would become zero.
    """
    old = weight.astype(jnp.float32)
    new = (old / scale).astype(weight.dtype)
    usable = (old != 0) & (new != 0) & jnp.isfinite(new)
    new = jnp.where(usable, new, weight)
    wide = new.astype(jnp.float32)
    return new, jnp.where(usable, old / jnp.where(usable, wide, 1.0), jnp.float32(1))


def scale_inputs(kernel: Array, factor: Array) -> Array:
    """``factor[:, None] * kernel`` in float32: a kernel whose inputs were divided by ``factor``."""
    return kernel.astype(jnp.float32) * factor[:, None]


def scale_outputs(kernel: Array, factor: Array) -> Array:
    """``kernel / factor[None, :]`` in float32: a kernel whose outputs shall be divided by it."""
    return kernel.astype(jnp.float32) / factor[None, :]


def scale_hessian(stats: HessianStats, factor: Array) -> HessianStats:
    """Statistics of the inputs after division by ``factor``, without a pass over the data."""
    inverse = 1 / factor
    return HessianStats(stats.hessian * inverse[:, None] * inverse[None, :], stats.count)


def gqa_sources(num_q_heads: int, num_kv_heads: int, head_dim: int) -> np.ndarray:
    """Which output channel of ``v_proj`` each input channel of ``o_proj`` comes from.

    With grouped queries several input channels of ``o_proj`` share one channel of ``v_proj`` and so
    must share its factor.

    Returns:
      int32 ``(num_q_heads * head_dim,)`` with values below ``num_kv_heads * head_dim``.
    """
    kv_head = np.arange(num_q_heads) // (num_q_heads // num_kv_heads)
    channel = kv_head[:, None] * head_dim + np.arange(head_dim)[None, :]
    return channel.reshape(-1).astype(np.int32)
