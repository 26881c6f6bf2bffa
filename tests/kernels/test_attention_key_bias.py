"""Keys stored without their bias in the decode kernel: the term that XLA computes, and the choice.

What the kernel does with the term is in test_attention_{interpret,ptx,aot}.py and
test_gpu_attention.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_format import KVFormat
from qjax.ops import _paged, key_bias
from qjax.ops._paged import choose_attention_backend, paged_attention_unsupported_reason
from qjax.ops._prefill import prefill_unsupported_reason
from qjax.pallas_kernels import paged_decode
from tests.kernels.attention_problems import Sizes, bias_logits, filled, queries
from tests.kernels.attention_problems import key_bias as known_bias
from tests.tolerances import KEY_BIAS_TF32

UNBIASED = KVFormat("float8_e4m3fn", "static", without_key_bias=True)


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 as tensor cores take it: without its last 13 bits."""
    return (np.asarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    return float((np.abs(got - want).max(-1) / np.abs(want).max(-1)).max())


@pytest.mark.parametrize("ratio", [1, 7])
def test_logits_at_all_positions(ratio: int) -> None:
    sizes = Sizes(heads=2, ratio=ratio, dim=64)
    q = queries(sizes, 3).reshape(3, 2, ratio, 64)
    got = known_bias(sizes).all_logits(q, 1024, 0.25)
    want = bias_logits(sizes, np.asarray(q.astype(jnp.float32), np.float64), 1024) * 0.25
    assert np.abs(want).max() > 100
    assert largest_error(np.asarray(got), want) < KEY_BIAS_TF32


def test_the_same_with_operands_of_eleven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs compute it; without the second parts errors would be a hundred times as large."""
    sizes = Sizes(heads=2, ratio=4, dim=64)
    q = queries(sizes, 3).reshape(3, 2, 4, 64)
    want = bias_logits(sizes, np.asarray(q.astype(jnp.float32), np.float64), 512)

    def product(spec: str, x: jax.Array, y: jax.Array, *, precision: object) -> np.ndarray:
        assert precision is jax.lax.Precision.DEFAULT
        return np.einsum(spec, *(tf32(np.asarray(part)).astype(np.float64) for part in (x, y)))

    monkeypatch.setattr(key_bias.jnp, "einsum", product)
    fine = largest_error(np.asarray(known_bias(sizes).all_logits(q, 512, 1.0)), want)
    monkeypatch.setattr(key_bias, "_split", lambda x: (x, jnp.zeros_like(x)))
    rounded = largest_error(np.asarray(known_bias(sizes).all_logits(q, 512, 1.0)), want)
    assert fine < KEY_BIAS_TF32 < rounded / 30


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(heads=1, ratio=7)
    cache, q = filled(UNBIASED, [100], sizes), queries(sizes, 1)

    def choice(backend: str | None) -> str:
        return choose_attention_backend(q, cache, 0, None, None, consecutive=True, backend=backend)

    monkeypatch.setattr(_paged, "mosaic_gpu_unsupported_reason", lambda: None)
    monkeypatch.setattr(_paged, "kernels_by_default", lambda: True)
    monkeypatch.setattr("qjax.ops._dispatch.kernels_by_default", lambda: True)
    assert choice("mosaic_gpu") == "mosaic_gpu"
    assert choice(None) == "mosaic_gpu"
    monkeypatch.setattr(_paged, "_MAX_BIAS_BYTES", 3583)
    reason = "keys stored without their bias, whose logits would take 3584 bytes; the limit is 3583"
    assert paged_attention_unsupported_reason(q, cache, 0) == reason
    assert choice(None) == "xla"
    several = jnp.concatenate([q, q], axis=1)
    assert "too coarse" in (prefill_unsupported_reason(several, cache, 0, None, None) or "")


def test_a_term_of_another_shape_is_refused() -> None:
    sizes = Sizes(heads=1, ratio=2)
    cache, q = filled(UNBIASED, [100], sizes), queries(sizes, 1).reshape(1, 1, 2, 128)
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 64\) must be float32\(1, 1, 2, 128\)"):
        paged_decode.decode(
            q,
            cache.keys[0],
            cache.values[0],
            cache.key_scales[0],
            cache.value_scales[0],
            cache.page_table,
            None,
            jnp.full((1,), 100, jnp.int32),
            kind="float8_e4m3fn",
            scale=1.0,
            logit_bias=jnp.zeros((1, 1, 2, 64)),
        )
