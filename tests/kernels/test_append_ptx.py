"""The instructions of the append kernel, executed by a model of PTX, against ``append`` itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.nn.rotary import RopeScaling, rope_frequencies
from qjax.ops._append import _plain_sizes, _sizes, append_plan
from qjax.ops.kv import append
from qjax.ops.rotary import Projected, rotary_table, rotate_heads
from qjax.pallas_kernels import _kv_append, _kv_append_body
from tests.kernels.ptx_model import THREADS, Model

SLOTS, PAGE, HEADS, STEPS = 3, 4, 5, 5
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


def cache_of(fmt: KVFormat, dim: int, rng: np.random.Generator) -> QuantizedKVCache:
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
    return cache.with_page_table(table)


@pytest.mark.parametrize(
    ("fmt", "dtype", "dim"), CASES, ids=[f"{f.name}-{t}-{d}" for f, t, d in CASES]
)
def test_the_same_bits_as_append(fmt: KVFormat, dtype: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    cache = cache_of(fmt, dim, rng)
    slots = jnp.asarray([2, 0, 1], jnp.int32)
    for i in range(STEPS):
        new = tokens(rng, dim, dtype)
        positions = jnp.asarray([[i], [i + 2], [i]], jnp.int32)  # the second leaves the table
        valid = jnp.asarray([[True], [True], [i != 3]])
        plan = np.asarray(append_plan(cache, positions, slots, valid))
        want = append(cache, 0, jnp.asarray(new[0]), jnp.asarray(new[1]), positions, slots, valid)
        sizes = _plain_sizes(cache, 0, jnp.asarray(new[0]))
        same(run(cache, sizes, {"new": new, "plan": plan}), want, i)
        cache = want


ROTATED = [
    # (format, type, head_dim, query heads, partial sums or 0 for 16 bits, biases of q, k and v)
    (KVFormat("bfloat16"), "bfloat16", 128, 20, 4, ""),
    (KVFormat("float16"), "float16", 64, 5, 1, "qkv"),
    (KVFormat("float8_e4m3fn", "static"), "bfloat16", 256, 10, 0, ""),
    (KVFormat("float8_e4m3fn", "tracked"), "bfloat16", 128, 35, 3, "qkv"),
    (KVFormat("float8_e5m2", "dynamic"), "float16", 64, 10, 2, ""),
    (KVFormat("int8", "tracked"), "bfloat16", 128, 10, 0, "qkv"),
    (KVFormat("int8", "tracked", without_key_bias=True), "bfloat16", 128, 10, 2, "qv"),
    (KVFormat("int8", "dynamic"), "bfloat16", 64, 20, 8, ""),
    (KVFormat("int4", "static"), "float16", 128, 10, 2, "qkv"),
    (KVFormat("int4", "tracked", without_key_bias=True), "bfloat16", 256, 5, 2, "qv"),
]


@pytest.mark.parametrize(
    ("fmt", "dtype", "dim", "q_heads", "splits", "biased"),
    ROTATED,
    ids=[f"{f.name}-{t}-{d}-{s}" for f, t, d, _, s, _ in ROTATED],
)
def test_the_same_bits_as_rotate_and_append(
    fmt: KVFormat, dtype: str, dim: int, q_heads: int, splits: int, biased: str
) -> None:
    rng = np.random.default_rng(dim)
    cache = cache_of(fmt, dim, rng)
    slots = jnp.asarray([2, 0, 1], jnp.int32)
    frequencies = rope_frequencies(dim, 1e4, RopeScaling("llama3", 8.0, 512))
    counts = {"q": q_heads, "k": HEADS, "v": HEADS}
    bias_q, bias_k, bias_v = (
        jnp.asarray(rng.normal(size=count * dim), dtype) if name in biased else None
        for name, count in counts.items()
    )
    # In programs of their own, as XLA may leave out a rounding between two parts of one program.
    rotate = jax.jit(rotate_heads)
    for i in range(3):
        product = rng.normal(size=(max(splits, 1), SLOTS, 1, (q_heads + 2 * HEADS) * dim))
        product[0, 0, 0, 7], product[0, 1, 0, -9] = np.nan, np.inf
        product[0, 2, 0, q_heads * dim] = -np.inf
        product = jnp.asarray(product, "float32" if splits else dtype)
        positions = jnp.asarray([[i + 2], [i], [i + 5]], jnp.int32)
        valid = jnp.asarray([[True], [i != 1], [True]])
        new = Projected((product,), (bias_q, bias_k, bias_v), jnp.dtype(dtype))
        q, k, v = new.heads(q_heads, HEADS, dim)
        table = rotary_table(positions, frequencies, 1.25)
        queries = rotate(q, table)
        want = append(cache, 0, rotate(k, table), v, positions, slots, valid)
        sizes = _sizes(cache, 0, new.products, new.biases, new.dtype)
        inputs = {
            "product_0": np.asarray(product),
            "plan": np.asarray(append_plan(cache, positions, slots, valid)),
            "table": np.asarray(table),
        }
        named = zip(("queries", "keys", "values"), new.biases, strict=True)
        inputs |= {f"bias_{part}": np.asarray(x) for part, x in named if x is not None}
        got = run(cache, sizes, inputs)
        rotated = got.pop("queries")
        assert (_bytes(rotated) == _bytes(np.asarray(queries)[:, 0])).all()
        same(got, want, i)
        cache = want


def same(got: dict[str, np.ndarray], want: QuantizedKVCache, step: int) -> None:
    fmt = want.formats[0]
    for name, array in got.items():
        different = _bytes(array) != _bytes(np.asarray(getattr(want, name)[0]))
        # On CPUs XLA multiplies by a reciprocal, and rounds to float16 on its way to e5m2: a value
        # half way between two codes may get the other one.
        codes = fmt.quantized and name in ("keys", "values")
        assert different.mean() <= (3e-4 if codes else 0), (name, step)


def _bytes(array: np.ndarray) -> np.ndarray:
    # Nothing distinguishes the two zeros, nor one NaN from another.
    if array.dtype.itemsize > 1:
        array = np.where(array == 0, np.zeros((), array.dtype), array)
    if array.dtype.itemsize == 2:
        array = np.where(np.isnan(array), np.asarray(np.nan, array.dtype), array)
    return np.ascontiguousarray(array).view(np.uint8)


def run(
    cache: QuantizedKVCache, sizes: Any, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The state, and queries if there are any, after the kernel."""
    state = {
        name: np.asarray(getattr(cache, name)[0])
        for name in ("keys", "values", "key_scales", "value_scales", "running", "page_running")
        if getattr(cache, name)[0] is not None
    }
    if cache.formats[0].mode == "static":
        inputs |= {f"static_{name}s": state.pop(f"{name}_scales") for name in ("key", "value")}
    if sizes.queries is not None:
        state["queries"] = np.zeros((SLOTS, sizes.queries.heads, sizes.head_dim), sizes.dtype)
    arrays = state | inputs
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = size
        size += -(-array.nbytes // 64) * 64
    memory = np.zeros(size, np.uint8)
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory[places[name] : places[name] + flat.size] = flat
    assert _kv_append.unsupported_reason(sizes) is None
    blocks = [(part, i) for part, source in sizes.parts.items() for i in range(source.blocks)]
    for row in range(SLOTS):
        for part, block in blocks:
            p = Model(np.zeros(16, np.uint8), memory)
            at = {name: np.full(THREADS, place, np.uint64) for name, place in places.items()}
            _kv_append_body.Part(p, sizes, at, p.integer(row)).emit(part, p.integer(block))
    result = {}
    for name, array in state.items():
        flat = memory[places[name] : places[name] + array.nbytes]
        result[name] = flat.view(array.dtype).reshape(array.shape)
    return result
