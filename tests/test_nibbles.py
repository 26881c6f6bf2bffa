from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.checkpoints import nibbles
from qjax.checkpoints.nibbles import pack_nibbles, unpack_nibbles


@pytest.mark.parametrize("shape", [(6, 10), (5, 7), (3, 4, 5), (0, 4)])
@pytest.mark.parametrize("dtype", ["int4", "float4_e2m1fn"])
def test_host_and_device_agree(
    shape: tuple[int, ...],
    dtype: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = getattr(ml_dtypes, dtype)
    codes = rng.integers(0, 16, shape)
    signed = ((codes ^ 8) - 8).astype(np.int8)
    host = signed.astype(kind) if dtype == "int4" else codes.astype(np.uint8).view(kind)
    monkeypatch.setattr(nibbles, "_STRIP", 7)
    stored = pack_nibbles(jnp.asarray(host))
    padded = np.pad(codes, [(0, 0)] * (len(shape) - 1) + [(0, shape[-1] % 2)])
    np.testing.assert_array_equal(stored, padded[..., ::2] | padded[..., 1::2] << 4)
    again = unpack_nibbles(stored, shape[-1], dtype)
    assert isinstance(again, jax.Array) and again.dtype == dtype and again.shape == shape
    np.testing.assert_array_equal(np.asarray(again).astype(np.float32), host.astype(np.float32))
    monkeypatch.setattr(nibbles, "_one_cpu", lambda x: False)
    other = unpack_nibbles(jnp.asarray(stored), shape[-1], dtype)
    np.testing.assert_array_equal(np.asarray(other), np.asarray(again))
