"""Kernel side of ``ops.kv.append`` and ``ops.rotary.rotate_and_append``, for one token per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import CLIP_FACTORS
from qjax.ops._dispatch import choose_backend, kernels_by_default
from qjax.typing import Array, DType

Biases = tuple[Array | None, Array | None, Array | None]


def choose_append_backend(op: str, backend: str | None, reason: Callable[[], str | None]) -> str:
    """``"mosaic_gpu"`` or ``"xla"``: ``choose_backend`` with a reason that is found on demand.

    Args:
      op: Name of the op, for messages.
      backend: What the caller asked for.
      reason: Says why the kernel cannot run; called only where that matters.
    """
    if backend is None and not kernels_by_default():
        return "xla"
    return choose_backend(op, backend, None if backend == "xla" else reason())


def append_unsupported_reason(cache: QuantizedKVCache, layer: int, keys: Array) -> str | None:
    """Why the kernel cannot append these keys ``[b, t, ...]``; None if it can."""
    reason = _unsupported_reason(cache, keys.shape[1])
    return reason or _kernel().unsupported_reason(_plain_sizes(cache, layer, keys))


def rotate_and_append_unsupported_reason(
    cache: QuantizedKVCache, layer: int, products: tuple[Array, ...], dtype: DType
) -> str | None:
    """Why the kernel cannot rotate and append; None if it can.

    Args:
      cache: The cache.
      layer: Layer index.
      products: As in ``ops.rotary.Projected``.
      dtype: As there.
    """
    reason = _unsupported_reason(cache, products[0].shape[2])
    if reason is not None:
        return reason
    for product in products:
        splits, kind = product.shape[0], product.dtype
        if kind != jnp.float32 and (kind != jnp.dtype(dtype) or splits > 1):
            return (
                f"{splits} parts of {kind} that make up {jnp.dtype(dtype)}; the kernel takes one "
                "of that type, or any number of float32"
            )
    biases = (None, None, None)
    return _kernel().unsupported_reason(_sizes(cache, layer, products, biases, dtype))


def _unsupported_reason(cache: QuantizedKVCache, tokens: int) -> str | None:
    if tokens != 1:
        return f"t={tokens} new tokens per row; the kernel is for one"
    if cache.counted:
        return "a cache that counts (counted=True); the kernel does not"
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, MOSAIC_GPU_MIN_JAX))}"
    return mosaic_gpu_unsupported_reason()


def _kernel() -> Any:
    """The kernel's module, which older versions of jax cannot import."""
    from qjax.pallas_kernels import _kv_append

    return _kv_append


def append_plan(cache: QuantizedKVCache, positions: Array, slots: Array, valid: Array) -> Array:
    """int32 ``[b, 3]``: page (-1 for a token that is dropped), place in the page, slot in range."""
    position = positions[:, 0]
    index = position // cache.page_size
    slot = jnp.clip(slots, 0, cache.max_seqs - 1)
    page = cache.page_table[slot, jnp.clip(index, 0, cache.pages_per_seq - 1)]
    stored = valid[:, 0] & (slot == slots) & (index >= 0) & (index < cache.pages_per_seq)
    stored &= (page >= 0) & (page < cache.num_pages)
    page = jnp.where(stored, page, -1)
    return jnp.stack([page, position % cache.page_size, slot], axis=1)


def append_by_kernel(
    cache: QuantizedKVCache,
    layer: int,
    keys: Array,
    values: Array,
    positions: Array,
    slots: Array,
    valid: Array,
) -> QuantizedKVCache:
    """``append`` for ``t == 1`` and a cache that does not count; arguments as there."""
    # One array, made together with the rotation of the keys. As a slice of a joined projection the
    # values would become part of the kernel's call, which then is not known to work in place.
    inputs = {
        "new": jnp.stack([keys[:, 0], values[:, 0]]),
        "plan": append_plan(cache, positions, slots, valid),
    }
    return _run(cache, layer, _plain_sizes(cache, layer, keys), inputs)[1]


def rotate_and_append_by_kernel(
    cache: QuantizedKVCache,
    layer: int,
    products: tuple[Array, ...],
    biases: Biases,
    dtype: DType,
    table: Array,
    positions: Array,
    slots: Array,
    valid: Array,
) -> tuple[Array, QuantizedKVCache]:
    """``rotate_and_append`` of a ``Projected`` for ``t == 1``; arguments as there.

    Returns:
      Queries ``[b, q_heads * head_dim]`` and the cache.
    """
    sizes = _sizes(cache, layer, products, biases, dtype)
    inputs = {
        # The same for all layers of a step, like the table: XLA computes it once.
        "plan": append_plan(cache, positions, slots, valid),
        "table": table[:, 0],
    }
    inputs |= {f"product_{i}": product[:, :, 0] for i, product in enumerate(products)}
    for source, bias in zip(sizes.parts.values(), biases, strict=True):
        if source.bias is not None and bias is not None:
            inputs[source.bias] = bias
    queries, cache = _run(cache, layer, sizes, inputs)
    assert queries is not None
    return queries, cache


def _run(
    cache: QuantizedKVCache, layer: int, sizes: Any, inputs: dict[str, Array]
) -> tuple[Array | None, QuantizedKVCache]:
    names = ["keys", "values", "key_scales", "value_scales", "running", "page_running"]
    state = {name: getattr(cache, name)[layer] for name in names}
    static: tuple[Array, ...] = ()
    if cache.formats[layer].mode == "static":
        static = (state.pop("key_scales"), state.pop("value_scales"))
    state = {name: array for name, array in state.items() if array is not None}
    queries, state = _kernel().call(sizes, inputs, state, static)
    changed = {}
    for name, array in state.items():
        held = getattr(cache, name)
        changed[name] = (*held[:layer], array, *held[layer + 1 :])
    return queries, dataclasses.replace(cache, **changed)


def _plain_sizes(cache: QuantizedKVCache, layer: int, keys: Array) -> Any:
    """Of an append whose keys and values are ready, one array after the other."""
    stride = cache.num_kv_heads * cache.head_dim
    source = _kernel().Source("new", cache.num_kv_heads, stride)
    values = dataclasses.replace(source, first=keys.shape[0] * stride)
    return _common_sizes(cache, layer, keys.shape[0], keys.dtype, keys=source, values=values)


def _sizes(
    cache: QuantizedKVCache,
    layer: int,
    products: tuple[Array, ...],
    biases: Biases,
    dtype: DType,
) -> Any:
    """Of ``rotate_and_append_by_kernel``."""
    heads, dim = cache.num_kv_heads, cache.head_dim
    joined = len(products) == 1
    q_heads = products[0].shape[-1] // dim - (2 * heads if joined else 0)
    parts, first = {}, 0
    for i, (part, bias) in enumerate(zip(("queries", "keys", "values"), biases, strict=True)):
        index = 0 if joined else i
        product = products[index]
        count = heads if i else q_heads
        parts[part] = _kernel().Source(
            f"product_{index}",
            count,
            product.shape[-1],
            first * dim,
            product.shape[0] if product.dtype == jnp.float32 else 0,
            None if bias is None else f"bias_{part}",
            rotates=part != "values",
        )
        first += count if joined else 0
    return _common_sizes(cache, layer, products[0].shape[1], dtype, **parts)


def _common_sizes(
    cache: QuantizedKVCache, layer: int, rows: int, dtype: DType, **parts: Any
) -> Any:
    return _kernel().Sizes(
        fmt=cache.formats[layer],
        dtype=jnp.dtype(dtype).name,
        rows=rows,
        head_dim=cache.head_dim,
        page_size=cache.page_size,
        num_pages=cache.num_pages,
        max_seqs=cache.max_seqs,
        page_running=cache.page_running[layer] is not None,
        clip_factors=CLIP_FACTORS if cache.formats[layer].clips else (),
        **parts,
    )
