"""Quantize the newest token of every sequence and write it into its page, in one small kernel.

XLA needs five to nine kernels for it, of a microsecond or two each, in every layer. A warp has one
KV head of one sequence, a lane every so many neighbouring elements of its key and of its value::

  largest finite magnitude (shuffles) -> scale -> codes -> page, scale, statistics

The arithmetic is that of ``ops.kv.append``, operation for operation. Pages, scales and statistics
are references, which XLA gives to the kernel in place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from qjax.kv_format import KVFormat
from qjax.pallas_kernels import _ptx
from qjax.pallas_kernels._ptx import Ptx, Value
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_INFINITY = 0x7F800000
_DROPPED = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes and types of one append.

    Attributes:
      fmt: Format of the layer.
      dtype: Type of the new keys and values: ``"bfloat16"`` or ``"float16"``.
      heads: KV heads.
      head_dim: Elements per head.
      page_size: Tokens per page.
      num_pages: Pages of the pool.
      max_seqs: Slots.
      page_running: Whether pages keep the statistic after their last token.
      clip_factors: Scales that are tried, over the one that clips nothing; empty for that one.
    """

    fmt: KVFormat
    dtype: str
    heads: int
    head_dim: int
    page_size: int
    num_pages: int
    max_seqs: int
    page_running: bool = False
    clip_factors: tuple[float, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.fmt.bits // 8


def call(
    sizes: Sizes,
    new: Array,
    plan: Array,
    state: dict[str, Array],
    static_scales: Sequence[Array],
) -> dict[str, Array]:
    """Run the kernel.

    Args:
      sizes: Sizes and types.
      new: Keys and values ``[2, b, heads, head_dim]``.
      plan: int32 ``[b, 3]``: page (-1 to drop the token), place in the page, slot.
      state: ``keys`` and ``values``, pages as the cache holds them; ``key_scales`` and
        ``value_scales`` if they are stored; ``running`` and ``page_running`` as the format has.
      static_scales: float32 ``[heads]`` for keys and values in mode ``static``, else empty.

    Returns:
      The new state.
    """
    names = (*state, "new", "plan", "static_keys", "static_values")

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(
            arg_types=(
                tuple(plgpu.RefType() for _ in refs),
                plgpu.Layout.WGMMA,
                plgpu.Layout.WGMMA,
            )
        )
        def emit(_: Any, refs: Any, row: Any, block: Any) -> None:
            places = {
                name: _ptx.global_address(ref) for name, ref in zip(names, refs, strict=False)
            }
            rows = new.shape[1]
            append(Ptx(), sizes, places, rows, row.registers.item(), block.registers.item())

        emit(tuple(refs), lax.axis_index("row"), lax.axis_index("block"))

    held = {name: jax.new_ref(array) for name, array in state.items()}
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(-(-sizes.heads // 4), plan.shape[0]),
        grid_names=("block", "row"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"kv_append_{sizes.fmt.name}".replace("-", "_"),
    )(*held.values(), new, plan, *static_scales)
    return {name: jax.freeze(ref) for name, ref in held.items()}


def append(
    p: Ptx, sizes: Sizes, places: dict[str, Value], rows: int, row: Value, block: Value
) -> None:
    """What one thread does.

    Args:
      p: Where to emit.
      sizes: Sizes and types.
      places: Addresses; see ``call``.
      rows: How many sequences.
      row: Which sequence.
      block: Which four heads.
    """
    fmt, heads = sizes.fmt, sizes.heads
    thread = p.thread()
    lane = p.bits_and(thread, 31)
    head = p.add(p.mul(block, 4), p.shift_right(thread, 5))
    at_plan = p.address(places["plan"], p.mul(row, 3), 4)
    page, place, slot = (p.load_global(at_plan, 4 * i) for i in range(3))
    # Warps beyond the last head do its work again, and store nothing.
    page = p.choose_below(head, heads, page, p.integer(_DROPPED))
    head = p.minimum(head, heads - 1)
    token = p.add(p.mul(page, heads), head)
    token = p.add(p.mul(token, sizes.page_size), place)
    once = p.choose_below(lane, 1, page, p.integer(_DROPPED))
    ended = p.choose_below(place, sizes.page_size - 1, p.integer(_DROPPED), once)
    source = p.mul(p.add(p.mul(row, heads), head), sizes.head_dim)
    for index, name in enumerate(("key", "value")):
        x = _elements(p, sizes, places["new"], source, lane)
        source = p.add(source, rows * heads * sizes.head_dim)
        sizes_of_x = [p.bits_and(p.float_bits(value), 0x7FFFFFFF) for value in x]
        scale, limit = None, None
        if fmt.mode == "none":
            limit = p.number(_ptx.float_bits_of(fmt.bound))
        elif fmt.mode == "static":
            at = p.address(places[f"static_{name}s"], head, 4)
            scale = p.load_global(at, out="f")
            limit = p.fmul(scale, p.number(_ptx.float_bits_of(fmt.bound)))
        else:
            absmax = _largest_finite(p, sizes_of_x)
            if fmt.mode == "tracked":
                # The old statistic, halved in its exponent; what is no normal number becomes 0.
                where = p.add(p.mul(slot, heads), head)
                if index:
                    where = p.add(where, sizes.max_seqs * heads)
                at = p.address(places["running"], where, 4)
                old = p.load_global_now(at)
                absmax = p.max_signed(absmax, p.add(old, -(1 << 23)))
                absmax = p.choose_below(absmax, 1 << 23, p.integer(0), absmax)
                p.store_global(at, absmax, 32, once, sizes.num_pages)
                if sizes.page_running:
                    where = p.add(p.mul(p.add(p.mul(page, 2), index), heads), head)
                    at = p.address(places["page_running"], where, 4)
                    p.store_global(at, absmax, 32, ended, sizes.num_pages)
            limit = p.bits_float(absmax)
            scale = p.fmul(limit, p.number(_ptx.float_bits_of(1.0 / fmt.bound)))
            one = p.integer(_ptx.float_bits_of(1.0))
            scale = p.bits_float(
                p.choose_below(p.float_bits(scale), 1 << 23, one, p.float_bits(scale))
            )
            if sizes.clip_factors:
                signs = (1, -1) if name == "key" else (1,)
                scale = _best_scale(p, sizes, x, sizes_of_x, scale, signs)
            at = p.address(places[f"{name}_scales"], token, 4)
            p.store_global(at, p.float_bits(scale), 32, once, sizes.num_pages)
        x = [_finite(p, value, size, limit) for value, size in zip(x, sizes_of_x, strict=True)]
        if scale is not None:
            x = [p.divide(value, scale) for value in x]
        at = p.address(places[f"{name}s"], token, sizes.row_bytes)
        at = p.address(at, lane, sizes.row_bytes // 32)
        words, bits = _codes(p, fmt, x)
        for i, word in enumerate(words):
            p.store_global(p.offset(at, i * bits // 8), word, bits, page, sizes.num_pages)


def _elements(p: Ptx, sizes: Sizes, new: Value, source: Value, lane: Value) -> list[Value]:
    """A lane's elements as float32; for int4 half of them from each half of the head."""
    count = sizes.head_dim // 32
    halves = 2 if sizes.fmt.packed else 1
    at = p.address(new, p.add(source, p.mul(lane, count // halves)), 2)
    result = []
    for half in range(halves):
        for i in range(0, count // halves, 2):
            word = p.load_global(at, half * sizes.head_dim + 2 * i)
            if sizes.dtype == "bfloat16":
                result.append(p.bits_float(p.shift_left(word, 16)))
                result.append(p.bits_float(p.bits_and(word, 0xFFFF0000)))
            else:
                result += p.f16_to_floats(word)
    return result


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
        short = {"bfloat16": "bf16", "float16": "f16"}[fmt.dtype]
        return [p.pack(x[i], x[i + 1], short) for i in range(0, len(x), 2)], 32
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


def unsupported_reason(sizes: Sizes) -> str | None:
    """Why the kernel cannot append; None if it can."""
    fmt = sizes.fmt
    if sizes.dtype not in ("bfloat16", "float16"):
        return f"{sizes.dtype} keys; the kernel takes bfloat16 and float16"
    if not fmt.quantized and fmt.dtype != sizes.dtype:
        return f"{sizes.dtype} keys in {fmt.dtype} pages; plain types must be the same"
    dims = (128, 256) if fmt.packed else (64, 128, 256)
    if sizes.head_dim not in dims:
        return f"head_dim={sizes.head_dim}; there are kernels for {dims}"
    if sizes.num_pages * sizes.heads * sizes.page_size >= 2**31:
        return f"{sizes.num_pages} pages; tokens times heads must stay below 2**31"
    return None
