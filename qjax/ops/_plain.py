"""The kernel for plain weights as an op that can be differentiated and mapped."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.pallas_kernels import plain
from qjax.typing import Array, DType


def plain_by_kernel(x: Array, w: Array, *, out_dtype: DType, keep_splits: bool) -> Array:
    """``x @ w`` by ``pallas_kernels.plain``; see ``quantized_dot``.

    Args:
      x: ``(..., k)``, bfloat16 or float16.
      w: ``(k, n)``, of the same type.
      out_dtype: Result type.
      keep_splits: Return ``(s, ..., n)``.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = _op(jnp.dtype(out_dtype).name, keep_splits)(flat, w)
    return out.reshape(*out.shape[:-2], *x.shape[:-1], w.shape[1])


@functools.cache
def _op(out_dtype: str, keep_splits: bool) -> Callable[[Array, Array], Array]:
    @jax.custom_batching.custom_vmap
    def forward(x: Array, w: Array) -> Array:
        return plain.matmul(x, w, out_dtype=jnp.dtype(out_dtype), keep_splits=keep_splits)

    @forward.def_vmap
    def _(axis_size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
        # Kernels are not mapped: XLA has products for batches.
        del axis_size
        axes = [0 if mapped else None for mapped in batched]

        def dot(x: Array, w: Array) -> Array:
            out = jnp.dot(x, w, preferred_element_type=jnp.float32).astype(out_dtype)
            if not keep_splits:
                return out
            # As many parts as the kernel has, so that the shape is what was promised.
            splits = plain.heuristic_config(x.shape[0], x.shape[1], w.shape[1]).splits
            if splits == 1:
                return out[None]
            k = x.shape[1] // splits
            parts = x.reshape(x.shape[0], splits, k), w.reshape(splits, k, w.shape[1])
            return jnp.einsum("msk,skn->smn", *parts, preferred_element_type=jnp.float32)

        return jax.vmap(dot, in_axes=axes)(x, w), True

    @jax.custom_vjp
    def op(x: Array, w: Array) -> Array:
        return forward(x, w)

    def fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
        return forward(x, w), (x, w)

    def bwd(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        # In the operands' type, as the backward pass of XLA's product (``dot._dot_16bit``).
        x, w = operands
        g = (g if keep_splits else g[None]).astype(x.dtype)
        splits, k = g.shape[0], x.shape[1] // g.shape[0]

        def product(spec: str, *args: Any) -> Array:
            return jnp.einsum(spec, *args, preferred_element_type=jnp.float32)

        dx = product("smn,skn->msk", g, w.reshape(splits, k, w.shape[1]))
        dw = product("msk,smn->skn", x.reshape(x.shape[0], splits, k), g)
        return dx.reshape(x.shape).astype(x.dtype), dw.reshape(w.shape).astype(w.dtype)

    op.defvjp(fwd, bwd)
    return op
