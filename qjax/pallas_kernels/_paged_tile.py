"""What one thread of the paged decode kernel computes, written with the instructions of ``_ptx``.

The four warps of a block work on their own: each has a quarter of the tokens of every tile, its own
running maximum, sum and output, merged once at the end. Per 16 tokens (``mma.m16n8k16``; the query
heads that share a KV head are the 8 columns)::

    S[token, head]  = K[token, :] @ q[head, :]      A: rows of the page     B: queries, kept
    P.T[head, token]                                 `movmatrix` turns the result into an operand
    O[d, head]     += V.T[d, token] @ P[token, head] A: `ldmatrix.trans`     B: P

Pages are read by ``ldmatrix`` in 16-bit units. With narrower values such a unit holds several
neighbours along the head: for K their order only has to be that of the queries, for V they become
different rows of ``O``, the same for every token, so that values need no transposed storage. Codes
become float16, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qjax.pallas_kernels._paged_sizes import LOG2E, Tile
from qjax.pallas_kernels._ptx import Ptx, Value

_NOTHING = int(np.float32(-1e30).view(np.uint32))
"""Running maximum before anything was seen: finite, so that differences of it are."""
_MINUS_INFINITY = 0xFF800000


def unpack(p: Ptx, word: Value, kind: str, *, values: bool, biased: bool = False) -> list[Value]:
    """Pairs of float16 of a 32-bit word of codes, bytes b0 ... b3.

    Returns:
      ``[(b0, b2), (b1, b3)]``; for the keys of fp8_e4m3 ``[(b0, b1), (b2, b3)]``. For int4 the same
      of the low nibbles, then of the high ones. Where ``biased`` they are 1152 (int8), 1032 (low
      nibbles) more than the code, or 1152 more than 16 times the code (high nibbles):
      ``_paged_queries`` makes up for it. For values the sums would be too long.
    """
    if kind == "float8_e4m3fn":
        word = p.permute(word, 0, 0x3120) if values else word
        return [p.e4m3_to_f16(word, 0), p.e4m3_to_f16(word, 1)]
    if kind == "float8_e5m2":  # the upper byte of a float16
        return [p.permute(word, 0, 0x2404), p.permute(word, 0, 0x3414)]
    if kind == "int8":  # 1024 + (code + 128) is 0x6400 + the code with its sign flipped
        word = p.bits_xor(word, 0x80808080)
        both = [p.permute(word, 0x64646464, selector) for selector in (0x4240, 0x4341)]
        return [p.add_halves(pair, 0xE480) for pair in both] if not biased else both  # - 1152
    assert kind == "int4", kind
    result = []
    shifted = p.shift_right(word, 8)
    for source in (word, shifted):  # 1024 + (code + 8), the sign bit flipped
        low = p.bits_xor(p.bits_and(source, 0x000F000F), 0x64086408)
        result.append(p.add_halves(low, 0xE408) if not biased else low)  # - 1032
    for source in (word, shifted):  # 1024 + 16 (code + 8), to be divided by 16
        high = p.bits_xor(p.bits_and(source, 0x00F000F0), 0x64806480)
        result.append(p.fma_halves(high, 0x2C00, 0xD480) if not biased else high)  # / 16 - 72
    return result


class Thread:
    """Constants of a thread: where it stands in its block and in the matrices it reads."""

    def __init__(self, p: Ptx, tile: Tile) -> None:
        self.p, self.tile = p, tile
        thread = p.thread()
        self.warp, lane = p.shift_right(thread, 5), p.bits_and(thread, 31)
        self.lane = lane
        self.group, self.pair = p.shift_right(lane, 2), p.bits_and(lane, 3)
        matrix, row = p.shift_right(lane, 3), p.bits_and(lane, 7)
        first, second = p.bits_and(matrix, 1), p.shift_right(matrix, 1)
        # Of the four matrices of one load, keys have rows then chunks, values chunks then rows.
        own = p.mul(self.warp, tile.tokens // 4 * tile.row_bytes)
        self.keys = self._offset(own, row, first, second)
        self.values = self._offset(own, row, second, first)

    def _offset(self, own: Value, row: Value, half: Value, chunk: Value) -> tuple[Value, Value]:
        """Offset of a lane's row in a tile, at its first chunk, and with ``chunk`` left out."""
        p, size, swizzle = self.p, self.tile.row_bytes, self.tile.swizzle
        if self.tile.per_row > 1:
            return self._offset_in_shared_row(own, row, half, chunk), own
        offset = p.add(own, p.mul(half, 8 * size))
        if swizzle is None:
            offset = p.add(offset, p.mul(row, size))
            return p.add(offset, p.mul(chunk, 16)), offset
        offset = p.add(offset, p.mul(row, swizzle))
        turn = row if swizzle == 128 else p.shift_right(row, {64: 1, 32: 2}[swizzle])
        return p.add(offset, p.mul(p.bits_xor(turn, chunk), 16)), offset

    def _offset_in_shared_row(self, own: Value, row: Value, half: Value, chunk: Value) -> Value:
        """The same where 2 or 4 tokens share a row of 128 bytes."""
        p, per = self.p, self.tile.per_row
        shift = per.bit_length() - 1
        line = p.add(p.shift_right(row, shift), p.mul(half, 8 // per))
        turn = line
        if per == 4:  # 16 tokens are half a swizzle pattern
            parts = self.tile.tokens // 64
            turn = p.add(turn, p.mul(p.bits_and(p.mul(self.warp, parts), 1), 4))
        place = p.add(p.mul(p.bits_and(row, per - 1), 8 // per), chunk)
        offset = p.add(own, p.mul(line, 128))
        return p.add(offset, p.mul(p.bits_xor(place, turn), 16))

    def load(
        self, base: Value, lanes: tuple[Value, Value], part: int, pair: int, *, values: bool
    ) -> list[Value]:
        """Two chunks of 16 bytes of 16 tokens, as four registers.

        Args:
          base: Address of the tile.
          lanes: ``self.keys`` or ``self.values``.
          part: Which 16 of the warp's tokens.
          pair: Which two chunks.
          values: Transposed.
        """
        p, tile, swizzle = self.p, self.tile, self.tile.swizzle
        offset = part * 16 * tile.row_bytes
        if swizzle is None:
            # With an odd number of chunks the last pair reads its first one twice.
            single = 32 * (pair + 1) > tile.row_bytes
            address = p.add(base, lanes[1] if single else lanes[0])
            return p.load_matrices(address, offset + 32 * pair, transposed=values)
        column, chunk = divmod(2 * pair, swizzle // 16)
        if tile.per_row == 4 and part % 2:
            chunk += 4
        address = p.bits_xor(p.add(base, lanes[0]), 16 * chunk)
        return p.load_matrices(address, offset + column * 8 * swizzle, transposed=values)


@dataclasses.dataclass
class State:
    """Running results of one warp, as registers of a thread.

    Attributes:
      out: ``quads`` lists of four registers: block of 16 elements by column group.
      top: Running maxima of the thread's two heads of each column group.
      total: This thread's share of the sums.
    """

    out: list[list[Value]]
    top: list[Value]
    total: list[Value]

    def registers(self) -> list[Value]:
        return [x for quad in self.out for x in quad] + self.top + self.total

    @staticmethod
    def count(tile: Tile) -> int:
        return 4 * tile.quads + 4 * tile.columns

    @classmethod
    def of(cls, tile: Tile, registers: Sequence[Value]) -> State:
        registers = list(registers)
        assert len(registers) == cls.count(tile), len(registers)
        out = [registers[4 * i : 4 * i + 4] for i in range(tile.quads)]
        rest = registers[4 * tile.quads :]
        return cls(out, rest[: 2 * tile.columns], rest[2 * tile.columns :])

    @classmethod
    def start(cls, p: Ptx, tile: Tile) -> State:
        zero, nothing = p.number(0), p.number(_NOTHING)
        heads = 2 * tile.columns
        return cls([[zero] * 4 for _ in range(tile.quads)], [nothing] * heads, [zero] * heads)


def step(
    p: Ptx,
    tile: Tile,
    state: State,
    queries: Sequence[Value],
    factors: Sequence[Value],
    buffers: Sequence[Value],
    position: Value,
    start: Value,
    stop: Value,
) -> State:
    """Attention over one tile.

    Args:
      p: Where to emit.
      tile: The sizes.
      state: What came before.
      queries: From ``load_queries``.
      factors: From ``load_queries``.
      buffers: Addresses in shared memory of the tile's keys and values, with ``token_scales`` of
        their scales, and with ``logit_bias`` of float32 ``[ratio, tokens]``.
      position: Position of the tile's first token.
      start: First position that is seen.
      stop: Position behind the last one.
    """
    thread = Thread(p, tile)
    parts = range(tile.tokens // 64)
    first = p.add(thread.group, p.mul(thread.warp, tile.tokens // 4))  # this thread's first token
    seen = p.sub(p.add(first, position), start)
    span = p.sub(stop, start)
    starts = factors[2 * tile.columns :]
    logits = [_products(p, tile, thread, queries, starts, buffers[0], part) for part in parts]
    token = None
    if tile.token_scales:
        token = [p.add(buffer, p.mul(first, 4)) for buffer in buffers[2:4]]
    added = None
    if tile.logit_bias:
        added = _added(p, tile, p.add(buffers[-1], p.mul(first, 4)), thread)
    inverse = [
        _logits(
            p, tile, logits[part], factors, token, added, p.add(seen, 16 * part), span, 64 * part
        )
        for part in parts
    ]

    tops, fades, totals = [], [], []
    operands: list[list[list[Value]]] = [[] for _ in parts]  # [part][column][2]
    for n in range(tile.columns):
        weights = []
        for e in (0, 1):  # heads 2 pair + e
            column = [logits[part][n][e + 2 * half] for part in parts for half in (0, 1)]
            top = state.top[2 * n + e]
            for x in column:
                top = p.fmax(top, x)
            for mask in (4, 8, 16):
                top = p.fmax(top, p.shuffle_xor(top, mask))
            fade = p.exp2(p.fsub(state.top[2 * n + e], top))
            weights.append([p.exp2(p.fsub(x, top)) for x in column])
            total = p.fmul(state.total[2 * n + e], fade)
            for i, weight in enumerate(weights[-1]):
                scale = inverse[i // 2][i % 2] if tile.token_scales else None
                total = p.fadd(total, weight) if scale is None else p.fma(weight, scale, total)
            tops.append(top)
            fades.append(fade)
            totals.append(total)
        for part in parts:
            both = zip(*(w[2 * part : 2 * part + 2] for w in weights), strict=True)
            operands[part].append([p.transpose(p.pack(x, y, tile.compute)) for x, y in both])

    out = []
    for index, quad in enumerate(state.out):
        n = index % tile.columns
        out.append([p.fmul(x, fades[2 * n + i % 2]) for i, x in enumerate(quad)])
    for part in parts:
        for block, a in _value_blocks(p, tile, thread, buffers[1], part):
            for n in range(tile.columns):
                index = block * tile.columns + n
                out[index] = p.mma(out[index], a, operands[part][n], tile.compute)
    return State(out, tops, totals)


def _products(
    p: Ptx,
    tile: Tile,
    thread: Thread,
    queries: Sequence[Value],
    starts: Sequence[Value],
    keys: Value,
    part: int,
) -> list[list[Value]]:
    """``K @ q`` of 16 tokens: four registers per column group."""
    zero = p.number(0)
    # Two sums each, so that every other product need not wait for the one before it.
    sums = [[[zero] * 4, [zero] * 4] for _ in range(tile.columns)]
    for n in range(tile.columns if starts else 0):
        sums[n][0] = [*starts[2 * n : 2 * n + 2]] * 2

    def multiply(block: int, a: Sequence[Value]) -> None:
        for n in range(tile.columns):
            at = 2 * (n * tile.blocks + block)
            sums[n][block % 2] = p.mma(sums[n][block % 2], a, queries[at : at + 2], tile.compute)

    chunks = tile.row_bytes // 16
    for pair in range(-(-chunks // 2)):
        words = thread.load(keys, thread.keys, part, pair, values=False)
        if not tile.narrow:
            multiply(pair, words)
            continue
        for chunk in range(2 * pair, min(2 * pair + 2, chunks)):
            low, high = words[2 * (chunk % 2) : 2 * (chunk % 2) + 2]  # tokens 0-7 and 8-15
            low, high = (
                unpack(p, w, tile.kind, values=False, biased=tile.biased) for w in (low, high)
            )
            for i in range(len(low) // 2):  # int4: the high nibbles are the head's second half
                a = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]]
                multiply(chunk + i * tile.blocks // 2, a)
    return [[p.fadd(x, y) for x, y in zip(*pair, strict=True)] for pair in sums]


def _value_blocks(
    p: Ptx, tile: Tile, thread: Thread, values: Value, part: int
) -> list[tuple[int, list[Value]]]:
    """``V.T`` of 16 tokens: the operand of every block of 16 elements of the head.

    Row ``r < 8`` of a block is element ``r`` and row ``r + 8`` element ``r + 8``; of narrow types
    they are elements ``2 r`` and ``2 r + 1``.
    """
    result = []
    chunks = tile.row_bytes // 16
    for pair in range(-(-chunks // 2)):
        words = thread.load(values, thread.values, part, pair, values=True)
        if not tile.narrow:
            result.append((pair, words))
            continue
        for chunk in range(2 * pair, min(2 * pair + 2, chunks)):
            early, late = words[chunk % 2], words[2 + chunk % 2]  # tokens 0-7 and 8-15
            early, late = (unpack(p, w, tile.kind, values=True) for w in (early, late))
            for i in range(len(early) // 2):
                a = [*early[2 * i : 2 * i + 2], *late[2 * i : 2 * i + 2]]
                result.append((chunk + i * tile.blocks // 2, a))
    return result


def _added(p: Ptx, tile: Tile, at: Value, thread: Thread) -> list[Value]:
    """Addresses of what is added to the logits of the thread's heads, at its first token.

    A row holds the tokens of one head, so that the four heads of a warp meet in one bank: 12 cycles
    for 16 tokens, which is less than spreading them would take.
    """
    heads = [p.add(p.mul(thread.pair, 2), 8 * n + e) for n in range(tile.columns) for e in (0, 1)]
    # Heads beyond the last are the last again, as in the queries.
    return [p.add(at, p.mul(p.minimum(head, tile.ratio - 1), 4 * tile.tokens)) for head in heads]


def _logits(
    p: Ptx,
    tile: Tile,
    products: list[list[Value]],
    factors: Sequence[Value],
    token: list[Value] | None,
    added: list[Value] | None,
    seen: Value,
    span: Value,
    offset: int,
) -> list[Value]:
    """Products become logits in units of log2(e), in place; minus infinity where not seen.

    The scale of a value multiplies its probability, ``2 ** (logit + log2(scale))``: its logarithm
    is added here, and nothing can underflow.

    Returns:
      With ``token_scales`` the inverse of that scale for the thread's two tokens.
    """
    inverse = []
    hidden = p.number(_MINUS_INFINITY)
    for half in (0, 1):
        at = p.add(seen, 8 * half)
        key_scale = shift = None
        if token is not None:
            at_scale = offset + 32 * half
            key_scale = p.load_shared(token[0], at_scale)
            one = p.number(0x3F800000)
            value_scale = p.select_below(at, span, p.load_shared(token[1], at_scale), one)
            shift = p.log2(value_scale)
            inverse.append(p.reciprocal(value_scale))
        for n, quad in enumerate(products):
            for e in (0, 1):
                factor = factors[2 * n + e]
                if key_scale is not None:
                    factor = p.fmul(factor, key_scale)
                x = quad[2 * half + e]
                if added is not None:
                    term = p.load_shared(added[2 * n + e], offset + 32 * half)
                    x = p.fma(x, factor, term)
                    x = x if tile.soft_cap is None else _soft_cap(p, x, tile.soft_cap)
                    x = x if shift is None else p.fadd(x, shift)
                elif tile.soft_cap is not None:
                    x = _soft_cap(p, p.fmul(x, factor), tile.soft_cap)
                    x = x if shift is None else p.fadd(x, shift)
                else:
                    x = p.fmul(x, factor) if shift is None else p.fma(x, factor, shift)
                quad[2 * half + e] = p.select_below(at, span, x, hidden)
    return inverse


def _soft_cap(p: Ptx, x: Value, cap: float) -> Value:
    """``cap * log2(e) * tanh(y)`` for ``x = 2 * log2(e) * y``; see ``logit_factor``."""
    size = cap * LOG2E
    one = p.number(0x3F800000)
    inverse = p.reciprocal(p.fadd(p.exp2(x), one))  # tanh(y) = 1 - 2 / (exp(2 y) + 1)
    return p.fma(inverse, _number(p, -2 * size), _number(p, size))


def _number(p: Ptx, value: float) -> Value:
    return p.number(int(np.float32(value).view(np.uint32)))
