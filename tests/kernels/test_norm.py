"""Residual addition and normalisation: the kernel against the XLA form, here and on the GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.ops.norm import add_rms_norm, add_rms_norm_unsupported_reason, rms_norm
from qjax.pallas_kernels import add_rms_norm as kernel
from tests import tolerances
from tests.tolerances import relative_error


def _operands(
    rng: np.random.Generator, rows: int, columns: int, splits: int, dtype: str = "bfloat16"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    residual = jnp.asarray(rng.standard_normal((rows, columns)) * 3, dtype)
    delta = jnp.asarray(rng.standard_normal((splits, rows, columns)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, columns), jnp.float32)
    return residual, delta if splits > 1 else delta.astype(dtype), weight


def _check(operands: tuple[jax.Array, ...], out: jax.Array, normed: jax.Array) -> None:
    residual, delta, weight = operands
    expected, _ = add_rms_norm(residual, delta, weight, 1e-5, backend="xla")
    assert out.dtype == residual.dtype and (out == expected).all()
    exact = np.asarray(out, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-5) * np.asarray(weight)
    assert relative_error(np.asarray(normed, np.float64), exact) < tolerances.BF16_OUTPUT


def needs_hopper() -> None:
    """Skip where the kernel cannot run."""
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX, reason="this jax has no Pallas GPU interpreter"
)
@pytest.mark.parametrize("splits", [1, 3])
def test_in_the_interpreter(splits: int, rng: np.random.Generator) -> None:
    operands = _operands(rng, 2, 1024, splits)
    _check(operands, *kernel.add_rms_norm(*operands, 1e-5, interpret=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns", "splits", "dtype"),
    [
        (1, 4096, 8, "bfloat16"),
        (64, 4096, 1, "bfloat16"),
        (5, 6144, 4, "float16"),
        (8, 1024, 2, "bfloat16"),
    ],
)
def test_on_the_gpu(
    rows: int, columns: int, splits: int, dtype: str, rng: np.random.Generator
) -> None:
    needs_hopper()
    operands = _operands(rng, rows, columns, splits, dtype)
    run = jax.jit(lambda r, d, w: add_rms_norm(r, d, w, 1e-5, backend="mosaic_gpu"))
    out, normed = run(*operands)
    _check(operands, out, normed)
    assert (normed == run(*operands)[1]).all()

    def loss(backend: str, *arrays: jax.Array) -> jax.Array:
        residual, delta, weight = arrays
        normed = add_rms_norm(residual, delta, weight, 1e-5, backend=backend)[1]
        return normed.astype(jnp.float32).sum()

    grads, xla = (
        jax.grad(functools.partial(loss, backend), (0, 1, 2)) for backend in ("mosaic_gpu", "xla")
    )
    for a, b in zip(grads(*operands), xla(*operands), strict=True):
        assert (a == b).all()


@pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX, reason="this jax has no Pallas GPU interpreter"
)
def test_float16_rows_in_the_interpreter(rng: np.random.Generator) -> None:
    operands = _operands(rng, 2, 1024, 3)
    out, normed = kernel.add_rms_norm(*operands, 1e-5, normed_dtype=jnp.float16, interpret=True)
    want = add_rms_norm(*operands, 1e-5, dtype=jnp.float16, backend="xla")
    assert normed.dtype == jnp.float16 and (out == want[0]).all()
    # Three bits more than bfloat16 has.
    error = relative_error(np.asarray(normed, np.float64), np.asarray(want[1], np.float64))
    assert error < tolerances.BF16_OUTPUT / 8


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "splits"), [(1, 8), (64, 1), (100, 4)])
def test_float16_rows_on_the_gpu(rows: int, splits: int, rng: np.random.Generator) -> None:
    needs_hopper()
    operands = _operands(rng, rows, 4096, splits)

    def run(backend: str) -> tuple[jax.Array, jax.Array]:
        call = functools.partial(add_rms_norm, dtype=jnp.float16, backend=backend)
        return jax.jit(lambda r, d, w: call(r, d, w, 1e-5))(*operands)

    (out, normed), want = run("mosaic_gpu"), run("xla")
    assert normed.dtype == jnp.float16 and (out == want[0]).all()
    error = relative_error(np.asarray(normed, np.float64), np.asarray(want[1], np.float64))
    assert error < tolerances.BF16_OUTPUT / 8


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [4096, 8192])
def test_as_many_ctas_as_there_may_be(columns: int, rng: np.random.Generator) -> None:
    """Rows of clusters of four CTAs, of two, and of one each: the same, bit by bit."""
    needs_hopper()
    residual, delta, weight = _operands(rng, 200, columns, 4)
    run = jax.jit(lambda r, d, w: add_rms_norm(r, d, w, 1e-5, backend="mosaic_gpu"))
    out, normed = run(residual, delta, weight)
    for rows in (1, 33, 66, 67):
        few_out, few_normed = run(residual[:rows], delta[:, :rows], weight)
        assert (few_out == out[:rows]).all() and (few_normed == normed[:rows]).all()


def test_xla_form_is_addition_then_normalisation(rng: np.random.Generator) -> None:
    residual, delta, weight = _operands(rng, 3, 32, 2, "float32")
    out, normed = add_rms_norm(residual, delta, weight, 1e-6)
    np.testing.assert_array_equal(out, residual + (delta[0] + delta[1]))
    np.testing.assert_array_equal(normed, rms_norm(out, weight, 1e-6, jnp.float32))


def test_what_the_kernel_does_not_take(rng: np.random.Generator) -> None:
    residual, delta, weight = _operands(rng, 2, 1024, 2)
    assert "float32 activations" in str(
        add_rms_norm_unsupported_reason(residual.astype(jnp.float32))
    )
    assert "300 rows" in str(kernel.unsupported_reason(300, 1024, jnp.bfloat16))
    assert "multiples of 128" in str(kernel.unsupported_reason(2, 1000, jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="add_rms_norm: 96 columns"):
        kernel.add_rms_norm(residual[:, :96], delta[..., :96], weight[:96], 1e-5)
    if mosaic_gpu_unsupported_reason() is not None:
        with pytest.raises(NotImplementedError, match="add_rms_norm: mosaic_gpu cannot run here"):
            add_rms_norm(residual, delta, weight, 1e-5, backend="mosaic_gpu")
