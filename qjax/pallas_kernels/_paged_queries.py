"""The queries of the paged decode kernel, as one thread of it holds them."""

from __future__ import annotations

from qjax.pallas_kernels._paged_sizes import Tile
from qjax.pallas_kernels._ptx import Ptx, Value, float_bits_of


def load_queries(
    p: Ptx, tile: Tile, queries: Value, row: Value, key_scale: Value | None
) -> tuple[list[Value], list[Value]]:
    """A thread's part of the queries, and what becomes of their products.

    With narrow pages queries become float16 times a power of two per head, which is exact for
    values down to 2**-29 of the largest. Keys of integers come with a constant added (``unpack``),
    the same for all tokens: what it adds to every product is known here.

    Args:
      p: Where to emit.
      tile: The sizes.
      queries: Address of ``[rows, ratio, head_dim]``.
      row: Which sequence and KV head.
      key_scale: float32, scale of all keys, or None.

    Returns:
      ``columns * blocks * 2`` registers of pairs. Per column group factors of two heads; for
      integers, then, per column group what their products start from.
    """
    lane = p.bits_and(p.thread(), 31)
    group, pair = p.shift_right(lane, 2), p.bits_and(lane, 3)
    factor = p.number(float_bits_of(tile.factor))
    if key_scale is not None:
        factor = p.fmul(factor, key_scale)
    result: list[Value] = []
    factors: list[Value] = []
    starts: list[Value] = []
    for n in range(tile.columns):
        # Heads beyond the last are the last again; nobody looks at their results.
        head = p.minimum(p.add(group, 8 * n), tile.ratio - 1)
        index = p.mul(p.add(p.mul(row, tile.ratio), head), tile.head_dim)
        words = _query_words(p, tile, queries, index, pair)
        if not tile.narrow:
            result += words
            factors += [factor, factor]
            continue
        words, down = _scaled(p, tile, words)
        start = _start(p, tile, words) if tile.biased else None
        result += words
        for e in (0, 1):  # of heads 2 pair + e, known to the lanes of that group
            who = p.add(p.mul(pair, 8), 4 * e)
            factors.append(p.fmul(factor, p.bits_float(p.shuffle_from(down, who))))
            if start is not None:
                starts.append(p.bits_float(p.shuffle_from(p.float_bits(start), who)))
    return result, factors + starts


def _scaled(p: Ptx, tile: Tile, words: list[Value]) -> tuple[list[Value], Value]:
    """Pairs of one head as float16 times a power of two, and the bits of its inverse."""
    x: list[Value] = []
    for word in words:
        if tile.query == "float16":
            x += p.f16_to_floats(word)
        else:
            x.append(p.bits_float(p.shift_left(word, 16)))
            x.append(p.bits_float(p.bits_and(word, 0xFFFF0000)))
    top = p.integer(0)
    for value in x:
        top = p.maximum(top, p.bits_and(p.float_bits(value), 0x7FFFFFFF))
    for mask in (1, 2):
        top = p.maximum(top, p.shuffle_xor(top, mask, out="r"))
    # The exponent e of the largest; it becomes 2**14 ... 2**15, by 2**(141 - e).
    exponent = p.maximum(p.shift_right(top, 23), 27)
    up = p.bits_float(p.shift_left(p.sub(p.integer(268), exponent), 23))
    scaled = [p.pack(p.fmul(x[i], up), p.fmul(x[i + 1], up), "f16") for i in range(0, len(x), 2)]
    if (
        tile.kind == "int4" and tile.biased
    ):  # keys of the second half of the head are 16 times as large
        half = len(scaled) // 2
        scaled[half:] = [p.fma_halves(word, 0x2C00, 0x8000) for word in scaled[half:]]
    return scaled, p.shift_left(p.add(exponent, -14), 23)


def _start(p: Ptx, tile: Tile, words: list[Value]) -> Value:
    """Minus the sum of a head's queries times the constants that ``unpack`` adds to keys."""
    total = p.number(0)
    for i, word in enumerate(words):
        first = tile.kind == "int4" and i < len(words) // 2
        constant = p.number(float_bits_of(-1032.0 if first else -1152.0))
        for value in p.f16_to_floats(word):
            total = p.fma(value, constant, total)
    for mask in (1, 2):
        total = p.fadd(total, p.shuffle_xor(total, mask))
    return total


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
