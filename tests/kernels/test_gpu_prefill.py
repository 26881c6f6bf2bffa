"""Prefill by cuDNN on the GPU, against the XLA form of the same attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_format import KVFormat
from qjax.ops.attention import paged_attention
from tests.kernels.attention_problems import Sizes, filled
from tests.tolerances import BF16_OPERANDS, relative_error

pytestmark = pytest.mark.gpu

FORMATS = [
    KVFormat("bfloat16"),
    KVFormat("float8_e4m3fn", "static"),
    KVFormat("int8", "dynamic"),
    KVFormat("int4", "tracked"),
]


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if jax.devices()[0].platform != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def _both(fmt: KVFormat, starts: list[int], counts: list[int], t: int, dim: int = 128) -> None:
    sizes = Sizes(heads=2, ratio=4, dim=dim)
    lengths = [s + n for s, n in zip(starts, counts, strict=True)]
    cache = filled(fmt, lengths, sizes)
    rows = len(starts)
    q = np.random.default_rng(3).normal(size=(rows, t, 8, dim))
    positions = jnp.asarray(np.asarray(starts)[:, None] + np.arange(t), jnp.int32)
    slots, n = jnp.arange(rows, dtype=jnp.int32), jnp.asarray(lengths, jnp.int32)

    def call(q: jax.Array, positions: jax.Array, n: jax.Array, backend: str) -> jax.Array:
        return paged_attention(
            q,
            cache,
            0,
            positions,
            slots,
            n,
            scale=sizes.scale,
            consecutive=True,
            backend=backend,
        )

    run = jax.jit(call, static_argnums=3)
    q16 = jnp.asarray(q, jnp.bfloat16)
    out = np.asarray(run(q16, positions, n, "cudnn"), np.float64)
    want = np.asarray(run(q16, positions, n, "xla"), np.float64)
    assert np.isfinite(out).all()
    assert relative_error(out, want) < BF16_OPERANDS
    for row, count in enumerate(counts):
        assert not out[row, count:].any(), "padding must be zeros"
        if count:
            assert relative_error(out[row, :count], want[row, :count]) < 2 * BF16_OPERANDS
    assert (out == np.asarray(run(q16, positions, n, "cudnn"), np.float64)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_first_chunks(fmt: KVFormat) -> None:
    _both(fmt, [0, 0, 0, 0], [256, 100, 1, 0], 256)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_after_stored_tokens(fmt: KVFormat) -> None:
    """More than one piece, a start within a page, a first chunk and an empty row beside them."""
    _both(fmt, [3000, 70, 0, 0, 2048], [128, 128, 77, 0, 5], 128)


def test_head_dims() -> None:
    for dim in (64, 96, 256):
        _both(FORMATS[2], [100, 0], [64, 64], 64, dim)
