"""What one thread of the append kernel does; see ``_kv_append``."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from qjax.kv_format import KVFormat
from qjax.pallas_kernels import _ptx
from qjax.pallas_kernels._ptx import Ptx, Value

if TYPE_CHECKING:
    from qjax.pallas_kernels._kv_append import Sizes, Source

_INFINITY = 0x7F800000
_DROPPED = 0xFFFFFFFF
_SIGN = 0x80000000


@dataclasses.dataclass(frozen=True)
class Part:
    """A thread of one sequence.

    Attributes:
      p: Where to emit.
      sizes: Sizes and types.
      places: Addresses of arrays by name.
      row: Which sequence.
    """

    p: Ptx
    sizes: Sizes
    places: dict[str, Value]
    row: Value

    def emit(self, part: str, block: Value) -> None:
        """What this thread does for ``"queries"``, ``"keys"`` or ``"values"``.

        Args:
          part: Which of them.
          block: Which four heads.
        """
        p, source = self.p, self.sizes.parts[part]
        thread = p.thread()
        lane = p.bits_and(thread, 31)
        warp = p.add(p.mul(block, 4), p.shift_right(thread, 5))
        # Warps beyond the last head do its work again, and store nothing.
        head = p.minimum(warp, source.heads - 1)
        # For int4 half of a lane's elements are from each half of the head, as they share bytes.
        halves = 2 if self.sizes.fmt.packed and part != "queries" else 1
        # All that is read is asked for at once: waiting for memory is what takes the time.
        known = None if part == "queries" else _look_up(self, part, warp, head)
        x = _elements(self, source, head, lane, halves)
        if known is not None:
            _store(self, part, x, known, head, lane)
            return
        size = source.heads * self.sizes.head_dim
        at = p.address(self.places["queries"], p.mul(self.row, size), 2)
        at = p.address(at, p.mul(head, self.sizes.head_dim), 2)
        at = p.address(at, lane, self.sizes.head_dim // 32 * 2)
        for i in range(0, len(x), 2):
            word = p.pack(x[i], x[i + 1], _short(self.sizes.dtype))
            p.store_global(p.offset(at, 2 * i), word, 32, warp, source.heads)


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}[dtype]


def _elements(t: Part, source: Source, head: Value, lane: Value, halves: int) -> list[Value]:
    """A lane's elements as float32 that ``sizes.dtype`` has, rotated if they are to be."""
    p, dim = t.p, t.sizes.head_dim
    run = dim // 32 // halves
    column = p.add(p.mul(head, dim), p.mul(lane, run))
    at = p.add(p.add(p.mul(t.row, source.stride), column), source.first)
    array = t.places[source.array]
    words, parts, bias, cos, sin = [], [], [], [], []
    if source.splits == 0:
        words = _words(t, p.address(array, at, 2), run, halves)
    for split in range(source.splits):
        begin = p.offset(p.address(array, at, 4), split * t.sizes.rows * source.stride * 4)
        loaded = [p.load_floats(begin, run, half * dim * 2) for half in range(halves)]
        parts.append(list(itertools.chain(*loaded)))
    if source.bias is not None:
        bias = _words(t, p.address(t.places[source.bias], column, 2), run, halves)
    if source.rotates:
        pair = p.mul(lane if halves == 2 else p.bits_and(lane, 15), run)
        at = p.address(t.places["table"], p.add(p.mul(t.row, dim), pair), 4)
        cos, sin = p.load_floats(at, run), p.load_floats(at, run, dim * 2)
    if parts:
        x = parts[0]
        for part in parts[1:]:
            x = [p.fadd(a, b) for a, b in zip(x, part, strict=True)]
        x = _rounded(t, x)
    else:
        x = _unpacked(t, words)
    if bias:
        both = zip(x, _unpacked(t, bias), strict=True)
        x = _rounded(t, [p.fadd(a, b) for a, b in both])
    return _rounded(t, _rotated(t, x, cos, sin, lane)) if source.rotates else x


def _rotated(
    t: Part, x: list[Value], cos: list[Value], sin: list[Value], lane: Value
) -> list[Value]:
    """``ops.rotary.turn``, contracted as LLVM does it: ``fma(own, cos, other * sin)``."""
    p, run = t.p, len(cos)
    if len(x) == run:
        # The other of a pair is 16 lanes away: lanes of the first half subtract.
        minus = p.choose_below(lane, 16, p.integer(_SIGN), p.integer(0))
        others = [p.shuffle_xor(value, 16) for value in x]
    else:
        minus = p.integer(_SIGN)
        others, cos = x[run:] + x[:run], cos * 2
    signed = [p.bits_float(p.bits_xor(p.float_bits(value), minus)) for value in sin]
    sin = signed if len(x) == run else signed + sin
    return [
        p.fma(own, c, p.fmul(other, s))
        for own, other, c, s in zip(x, others, cos, sin, strict=True)
    ]


def _words(t: Part, address: Value, run: int, halves: int) -> list[Value]:
    """Pairs of 16-bit values, ``run`` from each half."""
    return [
        t.p.load_global(address, half * t.sizes.head_dim + 2 * i)
        for half in range(halves)
        for i in range(0, run, 2)
    ]


def _unpacked(t: Part, words: list[Value]) -> list[Value]:
    """Both 16-bit values of each as float32."""
    p = t.p
    result = []
    for word in words:
        if t.sizes.dtype == "bfloat16":
            result.append(p.bits_float(p.shift_left(word, 16)))
            result.append(p.bits_float(p.bits_and(word, 0xFFFF0000)))
        else:
            result += p.f16_to_floats(word)
    return result


def _rounded(t: Part, x: list[Value]) -> list[Value]:
    """To ``sizes.dtype`` and back."""
    short = _short(t.sizes.dtype)
    return _unpacked(t, [t.p.pack(x[i], x[i + 1], short) for i in range(0, len(x), 2)])


@dataclasses.dataclass(frozen=True)
class _Known:
    """Where a head is stored, and what was known before it.

    Attributes:
      page: Its page; too large for a head that is not stored.
      place: Its place in the page.
      index: 0 for keys, 1 for values.
      statistic_at: Address of its running statistic; None if there is none.
      statistic: Bits of that.
      scale: Its static scale, or None.
    """

    page: Value
    place: Value
    index: int
    statistic_at: Value | None
    statistic: Value | None
    scale: Value | None


def _look_up(t: Part, part: str, warp: Value, head: Value) -> _Known:
    p, sizes = t.p, t.sizes
    heads, index = sizes.keys.heads, 0 if part == "keys" else 1
    at_plan = p.address(t.places["plan"], p.mul(t.row, 3), 4)
    page, place, slot = (p.load_global(at_plan, 4 * i) for i in range(3))
    at, old, scale = None, None, None
    if sizes.fmt.mode == "tracked":
        where = p.add(p.add(p.mul(slot, heads), head), index * sizes.max_seqs * heads)
        at = p.address(t.places["running"], where, 4)
        old = p.load_global_now(at)
    elif sizes.fmt.mode == "static":
        scale = p.load_global(p.address(t.places[f"static_{part}"], head, 4), out="f")
    page = p.choose_below(warp, heads, page, p.integer(_DROPPED))
    return _Known(page, place, index, at, old, scale)


def _store(t: Part, part: str, x: list[Value], known: _Known, head: Value, lane: Value) -> None:
    """Quantize a head and write it, its scale and statistics."""
    p, sizes, places = t.p, t.sizes, t.places
    fmt, heads, page = sizes.fmt, sizes.keys.heads, known.page
    token = p.add(p.mul(page, heads), head)
    token = p.add(p.mul(token, sizes.page_size), known.place)
    once = p.choose_below(lane, 1, page, p.integer(_DROPPED))
    sizes_of_x = [p.bits_and(p.float_bits(value), 0x7FFFFFFF) for value in x]
    scale = known.scale
    if fmt.mode == "none":
        limit = p.number(_ptx.float_bits_of(fmt.bound))
    elif scale is not None:
        limit = p.fmul(scale, p.number(_ptx.float_bits_of(fmt.bound)))
    else:
        absmax = _largest_finite(p, sizes_of_x)
        if known.statistic is not None:
            # The old statistic, halved in its exponent; what is no normal number becomes 0.
            absmax = p.max_signed(absmax, p.add(known.statistic, -(1 << 23)))
            absmax = p.choose_below(absmax, 1 << 23, p.integer(0), absmax)
            p.store_global(known.statistic_at, absmax, 32, once, sizes.num_pages)
            if sizes.page_running:
                last = sizes.page_size - 1
                ended = p.choose_below(known.place, last, p.integer(_DROPPED), once)
                where = p.add(p.mul(p.add(p.mul(page, 2), known.index), heads), head)
                at = p.address(places["page_running"], where, 4)
                p.store_global(at, absmax, 32, ended, sizes.num_pages)
        limit = p.bits_float(absmax)
        scale = p.fmul(limit, p.number(_ptx.float_bits_of(1.0 / fmt.bound)))
        one = p.integer(_ptx.float_bits_of(1.0))
        scale = p.bits_float(p.choose_below(p.float_bits(scale), 1 << 23, one, p.float_bits(scale)))
        if sizes.clip_factors:
            signs = (1, -1) if part == "keys" else (1,)
            scale = _best_scale(p, sizes, x, sizes_of_x, scale, signs)
        at = p.address(places[f"{part[:-1]}_scales"], token, 4)
        p.store_global(at, p.float_bits(scale), 32, once, sizes.num_pages)
    x = [_finite(p, value, size, limit) for value, size in zip(x, sizes_of_x, strict=True)]
    if scale is not None:
        x = [p.divide(value, scale) for value in x]
    at = p.address(places[part], token, sizes.row_bytes)
    at = p.address(at, lane, sizes.row_bytes // 32)
    words, bits = _codes(p, fmt, x)
    for i, word in enumerate(words):
        p.store_global(p.offset(at, i * bits // 8), word, bits, page, sizes.num_pages)


def _largest_finite(p: Ptx, sizes_of_x: list[Value]) -> Value:
    """Bits of the largest finite magnitude of the head; those of positive floats are ordered."""
    zero = p.integer(0)
    top = zero
    for size in sizes_of_x:
        top = p.maximum(top, p.choose_below(size, _INFINITY, size, zero))
    for mask in (1, 2, 4, 8, 16):
        top = p.maximum(top, p.shuffle_xor(top, mask, out="r"))
    return top


def _best_scale(
    p: Ptx,
    sizes: Sizes,
    x: list[Value],
    sizes_of_x: list[Value],
    scale: Value,
    signs: tuple[int, ...],
) -> Value:
    """``ops.kv.best_scale``: the scale times a factor and sign, with the least squared error."""
    zero = p.integer(0)
    finite = [
        p.bits_float(p.choose_below(size, _INFINITY, p.float_bits(value), zero))
        for value, size in zip(x, sizes_of_x, strict=True)
    ]
    best, least = scale, p.integer(_INFINITY)
    for sign, factor in itertools.product(signs, sizes.clip_factors):
        smaller = p.fmul(scale, p.number(_ptx.float_bits_of(sign * factor)))
        steps = zero
        for value in finite:
            code = p.divide(value, smaller)
            error = p.fsub(code, p.clamp(p.round(code), sizes.fmt.bound, _lowest(sizes.fmt)))
            error = p.fmul(p.fmul(error, error), p.number(_ptx.float_bits_of(512.0)))
            steps = p.add(steps, p.to_integer(error))
        for mask in (1, 2, 4, 8, 16):
            steps = p.add(steps, p.shuffle_xor(steps, mask, out="r"))
        weight = p.number(_ptx.float_bits_of(factor * factor))
        total = p.float_bits(p.fmul(p.to_float(steps), weight))  # ordered like integers
        chosen = p.choose_below(total, least, p.float_bits(smaller), p.float_bits(best))
        best, least = p.bits_float(chosen), p.choose_below(total, least, total, least)
    return best


def _lowest(fmt: KVFormat) -> float:
    """The lowest code; int4 uses its sixteenth one where scales are chosen."""
    return -8.0 if fmt.clips else -fmt.bound


def _finite(p: Ptx, x: Value, size: Value, limit: Value) -> Value:
    """``x``; the limit with its sign for infinities, 0 for NaN."""
    bits = p.float_bits(x)
    cut = p.add(p.bits_and(bits, 0x80000000), p.float_bits(limit))
    bits = p.choose_below(size, _INFINITY, bits, cut)
    return p.bits_float(p.choose_below(size, _INFINITY + 1, bits, p.integer(0)))


def _codes(p: Ptx, fmt: KVFormat, x: list[Value]) -> tuple[list[Value], int]:
    """Registers to store, and how many bits of each."""
    if fmt.mode == "none":
        return [p.pack(x[i], x[i + 1], _short(fmt.dtype)) for i in range(0, len(x), 2)], 32
    if fmt.dtype.startswith("float8"):
        kind = "e4m3" if fmt.dtype == "float8_e4m3fn" else "e5m2"
        halves = [p.to_f8(x[i], x[i + 1], kind) for i in range(0, len(x), 2)]
        return _joined(p, halves)
    codes = [p.to_integer(p.clamp(value, fmt.bound, _lowest(fmt))) for value in x]
    if fmt.packed:
        low, high = codes[: len(codes) // 2], codes[len(codes) // 2 :]
        codes = [
            p.add(p.bits_and(a, 15), p.shift_left(p.bits_and(b, 15), 4))
            for a, b in zip(low, high, strict=True)
        ]
    halves = [p.permute_both(codes[i], codes[i + 1], 0x0040) for i in range(0, len(codes), 2)]
    return _joined(p, halves)


def _joined(p: Ptx, halves: list[Value]) -> tuple[list[Value], int]:
    """Pairs of bytes in the low halves of registers, two to a register if there are several."""
    if len(halves) == 1:
        return halves, 16
    return [p.permute_both(halves[i], halves[i + 1], 0x5410) for i in range(0, len(halves), 2)], 32
