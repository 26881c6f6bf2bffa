"""Statistics, channel scaling (AWQ, SmoothQuant), clipping and correction on single layers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import calibration as c
from qjax.calibration import folding
from qjax.formats import W8A8_INT8, QuantFormat
from qjax.quantize import compute_scale, quantize
from tests.calibration.problems import TOKENS, K, N, error, layer

G16 = QuantFormat("int4", "group", group_size=16)
W, X = layer()
OUTLIERS = np.ones(K, np.float32)
OUTLIERS[[3, 17, 30]] = 50


def test_statistics_of_parts_add_up_and_padding_does_not_count() -> None:
    x = jnp.asarray(X).reshape(4, TOKENS // 4, K)
    whole = c.update_hessian(c.init_hessian(K), x)
    first, second = (c.update_hessian(c.init_hessian(K), part) for part in (x[:2], x[2:]))
    merged = c.merge_hessian(first, second)
    np.testing.assert_allclose(merged.hessian, whole.hessian, rtol=1e-4, atol=1e-2)
    assert int(merged.count) == int(whole.count) == TOKENS

    valid = jnp.arange(4)[:, None] * jnp.ones((1, TOKENS // 4), jnp.int32) < 2
    padded = jnp.where(valid[..., None], x, jnp.nan)
    masked = c.update_hessian(c.init_hessian(K), padded, valid)
    np.testing.assert_allclose(masked.hessian, first.hessian, rtol=1e-5, atol=1e-3)
    channels = c.update_channel(c.init_channel(K), padded, valid)
    np.testing.assert_array_equal(channels.absmax, np.abs(X[: TOKENS // 2]).max(0))
    np.testing.assert_allclose(channels.mean_square, (X[: TOKENS // 2] ** 2).mean(0), rtol=1e-5)
    both = c.merge_channel(channels, c.update_channel(c.init_channel(K), x[2:]))
    np.testing.assert_array_equal(both.absmax, np.abs(X).max(0))


def test_searched_scales_beat_the_full_range_in_every_tile() -> None:
    importance = jnp.asarray((X**2).sum(0))
    for fmt in (G16, G16.replace(qtype="int2", symmetric=False)):
        w = jnp.asarray(W[:32])  # whole tiles
        errors = []
        for scale, zero in (c.search_scale(w, importance[:32], fmt), compute_scale(w, fmt)):
            delta = np.asarray(quantize(w, fmt, scale=scale, zero_point=zero).dequantize()) - W[:32]
            errors.append((delta**2 * np.asarray(importance)[:32, None]).reshape(2, 16, N).sum(1))
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < 0.95 * errors[
            1
        ].sum()


def test_awq_recovers_what_outlier_channels_cost() -> None:
    """The same layer with three input channels 50 times larger and their weights smaller."""
    x, w = X * OUTLIERS, W / OUTLIERS[:, None]
    lost = error(w, np.asarray(quantize(jnp.asarray(w), G16).dequantize()), x)
    harmless = error(W, np.asarray(quantize(jnp.asarray(W), G16).dequantize()), X)
    stats = c.update_hessian(c.init_hessian(K), jnp.asarray(x))
    halves = [jnp.asarray(w[:, :10]), jnp.asarray(w[:, 10:])]
    found = c.search_awq_scale(halves, stats, G16)
    scaled = folding.scale_inputs(jnp.asarray(w), found.channel_scale)
    moved = folding.scale_hessian(stats, found.channel_scale)
    inputs = x / np.asarray(found.channel_scale)
    plain = error(np.asarray(scaled), np.asarray(quantize(scaled, G16).dequantize()), inputs)
    clipped = c.quantize_clipped(scaled, moved, G16)
    after = error(np.asarray(scaled), np.asarray(clipped.dequantize()), inputs)
    assert plain**2 == pytest.approx(float(found.after), rel=0.02)
    assert after < plain and (lost - after) / (lost - harmless) > 0.8


def test_smoothquant_recovers_what_outlier_channels_cost() -> None:
    def loss(x: np.ndarray, w: np.ndarray) -> float:
        assert W8A8_INT8.activation is not None
        inputs = quantize(jnp.asarray(x), W8A8_INT8.activation, axis=-1).dequantize()
        values = quantize(jnp.asarray(w), W8A8_INT8).dequantize()
        return float(np.linalg.norm(np.asarray(inputs) @ np.asarray(values) - x @ w))

    x, w = X * OUTLIERS, W / OUTLIERS[:, None]
    stats = c.update_channel(c.init_channel(K), jnp.asarray(x))
    found = c.search_smooth_scale([jnp.asarray(w)], stats, jnp.asarray(x), W8A8_INT8)
    s = np.asarray(found.channel_scale)
    lost, harmless, after = loss(x, w), loss(X, W), loss(x / s, w * s[:, None])
    assert (lost - after) / (lost - harmless) > 0.8
    assert float(found.after) < float(found.before)
    with pytest.raises(ValueError, match="does not quantize activations"):
        c.search_smooth_scale([jnp.asarray(w)], stats, jnp.asarray(x), G16)


def test_grouped_queries_share_the_factor_of_their_value_channel() -> None:
    sources = folding.gqa_sources(num_q_heads=4, num_kv_heads=2, head_dim=10)
    assert sources[:10].tolist() == sources[10:20].tolist() == list(range(10))
    stats = c.update_hessian(c.init_hessian(K), jnp.asarray(X))
    found = c.search_awq_scale([jnp.asarray(W)], stats, G16, sources=sources)
    assert found.scale.shape == (20,)
    np.testing.assert_array_equal(found.channel_scale, np.asarray(found.scale)[sources])


def test_norm_folding_gives_back_the_factor_that_was_really_divided_by() -> None:
    weight = jnp.asarray([1.0, 0.3, 0.0, 1e-5], jnp.bfloat16)
    scale = jnp.asarray([1.7, 0.9, 2.0, 1e38], jnp.float32)
    new, factor = folding.fold_into_norm(weight, scale)
    assert new.dtype == weight.dtype and np.isfinite(np.asarray(factor)).all()
    product = np.asarray(new, np.float32) * np.asarray(factor)
    np.testing.assert_allclose(product, np.asarray(weight, np.float32), rtol=1e-6)
    assert float(factor[2]) == 1.0 and float(factor[0]) != pytest.approx(1.7, rel=1e-6)


def test_correction_aims_at_the_output_of_undisturbed_inputs() -> None:
    disturbed = X + 0.1 * np.random.default_rng(1).normal(size=X.shape).astype(
        np.float32
    ) @ np.diag(X.std(0))
    missing = (X - disturbed) @ W
    valid = jnp.ones((TOKENS,), bool)
    hessian = c.update_hessian(c.init_hessian(K), jnp.asarray(disturbed, jnp.float32))
    stats = c.update_correction(
        c.init_correction(K, N), jnp.asarray(disturbed, jnp.float32), jnp.asarray(missing), valid
    )
    w = jnp.asarray(W)
    corrected = c.corrected_weight(w, hessian, stats, jnp.float32(0.001))
    before = float(c.corrected_error(w, w, hessian, stats))
    after = float(c.corrected_error(w, corrected, hessian, stats))
    assert after < before
    direct = np.linalg.norm(X @ W - disturbed @ np.asarray(corrected))
    assert after == pytest.approx(direct / np.linalg.norm(disturbed @ W), rel=1e-3)
