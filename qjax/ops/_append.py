"""``append`` of one token per row by a Pallas kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import CLIP_FACTORS
from qjax.ops._dispatch import kernels_by_default
from qjax.typing import Array

# Whether the kernel runs without being asked for, where it can; see also ``ops._paged``.
_KERNEL_BY_DEFAULT = False


def kernel_by_default(cache: QuantizedKVCache, layer: int, keys: Array) -> bool:
    """Whether ``append`` of these arguments is left to the kernel."""
    if not (_KERNEL_BY_DEFAULT and kernels_by_default()):
        return False
    return append_unsupported_reason(cache, layer, keys) is None


def append_unsupported_reason(cache: QuantizedKVCache, layer: int, keys: Array) -> str | None:
    """Why the kernel cannot append these keys; None if it can."""
    if keys.shape[1] != 1:
        return f"t={keys.shape[1]} new tokens per row; the kernel is for one"
    if cache.counted:
        return "a cache that counts (counted=True); the kernel does not"
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, MOSAIC_GPU_MIN_JAX))}"
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        return reason
    from qjax.pallas_kernels import _kv_append

    return _kv_append.unsupported_reason(_sizes(cache, layer, keys))


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
    from qjax.pallas_kernels import _kv_append

    fmt = cache.formats[layer]
    state = {"keys": cache.keys[layer], "values": cache.values[layer]}
    static: tuple[Array, ...] = ()
    key_scales, value_scales = cache.key_scales[layer], cache.value_scales[layer]
    if key_scales is not None and value_scales is not None:
        if fmt.stores_scales:
            state |= {"key_scales": key_scales, "value_scales": value_scales}
        else:
            static = (key_scales, value_scales)
    running, at_pages = cache.running[layer], cache.page_running[layer]
    if running is not None:
        state["running"] = running
    if at_pages is not None:
        state["page_running"] = at_pages
    # The same for all layers of a step: XLA computes it once.
    plan = append_plan(cache, positions, slots, valid)
    # One array, made together with the rotation of the keys. As a slice of a joined projection the
    # values would become part of the kernel's call, which then is not known to work in place.
    new = jnp.stack([keys[:, 0], values[:, 0]])
    state = _kv_append.call(_sizes(cache, layer, keys), new, plan, state, static)
    changed = {}
    for name, array in state.items():
        held = getattr(cache, name)
        changed[name] = (*held[:layer], array, *held[layer + 1 :])
    return dataclasses.replace(cache, **changed)


def _sizes(cache: QuantizedKVCache, layer: int, keys: Array) -> Any:
    from qjax.pallas_kernels import _kv_append

    return _kv_append.Sizes(
        fmt=cache.formats[layer],
        dtype=jnp.dtype(keys.dtype).name,
        heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        page_size=cache.page_size,
        num_pages=cache.num_pages,
        max_seqs=cache.max_seqs,
        page_running=cache.page_running[layer] is not None,
        clip_factors=CLIP_FACTORS if cache.formats[layer].clips else (),
    )
