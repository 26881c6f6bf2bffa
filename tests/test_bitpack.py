"""Bit packing against a bit-by-bit loop."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.checkpoints import bitpack


def loop_pack(codes: list[int], bits: int, width: int) -> list[int]:
    """One vector, one bit at a time."""
    words = [0] * -(-len(codes) * bits // width)
    for j, code in enumerate(codes):
        for i in range(bits):
            position = j * bits + i
            words[position // width] |= (code >> i & 1) << position % width
    return words


@given(
    bits=st.sampled_from(bitpack.BITS),
    dtype=st.sampled_from([np.int32, np.uint8, np.int16]),
    size=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_matches_a_loop_over_bits(bits, dtype, size, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint8)
    words = bitpack.pack(codes, bits, axis=0, dtype=dtype)
    width = np.dtype(dtype).itemsize * 8
    assert words.dtype == dtype
    assert (words.view(f"u{width // 8}")).tolist() == loop_pack(codes.tolist(), bits, width)
    np.testing.assert_array_equal(bitpack.unpack(words, bits, size=size, axis=0), codes)


@pytest.mark.parametrize("bits", bitpack.BITS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis(bits, axis):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (33, 10, 64)).astype(np.uint8)
    words = bitpack.pack(codes, bits, axis=axis)
    moved = bitpack.pack(np.moveaxis(codes, axis, 0), bits, axis=0)
    np.testing.assert_array_equal(np.moveaxis(words, axis, 0), moved)
    unpacked = bitpack.unpack(words, bits, size=codes.shape[axis], axis=axis)
    np.testing.assert_array_equal(unpacked, codes)


def test_all_words_survive():
    """105 words divide evenly into codes of any width: each bit belongs to one."""
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (105, 5)).astype(np.int32)
    for bits in bitpack.BITS:
        codes = bitpack.unpack(words, bits, size=105 * 32 // bits, axis=0)
        np.testing.assert_array_equal(bitpack.pack(codes, bits, axis=0), words)


@pytest.mark.parametrize("bits", bitpack.BITS)
def test_signed_codes_of_any_type(bits):
    half = 2 ** (bits - 1)
    wide = np.arange(-half, half, dtype=np.int8)
    expected = np.arange(2**bits)
    for codes in (wide, wide.astype(ml_dtypes.int4)) if bits <= 4 else (wide,):
        for view in (codes, np.repeat(codes, 3)[::3]):
            np.testing.assert_array_equal(bitpack.to_unsigned(view, bits), expected)
    few = np.arange(-8, 8, dtype=np.int8)
    shifted = bitpack.to_unsigned(few.astype(ml_dtypes.int4), bits)
    np.testing.assert_array_equal(shifted, (few.astype(np.int64) + half).astype(np.uint8))
    if bits < 4:
        with pytest.raises(ValueError, match="do not fit"):
            bitpack.pack(shifted, bits, axis=0)


@pytest.mark.parametrize("bits", bitpack.BITS)
@pytest.mark.parametrize("k", [1, 127, 128, 257])
def test_columns_are_packed_in_strips(bits, k):
    codes = np.random.default_rng(k).integers(0, 2**bits, (k, 3)).astype(np.uint8)
    for dtype in (np.int32, np.uint8):
        expected = bitpack.pack(codes, bits, axis=0, dtype=dtype).T
        words = bitpack.pack_columns(codes, bits, signed=False, dtype=dtype)
        assert words.dtype == dtype and words.flags.c_contiguous
        np.testing.assert_array_equal(words, expected)
        signed = bitpack.to_signed(codes.copy(), bits)
        words = bitpack.pack_columns(signed, bits, signed=True, dtype=dtype)
        np.testing.assert_array_equal(words, expected)


def test_a_read_only_view_can_be_unpacked():
    words = np.frombuffer(b"\x21\x43\x65\x87", np.int32)
    codes = bitpack.unpack(words, 4, size=8, axis=0)
    assert codes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_three_bit_codes_cross_word_borders():
    # The eleventh code has bits 30 and 31 of word 0 and bit 0 of word 1.
    codes = np.zeros(32, np.uint8)
    codes[10] = 0b111
    words = bitpack.pack(codes, 3, axis=0)
    assert words.view(np.uint32).tolist() == [0xC0000000, 1, 0]


def test_errors_name_the_values():
    with pytest.raises(ValueError, match=r"codes in \[0, 16\] do not fit 4 unsigned bits"):
        bitpack.pack(np.array([0, 16]), 4, axis=0)
    with pytest.raises(ValueError, match=r"9 codes of 4 bits need 2 words of 32 bits along axis 0"):
        bitpack.unpack(np.zeros((1, 3), np.int32), 4, size=9, axis=0)
    with pytest.raises(ValueError, match="bits=9"):
        bitpack.unpack(np.zeros(9, np.int32), 9, size=32, axis=0)
    with pytest.raises(ValueError, match="words must be integers, they are float32"):
        bitpack.unpack(np.zeros(5, np.float32), 4, size=32, axis=0)
