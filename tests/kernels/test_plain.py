"""Products with plain 16-bit weights: the kernel in the interpreter and on the GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.ops.dot import unsupported_reason
from qjax.pallas_kernels import plain
from qjax.pallas_kernels.weight_only import Config
from tests import tolerances
from tests.tolerances import relative_error


def _operands(
    rng: np.random.Generator, m: int, k: int, n: int, dtype: str = "bfloat16"
) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(rng.standard_normal((m, k)), dtype)
    return x, jnp.asarray(rng.standard_normal((k, n)) * k**-0.5, dtype)


def _reference(x: jax.Array, w: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


@pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX, reason="this jax has no Pallas GPU interpreter"
)
@pytest.mark.parametrize(("m", "config"), [(3, Config(2, 3)), (9, Config(1, 2, 2))])
def test_in_the_interpreter(m: int, config: Config, rng: np.random.Generator) -> None:
    x, w = _operands(rng, m, 512, 128)
    out = plain.matmul(x, w, config=config, out_dtype=jnp.float32, interpret=True)
    assert relative_error(out, _reference(x, w)) < tolerances.F32_SUM


@pytest.fixture
def hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("m", [1, 5, 8, 17, 64])
@pytest.mark.parametrize(("k", "n"), [(128, 64), (1024, 768), (14336, 4096), (4096, 28672)])
def test_on_the_gpu(m: int, k: int, n: int, rng: np.random.Generator) -> None:
    x, w = _operands(rng, m, k, n, "float16" if m == 8 else "bfloat16")
    run = jax.jit(lambda x, w: qjax.quantized_dot(x, w, out_dtype=jnp.float32))
    assert "mosaic_gpu" in run.lower(x, w).as_text()
    out = run(x, w)
    assert relative_error(out, _reference(x, w)) < tolerances.F32_SUM_GPU
    assert (out == run(x, w)).all()
    parts = qjax.quantized_dot(x, w, out_dtype=jnp.float32, keep_splits=True)
    assert relative_error(parts.sum(0), out) < tolerances.F32_SUM_GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("keep_splits", [False, True])
def test_gradients_and_maps_on_the_gpu(keep_splits: bool, rng: np.random.Generator) -> None:
    x, w = _operands(rng, 4, 4096, 256)

    def loss(backend: str, x: jax.Array, w: jax.Array) -> jax.Array:
        out = qjax.quantized_dot(
            x, w, out_dtype=jnp.float32, keep_splits=keep_splits, backend=backend
        )
        return jnp.sin(out.sum(0) if keep_splits else out).sum()

    for a, b in zip(
        jax.grad(lambda *o: loss("mosaic_gpu", *o), (0, 1))(x, w),
        jax.grad(lambda *o: loss("xla", *o), (0, 1))(x, w),
        strict=True,
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert relative_error(a, b) < tolerances.BF16_OPERANDS
    many = jnp.stack([w, -w])
    mapped = jax.vmap(lambda w: qjax.quantized_dot(x, w, backend="mosaic_gpu"))(many)
    alone = qjax.quantized_dot(x, w, backend="xla")
    got = np.asarray(mapped, np.float32)
    assert relative_error(got[0], np.asarray(alone, np.float32)) < tolerances.BF16_OPERANDS


def test_every_shape_has_a_config() -> None:
    for m in (1, 16, 64):
        for k, n in ((4096, 6144), (4096, 28672), (14336, 4096), (8192, 57344), (128, 64)):
            config = plain.heuristic_config(m, k, n)
            assert plain.smem_bytes(config, max(8, m)) <= 232448
            assert n % (config.warpgroups * 64) == 0 and k % (config.splits * 128) == 0


def test_what_the_kernel_does_not_take(rng: np.random.Generator) -> None:
    x, w = _operands(rng, 2, 128, 64)
    assert "m=65 rows" in str(plain.unsupported_reason(65, 128, 64, jnp.bfloat16))
    assert "must be multiples" in str(plain.unsupported_reason(1, 100, 64, jnp.bfloat16))
    assert "float32 operands" in str(plain.unsupported_reason(1, 128, 64, jnp.float32))
    assert "one type" in str(unsupported_reason(x.astype(jnp.float16), w))
    with pytest.raises(NotImplementedError, match="cannot be cut as"):
        plain.matmul(x, w, config=Config(2, 2))
    with pytest.raises(NotImplementedError, match="nothing to unpack"):
        plain.matmul(x, w, config=Config(1, 2, 1, True))
    if mosaic_gpu_unsupported_reason() is not None:
        with pytest.raises(NotImplementedError, match="mosaic_gpu cannot run here"):
            qjax.quantized_dot(x, w, backend="mosaic_gpu")
