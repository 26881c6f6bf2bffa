"""The body of ``dequantize``. See there for the picture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _codes, _layout, _unpack
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels.dequantize import Config
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_BLOCK_N, _BLOCK_K = _layout.BLOCK_N, _layout.BLOCK_K


@lowered_once("kind", "config", "dtype", "alternating", "interpret")
def call(
    words: Array,
    scales: Array | None,
    column: Array,
    *,
    kind: str,
    config: Config,
    dtype: Any,
    alternating: bool,
    interpret: bool,
) -> Array:
    """Run the kernel; arguments and result as of ``dequantize.dequantize``."""
    k_tiles, n_tiles = words.shape[:2]
    groups = 0 if scales is None else max(1, scales.shape[0] // k_tiles)
    # Of the scales of one step: a group may be a step long, not longer.
    assert scales is None or scales.shape[0] == groups * k_tiles, (scales.shape, words.shape)
    operands = {"words": words, "column": column, "scales": scales}
    operands = {name: value for name, value in operands.items() if value is not None}

    def kernel(*refs: Any, out_smem: Any) -> None:
        gmem = dict(zip((*operands, "out"), refs, strict=True))
        n_tile, first = lax.axis_index("n"), lax.axis_index("k") * config.steps
        # Where the features of this tile are in order.
        place = n_tile
        if alternating:
            half = jnp.int32(n_tiles // 2)
            place = lax.div(n_tile, jnp.int32(2)) + lax.rem(n_tile, jnp.int32(2)) * half
        features = pl.ds(n_tile * _BLOCK_N, _BLOCK_N)
        column = _per_feature(gmem["column"].at[features])
        layout = _unpack.words_layout(_codes.CODES[kind].bits)
        # All loads first: their latencies overlap.
        packed = [
            plgpu.load(gmem["words"].at[first + i, n_tile], layout=layout, optimized=False)
            for i in range(config.steps)
        ]
        for i in range(config.steps):
            step = first + i
            stored = [
                [
                    _per_feature(gmem["scales"].at[step * groups + g, part, features])
                    for part in range(gmem["scales"].shape[1])
                ]
                for g in range(groups)
            ]
            wide = _weights(packed[i], stored, column, kind, interpret)
            pieces = [piece.astype(dtype) for piece in wide]
            smem = out_smem.at[i % config.buffers]
            if i >= config.buffers:
                plgpu.wait_smem_to_gmem(config.buffers - 1, wait_read_only=True)
            width = _BLOCK_K // len(pieces)
            for g, piece in enumerate(pieces):
                smem.at[:, pl.ds(g * width, width)][...] = piece
            plgpu.commit_smem()
            rows, columns = pl.ds(place * _BLOCK_N, _BLOCK_N), pl.ds(step * _BLOCK_K, _BLOCK_K)
            plgpu.copy_smem_to_gmem(smem, gmem["out"].at[rows, columns])
        # What has been read is on its way; the end of the kernel waits for the rest.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # A group of 32 is written as one column of tiles.
    swizzle = 64 if groups == 4 else 128
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n_tiles * _BLOCK_N, k_tiles * _BLOCK_K), dtype),
        scratch_types={
            "out_smem": plgpu.SMEM(
                (config.buffers, _BLOCK_N, _BLOCK_K),
                dtype,
                transforms=(
                    plgpu.TilingTransform((8, swizzle // 2)),
                    plgpu.SwizzleTransform(swizzle),
                ),
            )
        },
        # Neighbours in time continue the same rows.
        grid=(n_tiles, k_tiles // config.steps),
        grid_names=("n", "k"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"dequantize_{kind}_{dtype.name}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(*operands.values())


def _per_feature(ref: Any) -> Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _weights(
    words: Array, stored: list[list[Array]], column: Array, kind: str, interpret: bool
) -> list[Array]:
    """float32 weights of one tile: ``(64, 128)`` in a piece per group, or in one."""

    def unpack(scales: list[Array], offsets: list[Array], compute: str) -> list[Array]:
        with jax.named_scope("unpack"):
            parts = max(1, len(stored))
            return _unpack.unpack(
                words,
                scales,
                offsets,
                kind=kind,
                compute=compute,
                parts=parts,
                interpret=interpret,
            )

    scales = [parts[0] for parts in stored]
    offsets = [parts[1] for parts in stored if len(parts) == 2]
    if not stored:
        _, rest = _codes.constant_multiplier(kind, "float16")
        pieces, factors = unpack([], [], "float16"), [column * jnp.float32(2.0**-rest)]
    elif scales[0].dtype == jnp.float32:
        # The stored scale is for what this unpacking gives.
        pieces, factors = unpack([], offsets, "bfloat16"), scales
    elif offsets:
        pieces, factors = unpack(scales, offsets, "float16"), [column] * len(stored)
    else:
        # The other kernels multiply codes by 2**unit and the stored scale, here by 2**rest.
        exponent, _ = _codes.constant_multiplier(kind, "float16")
        left = column * jnp.float32(2.0**-exponent)
        pieces = unpack([], [], "float16")
        factors = [scale.astype(jnp.float32) * left for scale in scales]
    return [
        piece.astype(jnp.float32) * lax.broadcast_in_dim(factor, piece.shape, [0])
        for piece, factor in zip(pieces, factors, strict=True)
    ]
