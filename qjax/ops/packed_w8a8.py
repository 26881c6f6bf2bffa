"""Packed weights for 8-bit activations, and products of quantized activations with them.

``packed.pack_for_mosaic`` comes here with a weight whose format names activations; everything else
about packed weights holds for it too. 8-bit codes become a ``PackedW8A8``. int4 codes with int8
activations (W4A8) are packed as for 16-bit activations, in ``_layout.int8_order``; of their two
kernels ``w4a8`` is for many rows and scales that are not whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.formats import QuantFormat
from qjax.numerics import expand_tiles, find_scale_step
from qjax.ops.activations import QuantizedActivation, quantize_activation
from qjax.ops.packed import PackedWeight, pack_for_registers
from qjax.pallas_kernels import w4a8, w8a8, weight_only_large
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array, DType


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "column", "perm", "act_scale"],
    meta_fields=["fmt", "tiles", "scale_dtype", "compute", "dtype", "alternating"],
)
@dataclasses.dataclass(frozen=True)
class PackedW8A8(PackedWeight):
    """A quantized weight ``(k, n)`` for 8-bit activations, stored as ``(n, k)``.

    Attributes:
      words: The codes ``(n, k)`` in their own type.
      scales: float32 ``(ceil(n / 128), k / 128)`` block scales, or None.
      column: float32 ``(n,)``: the scale of each output feature; ones with block scales.
      compute: Type of the codes.
    """

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[1], self.words.shape[0]

    def unpack(self) -> QuantizedArray:
        """The weight that was packed, exactly, if its scales fit float32."""
        return _unpack(self)


@jax.jit
def _unpack(w: PackedW8A8) -> QuantizedArray:
    # Scales of a whole column or tensor were repeated.
    scale = w.column[None, :: w.tiles[1]] if w.scales is None else w.scales.T
    return QuantizedArray.make(
        w.words.T,
        scale.astype(w.scale_dtype),
        w.fmt,
        perm=w.perm,
        act_scale=w.act_scale,
        dtype=w.dtype,
    )


def pack_unsupported_reason(w: QuantizedArray) -> str | None:
    """Why ``pack`` cannot pack a weight (a matrix with an activation format); None if it can."""
    activation = w.fmt.activation
    if activation is None:
        return f"{w.fmt.name}, which names no activations"
    if w.zero_point is not None or not activation.symmetric:
        return "zero points with 8-bit activations"
    if activation.bits != 8:
        return f"{activation.name} activations; the kernels are for 8-bit ones"
    if activation.is_float != w.fmt.is_float:
        return f"{activation.name} activations with {w.fmt.name} weights"
    k, n = w.shape
    kind = w.qvalue.dtype.name
    x_tile = activation.tiles((1, k), -1)[1]
    if kind == "int4":
        if x_tile != k:
            return f"activation groups of {x_tile} with int4 weights"
        group_size = None if w.tiles[0] == k else w.tiles[0]
        whole = group_size is not None and w.fmt.scale_steps is not None
        options: dict[str, Any] = {"compute": "int8", "whole_scales": whole}
        p = weight_only_large.Problem(1, k, n, kind, group_size, **options)
        return weight_only_large.unsupported_reason(p)
    blocks = w.tiles[0] != k
    if blocks and (w.tiles[0] != w8a8.BLOCK_K or min(w.tiles[1], n) not in (w8a8.BLOCK_K, n)):
        return f"scales of {w.tiles}; W8A8 kernels have one per column, or per (128, 128)"
    if x_tile != k and (not blocks or x_tile != w8a8.BLOCK_K):
        return f"activation groups of {x_tile} with weight scales of {w.tiles}"
    return w8a8.weight_unsupported_reason(k, n, kind=kind, blocks=blocks)


def pack(w: QuantizedArray) -> PackedWeight:
    """Rearrange a weight for its kernel; ``pack_unsupported_reason`` must be None."""
    if w.qvalue.dtype.name == "int4":
        if w.fmt.scale_steps is not None and not isinstance(w.scale, Tracer):
            _check_whole(w.scale, w.fmt.scale_steps)
        # Free scales in float32, as the sums of groups are scaled.
        return pack_for_registers(w, "bfloat16")
    return _pack(w)


def _check_whole(scale: Array, steps: int) -> None:
    _, exact = find_scale_step(scale, steps)
    bad = int((~exact).sum())
    if bad:
        raise ValueError(
            f"scales of {bad} of {exact.size} columns are no multiples, 1 to {steps}, of a step, "
            f"though scale_steps={steps}; quantize with qjax.quantize or qjax.calibration, or give "
            "the array a format with scale_steps=None"
        )


@jax.jit
def _pack(w: QuantizedArray) -> PackedW8A8:
    k, n = w.shape
    scale = w.scale.astype(jnp.float32)
    scales = None
    if w.tiles[0] == k:
        column = jnp.broadcast_to(expand_tiles(scale, (1, n), (1, w.tiles[1])), (1, n))[0]
    else:
        column = jnp.ones((n,), jnp.float32)
        scales = jnp.broadcast_to(scale.T, (-(-n // w8a8.BLOCK_K), scale.shape[0]))
    return PackedW8A8(
        w.qvalue.T,
        scales,
        column,
        w.perm,
        w.act_scale,
        fmt=w.fmt,
        tiles=w.tiles,
        scale_dtype=w.scale.dtype,
        compute=w.qvalue.dtype.name,
        dtype=w.dtype,
    )


_EXPAND_FROM = 2048
"""Rows from which int4 codes are written out as int8, where nothing was measured."""


def kernels(
    x: Array, w: PackedWeight, *, out_dtype: DType | None = None
) -> list[tuple[Any, w8a8.Problem | weight_only_large.Problem | w4a8.Problem]]:
    """The modules of the kernels for ``x @ w``; see ``packed.packed_kernels``."""
    m = math.prod(x.shape[:-1])
    out_itemsize = jnp.dtype(x.dtype if out_dtype is None else out_dtype).itemsize
    k, n = w.shape
    if isinstance(w, PackedW8A8):
        kinds = w.compute, _activation(w).storage_dtype.name
        blocks = w.scales is not None
        problem = w8a8.Problem(m, k, n, *kinds, blocks=blocks, out_itemsize=out_itemsize)
        return [(w8a8, problem)]
    group_size = None if w.scales is None else k // w.scales.shape[0]
    few = weight_only_large.Problem(
        m,
        k,
        n,
        w.kind,
        group_size,
        compute="int8",
        out_itemsize=out_itemsize,
        whole_scales=w.has_whole_scales,
    )
    found: list[tuple[Any, Any]] = [(weight_only_large, few)]
    if w.has_whole_scales:
        return found
    many = w4a8.Problem(m, k, n, out_itemsize)
    if group_size is not None and m >= w4a8.MIN_ROWS and w4a8.unsupported_reason(many) is None:
        found.append((w4a8, many))
    return found[::-1] if m >= _EXPAND_FROM else found


def _activation(w: PackedWeight) -> QuantFormat:
    assert w.fmt.activation is not None
    return w.fmt.activation


def unsupported_reason(x: Array, w: PackedWeight) -> str | None:
    """Why the kernel cannot compute ``x @ w``, whatever the device; None if it can."""
    activation = _activation(w)
    if not activation.dynamic and w.act_scale is None:
        return f"{activation.name} is static but the weight carries no act_scale"
    module, problem = kernels(x, w)[0]
    return module.unsupported_reason(problem)


def takes_codes(w: Any) -> QuantFormat | None:
    """Format in which products with a weight take activations that are quantized already, if any.

    Args:
      w: A weight: a plain array, a ``QuantizedArray`` or a ``PackedWeight``.
    """
    fmt = w.fmt.activation if isinstance(w, PackedWeight) else None
    # A permutation is for values; a static scale is the weight's own.
    return None if fmt is None or not fmt.dynamic or w.perm is not None else fmt


def dot(
    x: Array | QuantizedActivation,
    w: PackedWeight,
    *,
    out_dtype: DType | None = None,
    config: Any = None,
    keep_splits: bool = False,
    interpret: bool = False,
) -> Array:
    """Quantize activations and multiply; ``packed.packed_dot`` calls this.

    Args:
      x: Activations ``(..., k)``, bfloat16 or float16, or their codes if ``takes_codes``.
      w: Packed weight ``(k, n)``.
      out_dtype: Result type; ``x.dtype`` by default.
      config: How the kernel cuts up the work; it says which kernel is meant.
      keep_splits: See ``quantized_dot``.
      interpret: Run in the Pallas interpreter.

    Returns:
      ``(..., n)`` in ``out_dtype``; with ``keep_splits`` see ``quantized_dot``.

    """
    if isinstance(x, QuantizedActivation):
        xq = x
    else:
        flat = x.reshape(-1, x.shape[-1])
        if w.perm is not None:
            flat = jnp.take(flat, w.perm, axis=-1)
        # The same codes as on the XLA backend.
        static = None if _activation(w).dynamic else w.act_scale
        xq = quantize_activation(flat, _activation(w), static_scale=static)
    rows = math.prod(x.shape[:-1])
    options: dict[str, Any] = {
        "rows": rows,
        "config": config,
        "out_dtype": x.dtype if out_dtype is None else out_dtype,
        "keep_splits": keep_splits,
        "interpret": interpret,
    }
    if isinstance(w, PackedW8A8):
        scales = xq.scale, w.column
        if w.scales is not None:
            blocks = w.scales.shape[1], xq.scale.shape[-1]
            scales = jnp.broadcast_to(xq.scale, blocks), w.scales
        out = w8a8.matmul(xq.codes, w.words, *scales, **options)
    elif isinstance(config, w4a8.Config):
        assert w.scales is not None
        out = w4a8.matmul(xq.codes, w.words, w.scales, w.column, xq.scale.reshape(-1), **options)
    else:
        out = weight_only_large.matmul(
            xq.codes, w.words, w.scales, w.column, xq.scale, kind=w.kind, **options
        )
    return out.reshape(*out.shape[:-2], *x.shape[:-1], w.shape[1])
