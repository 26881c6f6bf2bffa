"""The queries of the paged decode kernel, as one thread of it holds them."""

from __future__ import annotations

from qjax.pallas_kernels._paged_sizes import Tile
from qjax.pallas_kernels._ptx import Ptx, Value, float_bits_of


def load_queries(
    p: Ptx, tile: Tile, queries: Value, row: Value, key_scale: Value | None
) -> tuple[list[Value], list[Value]]:
    """A thread's part of the queries, and what their products are multiplied by.

    With narrow pages bfloat16 queries become float16 times a power of two per head, which is exact
    for values down to 2**-29 of the largest.

    Args:
      p: Where to emit.
      tile: The sizes.
      queries: Address of ``[rows, ratio, head_dim]``.
      row: Which sequence and KV head.
      key_scale: float32, scale of all keys, or None.

    Returns:
      ``columns * blocks * 2`` registers of pairs, and two factors per column group.
    """
    lane = p.bits_and(p.thread(), 31)
    group, pair = p.shift_right(lane, 2), p.bits_and(lane, 3)
    scaled = tile.narrow and tile.query == "bfloat16"
    factor = p.number(float_bits_of(tile.factor))
    if key_scale is not None:
        factor = p.fmul(factor, key_scale)
    result, factors = [], []
    for n in range(tile.columns):
        # Heads beyond the last are the last again; nobody looks at their results.
        head = p.minimum(p.add(group, 8 * n), tile.ratio - 1)
        index = p.mul(p.add(p.mul(row, tile.ratio), head), tile.head_dim)
        words = _query_words(p, tile, queries, index, pair)
        if not scaled:
            result += words
            factors += [factor, factor]
            continue
        top = p.integer(0)
        for word in words:
            word = p.bits_and(word, 0x7FFF7FFF)
            top = p.maximum(top, p.maximum(p.bits_and(word, 0xFFFF), p.shift_right(word, 16)))
        for mask in (1, 2):
            top = p.maximum(top, p.shuffle_xor(top, mask, out="r"))
        # The exponent e of the largest; it becomes 2**14 ... 2**15, by 2**(141 - e).
        exponent = p.maximum(p.shift_right(top, 7), 27)
        up = p.bits_float(p.shift_left(p.sub(p.integer(268), exponent), 23))
        for word in words:
            low = p.bits_float(p.shift_left(word, 16))
            high = p.bits_float(p.bits_and(word, 0xFFFF0000))
            result.append(p.pack(p.fmul(low, up), p.fmul(high, up), "f16"))
        down = p.shift_left(p.add(exponent, -14), 23)
        for e in (0, 1):  # of heads 2 pair + e, known to the lanes of that group
            other = p.shuffle_from(down, p.add(p.mul(pair, 8), 4 * e))
            factors.append(p.fmul(factor, p.bits_float(other)))
    return result, factors


def _query_words(p: Ptx, tile: Tile, queries: Value, index: Value, pair: Value) -> list[Value]:
    """Two registers per block of 16 elements, in the order in which a key's elements come."""
    if not tile.narrow:
        at = p.address(queries, p.add(index, p.mul(pair, 2)), 2)
        return [
            p.load_global(at, 2 * (16 * block + 8 * half))
            for block in range(tile.blocks)
            for half in (0, 1)
        ]
    at = p.address(queries, p.add(index, p.mul(pair, 4)), 2)
    result = []
    for block in range(tile.blocks):  # elements 4 pair ... 4 pair + 3
        first, second = p.load_global2(at, 32 * block)
        if tile.kind != "float8_e4m3fn":  # 0, 2 and 1, 3 instead of 0, 1 and 2, 3
            first, second = (p.permute_both(first, second, s) for s in (0x5410, 0x7632))
        result += [first, second]
    return result
