"""Prefill in pieces, as cuDNN computes it on GPUs, with a stand-in for cuDNN on any device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import _compat, _device
from qjax._device import device_info
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops import _paged, _prefill
from qjax.ops._prefill import prefill_by_cudnn, prefill_unsupported_reason
from tests.test_attention import contents, filled, normal, reference
from tests.tolerances import BF16_OPERANDS, relative_error

INT8 = KVFormat("int8", "dynamic")


def softmax_part(q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2).astype(jnp.float32) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k) * jnp.float32(scale)
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])  # 0 times what must not be infinite
    return jnp.einsum("bhts,bshd->bthd", weights, v).astype(q.dtype), lse


def whole(q: Any, k: Any, v: Any, q_n: Any, kv_n: Any, *, scale: float) -> Any:
    """What ``_compat.cudnn_attention`` promises, and garbage where it promises nothing."""
    t, s = q.shape[1], k.shape[1]
    key = jnp.arange(s)[None, None, :]
    seen = jnp.broadcast_to(key < kv_n[:, None, None], (q.shape[0], t, s))
    out, lse = softmax_part(q, k, v, seen, scale)
    real = (jnp.arange(t)[None, :] < q_n[:, None]) & (q_n > 0)[:, None] & (kv_n > 0)[:, None]
    nan = jnp.float32(jnp.nan)
    out = jnp.where(real[..., None, None], out, nan.astype(q.dtype))
    return out, jnp.where(real[:, None], lse, nan)


def causal(q: Any, k: Any, v: Any, *, scale: float, with_lse: bool) -> Any:
    """What ``_compat.cudnn_causal_attention`` promises."""
    t = q.shape[1]
    seen = jnp.broadcast_to(jnp.tri(t, dtype=bool)[None], (q.shape[0], t, t))
    out, lse = softmax_part(q, k, v, seen, scale)
    return out, lse if with_lse else None


@pytest.fixture(autouse=True)
def _no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "cudnn_attention", whole)
    monkeypatch.setattr(_compat, "cudnn_causal_attention", causal)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prefill, "_MIN_PIECE_TOKENS", 8)  # two pages of 4
    monkeypatch.setattr(_prefill, "_PIECE_BYTES", 0)


def run(cache, q, positions, lengths, slots):
    def call(q, positions, slots, lengths):
        return prefill_by_cudnn(q, cache, 0, positions, slots, lengths, 8**-0.5)

    i32 = (jnp.asarray(x, jnp.int32) for x in (positions, slots, lengths))
    return np.asarray(jax.jit(call)(jnp.asarray(q, jnp.bfloat16), *i32).astype(jnp.float32))


def poisoned(cache, lengths):
    """The cache with NaN wherever no token of a sequence lies (1e30 and such as far as it can)."""
    used = np.zeros((cache.num_pages, cache.page_size), bool)
    for row, length in zip(np.asarray(cache.page_table), lengths, strict=True):
        for token in range(length):
            used[row[token // cache.page_size], token % cache.page_size] = True
    used = jnp.asarray(used)[:, None, :]

    def filled_up(held):
        if held is None or held.ndim == 1:
            return held
        if held.dtype == jnp.uint8:  # 0x7f are the bits of NaN in float8_e4m3fn
            stale = jnp.uint8(0x7F)
        else:
            stale = jnp.asarray(127 if held.dtype == jnp.int8 else jnp.nan, held.dtype)
        return jnp.where(used if held.ndim == 3 else used[..., None], held, stale)

    parts = ("keys", "values", "key_scales", "value_scales")
    return dataclasses.replace(
        cache, **{name: tuple(filled_up(x) for x in getattr(cache, name)) for name in parts}
    )


def check(cache, starts, lengths, t, *, padding=True):
    """Rows with stale pages and padding of NaN against the reference on a clean cache."""
    rows = len(lengths)
    positions = starts[:, None] + np.arange(t)
    padded = positions >= lengths[:, None]
    q = np.asarray(jnp.asarray(normal(2, (rows, t, 4, 8))).astype(jnp.bfloat16), np.float32)
    want = reference(q, *contents(cache), positions, lengths, 8**-0.5)
    q = np.where(padded[..., None, None], np.float32("nan"), q)
    out = run(poisoned(cache, lengths), q, positions, lengths, np.arange(rows))
    assert np.isfinite(out).all()
    assert relative_error(out, want) < BF16_OPERANDS
    assert padded.any() == padding and not out[padded].any()


@pytest.mark.parametrize(
    "fmt",
    [KVFormat("bfloat16"), INT8, KVFormat("int4", "tracked"), KVFormat("float8_e4m3fn", "static")],
    ids=lambda fmt: fmt.name,
)
@pytest.mark.usefixtures("small_pieces")
def test_chunks_after_different_numbers_of_stored_tokens(fmt):
    """Rows begin at 0, within a page, after more than one piece; one is empty, one has padding."""
    lengths, starts, t = np.array([5, 11, 20, 0, 3]), np.array([0, 6, 15, 0, 0]), 5
    check(filled(fmt, lengths, per_seq=5), starts, lengths, t)


def test_first_chunks():
    """Whole, with padding, of one token, and empty."""
    lengths = np.array([7, 3, 1, 0])
    check(filled(KVFormat("bfloat16"), lengths), np.zeros(4, int), lengths, 7)


def test_full_chunks():
    check(filled(INT8, [6, 5]), np.zeros(2, int), np.array([5, 5]), 5, padding=False)


def test_all_stored_tokens_in_one_piece():
    lengths, starts = np.array([9, 12, 0, 2]), np.array([5, 10, 0, 0])
    check(filled(INT8, lengths), starts, lengths, 4)


@pytest.mark.usefixtures("small_pieces")
def test_one_chunk_or_two_and_any_slots():
    lengths = np.array([9, 12])
    cache = filled(INT8, lengths)
    q = np.asarray(jnp.asarray(normal(3, (2, 9, 4, 8))).astype(jnp.bfloat16), np.float32)
    positions = np.tile(np.arange(9), (2, 1))
    whole = run(cache, q, positions, [9, 9], [0, 1])
    second = run(cache, q[::-1, 4:], positions[:, 4:], [9, 9], [1, 0])
    assert relative_error(second[::-1], whole[:, 4:]) < BF16_OPERANDS


def queries_back(q: Any, *_: Any, **__: Any) -> Any:
    return q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))


def twice_the_queries(q: Any, *_: Any, **__: Any) -> Any:
    return q * q.dtype.type(2), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))


def test_a_row_does_not_depend_on_what_others_have_stored(monkeypatch):
    """Beside padding or a row that has stored tokens it takes other branches: the same bits."""
    monkeypatch.setattr(_compat, "cudnn_causal_attention", queries_back)
    monkeypatch.setattr(_compat, "cudnn_attention", twice_the_queries)
    cache = filled(INT8, [5, 9])
    q = np.asarray(jnp.asarray(normal(4, (2, 5, 4, 8))).astype(jnp.bfloat16), np.float32)
    full = run(cache, q, np.tile(np.arange(5), (2, 1)), [5, 5], [0, 1])
    padded = run(cache, q, np.tile(np.arange(5), (2, 1)), [5, 0], [0, 1])
    stored = run(cache, q, np.array([[0], [4]]) + np.arange(5), [5, 9], [0, 1])
    assert (full == q).all() and (padded[0] == q[0]).all() and (stored[0] == q[0]).all()
    assert not padded[1].any()
    assert relative_error(stored[1], 1.5 * q[1]) < BF16_OPERANDS


def test_size_of_pieces():
    """Four chunks of tokens, within a budget, in equal parts of what the table has room for."""

    def pages(b: int, t: int, per_seq: int) -> int:
        cache = QuantizedKVCache.init(
            num_layers=1,
            num_kv_heads=8,
            head_dim=128,
            num_pages=1,
            page_size=64,
            max_seqs=1,
            pages_per_seq=per_seq,
            fmt=INT8,
        )
        return _prefill._pages_per_piece(cache, b, t, 2)

    assert pages(1, 4096, 256) == 256  # 16384 tokens, all there can be
    assert pages(1, 4096, 320) == 160
    assert pages(1, 16, 2048) == 32  # at least 2048 tokens
    assert pages(16, 4096, 2048) == 128  # 512 MiB for 16 sequences
    assert pages(1000, 4096, 2048) == 32
    assert pages(1, 4096, 1) == 1


def test_without_stored_tokens_no_copy_in_float32(monkeypatch):
    """Nor any other array of all queries than cuDNN's result and what clears padding in it."""
    monkeypatch.setattr(_compat, "cudnn_causal_attention", queries_back)
    monkeypatch.setattr(_compat, "cudnn_attention", twice_the_queries)
    cache = filled(INT8, [5, 9])
    q = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.bfloat16)
    i32 = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 5), (2,), (2,))]

    def call(q, positions, slots, lengths):
        return prefill_by_cudnn(q, cache, 0, positions, slots, lengths, 0.5)

    program = jax.make_jaxpr(call)(q, *i32)
    (cond,) = (e for e in program.jaxpr.eqns if e.primitive.name == "cond")
    full, first, _ = (branch.jaxpr.eqns for branch in cond.params["branches"])

    def of_all_queries(eqns):
        return [e for e in eqns if any(v.aval.size == 2 * 5 * 4 * 8 for v in e.outvars)]

    assert not of_all_queries(full)
    large = of_all_queries(first)
    names = {e.primitive.name for e in large}
    assert "scatter" in names and names <= {"reshape", "scatter", "broadcast_in_dim"}, names
    assert all(v.aval.dtype == jnp.bfloat16 for e in large for v in e.outvars)


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="cuDNN is there")
def test_reasons():
    cache = filled(INT8, [3])
    q = jnp.zeros((1, 2, 4, 8), jnp.bfloat16)

    def reason(q=q, window=None, soft_cap=None) -> str:
        return prefill_unsupported_reason(q, cache, 0, window, soft_cap) or ""

    assert "one new token" in reason(q[:, :1])
    assert "float32 queries" in reason(q.astype(jnp.float32))
    assert "window=4" in reason(window=4) and "soft_cap=5.0" in reason(soft_cap=5.0)
    assert "older than" in reason() or "cuDNN needs an NVIDIA GPU" in reason()


def test_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(INT8, [3])
    q = jnp.zeros((1, 2, 4, 8), jnp.bfloat16)

    def chosen(consecutive: bool = True, backend: str | None = None) -> str:
        options = {"consecutive": consecutive, "backend": backend}
        return _paged.choose_attention_backend(q, cache, 0, None, None, **options)

    monkeypatch.setattr(_paged, "prefill_unsupported_reason", lambda *_: None)
    monkeypatch.setattr(_paged, "kernels_by_default", lambda: True)
    assert chosen() == "cudnn" and chosen(backend="xla") == "xla"
    assert chosen(consecutive=False) == "xla"
    monkeypatch.setattr(_paged, "kernels_by_default", lambda: False)
    assert chosen() == "xla" and chosen(backend="cudnn") == "cudnn"


@pytest.mark.parametrize(
    ("architecture", "dim", "expected"),
    [
        ("sm_75", 128, "sm_80 or later"),
        ("sm_80", 128, ""),
        ("sm_80", 256, "up to 128 on sm_80"),
        ("sm_90", 256, ""),
        ("sm_90", 264, "up to 256 on sm_90"),
        ("sm_90", 12, "a multiple of 8"),
    ],
)
def test_architectures(
    architecture: str, dim: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What jax refuses, rather than computes in another way, is XLA's before jax is asked."""
    info = dataclasses.replace(device_info(), platform="gpu", architecture=architecture)
    for module in (_device, _prefill):
        monkeypatch.setattr(module, "device_info", lambda: info)
    monkeypatch.setattr(_device, "JAX_VERSION", _device.MOSAIC_GPU_MIN_JAX)
    monkeypatch.setattr(_compat, "cudnn_unsupported_reason", lambda: None)
    q = jnp.zeros((1, 2, 4, dim), jnp.bfloat16)
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=2,
        head_dim=dim,
        num_pages=1,
        page_size=4,
        max_seqs=1,
        pages_per_seq=1,
        fmt=INT8,
    )
    reason = prefill_unsupported_reason(q, cache, 0, None, None) or ""
    assert expected in reason and bool(expected) == bool(reason)


def test_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo

    reason = _compat.cudnn_unsupported_reason.__wrapped__

    def missing() -> int:
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    assert reason() is None
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    assert reason() == "jax finds no cuDNN: cuDNN is not detected."
