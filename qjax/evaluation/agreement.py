"""How far the next-token distributions of two models are apart, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax.typing import Array


def kl_divergence(reference_logits: Array, logits: Array) -> Array:
    """``KL(reference || model)`` in nats: what coding with the model's distribution costs extra.

    Args:
      reference_logits: ``[..., vocab]``.
      logits: ``[..., vocab]``.

    Returns:
      float32 ``[...]``. Tokens that the reference rules out (``-inf``) add nothing.
    """
    log_p = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), jnp.float32(0)), axis=-1)


def top1_agreement(reference_logits: Array, logits: Array) -> Array:
    """Whether greedy decoding would choose the same token: bool ``[...]``."""
    return jnp.argmax(reference_logits, axis=-1) == jnp.argmax(logits, axis=-1)
