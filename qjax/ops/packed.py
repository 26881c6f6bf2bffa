"""Weights packed for the Mosaic GPU kernels, and products with them.

Packing is a choice, made once when a model is loaded (``serving.weights`` makes it where the
kernels run); an unpacked quantized weight never meets these kernels.

A ``PackedWeight`` stands where a ``QuantizedArray`` stood and multiplies by the same
``quantized_dot`` (one whose format names 8-bit activations is the subclass ``PackedW8A8`` of
``packed_w8a8``); for what the kernels do not take (other devices, say) it is
unpacked inside the program and multiplied by XLA. Inference only: the kernels have no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.numerics import expand_tiles, find_scale_step
from qjax.ops._float16_rows import float16_rows
from qjax.pallas_kernels import _codes, _layout, dequantize, weight_only, weight_only_large
from qjax.pallas_kernels.tuned import tuned_config
from qjax.quantize import is_quantized, path_string
from qjax.quantized_array import QuantizedArray, packed_nbytes
from qjax.typing import Array, DType, PyTree

_CHANNEL_GROUP = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "column", "perm", "act_scale"],
    meta_fields=["fmt", "tiles", "scale_dtype", "compute", "dtype", "alternating"],
)
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A quantized weight ``(k, n)`` in the layout of ``pallas_kernels.weight_only``.

    Made by ``pack_for_mosaic``.

    Attributes:
      words: Packed codes, int32 ``(k / 128, n / 64, bits, 256)``.
      scales: ``(groups, 1, n)`` scales, or ``(groups, 2, n)`` scales and offsets, in
        ``_codes.stored_dtype(compute)``; None if the scale does not vary along ``k``. Whole
        multiples of ``column`` in bfloat16 if ``has_whole_scales``.
      column: float32 ``(n,)``: the scale of each output feature, or what remains of it.
      perm: int32 ``(k,)`` activation order, or None; see ``QuantizedArray``.
      act_scale: The original's, kept for ``unpack``.
      fmt: Format of the original.
      tiles: Extent of one scale's tile in the original.
      scale_dtype: Type of the original's scale.
      compute: Type in which groups are multiplied: ``"float16"`` or ``"bfloat16"``.
        Without groups weights are exact in both and the activations' type is used.
      dtype: Result type of ``dequantize``.
      alternating: Tiles of 64 columns of the left half and of the right half take turns in
        ``words``, ``scales`` and ``column``, for ``gated_dot``. The logical order is the usual one.
    """

    words: Array
    scales: Array | None
    column: Array
    perm: Array | None
    act_scale: Array | None
    fmt: QuantFormat
    tiles: tuple[int, ...]
    scale_dtype: Any
    compute: str
    dtype: Any
    alternating: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0] * _layout.BLOCK_K, self.words.shape[1] * _layout.BLOCK_N

    @property
    def ndim(self) -> int:
        return 2

    @property
    def kind(self) -> str:
        """Type of the codes, a key of ``_codes.CODES``."""
        return self.fmt.storage_dtype.name

    @property
    def has_whole_scales(self) -> bool:
        """Whether scales are multiples of a step per column (``QuantFormat.scale_steps``)."""
        return (
            self.fmt.scale_steps is not None and _takes_int8(self.fmt) and self.scales is not None
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (x for x in jax.tree_util.tree_leaves(self) if hasattr(x, "shape"))
        return sum(packed_nbytes(x.shape, x.dtype) for x in parts)

    def astype(self, dtype: DType) -> PackedWeight:
        """Change the type ``dequantize`` returns; the codes stay as they are."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def unpack(self) -> QuantizedArray:
        """The weight that was packed: the same codes, zero points and permutation.

        Scales are the same too unless ``compute`` is float16 and they have groups or zero points
        and more than its 11 significant bits. (A checkpoint's scales of 16 bits or fewer have not.)
        Then they are those that the kernel multiplies by, rounded to 11 bits.
        """
        return _unpack(self)

    def dequantize(self, dtype: DType | None = None) -> Array:
        """The represented values ``(k, n)`` in original row order; see ``QuantizedArray``."""
        return self.unpack().dequantize(dtype)


def _takes_int8(fmt: QuantFormat) -> bool:
    return fmt.activation is not None and fmt.activation.qtype == "int8"


@jax.jit
def _unpack(w: PackedWeight) -> QuantizedArray:
    if w.alternating:
        return _unpack(_reordered(w, alternating=False))
    k, n = w.shape
    codes = _layout.unpack_words(w.words, _codes.CODES[w.kind].bits)
    if w.fmt.activation is not None:
        codes = _layout.int8_order(codes, inverse=True)
    tile_k, tile_n = w.tiles
    zero_point = None
    if w.scales is None:
        scale = w.column[None, ::tile_n]
    else:
        # Scales of a whole column were repeated for every group; those of a block for every column.
        every = slice(None, None, tile_k * w.scales.shape[0] // k), slice(None, None, tile_n)
        stored = w.scales[:, 0]
        if w.has_whole_scales:
            scale = stored.astype(jnp.float32) * w.column[None]
        else:
            scale = _codes.merge_scale(stored, w.column, w.kind, w.compute)
        scale = scale[every]
        if w.scales.shape[1] == 2:
            offset = w.scales[:, 1]
            zero_point = _codes.zero_point_of_offset(stored, offset, w.kind, w.compute)[every]
    return QuantizedArray.make(
        _codes.from_unsigned(codes, w.kind),
        scale.astype(w.scale_dtype),
        w.fmt,
        zero_point=zero_point,
        perm=w.perm,
        act_scale=w.act_scale,
        dtype=w.dtype,
    )


def pack_unsupported_reason(w: QuantizedArray) -> str | None:
    """Why ``pack_for_mosaic`` cannot pack a weight; None if it can."""
    if w.ndim != 2:
        return f"a weight of shape {w.shape}; only matrices (k, n) are packed"
    if w.global_scale is not None:
        return f"the second-level scale of {w.fmt.name}"
    if w.fmt.activation is not None:
        return _w8a8().pack_unsupported_reason(w)
    return weight_only.weight_unsupported_reason(
        *w.shape,
        kind=w.qvalue.dtype.name,
        group_size=_group_size(w),
        zero_point=w.zero_point is not None,
    )


def pack_for_mosaic(
    w: QuantizedArray, *, compute: str | None = None, alternating: bool = False
) -> PackedWeight:
    """Rearrange a quantized weight for the Mosaic GPU kernels.

    Args:
      w: Weight ``(k, n)``, ``k`` a multiple of 128 and ``n`` of 64. For 16-bit activations: int4
        codes in groups of 32, 64 or 128 or with one scale per column or tensor, with or without
        zero points; int8, E4M3 or E5M2 codes without zero points, with one scale per column,
        tensor, group of 128 or block of 128 along ``k``. fp8 codes must be finite. With 8-bit
        activations in its format: int8, E4M3 or E5M2 codes with one scale per column or tensor, and
        fp8 codes in blocks of (128, 128); with int8 activations also int4 codes without zero
        points, with one scale per column, in groups of 128, or of 32, 64 or 128 with scale_steps.
      compute: Type of the products of grouped weights with 16-bit activations; best that of the
        activations. With float16 a weight is rounded to 11 bits. bfloat16 activations meet it too,
        scaled per row by a power of two, which is exact but takes a kernel of its own. With
        bfloat16 weights are exact (the sums of groups are scaled instead); float16 activations do
        not meet such weights. None takes float16 if that is ``w.dtype``, else bfloat16.
      alternating: The weight is gate and up side by side, for ``gated_dot``.

    Returns:
      The packed weight, of the same logical shape.

    Raises:
      ValueError: If ``w`` is not quantized, ``compute`` is unknown, scales are not the multiples
        that ``scale_steps`` says, or a weight for 8-bit activations or of which ``n`` is no
        multiple of 128 should alternate.
      NotImplementedError: If there is no kernel for the weight; says why.
    """
    if not isinstance(w, QuantizedArray):
        raise ValueError(
            f"pack_for_mosaic packs a QuantizedArray, not a {type(w).__name__}; quantize it first"
        )
    if compute is None:
        compute = "float16" if w.dtype == jnp.float16 else "bfloat16"
    if compute not in _codes.COMPUTE_DTYPES:
        raise ValueError(f"unknown {compute=}; choose one of {', '.join(_codes.COMPUTE_DTYPES)}")
    reason = pack_unsupported_reason(w)
    if reason is not None:
        raise NotImplementedError(f"pack_for_mosaic: no kernel for {reason}")
    if alternating and not can_alternate(w):
        raise ValueError(
            f"a weight {w.shape} of {w.fmt.name} cannot alternate: its columns must be a multiple "
            f"of {2 * _layout.BLOCK_N} and its activations 16-bit; use alternating=False"
        )
    if w.fmt.activation is not None:
        return _w8a8().pack(w)
    packed = pack_for_registers(w, compute)
    return _reordered(packed, alternating=True) if alternating else packed


def can_alternate(w: QuantizedArray) -> bool:
    """Whether ``pack_for_mosaic`` takes ``alternating`` for a weight that it can pack."""
    return w.fmt.activation is None and w.shape[1] % (2 * _layout.BLOCK_N) == 0


@functools.partial(jax.jit, static_argnames="alternating")
def _reordered(w: PackedWeight, *, alternating: bool) -> PackedWeight:
    """With tiles of columns in the other order."""
    move = functools.partial(_layout.swap_halves, alternate=alternating)
    return dataclasses.replace(
        w,
        words=move(w.words, axis=1),
        scales=None if w.scales is None else move(w.scales, tile=_layout.BLOCK_N),
        column=move(w.column, tile=_layout.BLOCK_N),
        alternating=alternating,
    )


def _w8a8() -> Any:
    """The module of weights for 8-bit activations. It builds on this one: imported on first use."""
    from qjax.ops import packed_w8a8

    return packed_w8a8


@functools.partial(jax.jit, static_argnums=1)
def pack_for_registers(w: QuantizedArray, compute: str) -> PackedWeight:
    """``pack_for_mosaic`` without its checks, whatever the activations (W4A8 has its own order)."""
    k, n = w.shape
    kind = w.qvalue.dtype.name
    codes = _codes.to_unsigned(w.qvalue, kind)
    if w.fmt.activation is not None:
        codes = _layout.int8_order(codes)
    words = _layout.pack_words(codes, _codes.CODES[kind].bits)
    group_size = _group_size(w)
    rows = 1 if group_size is None else k // group_size

    def per_group(values: Array) -> Array:
        """``(k / tile, n / tile)`` to ``(rows, n)``."""
        wide = expand_tiles(values, (values.shape[0], n), (1, w.tiles[1]))
        return jnp.broadcast_to(wide, (rows, n))

    scale, scales = per_group(w.scale.astype(jnp.float32)), None
    column = scale[0]
    if group_size is not None and w.fmt.scale_steps is not None and _takes_int8(w.fmt):
        step, _ = find_scale_step(scale, w.fmt.scale_steps)
        scales = jnp.rint(scale / step).astype(jnp.bfloat16)[:, None]
        column = step[0]
    elif group_size is not None:
        stored, column = _codes.split_scale(scale, kind, compute)
        parts = [stored]
        if w.zero_point is not None:
            parts.append(
                _codes.offset_of_zero_point(stored, per_group(w.zero_point), kind, compute)
            )
        scales = jnp.stack(parts, axis=1)
    return PackedWeight(
        words,
        scales,
        column,
        w.perm,
        w.act_scale,
        fmt=w.fmt,
        tiles=w.tiles,
        scale_dtype=w.scale.dtype,
        compute=compute,
        dtype=w.dtype,
    )


def _group_size(w: QuantizedArray) -> int | None:
    """Rows of a packed weight that share a stored scale."""
    if w.tiles[0] != w.shape[0]:
        return w.tiles[0]
    # Zero points of a whole column take the grouped path, repeated: one path fewer to get right.
    return None if w.zero_point is None else _CHANNEL_GROUP


def pack_tree(params: PyTree, *, compute: str | None = None, gated: Collection[str] = ()) -> PyTree:
    """Pack every ``QuantizedArray`` of a tree for which there is a kernel.

    Args:
      params: A parameter tree.
      compute: As for ``pack_for_mosaic``.
      gated: Names of modules whose weights are gate and up side by side, for ``gated_dot``.

    Returns:
      The tree with ``PackedWeight`` leaves; other leaves are the same objects.
    """

    def pack(path: Any, leaf: Any) -> Any:
        if not is_quantized(leaf) or pack_unsupported_reason(leaf) is not None:
            return leaf
        names = path_string(path).split("/")
        alternating = can_alternate(leaf) and any(name in gated for name in names)
        return pack_for_mosaic(leaf, compute=compute, alternating=alternating)

    return jax.tree_util.tree_map_with_path(pack, params, is_leaf=is_quantized)


def unpack_tree(params: PyTree) -> PyTree:
    """The inverse of ``pack_tree``."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf.unpack() if isinstance(leaf, PackedWeight) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, PackedWeight),
    )


def takes_float16(w: Any) -> bool:
    """Whether a weight was packed for float16 activations.

    Args:
      w: A weight: a plain array, a ``QuantizedArray`` or a ``PackedWeight``.
    """
    return isinstance(w, PackedWeight) and w.fmt.activation is None and w.compute == "float16"


def packed_unsupported_reason(x: Array, w: PackedWeight, *, interpret: bool = False) -> str | None:
    """Why the kernel cannot compute ``x @ w`` here; None if it can.

    Args:
      x: Activations ``(..., k)``.
      w: Packed weight.
      interpret: For the Pallas interpreter, which needs no GPU.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x.dtype} activations; the kernels take bfloat16 and float16"
    if w.fmt.activation is not None:
        reason = _w8a8().unsupported_reason(x, w)
    elif _compute_dtype(x, w) == "bfloat16" and x.dtype == jnp.float16:
        reason = "float16 activations meet a weight packed with compute='bfloat16'"
    else:
        kernel, problem = packed_kernels(x, w)[0]
        reason = kernel.unsupported_reason(problem)
    if reason is not None:
        return reason
    if not interpret:
        return mosaic_gpu_unsupported_reason()
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, MOSAIC_GPU_MIN_JAX))}"
    return None


def packed_kernels(
    x: Array, w: PackedWeight, *, out_dtype: DType | None = None
) -> list[tuple[Any, Any]]:
    """The modules of the kernels that compute ``x @ w``, the one to prefer first.

    Arguments as for ``packed_dot``.

    Returns:
      Modules, each with the product as it sees it, its ``Problem``. If none computes it one that
      says why.
    """
    if w.fmt.activation is not None:
        return _w8a8().kernels(x, w, out_dtype=out_dtype)
    problem = packed_problem(x, w, out_dtype=out_dtype)
    kernels: tuple[Any, ...] = (weight_only, weight_only_large)
    found = [kernel for kernel in kernels if kernel.unsupported_reason(problem) is None]
    if len(found) == 2 and weight_only.crowded(problem):
        found.reverse()
    if dequantize.unsupported_reason(problem) is None:
        found.append(dequantize)
    return [(kernel, problem) for kernel in found or [weight_only_large]]


def packed_config(x: Array, w: PackedWeight, *, out_dtype: DType | None = None) -> tuple[Any, str]:
    """The config with which ``packed_dot`` computes ``x @ w``, and whether it was measured.

    Arguments as for ``packed_dot``.

    Returns:
      ``(config, "tuned" or "heuristic")``.
    """
    kernels = packed_kernels(x, w, out_dtype=out_dtype)
    tuned = [found for kernel in kernels if (found := tuned_config(*kernel)) is not None]
    if tuned:
        # Times compare for equal numbers of rows.
        return min(tuned, key=lambda found: (found.rows, found.us)).config, "tuned"
    kernel, problem = kernels[0]
    return kernel.heuristic_config(problem), "heuristic"


def packed_problem(
    x: Array, w: PackedWeight, *, out_dtype: DType | None = None
) -> weight_only.Problem:
    """The product ``x @ w`` in the kernel's terms, for its configs; arguments as ``packed_dot``."""
    problem = weight_only.Problem(
        math.prod(x.shape[:-1]),
        *w.shape,
        w.kind,
        compute=_compute_dtype(x, w),
        out_itemsize=jnp.dtype(x.dtype if out_dtype is None else out_dtype).itemsize,
    )
    if w.scales is None:
        return problem
    groups, parts, _ = w.scales.shape
    return dataclasses.replace(problem, group_size=w.shape[0] // groups, zero_point=parts == 2)


def _compute_dtype(x: Array, w: PackedWeight) -> str:
    return x.dtype.name if w.scales is None else w.compute


def packed_dot(
    x: Array,
    w: PackedWeight,
    *,
    out_dtype: DType | None = None,
    config: Any = None,
    keep_splits: bool = False,
    gated: bool = False,
    interpret: bool = False,
) -> Array:
    """``x @ w`` by the kernel; ``quantized_dot`` is the function that chooses.

    Args:
      x: Activations ``(..., k)``, bfloat16 or float16.
      w: Packed weight ``(k, n)``.
      out_dtype: Result type; ``x.dtype`` by default.
      config: How the kernel cuts up the work, a ``Config`` of one of the modules of
        ``packed_kernels``, which is the one to run; ``packed_config`` by default.
      keep_splits: See ``quantized_dot``.
      gated: ``silu`` of the left half of the result times the right half, of both rounded to
        ``out_dtype``. For an alternating weight, with a config of ``gated.gated_config``.
      interpret: Run in the Pallas interpreter.

    Returns:
      ``(..., n)`` in ``out_dtype``, or ``(..., n / 2)`` if gated; with ``keep_splits`` see
      ``quantized_dot``.

    Raises:
      NotImplementedError: If the kernel cannot run; the message says why.
    """
    reason = packed_unsupported_reason(x, w, interpret=interpret)
    if reason is not None:
        raise NotImplementedError(f"packed_dot: mosaic_gpu cannot run here: {reason}")
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if config is None:
        config, _ = packed_config(x, w, out_dtype=out_dtype)
    if w.fmt.activation is not None:
        options = {"config": config, "keep_splits": keep_splits, "interpret": interpret}
        return _w8a8().dot(x, w, out_dtype=out_dtype, **options)
    flat = x.reshape(-1, x.shape[-1])
    if w.perm is not None:
        flat = jnp.take(flat, w.perm, axis=-1)
    weight = w.words, w.scales, w.column
    options: dict[str, Any] = {
        "kind": w.kind,
        "config": config,
        "out_dtype": out_dtype,
        "keep_splits": keep_splits,
        "interpret": interpret,
    }
    if isinstance(config, dequantize.Config):
        # The weight becomes of the activations' type, and its columns come in order.
        out = dequantize.matmul(flat, *weight, alternating=w.alternating, **options)
        return out.reshape(*out.shape[:-2], *x.shape[:-1], out.shape[-1])
    row_scale = None
    if flat.dtype.name != _compute_dtype(x, w):
        flat, row_scale = float16_rows(flat)
    if isinstance(config, weight_only_large.Config):
        out = weight_only_large.matmul(flat, *weight, row_scale, gated=gated, **options)
    else:
        out = weight_only.matmul(flat, *weight, row_scale, gated=gated, **options)
    if w.alternating and not gated:
        out = _layout.swap_halves(out, tile=_layout.BLOCK_N, alternate=False)
    return out.reshape(*out.shape[:-2], *x.shape[:-1], out.shape[-1])
