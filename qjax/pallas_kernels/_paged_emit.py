"""The work of ``paged_decode`` between its copies, as inline PTX in a Pallas kernel.

What a thread keeps from tile to tile travels through Pallas as arrays ``(registers, 128)``, one
column per thread: to Pallas they are opaque.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from qjax.pallas_kernels import _paged_finish, _paged_queries, _paged_tile, _ptx
from qjax.pallas_kernels._paged_sizes import Tile
from qjax.pallas_kernels._paged_tile import State
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu


def _registers(count: int, dtype: Any) -> Any:
    """``count`` registers of every thread, as an array of Pallas."""
    layout = plgpu.Layout.WG_STRIDED((count, 128), vec_size=1)
    return plgpu.ShapeDtypeStruct((count, 128), dtype, layout=layout)


def _pack(values: list[Any], dtype: Any) -> Any:
    layout = mgpu.WGStridedFragLayout((len(values), 128), 1)
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    kind = ir.VectorType.get((1,), element)
    registers = np.empty((len(values),), dtype=object)
    for i, value in enumerate(values):
        registers[i] = vector.broadcast(kind, value)
    signed = True if jnp.issubdtype(dtype, jnp.integer) else None
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def _unpack(array: Any) -> list[Any]:
    position = ir.DenseI64ArrayAttr.get([0])
    return [
        vector.extract(register, dynamic_position=[], static_position=position)
        for register in array.registers.flat
    ]


def _scalar(array: Any) -> Any:
    return array.registers.item()


class Emitted:
    """The three parts of the work as instructions of ``_paged_tile``."""

    def __init__(
        self, tile: Tile, gmem: dict[str, Any], buffers: dict[str, Any], merge: Any, transforms: Any
    ) -> None:
        self.tile, self.gmem, self.merge = tile, gmem, merge
        order = ("keys", "values", "key_scales", "value_scales", "logit_bias")
        self.buffers = [buffers[name] for name in order if name in buffers]
        pages = plgpu.RefType(transforms)
        self.types = (pages, pages, *(plgpu.RefType() for _ in self.buffers[2:]))

    def start(self, row: Array, head: Array) -> tuple[Any, Any]:
        """The queries and their factors, and the state before the first tile."""
        tile, gmem = self.tile, self.gmem
        row = row * gmem["queries"].shape[1] + head
        scaled = "key_scales" in gmem and not tile.token_scales
        state, *constants = (_registers(*shape) for shape in _shapes(tile))

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType(),
                (plgpu.RefType(),) * scaled,
                plgpu.Layout.WGMMA,
                plgpu.Layout.WGMMA,
            ),
            return_type=(*constants, state),
        )
        def emit(_: Any, queries: Any, scales: Any, row: Any, head: Any) -> Any:
            p = _ptx.Ptx()
            scale = None
            if scaled:
                address = p.address(_ptx.global_address(scales[0]), _scalar(head), 4)
                scale = p.load_global(address, out="f")
            at = _ptx.global_address(queries)
            loaded, factors = _paged_queries.load_queries(p, tile, at, _scalar(row), scale)
            state = State.start(p, tile).registers()
            return _pack(loaded, jnp.int32), _pack(factors, jnp.float32), _pack(state, jnp.float32)

        scales = (gmem["key_scales"],) if scaled else ()
        queries, factors, state = emit(gmem["queries"], scales, row, head)
        return (queries, factors), state

    def step(
        self, state: Any, constants: Any, slot: Array, position: Array, start: Array, stop: Array
    ) -> Any:
        """The state after the tile in a slot, whose first token is at ``position``."""
        tile, count = self.tile, State.count(self.tile)
        queries, factors = constants
        layouts = [_registers(*x).layout for x in _shapes(tile)]

        @plgpu.inline_mgpu(
            arg_types=(*layouts, self.types, *(plgpu.Layout.WGMMA,) * 4),
            return_type=_registers(count, jnp.float32),
        )
        def emit(
            _: Any, state: Any, queries: Any, factors: Any, buffers: Any, *scalars: Any
        ) -> Any:
            p = _ptx.Ptx()
            slot, position, start, stop = map(_scalar, scalars)
            sizes = [tile.tile_bytes] * 2 + [4 * tile.tokens] * 2 * tile.token_scales
            sizes += [tile.added_bytes] * tile.logit_bias
            addresses = [
                p.add(_ptx.shared_address(buffer), p.mul(slot, size))
                for buffer, size in zip(buffers, sizes, strict=True)
            ]
            after = _paged_tile.step(
                p,
                tile,
                State.of(tile, _unpack(state)),
                _unpack(queries),
                _unpack(factors),
                addresses,
                position,
                start,
                stop,
            )
            p.barrier()
            return _pack(after.registers(), jnp.float32)

        return emit(state, queries, factors, tuple(self.buffers), slot, position, start, stop)

    def finish(self, state: Any, split: Array, row: Array, head: Array) -> None:
        """Merge the warps and store the result."""
        tile, gmem = self.tile, self.gmem
        _, rows, heads = gmem["out"].shape[:3]
        row = (split * rows + row) * heads + head
        names = [name for name in ("out", "lse") if name in gmem]
        if "value_scales" in gmem and not tile.token_scales:
            names.append("value_scales")
        bits = jnp.dtype(gmem["out"].dtype).itemsize * 8
        dtype = "bf16" if gmem["out"].dtype == jnp.bfloat16 else "f16"

        @plgpu.inline_mgpu(
            arg_types=(
                _registers(State.count(tile), jnp.float32).layout,
                self.types[0],
                plgpu.RefType(),
                tuple(plgpu.RefType() for _ in names),
                plgpu.Layout.WGMMA,
                plgpu.Layout.WGMMA,
            )
        )
        def emit(_: Any, state: Any, keys: Any, merge: Any, refs: Any, row: Any, head: Any) -> None:
            p = _ptx.Ptx()
            at = dict(zip(names, map(_ptx.global_address, refs), strict=True))
            scale = None
            if "value_scales" in at:
                address = p.address(at["value_scales"], _scalar(head), 4)
                scale = p.load_global(address, out="f")
            _paged_finish.finish(
                p,
                tile,
                State.of(tile, _unpack(state)),
                scratch=_ptx.shared_address(keys),
                scratch_bytes=tile.stages * tile.tile_bytes,
                merge=_ptx.shared_address(merge),
                out=at["out"],
                out_bits=bits,
                out_dtype=dtype,
                row=_scalar(row),
                value_scale=scale,
                lse=at.get("lse"),
            )

        refs = tuple(gmem[name] for name in names)
        emit(state, self.buffers[0], self.merge, refs, row, head)


def _shapes(tile: Tile) -> list[tuple[int, Any]]:
    """Registers of the state, of the queries and of their factors."""
    return [
        (State.count(tile), jnp.float32),
        (2 * tile.quads, jnp.int32),
        (tile.factors, jnp.float32),
    ]
