"""The body of ``w4a8.int8_codes``. See there for the picture."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _layout, _unpack
from qjax.pallas_kernels._once import lowered_once
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_BLOCK_N, _BLOCK_K = _layout.BLOCK_N, _layout.BLOCK_K
_BUFFERS = 2


@lowered_once("interpret")
def call(words: Array, *, interpret: bool) -> Array:
    """Run the kernel; arguments and result as of ``w4a8.int8_codes``."""
    k_tiles, n_tiles, bits, _ = words.shape
    steps = math.gcd(k_tiles, 4)

    def kernel(words_gmem: Any, out: Any, *, out_smem: Any) -> None:
        n_tile, first = lax.axis_index("n"), lax.axis_index("k") * steps
        layout = _unpack.words_layout(bits)
        # All loads first: their latencies overlap.
        packed = [
            plgpu.load(words_gmem.at[first + i, n_tile], layout=layout, optimized=False)
            for i in range(steps)
        ]
        for i in range(steps):
            smem = out_smem.at[i % _BUFFERS]
            if i >= _BUFFERS:
                plgpu.wait_smem_to_gmem(_BUFFERS - 1, wait_read_only=True)
            smem[...] = _unpack.unpack_int8(packed[i], interpret=interpret)
            plgpu.commit_smem()
            rows = pl.ds(n_tile * _BLOCK_N, _BLOCK_N)
            columns = pl.ds((first + i) * _BLOCK_K, _BLOCK_K)
            plgpu.copy_smem_to_gmem(smem, out.at[rows, columns])
        # What has been read is on its way; the end of the kernel waits for the rest.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n_tiles * _BLOCK_N, k_tiles * _BLOCK_K), jnp.int8),
        scratch_types={
            "out_smem": plgpu.SMEM(
                (_BUFFERS, _BLOCK_N, _BLOCK_K),
                jnp.int8,
                transforms=(plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)),
            )
        },
        # Neighbours in time continue the same rows.
        grid=(n_tiles, k_tiles // steps),
        grid_names=("n", "k"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name="int8_codes",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(words)
