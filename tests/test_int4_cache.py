"""What 4-bit keys and values get beyond an absmax scale: clipping, both signs, a mixed basis."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluation import score
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.decoder import Decoder
from qjax.ops.kv import best_scale
from qjax.serving.kv_scales import export_scales
from tests.test_key_bias import QWEN2, qwen2_params, sequences

INT4 = KVFormat("int4", "dynamic")


def test_the_best_scale_halves_the_error_of_some_tokens_and_worsens_none():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 64)).astype(np.float32)
    absmax = np.abs(x).max(-1)
    plain = absmax / np.float32(7)

    def error(scale: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(x / scale[:, None]), -8, 7)
        return ((codes * scale[:, None] - x) ** 2).sum(-1)

    keys, values = (
        np.asarray(best_scale(jnp.asarray(x), jnp.asarray(plain), signed=s)) for s in (True, False)
    )
    assert (values > 0).all() and 0.3 < (keys < 0).mean() < 0.7
    before = error(plain)
    assert (error(values) <= before * 1.01).all() and error(values).sum() < 0.85 * before.sum()
    assert error(keys).sum() < 0.8 * before.sum()


def test_a_mixed_basis_makes_up_for_features_of_unequal_size(monkeypatch):
    """Some key features 8 times larger, and the queries smaller: the same model in float."""
    config = dataclasses.replace(QWEN2, num_layers=1, layer_windows=())
    module = Decoder(config, dtype=jnp.float32)
    params = jax.tree.map(lambda x: x, qwen2_params(2.0))
    attn = params["model"]["layers_0"]["self_attn"]
    gain = np.ones(16, np.float32)
    gain[[2, 10]] = 8
    for name, factor in (("k_proj", np.tile(gain, 2)), ("q_proj", np.tile(1 / gain, 4))):
        attn[name] = jax.tree.map(lambda x, f=factor: jnp.asarray(np.asarray(x) * f), attn[name])

    def kl() -> float:
        result = score(
            module, params, sequences(), kv_format=INT4, reference=(module, params), chunk=32
        ).kl
        assert result is not None
        return result

    assert INT4.mixes_keys and not dataclasses.replace(INT4, without_key_bias=True).mixes_keys
    mixed = kl()
    monkeypatch.setattr(KVFormat, "mixes_keys", property(lambda self: False))
    assert mixed < 0.7 * kl()


def test_static_scales_are_not_taken_from_mixed_keys(tmp_path):
    cache = QuantizedKVCache.init(
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
        num_pages=1,
        page_size=4,
        max_seqs=1,
        pages_per_seq=1,
        fmt=INT4,
    )
    with pytest.raises(ValueError, match="layer 0 holds keys in int4-dynamic, which mixes"):
        export_scales(tmp_path / "s.json", cache, QWEN2)
