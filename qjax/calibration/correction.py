"""Aim at what the original model computed, not at what the layer makes of disturbed inputs.

Behind quantized layers a layer sees inputs ``X`` that differ from the original model's ``X_0``, and
the residual stream it adds to is off as well. With ``E`` the change of the layer's output that
would undo both (``(X_0 - X) W``, plus the error of the residual stream for the layers that write to
it), the kernel to approximate is not ``W`` but

    W + (X^T X + lambda I)^-1 X^T E,

the ridge regression of ``E`` on the inputs there are. GPTQ then quantizes this kernel.

References:
  Li et al., GPTAQ, arXiv:2504.02692; Zhang et al., Qronos, arXiv:2505.11695.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qjax.calibration.stats import HessianStats, quadratic
from qjax.typing import Array

_EXACT = jax.lax.Precision.HIGHEST


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["cross", "energy"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class CorrectionStats:
    """What the outputs of a layer lack, seen from its inputs.

    Attributes:
      cross: float32 ``(k, n)``, ``X^T E`` over tokens.
      energy: float32 ``(n,)``, sum of ``E^2`` over tokens.
    """

    cross: Array
    energy: Array


def init_correction(in_features: int, out_features: int) -> CorrectionStats:
    """Statistics of no tokens."""
    return CorrectionStats(
        jnp.zeros((in_features, out_features), jnp.float32), jnp.zeros((out_features,), jnp.float32)
    )


@jax.jit
def update_correction(
    stats: CorrectionStats, x: Array, missing: Array, valid: Array
) -> CorrectionStats:
    """Add a batch.

    Args:
      stats: What was seen before.
      x: ``(..., k)`` inputs of the layer.
      missing: ``(..., n)``, ``E``: what should be added to its output.
      valid: Boolean ``(...)``: tokens to count.

    Returns:
      New statistics.
    """
    # Behind 16-bit activations the errors themselves are rounded: what the fastest product of
    # float32 (TF32 on a GPU) adds to that is noise, which the regression averages out.
    precision = _EXACT if x.dtype == jnp.float32 else None
    mask = valid.reshape(-1)[:, None]
    rows = jnp.where(mask, x.reshape(-1, x.shape[-1]).astype(jnp.float32), 0.0)
    wanted = jnp.where(mask, missing.reshape(-1, missing.shape[-1]).astype(jnp.float32), 0.0)
    return CorrectionStats(
        stats.cross + jnp.matmul(rows.T, wanted, precision=precision),
        stats.energy + jnp.sum(wanted * wanted, axis=0),
    )


def merge_correction(a: CorrectionStats, b: CorrectionStats) -> CorrectionStats:
    """Statistics of both sets of tokens."""
    return CorrectionStats(a.cross + b.cross, a.energy + b.energy)


@jax.jit
def corrected_weight(
    weight: Array, hessian: HessianStats, stats: CorrectionStats, strength: Array
) -> Array:
    """The kernel which brings the output closest to the original model's.

    Args:
      weight: ``(k, n)`` original kernel.
      hessian: Statistics of the inputs.
      stats: What the outputs lack, over the same tokens.
      strength: ``lambda`` as a fraction of the Hessian's mean diagonal; the larger, the closer to
        ``weight``.

    Returns:
      float32 ``(k, n)``; ``weight`` where the regression has no finite solution.
    """
    h = hessian.hessian
    ridge = strength * jnp.mean(jnp.diagonal(h))
    ridge = jnp.where(ridge > 0, ridge, jnp.float32(1))  # no token at all: nothing to correct
    factor = jax.scipy.linalg.cho_factor(h + ridge * jnp.eye(h.shape[0], dtype=jnp.float32))
    delta = jax.scipy.linalg.cho_solve(factor, stats.cross)
    return weight.astype(jnp.float32) + jnp.where(jnp.all(jnp.isfinite(delta)), delta, 0.0)


@jax.jit
def corrected_error(
    weight: Array, approximation: Array, hessian: HessianStats, stats: CorrectionStats
) -> Array:
    """Relative error against the original model's output, ``|X W + E - X W_q| / |X W|``.

    Args:
      weight: ``(k, n)`` original kernel.
      approximation: ``(k, n)``, dequantized.
      hessian: Statistics of the inputs.
      stats: What the outputs lack.

    Returns:
      float32 scalar. With zero ``stats`` it is ``stats.output_error``.
    """
    weight = weight.astype(jnp.float32)
    delta = approximation.astype(jnp.float32) - weight
    explained = jnp.vdot(delta, stats.cross, precision=_EXACT)
    error = jnp.sum(stats.energy) - 2 * explained + quadratic(delta, hessian.hessian)
    size = quadratic(weight, hessian.hessian)
    return jnp.sqrt(jnp.maximum(error, 0.0) / jnp.where(size > 0, size, jnp.float32(1)))
