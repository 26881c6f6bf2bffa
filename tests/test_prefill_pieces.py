"""Prefill in pieces, as cuDNN computes it on GPUs, with a stand-in for cuDNN on any device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import _compat
from qjax.kv_format import KVFormat
from qjax.ops import _prefill
from qjax.ops._prefill import prefill_by_cudnn, prefill_unsupported_reason
from tests.test_attention import contents, filled, normal, reference
from tests.tolerances import BF16_OPERANDS, relative_error

INT8 = KVFormat("int8", "dynamic")


def stand_in(q: Any, k: Any, v: Any, q_n: Any, kv_n: Any, *, scale: float, causal: bool) -> Any:
    """What ``_compat.cudnn_attention`` promises, and garbage where it promises nothing."""
    b, t, heads, _ = q.shape
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2).astype(jnp.float32) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k) * jnp.float32(scale)
    query, key = jnp.arange(t)[None, :, None], jnp.arange(k.shape[1])[None, None, :]
    seen = key < kv_n[:, None, None]
    seen = jnp.broadcast_to(seen & (key <= query) if causal else seen, (b, t, k.shape[1]))
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", jnp.exp(logits - lse[..., None]), v).astype(q.dtype)
    real = jnp.arange(t)[None, :] < q_n[:, None]
    nan = jnp.float32(jnp.nan)
    return jnp.where(real[..., None, None], out, nan.astype(q.dtype)), jnp.where(
        real[:, None], lse, nan
    )


@pytest.fixture(autouse=True)
def _no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "cudnn_attention", stand_in)
    monkeypatch.setattr(_prefill, "_PIECE_TOKENS", 8)  # two pages of 4


def run(cache, q, positions, lengths, slots):
    def call(q, positions, slots, lengths):
        return prefill_by_cudnn(q, cache, 0, positions, slots, lengths, 8**-0.5)

    i32 = (jnp.asarray(x, jnp.int32) for x in (positions, slots, lengths))
    return np.asarray(jax.jit(call)(jnp.asarray(q, jnp.bfloat16), *i32).astype(jnp.float32))


@pytest.mark.parametrize(
    "fmt",
    [KVFormat("bfloat16"), INT8, KVFormat("int4", "tracked"), KVFormat("float8_e4m3fn", "static")],
    ids=lambda fmt: fmt.name,
)
def test_chunks_after_different_numbers_of_stored_tokens(fmt):
    """Rows begin at 0, within a page, after more than one piece; one is empty, one has padding."""
    lengths, starts, t = np.array([5, 11, 20, 0, 3]), np.array([0, 6, 15, 0, 0]), 5
    cache = filled(fmt, lengths, per_seq=5)
    positions = starts[:, None] + np.arange(t)
    q = np.asarray(jnp.asarray(normal(2, (5, t, 4, 8))).astype(jnp.bfloat16), np.float32)
    out = run(cache, q, positions, lengths, np.arange(5))
    want = reference(q, *contents(cache), positions, lengths, 8**-0.5)
    assert np.isfinite(out).all()
    assert relative_error(out, want) < BF16_OPERANDS
    padded = positions >= lengths[:, None]
    assert padded.any() and not out[padded].any()


def test_one_chunk_or_two_and_any_slots():
    lengths = np.array([9, 12])
    cache = filled(INT8, lengths)
    q = np.asarray(jnp.asarray(normal(3, (2, 9, 4, 8))).astype(jnp.bfloat16), np.float32)
    positions = np.tile(np.arange(9), (2, 1))
    whole = run(cache, q, positions, [9, 9], [0, 1])
    second = run(cache, q[::-1, 4:], positions[:, 4:], [9, 9], [1, 0])
    assert relative_error(second[::-1], whole[:, 4:]) < BF16_OPERANDS


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
