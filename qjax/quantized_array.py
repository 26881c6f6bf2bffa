"""``QuantizedArray``: a pytree that stands where an array stood."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats import QuantFormat
from qjax.numerics import expand_tiles
from qjax.typing import Array, DType


def packed_nbytes(shape: tuple[int, ...], dtype: DType) -> int:
    """Bytes of an array with sub-byte types packed, as XLA holds them (not ``Array.nbytes``)."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    else:
        bits = dtype.itemsize * 8
    return -(-int(np.prod(shape, dtype=np.int64)) * bits // 8)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point", "perm", "global_scale", "act_scale"],
    meta_fields=["fmt", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """Low-precision codes with their scales; the logical shape of the array it replaces.

    ``original[perm] ~= (qvalue - zero_point) * scale * global_scale``, every factor broadcast over
    its tile. Build one with ``qjax.quantize`` or, from a checkpoint's own codes, ``make``.

    Attributes:
      qvalue: Codes, the original's shape, in ``fmt.storage_dtype``. Always signed: unsigned codes
        of a file are moved down by ``2**(bits-1)`` and so are their zero points.
      scale: Multipliers, the rank of ``qvalue``. Along each axis its length is 1, the array's, or
        ``ceil(size / tile)``; a last tile may be cut short. ``quantize`` makes positive ones;
        checkpoints of learned methods (AutoRound) hold negative ones too.
      zero_point: int8 with the shape of ``scale``, or None if symmetric.
      perm: int32 ``(k,)`` or None. GPTQ activation order: row ``i`` of ``qvalue`` (axis -2) is row
        ``perm[i]`` of the original, so that the rows of a group lie together.
      global_scale: float32 scalar or None: second level of two-level formats (NVFP4).
      act_scale: float32 scalar or None: static scale of the activations this weight meets.
      fmt: The format.
      dtype: Result type of ``dequantize``; independent of the scale's type.
    """

    qvalue: Array
    scale: Array
    zero_point: Array | None
    perm: Array | None
    global_scale: Array | None
    act_scale: Array | None
    fmt: QuantFormat
    dtype: Any

    @classmethod
    def make(
        cls,
        qvalue: Array,
        scale: Array,
        fmt: QuantFormat,
        *,
        zero_point: Array | None = None,
        perm: Array | None = None,
        global_scale: Array | None = None,
        act_scale: Array | None = None,
        dtype: DType = jnp.bfloat16,
    ) -> QuantizedArray:
        """Build from parts, checked. (Unflattening cannot check: pytrees hold placeholders.)

        Raises:
          ValueError: If shapes, types and format contradict each other.
        """
        if qvalue.dtype != fmt.storage_dtype:
            raise ValueError(f"{qvalue.dtype=} but {fmt.name} stores {fmt.storage_dtype}")
        if scale.ndim != qvalue.ndim:
            raise ValueError(
                f"scale of shape {scale.shape} must have the rank of qvalue {qvalue.shape}; "
                "keep the reduced axes with length one"
            )
        _infer_tiles(qvalue.shape, scale.shape, fmt)  # raises if they do not fit
        if fmt.symmetric != (zero_point is None):
            raise ValueError(
                f"{fmt.name} is {'' if fmt.symmetric else 'a'}symmetric, "
                f"zero_point {'must be None' if fmt.symmetric else 'is needed'}"
            )
        if zero_point is not None and zero_point.shape != scale.shape:
            raise ValueError(f"{zero_point.shape=} must be that of scale, {scale.shape}")
        if perm is not None and perm.shape != (qvalue.shape[-2],):
            raise ValueError(f"{perm.shape=} must be ({qvalue.shape[-2]},), the contraction size")
        # float64 means float32 where jax has no 64-bit types: as a result it would be a warning.
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        return cls(qvalue, scale, zero_point, perm, global_scale, act_scale, fmt, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Extent of one scale's tile along every axis."""
        return _infer_tiles(self.qvalue.shape, self.scale.shape, self.fmt)

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes, scales, zero points and permutation."""
        parts = (x for x in jax.tree_util.tree_leaves(self) if hasattr(x, "shape"))
        return sum(packed_nbytes(x.shape, x.dtype) for x in parts)

    def astype(self, dtype: DType) -> QuantizedArray:
        """Change the type ``dequantize`` returns; the codes stay as they are."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    @property
    def T(self) -> QuantizedArray:
        """The transposed matrix; not defined with a permutation, which belongs to axis -2."""
        if self.ndim != 2:
            raise ValueError(f".T needs a matrix; got shape {self.shape}")
        if self.perm is not None:
            raise ValueError("an activation-ordered weight cannot be transposed; dequantize it")
        zero_point = None if self.zero_point is None else self.zero_point.T
        fmt = self.fmt
        if fmt.block is not None:
            fmt = fmt.replace(block=fmt.block[::-1])
        return dataclasses.replace(
            self, qvalue=self.qvalue.T, scale=self.scale.T, zero_point=zero_point, fmt=fmt
        )

    def effective_scale(self) -> Array:
        """``scale * global_scale`` in float32, in the shape of ``scale``."""
        scale = self.scale.astype(jnp.float32)
        return scale if self.global_scale is None else scale * self.global_scale

    def dequantize(self, dtype: DType | None = None) -> Array:
        """The represented values, ``(qvalue - zero_point) * scale``, in original row order.

        Args:
          dtype: Result type; ``self.dtype`` by default.
        """
        return _dequantize(self, jnp.dtype(self.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(q: QuantizedArray, dtype: Any) -> Array:
    x = q.qvalue.astype(jnp.float32)
    tiles = q.tiles
    if q.zero_point is not None:
        x = x - expand_tiles(q.zero_point.astype(jnp.float32), q.shape, tiles)
    x = x * expand_tiles(q.effective_scale(), q.shape, tiles)
    if q.perm is not None:
        x = jnp.take(x, jnp.argsort(q.perm), axis=-2)
    return x.astype(dtype)


def _infer_tiles(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], fmt: QuantFormat
) -> tuple[int, ...]:
    candidates = (fmt.group_size,) if fmt.block is None else fmt.block
    tiles = []
    for axis, (size, count) in enumerate(zip(shape, scale_shape, strict=True)):
        if count == 1:
            tiles.append(max(size, 1))
        elif count == size:
            tiles.append(1)
        else:
            # Block tiles are (contraction, output) for the usual kernel layout (in, out).
            order = candidates if axis == len(shape) - 2 else candidates[::-1]
            fits = [tile for tile in order if tile is not None and -(-size // tile) == count]
            if not fits:
                raise ValueError(
                    f"scale of shape {scale_shape} does not tile an array of shape {shape}: axis "
                    f"{axis} has {count} scales for {size} elements, but {fmt.name} allows 1, "
                    f"{size}" + "".join(f" or {-(-size // t)}" for t in candidates if t)
                )
            tiles.append(fits[0])
    return tuple(tiles)
