"""The end of the paged decode kernel: merge the four warps and store, as one thread does it."""

from __future__ import annotations

from collections.abc import Sequence

from qjax.pallas_kernels._paged_sizes import Tile
from qjax.pallas_kernels._paged_tile import State, Thread
from qjax.pallas_kernels._ptx import Ptx, Value


def finish(
    p: Ptx,
    tile: Tile,
    state: State,
    *,
    scratch: Value,
    scratch_bytes: int,
    merge: Value,
    out: Value,
    out_bits: int,
    out_dtype: str,
    row: Value,
    value_scale: Value | None,
    lse: Value | None,
) -> None:
    """Merge the four warps and store the normalized result.

    Args:
      p: Where to emit.
      tile: The sizes.
      state: This warp's.
      scratch: Shared memory that nobody needs any more.
      scratch_bytes: Its size, at least 8192.
      merge: Other shared memory, 256 bytes per column group.
      out: Address of ``[rows, ratio, head_dim]``.
      out_bits: 16 or 32.
      out_dtype: ``"bf16"`` or ``"f16"``; not used with 32 bits.
      row: Which row.
      value_scale: float32, multiplies the result.
      lse: Address of float32 ``[rows, ratio]``, for log2 of the sum of exponentials, or None.
    """
    thread = Thread(p, tile)
    factors = _merge_sums(p, tile, thread, state, merge, row, value_scale, lse)
    for index, quad in enumerate(state.out):
        n = index % tile.columns
        state.out[index] = [p.fmul(x, factors[2 * n + i % 2]) for i, x in enumerate(quad)]
    # Registers of a warp lie together, so that no two lanes meet in a bank; the warps share the
    # sums. Where the scratch does not hold all, in several rounds.
    per_pass = min(tile.quads, scratch_bytes // 2048)
    lane = p.add(scratch, p.mul(thread.lane, 16))
    for begin in range(0, tile.quads, per_pass):
        count = min(per_pass, tile.quads - begin)
        if begin:
            p.barrier()
        mine = p.add(lane, p.mul(thread.warp, 512 * count))
        for i in range(count):
            p.store_shared4(mine, state.out[begin + i], 512 * i)
        p.barrier()
        for i in range(-(-count // 4)):
            # Beyond the last, the last again: the same values are stored twice.
            index = p.minimum(p.add(thread.warp, 4 * i), count - 1)
            at = p.add(lane, p.mul(index, 512))
            quad = p.load_shared4(at)
            for warp in (1, 2, 3):
                other = p.load_shared4(at, 512 * count * warp)
                quad = [p.fadd(x, y) for x, y in zip(quad, other, strict=True)]
            _store(p, tile, thread, quad, p.add(index, begin), out, out_bits, out_dtype, row)


def _merge_sums(
    p: Ptx,
    tile: Tile,
    thread: Thread,
    state: State,
    merge: Value,
    row: Value,
    value_scale: Value | None,
    lse: Value | None,
) -> list[Value]:
    """What to multiply this warp's output by: its share of the common maximum over the sum."""
    totals = []
    for total in state.total:
        for mask in (4, 8, 16):
            total = p.fadd(total, p.shuffle_xor(total, mask))
        totals.append(total)
    at = p.add(merge, p.mul(thread.pair, 16))
    for n in range(tile.columns):
        mine = p.add(at, p.mul(thread.warp, 64))
        both = [x for i in (2 * n, 2 * n + 1) for x in (state.top[i], totals[i])]
        p.store_shared4(mine, both, 256 * n)
    p.barrier()
    factors = []
    for n in range(tile.columns):
        warps = [p.load_shared4(at, 256 * n + 64 * warp) for warp in range(4)]
        for e in (0, 1):
            top, total = warps[0][2 * e], p.number(0)
            for warp in warps[1:]:
                top = p.fmax(top, warp[2 * e])
            for warp in warps:
                total = p.fma(p.exp2(p.fsub(warp[2 * e], top)), warp[2 * e + 1], total)
            factor = p.exp2(p.fsub(state.top[2 * n + e], top))
            factor = p.fmul(factor, p.reciprocal_or_zero(total))
            factors.append(factor if value_scale is None else p.fmul(factor, value_scale))
            if lse is not None:
                head = p.add(p.mul(thread.pair, 2), 8 * n + e)
                # One thread of the 32 that have it: the first group of the first warp.
                who = p.add(head, p.mul(p.add(thread.group, p.mul(thread.warp, 8)), 64))
                index = p.add(p.mul(row, tile.ratio), head)
                value = p.float_bits(p.fadd(top, p.log2(total)))
                p.store_global(p.address(lse, index, 4), value, 32, who, tile.ratio)
    return factors


def _store(
    p: Ptx,
    tile: Tile,
    thread: Thread,
    quad: Sequence[Value],
    index: Value,
    out: Value,
    bits: int,
    dtype: str,
    row: Value,
) -> None:
    """Four results: two heads of two elements."""
    block = index if tile.columns == 1 else p.shift_right(index, 1)
    first = p.mul(thread.pair, 2)
    if tile.columns == 2:
        first = p.add(first, p.mul(p.bits_and(index, 1), 8))
    element = p.mul(block, 16)
    element = p.add(element, p.mul(thread.group, 2) if tile.narrow else thread.group)
    distance = 1 if tile.narrow else 8
    for e in (0, 1):
        head = p.add(first, e)
        at = p.mul(p.add(p.mul(row, tile.ratio), head), tile.head_dim)
        address = p.address(out, p.add(at, element), bits // 8)
        one, two = quad[e], quad[2 + e]
        if bits == 16 and tile.narrow:
            p.store_global(address, p.pack(one, two, dtype), 32, head, tile.ratio)
            continue
        for i, x in enumerate((one, two)):
            value = p.float_bits(x) if bits == 32 else p.pack(x, x, dtype)
            where = p.offset(address, i * distance * bits // 8)
            p.store_global(where, value, bits, head, tile.ratio)
