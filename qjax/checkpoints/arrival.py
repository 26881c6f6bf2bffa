"""One tensor from a mapped file to its device: copied, transposed, converted or quantized.

Accelerators get the bytes as they are stored and do the rest. On CPUs that would be slow: XLA
transposes, packs 4-bit codes and reduces down columns at a fraction of the memory's speed, and
fills every new buffer page by page. There a matrix goes in strips of rows, small enough for the
caches and for buffers that are used again: XLA computes codes of the matrix as it is stored, with
its groups along the rows, and they are transposed on the way from host to device, which is quick.
Results lie in arrays of NumPy, which have large pages; jax adopts them without a copy.

Codes and scales are those of ``qjax.quantize``, bit by bit.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax._compat import default_device
from qjax.formats import QuantFormat
from qjax.quantize import compute_scale, encode, quantize
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array

_STRIP_BYTES = 4 * 2**20
"""Stored bytes of a strip. A bf16 matrix of 117 MB to int8 on two x86 cores: 3.8 GB/s in strips of
4 MB, 3.4 of 2 MB, 2.3 of 16 MB, 1.1 as a whole."""

_ALIGNMENT = 64
"""Bytes; what jax wants of an array that it adopts."""

_PACKED = (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.float4_e2m1fn))
"""Two to a byte on devices, one on the host: never adopted, and never a view of a file."""


class Each(Protocol):
    """``map``, or the ``map`` of a pool of threads."""

    def __call__(self, work: Callable[[slice], Any], strips: Iterable[slice], /) -> Iterable[Any]:
        """Results in order."""
        ...


def plain_parameter(array: np.ndarray, dtype: Any, *, transpose: bool, each: Each = map) -> Array:
    """Move a tensor to the default device.

    Args:
      array: As stored; may be a view of the file and is not kept.
      dtype: Type of the result.
      transpose: Whether the result shall be the transposed matrix.
      each: Runs the strips.
    """
    dtype = np.dtype(dtype)
    if not _on_host():
        return _convert(jax.device_put(array), dtype, transpose)
    if array.ndim < 2:
        with np.errstate(over="ignore"):  # to an infinity, as XLA does
            return jax.device_put(_adoptable(array.astype(dtype)))
    out = _empty(array.shape[::-1] if transpose else array.shape, dtype)

    def move(rows: slice) -> None:
        part = array[rows]
        if transpose:
            out[:, rows] = _cast(jax.device_put(part.T), dtype)
        else:
            out[rows] = part if part.dtype == dtype else _cast(jax.device_put(part), dtype)

    list(each(move, _strips(array)))
    return jax.device_put(out)


def quantized_parameter(
    array: np.ndarray, fmt: QuantFormat, dtype: Any, *, each: Each = map
) -> QuantizedArray:
    """Quantize the kernel of a linear layer on the default device.

    Args:
      array: The stored matrix ``(n, k)``, whose transpose is the kernel; not kept.
      fmt: The format.
      dtype: What ``dequantize`` of the result shall give.
      each: Runs the strips.

    Returns:
      ``quantize(array.T, fmt, axis=-2, dtype=dtype)``.
    """
    if not _on_host():
        kernel = _convert(jax.device_put(array), array.dtype, True)
        return quantize(kernel, fmt, axis=-2, dtype=dtype)
    n, k = array.shape
    # XLA takes longer to pack codes than to compute them; the host packs on their way to jax.
    narrow = fmt.storage_dtype == jnp.int4
    codes = _empty((k, n), np.int8 if narrow else fmt.storage_dtype)

    def encode_strip(rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        part, scale, zero_point = _encode_rows(jax.device_put(array[rows]), fmt, codes.dtype)
        codes[:, rows] = np.asarray(jax.device_put(np.asarray(part).T))
        return np.asarray(scale), None if zero_point is None else np.asarray(zero_point)

    tile = fmt.tiles((n, k), -1)[0]
    scales, zero_points = zip(*each(encode_strip, _strips(array, tile)), strict=True)
    return QuantizedArray.make(
        jax.device_put(codes.view(ml_dtypes.int4) if narrow else codes),
        _join(scales),
        fmt,
        zero_point=None if fmt.symmetric else _join(zero_points),
        dtype=dtype,
    )


def stored_parameter(value: Any, *, each: Each = map) -> Any:
    """Move the arrays of a reader's result to the default device; none stays a view of a file."""
    return jax.tree.map(functools.partial(_moved, each=each), value)


def _moved(array: Any, *, each: Each) -> Array:
    if isinstance(array, jax.Array):
        return array
    if array.dtype in _PACKED:
        return jax.device_put(array)
    if array.ndim == 2 and not array.flags.c_contiguous:
        return plain_parameter(array.T, array.dtype, transpose=True, each=each)
    if not _on_host():
        return jax.device_put(array)
    return jax.device_put(_adoptable(array) if _is_mapped(array) else array)


def _on_host() -> bool:
    """Whether the default device is a CPU."""
    device = default_device()
    if device is None:
        return jax.default_backend() == "cpu"
    return (device if isinstance(device, str) else device.platform) == "cpu"


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(x: Array, dtype: Any, transpose: bool) -> Array:
    return (x.T if transpose else x).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode_rows(x: Array, fmt: QuantFormat, dtype: Any) -> tuple[Array, Array, Array | None]:
    """Codes of rows ``(n, k)``; scales and zero points already transposed."""
    scale, zero_point = compute_scale(x, fmt, axis=-1)
    codes = encode(x, scale, zero_point, fmt, fmt.tiles(x.shape, -1), dtype=dtype)
    return codes, scale.T, None if zero_point is None else zero_point.T


def _cast(x: Array, dtype: np.dtype) -> np.ndarray:
    return np.asarray(x if x.dtype == dtype else x.astype(dtype))


def _join(parts: tuple[np.ndarray, ...]) -> Array:
    return jax.device_put(_adoptable(parts[0] if len(parts) == 1 else np.concatenate(parts, 1)))


def _strips(array: np.ndarray, tile: int = 1) -> Iterable[slice]:
    """Ranges of rows of about equal size, multiples of ``tile`` but for the last."""
    rows = array.shape[0]
    count = max(1, -(-array.nbytes // _STRIP_BYTES))
    step = max(1, -(-rows // (count * tile))) * tile
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An aligned array."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % _ALIGNMENT
    return buffer[begin : begin + nbytes].view(dtype).reshape(shape)


def _adoptable(array: np.ndarray) -> np.ndarray:
    out = _empty(array.shape, array.dtype)
    out[...] = array
    return out


def _is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return isinstance(base, mmap.mmap)
