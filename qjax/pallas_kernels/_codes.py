"""How a stored code becomes a number in two or three instructions, and what its scale must be.

The bits of a code, placed in a 16-bit float and read as that float, are the code times a power of
two (``unit``): small integers are *subnormal* numbers, and an fp8 number moved to the right place
is a 16-bit float with a wrong exponent bias. One fused multiply-add then removes the power of two,
applies the scale and subtracts the zero point. How scales of groups are applied depends on the
type. float16 with its 11 bits holds scaled weights; the scale handed to the kernel is::

  stored[g, n] = scale[g, n] / 2**exponent[n]        column[n] = 2**(exponent[n] - unit)
  weight[k, n] = code_bits[k, n] * stored[k // group, n] + offset[k // group, n]
  output[m, n] = column[n] * sum_k x[m, k] * weight[k, n]

with one power of two per output feature that brings the largest stored scale of the column to
``2**top``, as large as the 16-bit type and the largest code allow. Powers of two keep the split
exact; the only rounding is that of the scale to the 11 bits of float16, and none where a checkpoint
stores its scales in 16 bits.

bfloat16 with its 8 bits does not hold scaled weights, but codes less their zero points exactly.
There the products are of those, and the float32 sum of each group is scaled::

  part[m, n, g] = sum over k in g of x[m, k] * (code_bits[k, n] * 2**multiplier + offset[g, n])
  output[m, n] = sum_g part[m, n, g] * stored[g, n]         stored[g, n] = scale[g, n] * 2**-rest

Without groups the multiplier is a constant, every weight is exact in either type, and the whole
scale is in ``column``.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from qjax.typing import Array, DType

COMPUTE_DTYPES = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Codes:
    """A kind of code.

    Attributes:
      bits: 4 or 8.
      bias: What is added to a signed integer to make it unsigned; 0 for floats.
      unit: Exponent of the code's bits read as a number of the compute type.
      top: Exponent of the largest stored scale in float16. Integers: 255 * 2**(15-24) is far
        inside it. E4M3 values reach 448 < 2**9, E5M2 values 57344 < 2**16.
    """

    bits: int
    bias: int
    unit: dict[str, int]
    top: int


CODES: dict[str, Codes] = {
    "int4": Codes(4, 8, {"float16": -24, "bfloat16": -133}, 15),
    "int8": Codes(8, 128, {"float16": -24, "bfloat16": -133}, 15),
    # float16: one instruction converts E4M3, and E5M2 is the upper byte of a float16.
    "float8_e4m3fn": Codes(8, 0, {"float16": 0, "bfloat16": -120}, 7),
    "float8_e5m2": Codes(8, 0, {"float16": 0, "bfloat16": -112}, 0),
}


def constant_multiplier(kind: str, compute: str) -> tuple[int, int]:
    """Multiplier of ungrouped codes and what it leaves over, as exponents of two.

    Returns:
      ``(multiplier, rest)``: weights are ``value * 2**rest`` after the multiplication.
    """
    codes = CODES[kind]
    unit = codes.unit[compute]
    if codes.bias == 0:
        return -unit, 0
    # The largest power of two of the type: 2**-unit itself is out of its range.
    multiplier = 15 if compute == "float16" else 127
    return multiplier, unit + multiplier


def half_bits(value: float, compute: str) -> int:
    """Bit pattern of ``value`` in the compute type, repeated in both halves of a register."""
    dtype = np.float16 if compute == "float16" else ml_dtypes.bfloat16
    half = int(np.asarray(value, dtype).view(np.uint16))
    return half << 16 | half


def to_unsigned(qvalue: Array, kind: str) -> Array:
    """Codes as the kernel stores them, uint8: integers plus their bias, floats as bits."""
    bias = CODES[kind].bias
    if bias == 0:
        return lax.bitcast_convert_type(qvalue, jnp.uint8)
    return (qvalue.astype(jnp.int16) + jnp.int16(bias)).astype(jnp.uint8)


def from_unsigned(codes: Array, kind: str) -> Array:
    """The inverse of ``to_unsigned``, in the type that ``kind`` names."""
    bias = CODES[kind].bias
    if bias == 0:
        return lax.bitcast_convert_type(codes, jnp.dtype(kind))
    return (codes.astype(jnp.int16) - jnp.int16(bias)).astype(jnp.int8).astype(jnp.dtype(kind))


def times_power_of_two(x: Array, exponent: Array) -> Array:
    """``x * 2**exponent`` in float32, exact where the result is a normal number.

    In two steps: ``2**exponent`` alone may lie outside float32 when the product does not. (The
    barrier keeps XLA from joining them again if the exponent is constant.)
    """
    half = exponent // 2

    def power(e: Array) -> Array:
        return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)

    return lax.optimization_barrier(x * power(half)) * power(exponent - half)


def split_scale(scale: Array, kind: str, compute: str) -> tuple[Array, Array]:
    """Cut a grouped scale into the kernel's two parts.

    Args:
      scale: float32 ``(groups, n)``.
      kind: A key of ``CODES``.
      compute: ``"float16"`` or ``"bfloat16"``.

    Returns:
      ``(stored, column)``: ``(groups, n)`` in ``stored_dtype(compute)``, and float32 ``(n,)``.
    """
    codes = CODES[kind]
    if compute == "bfloat16":
        _, rest = constant_multiplier(kind, compute)
        return scale * jnp.float32(2.0**-rest), jnp.ones_like(scale[0])
    _, exponent = jnp.frexp(jnp.abs(scale).max(axis=0))
    exponent = exponent.astype(jnp.int32) - codes.top
    stored = times_power_of_two(scale, jnp.broadcast_to(-exponent[None], scale.shape))
    column = times_power_of_two(jnp.ones_like(scale[0]), exponent - codes.unit[compute])
    return stored.astype(jnp.dtype(compute)), column


def stored_dtype(compute: str) -> DType:
    """Type of a group's scale and offset as the kernel reads them."""
    return jnp.dtype(jnp.float32 if compute == "bfloat16" else compute)


def merge_scale(stored: Array, column: Array, kind: str, compute: str) -> Array:
    """The inverse of ``split_scale``: float32 ``(groups, n)``."""
    if compute == "bfloat16":
        _, rest = constant_multiplier(kind, compute)
        return stored * jnp.float32(2.0**rest)
    _, exponent = jnp.frexp(column)
    exponent = exponent.astype(jnp.int32) - 1 + CODES[kind].unit[compute]
    wide = stored.astype(jnp.float32)
    return times_power_of_two(wide, jnp.broadcast_to(exponent[None], wide.shape))


def offset_of_zero_point(stored: Array, zero_point: Array, kind: str, compute: str) -> Array:
    """What unpacking adds for a zero point, in ``stored_dtype(compute)``.

    float16: ``-(bias + zero_point) * stored * 2**unit``. Its rounding shifts a whole group by at
    most ``16 * 2**-11`` of a step; the weights' root mean square is some five steps. bfloat16:
    ``-(bias + zero_point) * 2**rest``, exact.
    """
    shift = -(zero_point.astype(jnp.float32) + CODES[kind].bias)
    return (shift * _offset_step(stored, kind, compute)).astype(stored.dtype)


def zero_point_of_offset(stored: Array, offset: Array, kind: str, compute: str) -> Array:
    """The inverse of ``offset_of_zero_point``, exact: int8."""
    shift = jnp.rint(-offset.astype(jnp.float32) / _offset_step(stored, kind, compute))
    return (shift - CODES[kind].bias).astype(jnp.int8)


def _offset_step(stored: Array, kind: str, compute: str) -> Array:
    """One step of the codes in the units of what unpacking makes of them."""
    if compute == "bfloat16":
        _, rest = constant_multiplier(kind, compute)
        return jnp.full_like(stored, 2.0**rest)
    return stored.astype(jnp.float32) * 2.0 ** CODES[kind].unit["float16"]
