"""``quantized_dot``: activations times a quantized weight, by the scale algebra.

A scale whose axis survives the contraction multiplies the output; one that varies along the
contraction multiplies partial sums of its group, or (many rows) the operand inside the fusion that
reads it. No form writes a dequantized copy of the weight to memory where XLA can fuse the cast.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.numerics import expand_tiles
from qjax.ops import packed_w8a8
from qjax.ops._dispatch import choose_backend
from qjax.ops._plain import plain_by_kernel
from qjax.ops.activations import QuantizedActivation
from qjax.ops.packed import (
    PackedWeight,
    packed_config,
    packed_dot,
    packed_unsupported_reason,
)
from qjax.pallas_kernels import plain
from qjax.quantize import quantize
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array, DType

_F32 = jnp.float32


def unsupported_reason(x: Array, w: Array | QuantizedArray | PackedWeight) -> str | None:
    """Why the Mosaic GPU kernels cannot compute ``quantized_dot(x, w)``; None if they can."""
    if isinstance(w, PackedWeight):
        return packed_unsupported_reason(x, w)
    if isinstance(w, QuantizedArray):
        return "the kernels take packed weights; pack it first with qjax.pack_for_mosaic"
    if w.dtype != x.dtype:
        return f"{x.dtype} activations and a {w.dtype} weight; the kernel takes one type"
    m, (k, n) = math.prod(x.shape[:-1]), w.shape
    return plain.unsupported_reason(m, k, n, x.dtype) or mosaic_gpu_unsupported_reason()


def quantized_dot(
    x: Array | QuantizedActivation,
    w: Array | QuantizedArray | PackedWeight,
    *,
    activation_format: QuantFormat | None = None,
    out_dtype: DType | None = None,
    keep_splits: bool = False,
    backend: str | None = None,
) -> Array:
    """``x @ w`` for a plain or quantized weight, accumulated in float32 (int32 for int8 x int8).

    Args:
      x: Activations ``(..., k)``, float32, bfloat16 or float16; or a ``QuantizedActivation`` for a
        packed weight with that activation format.
      w: Weight ``(k, n)``; any ``QuantFormat``, with zero points, permutation and global scale; or
        one packed by ``pack_for_mosaic``.
      activation_format: Quantize the activations to this format first (W8A8, W4A8);
        ``w.fmt.activation`` by default, and none if that is None. Integer activations meet integer
        weights, float activations float weights.
      out_dtype: Result type; ``x.dtype`` by default.
      keep_splits: Return partial sums over parts of ``k`` if there are any, for an op that adds
        them on the way (``add_rms_norm``).
      backend: ``"xla"``, ``"mosaic_gpu"``, or None: the kernels for packed weights, and for few
        rows of plain 16-bit ones, where they can run (``unsupported_reason`` says why not); XLA for
        all else.

    Returns:
      ``(..., n)`` in ``out_dtype``. With ``keep_splits`` ``(s, ..., n)``, to be summed over ``s``:
      one of ``out_dtype``, or several of float32.

    Raises:
      ValueError: If shapes do not match, or activation and weight formats cannot be combined.
      NotImplementedError: If the named backend cannot run; the message says why.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"{x.shape=} and {w.shape=} do not match: need (..., k) and (k, n); "
            "use jax.vmap for stacked weights"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"activations must be floating point; got {x.dtype}")
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if isinstance(x, QuantizedActivation):
        return _dot_of_codes(x, w, out_dtype, keep_splits, backend)
    if not isinstance(w, QuantizedArray | PackedWeight):
        if activation_format is not None:
            raise ValueError(f"{activation_format.name} activations need a quantized weight")
        w = w.astype(x.dtype)
        if choose_backend("quantized_dot", backend, unsupported_reason(x, w)) == "mosaic_gpu":
            return plain_by_kernel(x, w, out_dtype=out_dtype, keep_splits=keep_splits)
        # In float32 autodiff's own rules are as good, and forward mode works too.
        dot = _dot if x.dtype.itemsize > 2 else _dot_16bit
        out = dot(x, w).astype(out_dtype)
        return out[None] if keep_splits else out
    chosen = choose_backend("quantized_dot", backend, unsupported_reason(x, w))
    if isinstance(w, PackedWeight):
        if activation_format not in (None, w.fmt.activation):
            raise ValueError(
                f"{activation_format.name} activations need an unpacked weight, or one packed "
                "with them as fmt.activation"
            )
        if chosen == "mosaic_gpu":
            return packed_dot(x, w, out_dtype=out_dtype, keep_splits=keep_splits)
        w = w.unpack()
    activation_format = w.fmt.activation if activation_format is None else activation_format
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, x.shape[-1])
    if w.perm is not None:
        flat = jnp.take(flat, w.perm, axis=-1)
    if activation_format is None:
        out = _weight_only(flat, w)
    else:
        out = _quantized_activations(_quantize_activations(flat, w, activation_format), w)
    out = out.astype(out_dtype).reshape(*x.shape[:-1], w.shape[1])
    return out[None] if keep_splits else out


def _dot_of_codes(
    x: QuantizedActivation, w: Any, out_dtype: DType, keep_splits: bool, backend: str | None
) -> Array:
    """``quantized_dot`` of activations that are quantized already."""
    wanted = packed_w8a8.takes_codes(w)
    if wanted != x.fmt:
        weight = w.fmt.name if isinstance(w, QuantizedArray | PackedWeight) else w.dtype
        takes = "values" if wanted is None else f"codes in {wanted.name}"
        raise ValueError(
            f"activations quantized to {x.fmt.name} meet a weight in {weight} that takes {takes}: "
            "give it values, or a weight packed with that activation format"
        )
    like: Any = x  # what is asked here depends on shape and type only
    if choose_backend("quantized_dot", backend, unsupported_reason(like, w)) == "mosaic_gpu":
        config, _ = packed_config(like, w, out_dtype=out_dtype)
        return packed_w8a8.dot(x, w, out_dtype=out_dtype, config=config, keep_splits=keep_splits)
    out = _quantized_activations(x.unpack(), w.unpack())
    out = out.astype(out_dtype).reshape(*x.shape[:-1], w.shape[1])
    return out[None] if keep_splits else out


def _dot(x: Array, w: Array) -> Array:
    """``(m, k) @ (k, n)`` with a wide accumulator."""
    wide = jnp.int32 if jnp.issubdtype(w.dtype, jnp.integer) else _F32
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=wide)


@jax.custom_vjp
def _dot_16bit(x: Array, w: Array) -> Array:
    """``x @ w`` of 16-bit operands in float32, with a backward pass in the operands' dtype.

    Autodiff would multiply the float32 cotangent by the 16-bit operands, which XLA does in float32
    at a fraction of the speed. The cotangent of a 16-bit model is rounded to 16 bits instead.
    """
    return _dot(x, w)


def _dot_16bit_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, w), (x, w)


def _dot_16bit_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    g = g.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=_F32)
    dw = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=_F32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_dot_16bit.defvjp(_dot_16bit_fwd, _dot_16bit_bwd)


def _weight_only(x: Array, w: QuantizedArray) -> Array:
    """``(m, k) @ (k, n)`` with 16- or 32-bit activations; float32 result."""
    m, k = x.shape
    tile_k = w.tiles[0]
    scale = w.effective_scale()
    if scale.shape[0] == 1:
        with jax.named_scope("scale_on_output"):
            # Every code is exact in bf16 and f16, so the cast loses nothing.
            out = _dot(x, w.qvalue.astype(x.dtype))
            if w.zero_point is not None:
                row_sum = x.astype(_F32).sum(-1, keepdims=True)
                out = out - row_sum * _per_column(w.zero_point.astype(_F32), w)[0][None]
            return out * _per_column(scale, w)
    # Partial sums cost 4 m k n / tile bytes; past the weight's own bytes the other form wins.
    if k % tile_k == 0 and m * 32 <= tile_k * w.fmt.bits:
        with jax.named_scope("scale_on_partial_sums"):
            groups = k // tile_k
            x_groups = x.reshape(m, groups, tile_k)
            codes = w.qvalue.astype(x.dtype).reshape(groups, tile_k, w.shape[1])
            partial = _grouped(x_groups, codes)
            if w.zero_point is not None:
                sums = x_groups.astype(_F32).sum(-1).T[:, :, None]
                partial = partial - sums * _per_column(w.zero_point.astype(_F32), w)[:, None]
            return (partial * _per_column(scale, w)[:, None]).sum(0)
    with jax.named_scope("scale_on_operand"):
        codes = w.qvalue.astype(_F32)
        if w.zero_point is not None:
            codes = codes - expand_tiles(w.zero_point.astype(_F32), w.shape, w.tiles)
        weight = codes * expand_tiles(scale, w.shape, w.tiles)
        return _dot(x, weight.astype(x.dtype))


def _quantize_activations(x: Array, w: QuantizedArray, fmt: QuantFormat) -> QuantizedArray:
    """``(m, k)`` activations in ``fmt``."""
    if fmt.is_float != w.fmt.is_float or not fmt.symmetric:
        raise ValueError(
            f"{fmt.name} activations cannot meet {w.fmt.name} weights: both must be integers or "
            "both floats, and the activations symmetric"
        )
    scale = None
    if not fmt.dynamic:
        if w.act_scale is None:
            raise ValueError(
                f"{fmt.name} is static but the weight carries no act_scale; calibrate one or use "
                "a dynamic activation format"
            )
        scale = w.act_scale.astype(_F32).reshape(1, 1)
    with jax.named_scope("quantize_activations"):
        # XLA may drop a conversion to fp8 and back, which would leave activations unquantized.
        return jax.lax.optimization_barrier(quantize(x, fmt, axis=-1, scale=scale))


def _quantized_activations(xq: QuantizedArray, w: QuantizedArray) -> Array:
    """``(m, k) @ (k, n)`` of quantized activations; float32 result."""
    m, k = xq.shape
    narrow = xq.fmt.storage_dtype
    codes = (
        w.qvalue if w.qvalue.dtype.itemsize == 1 and w.fmt.bits == 8 else w.qvalue.astype(narrow)
    )
    w_scale = w.effective_scale()
    x_groups_count, w_groups_count = xq.scale.shape[1], w_scale.shape[0]
    if x_groups_count == 1 and w_groups_count == 1:
        out = _dot(xq.qvalue, codes).astype(_F32)
        if w.zero_point is not None:
            row_sum = xq.qvalue.astype(_F32).sum(-1, keepdims=True)
            out = out - row_sum * _per_column(w.zero_point.astype(_F32), w)[0][None]
        return out * xq.scale.astype(_F32) * _per_column(w_scale, w)
    groups = max(x_groups_count, w_groups_count)
    tile = xq.tiles[1] if x_groups_count > 1 else w.tiles[0]
    if x_groups_count not in (1, groups) or w_groups_count not in (1, groups):
        raise ValueError(
            f"activation groups of {xq.tiles[1]} do not match weight groups of {w.tiles[0]}"
        )
    pad = groups * tile - k
    x_codes = jnp.pad(xq.qvalue, ((0, 0), (0, pad))) if pad else xq.qvalue
    codes = jnp.pad(codes, ((0, pad), (0, 0))) if pad else codes
    x_scale = jnp.broadcast_to(xq.scale.astype(_F32), (m, groups))
    wide_scale = jnp.broadcast_to(_per_column(w_scale, w), (groups, w.shape[1]))
    zero = None
    if w.zero_point is not None:
        zero = jnp.broadcast_to(_per_column(w.zero_point.astype(_F32), w), wide_scale.shape)

    # One group at a time, promoted to float32 after each: Hopper's fp8 accumulator keeps only
    # about 14 bits, and the partial sums of all groups at once would not fit for many rows.
    def step(g: Array, acc: Array) -> Array:
        xg = jax.lax.dynamic_slice_in_dim(x_codes, g * tile, tile, axis=1)
        wg = jax.lax.dynamic_slice_in_dim(codes, g * tile, tile, axis=0)
        part = _dot(xg, wg).astype(_F32)
        if zero is not None:
            part = part - xg.astype(_F32).sum(-1, keepdims=True) * zero[g][None]
        return acc + part * x_scale[:, g][:, None] * wide_scale[g][None]

    return jax.lax.fori_loop(0, groups, step, jnp.zeros((m, w.shape[1]), _F32))


def _per_column(values: Array, w: QuantizedArray) -> Array:
    """``(groups, n or n/tile or 1)`` to ``(groups, n)``, or to ``(groups, 1)`` if all are equal."""
    columns = expand_tiles(values, (values.shape[0], w.shape[1]), (1, w.tiles[1]))
    return jnp.broadcast_to(columns, (values.shape[0], w.shape[1]))


def _grouped(x: Array, w: Array) -> Array:
    """``(m, g, t), (g, t, n) -> (g, m, n)`` in float32."""
    dimensions = (((2,), (1,)), ((1,), (0,)))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=_F32)
