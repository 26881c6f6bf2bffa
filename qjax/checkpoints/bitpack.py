"""Dense bit packing: codes of 2 to 8 bits in integer words, least significant bit first.

Along the packed axis, element ``j`` of ``b`` bits occupies bits ``j*b .. j*b+b-1`` of one bit
stream, and bit ``i`` of the stream is bit ``i % width`` of word ``i // width``. Nothing is skipped
at word borders: 32 codes of 3 bits fill exactly three int32 words. GPTQ, AWQ "gemv" and
compressed-tensors store this in int32 words; MXFP4 and NVFP4 in bytes.

Everything works on fields ("the j-th code of every period") with whole-array shifts, so the packed
axis may be any axis and nothing is transposed.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

BITS = (2, 3, 4, 5, 6, 7, 8)
_STRIP = 128
"""Rows packed at a time: what is made on the way then stays in the cache. Any number of codes that
fills whole words divides it."""


def packed_size(size: int, bits: int, word_bits: int = 32) -> int:
    """Words that ``size`` codes take, the last one padded with zero bits."""
    return -(-size * bits // word_bits)


def unpack(words: np.ndarray, bits: int, *, size: int, axis: int) -> np.ndarray:
    """Unpack unsigned codes.

    Args:
      words: Integers of any width, signed or not (their bits count, not their value).
      bits: Bits per code: 2 to 8.
      size: Number of codes along ``axis``.
      axis: The packed axis.

    Returns:
      uint8 codes, ``size`` along ``axis``; other axes as in ``words``.

    Raises:
      ValueError: If ``words`` does not have ``packed_size(size, bits)`` entries along ``axis``.
    """
    words = words.view(_unsigned(words.dtype))
    width = words.dtype.itemsize * 8
    axis %= words.ndim
    _check(bits, width)
    if words.shape[axis] != packed_size(size, bits, width):
        raise ValueError(
            f"{size} codes of {bits} bits need {packed_size(size, bits, width)} words of {width} "
            f"bits along axis {axis}; got an array of shape {words.shape}"
        )
    fields, period = _period(bits, width)
    words = _pad(words, axis, -words.shape[axis] % period)
    shape = list(words.shape)
    shape[axis : axis + 1] = [words.shape[axis] // period, fields]
    codes = np.empty(shape, np.uint8)
    mask = words.dtype.type(2**bits - 1)
    lead = (slice(None),) * axis
    for j in range(fields):
        word, shift = divmod(j * bits, width)
        # Plain slices: one strided pass over the words per field.
        value = words[(*lead, slice(word, None, period))] >> words.dtype.type(shift)
        if shift + bits > width:  # the code continues in the next word
            value |= words[(*lead, slice(word + 1, None, period))] << words.dtype.type(
                width - shift
            )
        value &= mask
        codes[(*lead, slice(None), j)] = value
    shape[axis : axis + 2] = [shape[axis] * fields]
    return codes.reshape(shape)[(*lead, slice(0, size))]


def pack(codes: np.ndarray, bits: int, *, axis: int, dtype: type = np.int32) -> np.ndarray:
    """Pack unsigned codes; the inverse of ``unpack``.

    Args:
      codes: Integers in ``[0, 2**bits)``.
      bits: Bits per code: 2 to 8.
      axis: The axis to pack along.
      dtype: Word type of the result, such as ``np.int32`` or ``np.uint8``.

    Returns:
      Words in ``dtype``, ``packed_size(size, bits)`` along ``axis``; unused bits are zero.

    Raises:
      ValueError: If a code is out of range.
    """
    word_type = _unsigned(np.dtype(dtype))
    width = word_type.itemsize * 8
    axis %= codes.ndim
    _check(bits, width)
    if codes.size and not (0 <= int(codes.min()) and int(codes.max()) < 2**bits):
        raise ValueError(
            f"codes in [{int(codes.min())}, {int(codes.max())}] do not fit {bits} unsigned bits; "
            f"clip them to [0, {2**bits - 1}]"
        )
    size = codes.shape[axis]
    fields, period = _period(bits, width)
    codes = _pad(codes, axis, -size % fields)
    shape = list(codes.shape)
    shape[axis] = codes.shape[axis] // fields * period
    words = np.zeros(shape, word_type)
    lead = (slice(None),) * axis
    for j in range(fields):
        word, shift = divmod(j * bits, width)
        value = codes[(*lead, slice(j, None, fields))].astype(word_type)
        words[(*lead, slice(word, None, period))] |= value << word_type.type(shift)
        if shift + bits > width:
            words[(*lead, slice(word + 1, None, period))] |= value >> word_type.type(width - shift)
    used = words[(*lead, slice(0, packed_size(size, bits, width)))]
    return np.ascontiguousarray(used).view(dtype)


def pack_columns(
    codes: np.ndarray, bits: int, *, signed: bool, dtype: type = np.int32
) -> np.ndarray:
    """``pack`` a matrix along its first axis and transpose; several times as fast as in two steps.

    Args:
      codes: ``(k, n)``: as for ``pack``, or as for ``to_unsigned``.
      bits: Bits per code: 2 to 8.
      signed: Whether ``to_unsigned`` comes first.
      dtype: Word type of the result.

    Returns:
      Words in ``dtype``, ``(n, packed_size(k, bits))``, contiguous; unused bits are zero.

    Raises:
      ValueError: If a code is out of range.
    """
    k, n = codes.shape
    width = np.dtype(dtype).itemsize * 8
    words = np.empty((n, packed_size(k, bits, width)), dtype)
    for begin in range(0, k, _STRIP):
        strip = codes[begin : begin + _STRIP]
        part = pack(to_unsigned(strip, bits) if signed else strip, bits, axis=0, dtype=dtype)
        place = begin * bits // width
        words[:, place : place + len(part)] = part.T
    return words


def to_signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Move unsigned codes down by ``2**(bits-1)``, as ``QuantizedArray`` holds them.

    Args:
      codes: uint8 in ``[0, 2**bits)``; overwritten.
      bits: Bits per code.

    Returns:
      ml_dtypes.int4 up to 4 bits, int8 above.
    """
    codes -= np.uint8(2 ** (bits - 1))  # wraps modulo 256, which is the int8 of the difference
    signed = codes.view(np.int8)
    return signed if bits > 4 else signed.astype(ml_dtypes.int4)


def to_unsigned(codes: np.ndarray, bits: int) -> np.ndarray:
    """Move signed codes (int4 or int8) up by ``2**(bits-1)``; uint8, which ``pack`` checks."""
    if codes.dtype != ml_dtypes.int4 or bits > 4:
        return codes.astype(np.int8).view(np.uint8) + np.uint8(2 ** (bits - 1))
    # Not by ml_dtypes' conversion, which is slow. Of an int4's byte the lower half counts, in which
    # flipping the sign adds 8.
    shifted = codes.view(np.uint8) & np.uint8(15)
    shifted ^= np.uint8(8)
    if bits < 4:
        shifted -= np.uint8(8 - 2 ** (bits - 1))
    return shifted


def _unsigned(dtype: np.dtype) -> np.dtype:
    if dtype.kind not in "iu":
        raise ValueError(f"words must be integers, they are {dtype}")
    return np.dtype(f"u{dtype.itemsize}")


def _check(bits: int, width: int) -> None:
    if bits not in BITS or bits > width:
        raise ValueError(f"{bits=} in words of {width} bits; choose bits from {BITS}")


def _period(bits: int, width: int) -> tuple[int, int]:
    """(codes, words) after which the positions of the codes in their words repeat."""
    common = math.lcm(bits, width)
    return common // bits, common // width


def _pad(x: np.ndarray, axis: int, after: int) -> np.ndarray:
    if not after:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, after)
    return np.pad(x, widths)
