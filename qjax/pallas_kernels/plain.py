"""A few rows of 16-bit activations times a plain 16-bit weight as it is stored, on Hopper.

For decoding, like ``weight_only`` and with the same roles of the warpgroups: the transposed product
``out.T = weight.T @ x.T`` with tokens on the narrow side of ``wgmma``, splits of the contraction
where output tiles do not fill the device, and steps in flight by TMA. The weight ``(k, n)`` stays
in its own layout, tiles of 64 columns being the transposed operand in shared memory, so that
products of many rows are XLA's as before. What it saves over XLA's choice for so few rows is time
at small layers, and padding.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.pallas_kernels._layout import BLOCK_K, BLOCK_N
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels.weight_only import MAX_ROWS, SHARED_MEMORY_BYTES, SM_COUNT, Config
from qjax.typing import Array, DType

_ROWS = (8, 16, 32, 64)


def unsupported_reason(m: int, k: int, n: int, dtype: DType) -> str | None:
    """Why this kernel cannot compute a product ``(m, k) @ (k, n)``; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} operands; the kernel is for bfloat16 and float16"
    if not 1 <= m <= MAX_ROWS:
        return f"{m=} rows; this kernel is for 1 to {MAX_ROWS}"
    if k % BLOCK_K or n % BLOCK_N:
        return f"({k=}, {n=}) must be multiples of ({BLOCK_K}, {BLOCK_N})"
    return None


def smem_bytes(config: Config, rows: int) -> int:
    """Shared memory of one CTA in bytes, for float32 partial sums."""
    step = config.warpgroups * BLOCK_K * BLOCK_N * 2 + rows * BLOCK_K * 2
    return config.stages * step + config.warpgroups * rows * BLOCK_N * 4 + 1024


def heuristic_config(m: int, k: int, n: int) -> Config:
    """A config for any supported product: many bytes in flight on all multiprocessors."""
    rows = next(rows for rows in _ROWS if rows >= m)
    tiles, steps = n // BLOCK_N, k // BLOCK_K

    def rank(choice: tuple[int, int]) -> tuple[float, int, int]:
        warpgroups, splits = choice
        ctas = tiles // warpgroups * splits
        return ctas / (-(-ctas // SM_COUNT) * SM_COUNT), -splits, warpgroups

    def deepest(warpgroups: int) -> int:
        configs = (Config(warpgroups, stages) for stages in (8, 6, 4, 3))
        fitting = (c.stages for c in configs if smem_bytes(c, rows) <= SHARED_MEMORY_BYTES)
        return next(fitting, 0)

    choices = [
        (warpgroups, splits)
        for warpgroups in (1, 2, 4)
        for splits in range(1, 17)
        if tiles % warpgroups == 0
        and steps % splits == 0
        and deepest(warpgroups)
        and (splits == 1 or steps // splits >= 4 and tiles // warpgroups * splits <= SM_COUNT)
    ]
    warpgroups, splits = max(choices, key=rank)
    return Config(warpgroups, deepest(warpgroups), splits)


def search_space(m: int, k: int, n: int) -> list[Config]:
    """Configs worth timing for a product, for an autotuner."""
    rows = next(rows for rows in _ROWS if rows >= m)
    product = itertools.product((1, 2, 3, 4), (3, 4, 6, 8), (1, 2, 4, 7, 8))
    return [
        Config(warpgroups, stages, splits)
        for warpgroups, stages, splits in product
        if n % (warpgroups * BLOCK_N) == 0
        and k % (splits * BLOCK_K) == 0
        and smem_bytes(Config(warpgroups, stages, splits), rows) <= SHARED_MEMORY_BYTES
    ]


def matmul(
    x: Array,
    weight: Array,
    *,
    config: Config | None = None,
    out_dtype: DType = jnp.bfloat16,
    keep_splits: bool = False,
    interpret: bool = False,
) -> Array:
    """``x @ weight`` with float32 accumulation.

    Args:
      x: ``(m, k)``, bfloat16 or float16, ``m <= 64``.
      weight: ``(k, n)``, of the same type.
      config: How the work is cut up; ``heuristic_config`` by default. ``pipelined`` and
        ``registers`` mean nothing here and must be left alone.
      out_dtype: Result type: float32, bfloat16 or float16.
      keep_splits: Leave the partial sums of the splits to the caller.
      interpret: Run in the Pallas interpreter.

    Returns:
      ``(m, n)`` in ``out_dtype``. With ``keep_splits``, ``(1, m, n)`` of it, or the float32 partial
      sums ``(splits, m, n)``.

    Raises:
      NotImplementedError: If the kernel or the config does not fit the product; says why.
    """
    (m, k), n = x.shape, weight.shape[1]
    reason = unsupported_reason(m, k, n, x.dtype)
    config = heuristic_config(m, k, n) if config is None and reason is None else config
    rows = next((rows for rows in _ROWS if rows >= m), MAX_ROWS)
    if reason is None and config is not None:
        if n % (config.warpgroups * BLOCK_N) or k % (config.splits * BLOCK_K):
            reason = f"({k=}, {n=}) cannot be cut as {config} says"
        elif config.pipelined or config.registers is not None:
            reason = f"{config}: there is nothing to unpack"
        elif smem_bytes(config, rows) > SHARED_MEMORY_BYTES:
            reason = f"{smem_bytes(config, rows)} bytes of shared memory for {config}"
    if reason is not None or config is None:
        raise NotImplementedError(f"plain.matmul: {reason}")
    # TMA cuts off what is beyond the last row, in steps of 8. The interpreter does not.
    pad = rows - m if interpret else -m % 8 if m > 8 else 0
    x = jnp.pad(x, ((0, pad), (0, 0))) if pad else x
    out = _call(
        x, weight, rows=rows, config=config, out_dtype=jnp.dtype(out_dtype), interpret=interpret
    )
    if keep_splits:
        out = out if config.splits > 1 else out[None]
    elif config.splits > 1:
        out = out.sum(0).astype(out_dtype)
    return out[..., :m, :] if pad else out


@lowered_once("rows", "config", "out_dtype", "interpret")
def _call(
    x: Array, weight: Array, *, rows: int, config: Config, out_dtype: Any, interpret: bool
) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    from qjax.pallas_kernels import _weight_only_body as body
    from qjax.pallas_kernels import _weight_only_store as ending

    plgpu: Any = mosaic_gpu
    (m, k), n = x.shape, weight.shape[1]
    warpgroups, stages, splits = config.warpgroups, config.stages, config.splits
    steps = k // splits // BLOCK_K
    if splits > 1:
        out_type = jax.ShapeDtypeStruct((splits, m, n), jnp.float32)
    else:
        out_type = jax.ShapeDtypeStruct((m, n), out_dtype)

    def kernel(x: Any, weight: Any, out: Any, **scratch: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        start = lax.axis_index("split") * steps

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            total = accumulate(scratch, warpgroup).astype(out_type.dtype)
            ending.store(total, out, scratch, warpgroup, config)

        @pl.when(warpgroup == warpgroups)
        def _memory() -> None:
            tile = lax.axis_index("n")
            consumed, ready = scratch["consumed"], scratch["ready"]

            @pl.loop(0, steps)
            def _step(i: Array) -> None:
                slot = lax.rem(i, jnp.int32(stages))
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                along_k = pl.ds((start + i) * BLOCK_K, BLOCK_K)
                for g in range(warpgroups):
                    columns = pl.ds((tile * warpgroups + g) * BLOCK_N, BLOCK_N)
                    plgpu.copy_gmem_to_smem(
                        weight.at[along_k, columns],
                        scratch["weight_smem"].at[slot, g],
                        ready.at[slot],
                    )
                plgpu.copy_gmem_to_smem(
                    x.at[ending.all_rows(i, rows), along_k],
                    scratch["x_smem"].at[slot],
                    ready.at[slot],
                )

            # No barrier is left with an arrival that nobody saw.
            @pl.loop(max(steps - stages, 0), steps)
            def _drain(i: Array) -> None:
                plgpu.barrier_wait(consumed.at[lax.rem(i, jnp.int32(stages))])

    def accumulate(scratch: dict[str, Any], warpgroup: Array) -> Array:
        def step(i: Array, total: Any, accumulator: Any) -> Any:
            slot = lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(scratch["ready"].at[slot])
            if interpret:
                w = scratch["weight_smem"][slot, warpgroup].astype(jnp.float32)
                rows_ = scratch["x_smem"][slot].astype(jnp.float32)
                total = total + lax.dot_general(w, rows_, (((0,), (1,)), ((), ())))
            else:
                w = scratch["weight_smem"].at[slot, warpgroup]
                plgpu.wgmma(accumulator, w.T, scratch["x_smem"].at[slot].T)
            body.finish(scratch, slot, interpret)
            return total

        if interpret:
            zeros = jnp.zeros((BLOCK_N, rows), jnp.float32)
            return lax.fori_loop(0, steps, lambda i, total: step(i, total, None), zeros)

        def run(accumulator: Any) -> Array:
            lax.fori_loop(0, steps, lambda i, total: step(i, total, accumulator), ())
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((BLOCK_N, rows)))

    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types={
            "weight_smem": plgpu.SMEM(
                (stages, warpgroups, BLOCK_K, BLOCK_N), x.dtype, transforms=body.transforms(x.dtype)
            ),
            "x_smem": plgpu.SMEM(
                (stages, rows, BLOCK_K), x.dtype, transforms=body.transforms(x.dtype)
            ),
            "out_smem": plgpu.SMEM(
                (warpgroups, rows, BLOCK_N),
                out_type.dtype,
                transforms=body.transforms(out_type.dtype),
            ),
            "ready": plgpu.Barrier(num_arrivals=warpgroups + 1, num_barriers=stages),
            "consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        },
        grid=(n // (warpgroups * BLOCK_N), splits),
        grid_names=("n", "split"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"plain_{x.dtype.name}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(x, weight)
