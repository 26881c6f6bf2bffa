"""GPTQ and coordinate descent on single layers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibration import gptq, gptq_quantize, init_hessian, refine, update_hessian
from qjax.formats import FP8_E4M3_CHANNEL, QuantFormat
from qjax.quantize import quantize
from tests.calibration.problems import K, N, error, layer, reference_gptq

G16 = QuantFormat("int4", "group", group_size=16)  # 40 rows: the last group is cut short
G16_ASYM = G16.replace(symmetric=False)
W, X = layer()
FORMATS = {
    "int4": G16,
    "int4_asym": G16_ASYM,
    "fp8": FP8_E4M3_CHANNEL,
    "block": QuantFormat("int8", "block", block=(16, 8)),
}


@functools.cache
def _stats() -> gptq.HessianStats:
    return update_hessian(init_hessian(K), jnp.asarray(X))


@pytest.mark.parametrize("name", FORMATS)
def test_output_error_falls_and_weight_error_rises(name: str) -> None:
    fmt, w = FORMATS[name], jnp.asarray(W)
    rtn = quantize(w, fmt)
    result, info = gptq_quantize(w, _stats(), fmt)
    # The same tree, shapes and types: whatever runs one runs the other.
    assert jax.tree.structure(result) == jax.tree.structure(rtn)
    described = lambda q: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), q)  # noqa: E731
    assert described(result) == described(rtn)
    plain, found = np.asarray(rtn.dequantize()), np.asarray(result.dequantize())
    assert error(W, found, X) < 0.8 * error(W, plain, X)
    assert np.linalg.norm(W - found) > np.linalg.norm(W - plain)
    assert float(info.damping) == pytest.approx(0.01) and int(info.dead) == 0

    better = refine(w, result, _stats(), sweeps=3)
    assert jax.tree.structure(better) == jax.tree.structure(rtn)
    assert error(W, np.asarray(better.dequantize()), X) < 0.97 * error(W, found, X)


@pytest.mark.parametrize(
    ("fmt", "act_order"),
    [(G16, False), (G16_ASYM, True)],
    ids=["symmetric", "asymmetric-act-order"],
)
def test_matches_the_paper_in_float64(fmt: QuantFormat, act_order: bool) -> None:
    order = "static" if act_order else "none"
    result, _ = gptq_quantize(jnp.asarray(W), _stats(), fmt, order=order, search=False)
    hessian = X.astype(np.float64).T @ X
    reference = reference_gptq(W, hessian, fmt, damping=0.01, act_order=act_order)
    assert error(W, np.asarray(result.dequantize()), X) <= 1.01 * error(W, reference, X)
    same = np.isclose(np.asarray(result.dequantize()), reference, rtol=1e-4, atol=1e-5)
    assert same.mean() > 0.95  # a tie broken otherwise changes what follows in its column


def test_damping_is_raised_until_the_factorization_exists() -> None:
    # Two tokens for 40 channels, and next to no damping: singular in float32.
    stats = update_hessian(init_hessian(K), jnp.asarray(1e3 * X[:2]))
    result, info = gptq_quantize(jnp.asarray(W), stats, G16, damping=1e-9)
    assert float(info.damping) > 1e-9
    assert np.isfinite(np.asarray(result.dequantize())).all()


def test_channels_without_activations_are_rounded_to_nearest() -> None:
    x = X.copy()
    x[:, 16:32] = 0  # a whole group, whose scales then have nothing to gain from shrinking
    stats = update_hessian(init_hessian(K), jnp.asarray(x))
    result, info = gptq_quantize(jnp.asarray(W), stats, G16)
    assert int(info.dead) == 16
    plain = quantize(jnp.asarray(W), G16)
    np.testing.assert_array_equal(
        np.asarray(result.dequantize())[16:32], np.asarray(plain.dequantize())[16:32]
    )


def test_program_does_not_grow_with_the_width() -> None:
    def size(k: int) -> int:
        f32 = jnp.float32
        shapes = [jax.ShapeDtypeStruct(s, f32) for s in ((k, 512), (k, k), ())]
        fmt = G16.replace(group_size=128)
        lowered = gptq._gptq.lower(*shapes, fmt=fmt, order="group", search=True)
        return lowered.as_text().count("\n")

    assert size(14336) < 1.02 * size(512)


def test_refuses() -> None:
    w, stats = jnp.asarray(W), _stats()
    with pytest.raises(ValueError, match="unknown order='other'"):
        gptq_quantize(w, stats, G16, order="other")
    with pytest.raises(ValueError, match="statistics of 40 channels"):
        gptq_quantize(w[:8], stats, G16)
    with pytest.raises(ValueError, match="damping"):
        gptq_quantize(w, stats, G16, damping=0.0)
    with pytest.raises(ValueError, match="do not fit together"):
        refine(w[:, : N - 1], quantize(w, G16), stats)
