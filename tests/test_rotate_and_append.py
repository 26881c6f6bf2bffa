"""``rotate_and_append``: its XLA form, and why its kernel cannot run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.nn.rotary import RopeScaling, apply_rotary, rope_frequencies
from qjax.ops import _append
from qjax.ops.kv import append, read
from qjax.ops.rotary import Projected, rotary_table, rotate_and_append
from qjax.pallas_kernels import _kv_append

ROWS, HEADS, Q_HEADS, DIM = 2, 2, 6, 128
YARN = RopeScaling("yarn", 4.0, 64, attention_factor=1.25)


def _cache(fmt: KVFormat, *, counted: bool = False) -> QuantizedKVCache:
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=ROWS,
        page_size=8,
        max_seqs=ROWS,
        pages_per_seq=1,
        fmt=fmt,
        counted=counted,
    )
    return cache.with_page_table(np.arange(ROWS, dtype=np.int32)[:, None])


def _projected(key: jax.Array, tokens: int, splits: int = 1) -> Projected:
    shape = (splits, ROWS, tokens, (Q_HEADS + 2 * HEADS) * DIM)
    dtype = jnp.float32 if splits > 1 else jnp.bfloat16
    return Projected(
        (jax.random.normal(key, shape, dtype),), (None, None, None), jnp.dtype(jnp.bfloat16)
    )


def _arguments(projected: Projected) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Queries, keys and values, and where their tokens go."""
    tokens = projected.products[0].shape[2]
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None, :], (ROWS, tokens)) + 1
    slots = jnp.arange(ROWS, dtype=jnp.int32)
    valid = jnp.ones((ROWS, tokens), bool)
    return projected.heads(Q_HEADS, HEADS, DIM), (positions, slots, valid)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_xla_form(key: jax.Array, tokens: int, mixed: bool) -> None:
    cache = _cache(KVFormat("int8", "tracked"))
    (q, k, v), (positions, slots, valid) = _arguments(_projected(key, tokens))
    table = rotary_table(positions, rope_frequencies(DIM, 1e4, YARN), YARN.attention_factor)
    mix = (lambda x: x[..., ::-1]) if mixed else lambda x: x
    queries, keys, got = rotate_and_append(
        cache, 0, q, k, v, table, positions, slots, valid, mix=mix if mixed else None
    )
    want_q, want_k = (apply_rotary(x, positions, 1e4, YARN) for x in (q, k))
    want = append(cache, 0, mix(want_k), v, positions, slots, valid)
    np.testing.assert_array_equal(queries, mix(want_q))
    np.testing.assert_array_equal(keys, want_k)
    for x, y in zip(read(got, 0, slots, 8), read(want, 0, slots, 8), strict=True):
        np.testing.assert_array_equal(x, y)


def test_heads_are_rounded_sums(key: jax.Array) -> None:
    projected = _projected(key, 1, splits=3)
    (product,) = projected.products
    bias = jax.random.normal(key, (Q_HEADS * DIM,), jnp.bfloat16)
    q, k, v = dataclasses.replace(projected, biases=(bias, None, None)).heads(Q_HEADS, HEADS, DIM)
    total = (product[0] + product[1] + product[2]).astype(jnp.bfloat16)
    ends = [Q_HEADS * DIM, (Q_HEADS + HEADS) * DIM]
    parts = jnp.split(total, ends, axis=-1)
    np.testing.assert_array_equal(q.reshape(ROWS, 1, -1), parts[0] + bias.reshape(1, 1, -1))
    np.testing.assert_array_equal(k.reshape(ROWS, 1, -1), parts[1])
    apart = tuple(jnp.split(product, ends, axis=-1))
    separate = dataclasses.replace(projected, products=apart).heads(Q_HEADS, HEADS, DIM)
    np.testing.assert_array_equal(separate[2], v)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"tokens": 2}, "t=2 new tokens per row"),
        ({"counted": True}, "counted=True"),
        ({"mix": lambda x: x}, "keys that are mixed"),
        ({"changed": True}, "changed after their projection"),
        ({"backend": "cudnn"}, "unknown backend"),
    ],
    ids=["tokens", "counted", "mix", "changed", "backend"],
)
def test_refusals(key: jax.Array, case: dict[str, Any], reason: str) -> None:
    cache = _cache(KVFormat("bfloat16"), counted=case.get("counted", False))
    projected = _projected(key, case.get("tokens", 1))
    (q, k, v), (positions, slots, valid) = _arguments(projected)
    table = rotary_table(positions, rope_frequencies(DIM, 1e4, None))
    error = ValueError if "backend" in case else NotImplementedError
    with pytest.raises(error, match=reason):
        rotate_and_append(
            cache,
            0,
            q,
            k,
            v,
            table,
            positions,
            slots,
            valid,
            projected=None if "changed" in case else projected,
            mix=case.get("mix"),
            backend=case.get("backend", "mosaic_gpu"),
        )


def test_reasons_of_the_kernel(key: jax.Array) -> None:
    sizes = _append._sizes(
        _cache(KVFormat("int8", "dynamic")),
        0,
        _projected(key, 1, splits=4).products,
        (None, None, None),
        jnp.dtype(jnp.bfloat16),
    )
    assert _kv_append.unsupported_reason(sizes) is None
    assert sizes.queries.heads == Q_HEADS and sizes.keys.first == Q_HEADS * DIM
    for change, reason in [
        ({"dtype": "float32"}, "float32 keys"),
        ({"fmt": KVFormat("float16")}, "bfloat16 keys in float16 pages"),
        ({"head_dim": 96}, "head_dim=96; there are kernels for"),
        ({"fmt": KVFormat("int4", "dynamic"), "head_dim": 64}, "head_dim=64"),
        ({"num_pages": 2**28}, "tokens times heads"),
        ({"rows": 2**28}, "elements must stay below"),
    ]:
        assert reason in (_kv_append.unsupported_reason(dataclasses.replace(sizes, **change)) or "")
