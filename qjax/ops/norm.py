"""Residual addition and RMS normalisation."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.ops._dispatch import choose_backend
from qjax.ops.activations import QuantizedActivation, kernel_options
from qjax.pallas_kernels import add_rms_norm as kernel
from qjax.typing import Array, DType

_F32 = jnp.float32


def rms_norm(x: Array, weight: Array, eps: float, dtype: DType) -> Array:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis, in float32, rounded once.

    Args:
      x: ``(..., d)``.
      weight: ``(d,)``.
      eps: Added to the mean square.
      dtype: Type of the result.
    """
    wide = x.astype(_F32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(_F32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(dtype)


def add_rms_norm_unsupported_reason(residual: Array) -> str | None:
    """Why the Mosaic GPU kernel cannot normalise these rows here; None if it can."""
    rows, columns = math.prod(residual.shape[:-1]), residual.shape[-1]
    reason = kernel.unsupported_reason(rows, columns, residual.dtype)
    return reason or mosaic_gpu_unsupported_reason()


def add_rms_norm(
    residual: Array,
    delta: Array,
    weight: Array,
    eps: float,
    *,
    dtype: DType | None = None,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Add to the residual stream and normalise it.

    Args:
      residual: ``(..., d)``.
      delta: ``(s, ..., d)``: partial sums of what is added, as ``quantized_dot(keep_splits=True)``
        returns them. Added in order in float32 and rounded to the type of ``residual``.
      weight: ``(d,)``.
      eps: Added to the mean square.
      dtype: Type of the normalised rows; that of ``residual`` by default.
      backend: ``"xla"``, ``"mosaic_gpu"``, or None for the kernel where it can run.

    Returns:
      The new residual and the normalised rows.

    Raises:
      NotImplementedError: If the named backend cannot run; the message says why.
    """
    reason = add_rms_norm_unsupported_reason(residual)
    dtype = jnp.dtype(residual.dtype if dtype is None else dtype)
    if choose_backend("add_rms_norm", backend, reason) == "xla":
        return _reference(eps, dtype, residual, delta, weight)
    return _by_kernel(eps, dtype, residual, delta, weight)


def _reference(
    eps: float, dtype: DType, residual: Array, delta: Array, weight: Array
) -> tuple[Array, Array]:
    total = functools.reduce(jnp.add, [part.astype(_F32) for part in delta])
    residual = residual + total.astype(residual.dtype)
    return residual, rms_norm(residual, weight, eps, dtype)


def add_rms_norm_codes_unsupported_reason(residual: Array, fmt: QuantFormat) -> str | None:
    """Why the kernel cannot give codes of these rows, normalised; None if it can, on a GPU.

    Of formats, rows and devices that ``activations.codes_by_kernel`` allows for.
    """
    rows, columns = math.prod(residual.shape[:-1]), residual.shape[-1]
    return kernel.unsupported_reason(rows, columns, residual.dtype, *kernel_options(columns, fmt))


def add_rms_norm_codes(
    residual: Array, delta: Array, weight: Array, eps: float, fmt: QuantFormat
) -> tuple[Array, QuantizedActivation]:
    """``add_rms_norm`` by the kernel, for products with 8-bit activations.

    For inference: it has no gradient. ``add_rms_norm_codes_unsupported_reason`` must be None.

    Args:
      residual: ``(..., d)``, bfloat16 or float16.
      delta: ``(s, ..., d)``.
      weight: ``(d,)``.
      eps: Added to the mean square.
      fmt: Format of the normalised rows.

    Returns:
      The new residual, and what ``quantize`` makes of the normalised rows, rounded to its type.

    Raises:
      NotImplementedError: If the kernel does not take the arguments; says why.
    """
    rows, d = math.prod(residual.shape[:-1]), residual.shape[-1]
    codes, blocks = kernel_options(d, fmt)
    out, values, scale = kernel.add_rms_norm(
        residual.reshape(rows, d),
        delta.reshape(delta.shape[0], rows, d),
        weight,
        eps,
        codes=codes,
        blocks=blocks,
    )
    normed = QuantizedActivation(values, scale, fmt, residual.shape, residual.dtype)
    return out.reshape(residual.shape), normed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(
    eps: float, dtype: DType, residual: Array, delta: Array, weight: Array
) -> tuple[Array, Array]:
    rows, d = math.prod(residual.shape[:-1]), residual.shape[-1]
    flat = delta.reshape(delta.shape[0], rows, d)
    rows_in = residual.reshape(rows, d)
    out, normed = kernel.add_rms_norm(rows_in, flat, weight, eps, normed_dtype=dtype)
    return out.reshape(residual.shape), normed.reshape(residual.shape)


def _forward(
    eps: float, dtype: DType, *arguments: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _by_kernel(eps, dtype, *arguments), arguments


def _backward(
    eps: float, dtype: DType, arguments: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, ...]:
    _, pull_back = jax.vjp(functools.partial(_reference, eps, dtype), *arguments)
    return pull_back(cotangents)


_by_kernel.defvjp(_forward, _backward)
