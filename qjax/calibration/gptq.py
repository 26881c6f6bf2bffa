"""GPTQ: quantize the rows of a kernel one by one, letting the rest make up for each error.

With ``H = X^T X`` and ``U`` the upper Cholesky factor of ``H^-1`` (``H^-1 = U^T U``), row ``i`` is
rounded to ``q_i``, ``e_i = (w_i - q_i) / U_ii``, and ``w_j -= U_ij e_i`` for all later rows ``j``.

The rows are walked in blocks: inside a block a few rows at a time, after it one matrix product for
everything behind the block. All loops are ``lax.fori_loop``, so compile time does not depend on
the width. Rows are those of a kernel ``(in, out)``, the columns of the paper.

References:
  Frantar et al., GPTQ, arXiv:2210.17323. The order "group" is the group-aware reordering of
  Gafni et al., arXiv:2505.14638: groups keep their members, so no permutation has to be stored.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.calibration.scale_search import decode, range_scale, search_scale
from qjax.calibration.stats import HessianStats
from qjax.formats import QuantFormat
from qjax.quantize import encode
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array

ORDERS = ("none", "group", "static")
_MAX_BLOCK = 128
_MAX_CHUNK = 8
_MAX_DAMPING = 10.0


class GPTQInfo(NamedTuple):
    """The damping finally used, float32, and the number of channels never active, int32."""

    damping: Array
    dead: Array


def gptq_quantize(
    weight: Array,
    stats: HessianStats,
    fmt: QuantFormat,
    *,
    damping: float = 0.01,
    order: str = "group",
    search: bool = True,
    dtype: Any = None,
) -> tuple[QuantizedArray, GPTQInfo]:
    """Quantize a kernel so that the layer's output over the calibration tokens changes least.

    Scales of a group are computed when its first row is reached, from weights that already carry
    the corrections for all earlier rows. With ``fmt.scale_steps`` their steps are those of the
    original weights, whose largest range no scale exceeds.

    Args:
      weight: ``(k, n)`` kernel.
      stats: Statistics of the ``k`` input channels. Channels that were never active are rounded to
        nearest; without any token the whole kernel is.
      fmt: Any weight format.
      damping: Added to the diagonal, as a fraction of its mean. Raised tenfold as often as needed
        for the Cholesky factorization to exist.
      order: In which order rows are quantized. ``"none"``: as they are. ``"group"``: most active
        group first and most active row of each first. ``"static"``: most active row first, over all
        groups; scales then come from the original weights.
      search: Search scales for the least error weighted by the Hessian's diagonal, instead of
        covering the range.
      dtype: What ``dequantize`` shall return; ``weight.dtype`` by default.

    Returns:
      ``(quantized, info)``; the structure of the array is that of ``qjax.quantize``.

    Raises:
      ValueError: If shapes do not fit or an option is unknown.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"{weight.shape=} must be a matrix (in, out); use vmap for stacked experts"
        )
    if stats.in_features != weight.shape[0]:
        raise ValueError(f"statistics of {stats.in_features} channels do not fit {weight.shape=}")
    if order not in ORDERS:
        raise ValueError(f"unknown {order=}; choose one of {', '.join(ORDERS)}")
    if not damping > 0:
        raise ValueError(f"{damping=} must be positive; 0.01 is usual")
    code, scale, zero_point, info = _gptq(
        weight, stats.hessian, jnp.float32(damping), fmt=fmt, order=order, search=search
    )
    dtype = weight.dtype if dtype is None else dtype
    return QuantizedArray.make(code, scale, fmt, zero_point=zero_point, dtype=dtype), info


class Layout(NamedTuple):
    """How rows are cut: ``tile`` rows share a scale, ``block`` rows are updated together."""

    rows: int  # padded
    tile: int
    block: int


def plan_layout(k: int, tile: int) -> Layout:
    """Row blocks of at most about 128 which neither straddle a tile nor are straddled by one."""
    if tile >= k:  # one scale for all rows
        block = min(_MAX_BLOCK, k)
        rows = -(-k // block) * block
        return Layout(rows, rows, block)
    if tile <= _MAX_BLOCK:
        block = tile * max(1, min(_MAX_BLOCK // tile, -(-k // tile)))
        return Layout(-(-k // block) * block, tile, block)
    block = max(d for d in range(1, _MAX_BLOCK + 1) if tile % d == 0)
    return Layout(-(-k // tile) * tile, tile, block)


def chunk_rows(span: int) -> int:
    """Rows that are rounded by one unrolled step: the largest divisor of ``span`` up to 8.

    On a GPU a step of one row is a handful of kernel launches for next to no work.
    """
    return max(d for d in range(1, _MAX_CHUNK + 1) if span % d == 0)


def normalize_hessian(hessian: Array, rows: int) -> tuple[Array, Array, Array]:
    """Pad to ``rows`` channels, scale to a mean diagonal of one, and find the dead channels.

    Padding is dead too: its weights are zeros, and it interacts with nothing.

    Returns:
      ``(hessian, dead, importance)``: float32 ``(rows, rows)`` with ones on the diagonal of dead
      channels; boolean ``(rows,)``; the diagonal before that, ``(rows,)``.
    """
    pad = rows - hessian.shape[0]
    hessian = jnp.pad(hessian, ((0, pad), (0, pad)))
    diagonal = jnp.diagonal(hessian)
    live = (diagonal > 0) & jnp.isfinite(diagonal)
    total = jnp.sum(jnp.where(live, diagonal, 0.0))
    mean = total / jnp.maximum(jnp.sum(live), 1).astype(jnp.float32)
    hessian = hessian / jnp.where(mean > 0, mean, jnp.float32(1))
    # An overflowed channel would make everything NaN; without it the others are still served.
    hessian = jnp.where(live[:, None] & live[None, :], hessian, jnp.float32(0))
    importance = jnp.diagonal(hessian)
    return hessian + jnp.diag((~live).astype(jnp.float32)), ~live, importance


def inverse_factor(hessian: Array, damping: Array) -> tuple[Array, Array]:
    """Upper ``U`` with ``U^T U = (H + damping I)^-1`` and the damping that was needed for it.

    With ``J`` reversing the order, ``J H J = L L^T`` gives ``U = J L^-1 J``: one factorization and
    one triangular inverse, where the paper inverts ``H`` and factorizes again.
    """
    eye = jnp.eye(hessian.shape[0], dtype=jnp.float32)
    flipped = hessian[::-1, ::-1]

    def attempt(state: tuple[Array, Array]) -> tuple[Array, Array]:
        used, _ = state
        used = jnp.where(used > 0, used * 10, damping)
        return used, jnp.linalg.cholesky(flipped + used * eye)

    def failed(state: tuple[Array, Array]) -> Array:
        used, lower = state
        return (used < _MAX_DAMPING) & ~jnp.all(jnp.isfinite(lower))

    start = (jnp.float32(0), jnp.full_like(hessian, jnp.nan))
    used, lower = jax.lax.while_loop(failed, attempt, start)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    return inverse[::-1, ::-1], used


def row_order(importance: Array, tile: int, order: str) -> Array:
    """int32 ``(rows,)``: which row comes when (see ``gptq_quantize``); ties keep their order."""
    rows = importance.shape[0]
    if order == "none":
        return jnp.arange(rows, dtype=jnp.int32)
    if order == "static":
        return jnp.argsort(-importance).astype(jnp.int32)
    groups = importance.reshape(rows // tile, tile)
    within = jnp.argsort(-groups, axis=1)
    between = jnp.argsort(-groups.max(1))
    start = jnp.arange(rows // tile)[:, None] * tile
    return (start + within)[between].reshape(rows).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("fmt", "order", "search"))
def _gptq(
    weight: Array, hessian: Array, damping: Array, *, fmt: QuantFormat, order: str, search: bool
) -> tuple[Array, Array, Array | None, GPTQInfo]:
    k, n = weight.shape
    tile, out_tile = fmt.tiles((k, n), 0)
    rows, tile, block = plan_layout(k, tile)
    groups = rows // tile
    w = jnp.pad(weight.astype(jnp.float32), ((0, rows - k), (0, 0)))
    hessian, dead, importance = normalize_hessian(hessian, rows)
    # All groups of a column share it, and the first is rounded before the others have changed.
    step = numerics.scale_step(numerics.tile_absmax(w, (tile, out_tile)), fmt, 0)

    def tile_scale(values: Array, weights: Array) -> tuple[Array, Array | None]:
        if search:
            return search_scale(values, weights, fmt, step)
        low, high = numerics.tile_reduce(values, (values.shape[0], out_tile))
        return range_scale(low, high, fmt, step)

    perm = row_order(importance, tile, order)
    group_of = perm // tile
    scale_shape = (groups, -(-n // out_tile))
    if order == "static":
        # Every scale is needed before the first row: the original weights are all there is.
        scale, zero = jax.vmap(tile_scale)(
            w.reshape(groups, tile, n), importance.reshape(groups, tile)
        )
        scale = scale.reshape(scale_shape)
        zero = None if zero is None else zero.reshape(scale_shape)
    else:
        # Neutral placeholders, each replaced when the first row of its group is reached.
        scale = jnp.ones(scale_shape, fmt.scale_dtype)
        zero = None if fmt.symmetric else jnp.zeros(scale_shape, jnp.int8)

    w, importance = w[perm], importance[perm]
    upper, used = inverse_factor(hessian[perm][:, perm], damping)
    # XLA cannot slice int4 in loops on every backend; bfloat16 holds every fp8 and fp4 value.
    carry_dtype = jnp.bfloat16 if fmt.is_float else jnp.int8

    def start_group(row: Array, values: Array, scale: Array, zero: Array | None) -> tuple:
        weights = jax.lax.dynamic_slice_in_dim(importance, row, tile)
        new_scale, new_zero = tile_scale(values, weights)
        group = jax.lax.dynamic_index_in_dim(group_of, row, keepdims=False)
        put = jax.lax.dynamic_update_slice_in_dim
        scale = put(scale, new_scale, group, 0)
        return scale, None if new_zero is None or zero is None else put(zero, new_zero, group, 0)

    span = min(tile, block)
    chunk = chunk_rows(span)

    def wide(values: Array, groups: Array) -> Array:
        """Rows of per-tile parameters as ``(chunk, n or 1)``."""
        rows = values.at[groups].get(mode="promise_in_bounds")
        return numerics.expand_tiles(rows, (groups.shape[0], n), (1, out_tile))

    def round_rows(
        values: Array, u: Array, scale: Array, zero: Array | None
    ) -> tuple[Array, Array]:
        """Errors and codes of a few rows in sequence; one fused loop over the columns."""
        pending = [values[i][None] for i in range(chunk)]
        errors, codes = [], []
        for i in range(chunk):
            offset = None if zero is None else zero[i][None]
            q = encode(pending[i], scale[i][None], offset, fmt, (1, 1))
            error = (pending[i] - decode(q, scale[i][None], offset)) / u[i, i]
            for j in range(i + 1, chunk):
                pending[j] = pending[j] - u[i, j] * error
            errors.append(error)
            codes.append(q.astype(carry_dtype))
        return jnp.concatenate(errors), jnp.concatenate(codes)

    def block_step(b: Array, state: tuple) -> tuple:
        w, code, scale, zero = state
        first = b * block
        if order != "static" and tile > block:
            scale, zero = jax.lax.cond(
                first % tile == 0,
                lambda: start_group(
                    first, jax.lax.dynamic_slice_in_dim(w, first, tile), scale, zero
                ),
                lambda: (scale, zero),
            )
        u_rows = jax.lax.dynamic_slice_in_dim(upper, first, block)
        u_block = jax.lax.dynamic_slice_in_dim(u_rows, first, block, axis=1)

        def span_step(s: Array, state: tuple) -> tuple:
            w_block, errors, codes, scale, zero = state
            begin = s * span
            if order != "static" and tile <= block:
                values = jax.lax.dynamic_slice_in_dim(w_block, begin, tile)
                scale, zero = start_group(first + begin, values, scale, zero)

            def chunk_step(c: Array, state: tuple) -> tuple:
                w_block, errors, codes = state
                top = begin + c * chunk
                u_chunk = jax.lax.dynamic_slice_in_dim(u_block, top, chunk)
                groups = jax.lax.dynamic_slice_in_dim(group_of, first + top, chunk)
                new_errors, new_codes = round_rows(
                    jax.lax.dynamic_slice_in_dim(w_block, top, chunk),
                    jax.lax.dynamic_slice_in_dim(u_chunk, top, chunk, axis=1),
                    wide(scale, groups),
                    None if zero is None else wide(zero, groups),
                )
                # U is upper triangular: finished rows are not touched.
                change = jnp.matmul(u_chunk.T, new_errors, precision=jax.lax.Precision.HIGHEST)
                errors = jax.lax.dynamic_update_slice_in_dim(errors, new_errors, top, 0)
                codes = jax.lax.dynamic_update_slice_in_dim(codes, new_codes, top, 0)
                return w_block - change, errors, codes

            start = (w_block, errors, codes)
            done = jax.lax.fori_loop(0, span // chunk, chunk_step, start)
            return *done, scale, zero

        start = (
            jax.lax.dynamic_slice_in_dim(w, first, block),
            jnp.zeros((block, n), jnp.float32),
            jnp.zeros((block, n), carry_dtype),
            scale,
            zero,
        )
        _, errors, codes, scale, zero = jax.lax.fori_loop(0, block // span, span_step, start)
        w = w - jnp.matmul(u_rows.T, errors, precision=jax.lax.Precision.HIGHEST)
        return w, jax.lax.dynamic_update_slice_in_dim(code, codes, first, 0), scale, zero

    state = (w, jnp.zeros((rows, n), carry_dtype), scale, zero)
    _, code, scale, zero = jax.lax.fori_loop(0, rows // block, block_step, state)
    code = jnp.zeros_like(code).at[perm].set(code)[:k].astype(fmt.storage_dtype)
    # Groups of padding alone exist only in the layout.
    kept = -(-k // tile)
    zero = None if zero is None else zero[:kept]
    dead_count = jnp.sum(dead[:k], dtype=jnp.int32)
    return code, scale[:kept], zero, GPTQInfo(used, dead_count)
