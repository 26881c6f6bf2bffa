"""Rotate, quantize and store the newest token of every sequence, in one small kernel.

XLA needs three to nine kernels for it, of a microsecond or two each, in every layer. A warp has one
head of one sequence, a lane every so many neighbouring elements of it; four heads are a block::

  blocks of queries   sum of the partial products -> bias -> rotation -> queries
  blocks of keys      the same                             -> largest finite magnitude (shuffles)
  blocks of values    the same without the rotation           -> scale -> codes -> page, statistics

Keys and values may also come ready, and then there are no queries. The arithmetic is that of
``ops.rotary`` and ``ops.kv.append``, operation for operation. Pages, scales and statistics are
references, which XLA gives to the kernel in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.kv_format import KVFormat
from qjax.pallas_kernels import _kv_append_body, _ptx
from qjax.pallas_kernels._once import lowered_once
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

HEADS_PER_BLOCK = 4


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the heads of queries, keys or values are read.

    Attributes:
      array: Name of the array.
      heads: How many heads.
      stride: Elements from one sequence to the next.
      first: Element at which the first head of the first sequence begins.
      splits: float32 partial sums to be added; 0 for one array of 16-bit values.
      bias: Name of the array of what is added to them, if anything.
      rotates: Whether they are rotated to their position.
    """

    array: str
    heads: int
    stride: int
    first: int = 0
    splits: int = 0
    bias: str | None = None
    rotates: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.heads // HEADS_PER_BLOCK)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes and types of one append.

    Attributes:
      fmt: Format of the layer.
      dtype: Type of queries, keys and values: ``"bfloat16"`` or ``"float16"``.
      rows: Sequences.
      head_dim: Elements per head.
      page_size: Tokens per page.
      num_pages: Pages of the pool.
      max_seqs: Slots.
      keys: Where keys come from.
      values: Where values come from, as many as keys.
      queries: Where queries come from; None if there are none.
      page_running: Whether pages keep the statistic after their last token.
      clip_factors: Scales that are tried, over the one that clips nothing; empty for that one.
    """

    fmt: KVFormat
    dtype: str
    rows: int
    head_dim: int
    page_size: int
    num_pages: int
    max_seqs: int
    keys: Source
    values: Source
    queries: Source | None = None
    page_running: bool = False
    clip_factors: tuple[float, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.fmt.bits // 8

    @property
    def parts(self) -> dict[str, Source]:
        """What blocks do, in their order."""
        first = {} if self.queries is None else {"queries": self.queries}
        return first | {"keys": self.keys, "values": self.values}


@lowered_once("sizes")
def call(
    sizes: Sizes, inputs: dict[str, Array], state: dict[str, Array], static: Sequence[Array]
) -> tuple[Array | None, dict[str, Array]]:
    """Run the kernel.

    Args:
      sizes: Sizes and types.
      inputs: The arrays that the sources name: 16-bit values, or float32 ``[splits, b, stride]``,
        and biases ``[heads * head_dim]`` of ``sizes.dtype``; ``plan``: int32 ``[b, 3]``, page (-1
        to drop the token), place in the page, slot; ``table``: float32 ``[b, head_dim]``, cosines
        and then sines, if a source rotates.
      state: ``keys`` and ``values``, pages as the cache holds them; ``key_scales`` and
        ``value_scales`` if they are stored; ``running`` and ``page_running`` as the format has.
      static: float32 ``[heads]`` for keys and values in mode ``static``, else empty.

    Returns:
      Queries ``[b, heads * head_dim]`` if there are any, and the new state.
    """
    queries = sizes.queries
    names = (*state, *inputs, *("static_keys", "static_values")[: len(static)])
    names = names if queries is None else (*names, "queries")

    def kernel(*refs: Any) -> None:
        first = 0
        for part, source in sizes.parts.items():
            block = lax.axis_index("block")
            mine = (block >= first) & (block < first + source.blocks)
            pl.when(mine)(functools.partial(emit_part, part, refs, block - first))
            first += source.blocks

    def emit_part(part: str, refs: tuple[Any, ...], block: Any) -> None:
        @plgpu.inline_mgpu(
            arg_types=(
                tuple(plgpu.RefType() for _ in refs),
                plgpu.Layout.WGMMA,
                plgpu.Layout.WGMMA,
            )
        )
        def emit(_: Any, refs: Any, row: Any, block: Any) -> None:
            places = {name: _ptx.global_address(ref) for name, ref in zip(names, refs, strict=True)}
            emitted = _kv_append_body.Part(_ptx.Ptx(), sizes, places, row.registers.item())
            emitted.emit(part, block.registers.item())

        emit(tuple(refs), lax.axis_index("row"), block)

    out_type = ()
    if queries is not None:
        out_type = (
            jax.ShapeDtypeStruct((sizes.rows, queries.heads * sizes.head_dim), sizes.dtype),
        )
    held = {name: jax.new_ref(array) for name, array in state.items()}
    out = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(sum(source.blocks for source in sizes.parts.values()), sizes.rows),
        grid_names=("block", "row"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"kv_append_{sizes.fmt.name}".replace("-", "_"),
    )(*held.values(), *inputs.values(), *static)
    state = {name: jax.freeze(ref) for name, ref in held.items()}
    return (None if queries is None else out[0]), state


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
    if sizes.num_pages * sizes.keys.heads * sizes.page_size >= 2**31:
        return f"{sizes.num_pages} pages; tokens times heads must stay below 2**31"
    for part, source in sizes.parts.items():
        if max(source.splits, 1) * sizes.rows * source.stride >= 2**31:
            return f"{sizes.rows} rows of {source.stride} {part}; elements must stay below 2**31"
    return None
