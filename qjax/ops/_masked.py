"""Attention with a mask over keys at hand, differentiable, and the steps that all forms share."""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp

from qjax.typing import Array


def contract(spec: str, x: Array, y: Array) -> Array:
    """einsum with float32 accumulation; float32 operands are not rounded to TF32 or bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)


def finite(m: Array) -> Array:
    """A row maximum that may be subtracted: 0 for rows that see nothing."""
    return jnp.where(m == -jnp.inf, jnp.float32(0), m)


def masked_attention(q: Array, k: Array, v: Array, seen: Array, scale: float) -> Array:
    """``softmax(scale * q @ k.T where seen) @ v`` over the last two axes, float32 inside.

    Differentiable.

    Args:
      q: ``[b, heads, t, head_dim]``.
      k: ``[b, heads, s, head_dim]``, of the same type.
      v: Like ``k``.
      seen: bool, broadcast to ``[b, heads, t, s]``.
      scale: Multiplier of the logits.

    Returns:
      float32, like ``q``; zeros for queries that see nothing.
    """
    # In float32 autodiff's own rules are as good, and forward mode works too.
    if q.dtype.itemsize > 2:
        return _masked_attention_fwd(q, k, v, seen, scale)[0]
    return cast(Array, _masked_attention(q, k, v, seen, scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _masked_attention(q: Array, k: Array, v: Array, seen: Array, scale: float) -> Array:
    """``masked_attention`` of 16-bit operands.

    The backward pass multiplies in the operands' dtype, like the forward pass: autodiff would pair
    the float32 cotangents with 16-bit operands, which XLA computes in float32.
    """
    return _masked_attention_fwd(q, k, v, seen, scale)[0]


def _masked_attention_fwd(
    q: Array, k: Array, v: Array, seen: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    logits = contract("bktd,bksd->bkts", q, k) * jnp.float32(scale)
    logits = jnp.where(seen, logits, -jnp.inf)
    p = jnp.exp(logits - finite(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = (p / jnp.where(total > 0, total, jnp.float32(1))).astype(q.dtype)
    return contract("bkts,bksd->bktd", p, v), (q, k, v, p)


def _masked_attention_bwd(
    scale: float, residuals: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, p = residuals
    g = g.astype(q.dtype)
    dp = contract("bktd,bksd->bkts", g, v)
    wide = p.astype(jnp.float32)
    dlogits = wide * (dp - jnp.sum(dp * wide, axis=-1, keepdims=True))
    dlogits = (dlogits * jnp.float32(scale)).astype(q.dtype)
    dq = contract("bkts,bksd->bktd", dlogits, k)
    dk = contract("bkts,bktd->bksd", dlogits, q)
    dv = contract("bkts,bktd->bksd", p, g)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_masked_attention.defvjp(_masked_attention_fwd, _masked_attention_bwd)
