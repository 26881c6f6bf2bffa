"""The instructions of the append kernel, executed by a model of PTX, against ``append`` itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops._append import _sizes, append_plan
from qjax.ops.kv import append
from qjax.pallas_kernels import _kv_append
from tests.kernels.ptx_model import THREADS, Model

SLOTS, PAGE, HEADS, STEPS = 3, 4, 5, 6
CASES = [
    (KVFormat("bfloat16"), "bfloat16", 64),
    (KVFormat("float16"), "float16", 128),
    (KVFormat("float8_e4m3fn", "static"), "bfloat16", 128),
    (KVFormat("float8_e4m3fn", "tracked"), "bfloat16", 64),
    (KVFormat("float8_e5m2", "dynamic"), "float16", 256),
    (KVFormat("int8", "tracked"), "bfloat16", 128),
    (KVFormat("int8", "static"), "float16", 64),
    (KVFormat("int4", "tracked"), "bfloat16", 256),
    (KVFormat("int4", "dynamic"), "float16", 128),
]


def tokens(rng: np.random.Generator, dim: int, dtype: str) -> np.ndarray:
    x = rng.normal(size=(2, SLOTS, 1, HEADS, dim)) * np.exp(
        rng.normal(size=(2, SLOTS, 1, HEADS, 1))
    )
    x[0, 0, 0, 1, 3], x[1, 0, 0, 2, 5], x[1, 1, 0, 0, 7] = np.nan, np.inf, -np.inf
    x[0, 1, 0, 3], x[1, 2, 0, 4], x[0, 2, 0, 0] = 0, np.inf, 1e-30
    return x.astype(np.dtype(dtype))


@pytest.mark.parametrize(
    ("fmt", "dtype", "dim"), CASES, ids=[f"{f.name}-{t}-{d}" for f, t, d in CASES]
)
def test_the_same_bits_as_append(fmt: KVFormat, dtype: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    scales = np.linspace(0.005, 0.02, HEADS)
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=dim,
        num_pages=SLOTS * 2,
        page_size=PAGE,
        max_seqs=SLOTS,
        pages_per_seq=2,
        fmt=fmt,
        static_scales=[(scales, scales[::-1])] if fmt.mode == "static" else None,
        counted=False,
        share_pages=True,
    )
    table = rng.permutation(SLOTS * 2).reshape(SLOTS, 2).astype(np.int32)
    table[2, 1] = SLOTS * 2  # the last slot has one page only
    cache = cache.with_page_table(table)
    slots = jnp.asarray([2, 0, 1], jnp.int32)
    step = jax.jit(append, static_argnums=1)
    for i in range(STEPS):
        new = tokens(rng, dim, dtype)
        positions = jnp.asarray([[i], [i + 2], [i]], jnp.int32)  # the second leaves the table
        valid = jnp.asarray([[True], [True], [i != 3]])
        plan = np.asarray(append_plan(cache, positions, slots, valid))
        want = step(cache, 0, jnp.asarray(new[0]), jnp.asarray(new[1]), positions, slots, valid)
        state = {
            name: np.asarray(getattr(cache, name)[0])
            for name in ("keys", "values", "key_scales", "value_scales", "running", "page_running")
            if getattr(cache, name)[0] is not None
        }
        got = run(cache, new, plan, state)
        for name, array in got.items():
            expected = np.asarray(getattr(want, name)[0])
            different = _bytes(array) != _bytes(expected)
            # On CPUs XLA multiplies by a reciprocal, and rounds to float16 on its way to e5m2: a
            # value half way between two codes may get the other one.
            codes = fmt.quantized and name in ("keys", "values")
            assert different.mean() <= (2e-4 if codes else 0), (name, i)
        cache = want


def _bytes(array: np.ndarray) -> np.ndarray:
    # Nothing distinguishes the two zeros.
    if array.dtype.itemsize > 1:
        array = np.where(array == 0, np.zeros((), array.dtype), array)
    return np.ascontiguousarray(array).view(np.uint8)


def run(
    cache: QuantizedKVCache, new: np.ndarray, plan: np.ndarray, state: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The state after the kernel."""
    arrays: dict[str, Any] = dict(state)
    if cache.formats[0].mode == "static":
        arrays["static_keys"], arrays["static_values"] = (
            arrays.pop("key_scales"),
            arrays.pop("value_scales"),
        )
    written = [name for name in arrays if not name.startswith("static")]
    arrays |= {"new": new, "plan": plan}
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = size
        size += -(-array.nbytes // 64) * 64
    memory = np.zeros(size, np.uint8)
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory[places[name] : places[name] + flat.size] = flat
    sizes = _sizes(cache, 0, jnp.asarray(new[0]))
    assert _kv_append.unsupported_reason(sizes) is None
    for row in range(SLOTS):
        for block in range(-(-HEADS // 4)):
            p = Model(np.zeros(16, np.uint8), memory)
            at = {name: np.full(THREADS, place, np.uint64) for name, place in places.items()}
            _kv_append.append(p, sizes, at, SLOTS, p.integer(row), p.integer(block))
    result = {}
    for name in written:
        array = arrays[name]
        flat = memory[places[name] : places[name] + array.nbytes]
        result[name] = flat.view(array.dtype).reshape(array.shape)
    return result
