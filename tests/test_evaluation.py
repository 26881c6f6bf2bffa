"""Perplexity through the KV cache, agreement, memory accounting."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.ops.rotary as ops_rotary
from qjax import evaluation
from qjax.assets import bundled_model_path
from qjax.checkpoints.hf import LoadedModel, load_model
from qjax.evaluation import memory, report, speed
from qjax.formats import FORMATS, FP8_E4M3_CHANNEL, INT8_CHANNEL
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.quantize import quantize_tree
from tests import tolerances
from tests.kv_outliers import append_with_outlier

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
MODULE = Decoder(CONFIG, dtype=jnp.float32)
PLAIN = KVFormat("float32")


@pytest.fixture(scope="module")
def params() -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(MODULE.init)(jax.random.key(0), tokens)["params"]
    # Freshly initialised models say nothing: larger weights make predictions that differ.
    return jax.tree.map(lambda p: p * 8 if p.ndim == 2 else p, params)


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 40, n).astype(np.int32) for n in (2, 19, 7, 33, 12)]


def by_hand(params: Any, sequences: list[np.ndarray]) -> float:
    """Sum of negative log likelihoods, one sequence at a time, in float64 after the logits."""
    apply = jax.jit(lambda tokens: MODULE.apply({"params": params}, tokens)[0])
    longest = max(map(len, sequences))
    total = 0.0
    for ids in sequences:
        padded = np.zeros((1, longest), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(apply(padded), np.float64)[0, : len(ids) - 1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= logp[np.arange(len(ids) - 1), ids[1:]].sum()
    return total


def test_scores_equal_those_by_hand_whatever_the_batching(params, sequences) -> None:
    wanted = by_hand(params, sequences)
    for kv, batch_size, chunk in [(None, 2, 128), (PLAIN, 2, 8)]:
        scores = evaluation.score(
            MODULE, params, sequences, kv_format=kv, batch_size=batch_size, chunk=chunk
        )
        assert scores.tokens == sum(len(s) - 1 for s in sequences) == 68
        assert scores.nll == pytest.approx(wanted, rel=tolerances.F32_SCORE)
        assert scores.kl is None and scores.top1_agreement is None
    assert scores.perplexity == pytest.approx(math.exp(wanted / 68), rel=1e-4)
    assert scores.bits_per_byte(136) == pytest.approx(wanted / math.log(2) / 136, rel=1e-4)


def test_the_cache_format_shows_in_perplexity_and_agreement(params, sequences) -> None:
    def run(kv: KVFormat) -> evaluation.Scores:
        reference = (MODULE, params)
        return evaluation.score(
            MODULE, params, sequences, kv_format=kv, reference=reference, batch_size=5, chunk=16
        )

    same = run(PLAIN)
    assert same.kl == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1.0
    int8, int4 = (run(parse_kv_format(n, model_dtype=jnp.float32)) for n in ("int8", "int4"))
    assert int8.kl is not None and int4.kl is not None
    assert 0 < int8.kl < int4.kl / 10
    assert int4.top1_agreement is not None and int4.top1_agreement < 1


def test_static_scales_reach_the_cache(params, sequences) -> None:
    fmt = parse_kv_format("int8", mode="static", model_dtype=jnp.float32)
    with pytest.raises(ValueError, match="static"):
        evaluation.score(MODULE, params, sequences, kv_format=fmt)
    coarse = [(np.full(2, 100, np.float32), np.full(2, 100, np.float32))] * 2
    scores = evaluation.score(
        MODULE, params, sequences, kv_format=fmt, static_scales=coarse, batch_size=5, chunk=16
    )
    assert abs(scores.nll - by_hand(params, sequences)) > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": []}, "0 sequences"),
        ({"sequences": [np.zeros(1, np.int32)]}, "shortest of 1"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_arguments_of_score(params, sequences, arguments, message: str) -> None:
    arguments = {"sequences": sequences} | arguments
    with pytest.raises(ValueError, match=message):
        evaluation.score(MODULE, params, **arguments)


@pytest.mark.parametrize("bos", [None, 9])
@pytest.mark.parametrize("seq_len", [2, 5, 100])
def test_windows_score_every_token_once(seq_len: int, bos: int | None) -> None:
    ids = np.arange(100, 123, dtype=np.uint16)
    parts = evaluation.windows(ids, seq_len, bos)
    assert all(2 <= len(p) <= seq_len and p.dtype == np.int32 for p in parts)
    scored = np.concatenate([p[1:] for p in parts])
    np.testing.assert_array_equal(scored, ids if bos is not None else ids[1:])
    with pytest.raises(ValueError, match="at least 2"):
        evaluation.windows(ids, 1, bos)


def test_agreement_by_hand() -> None:
    p = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], jnp.float32))
    q = jnp.log(jnp.asarray([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], jnp.float32))
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), math.log(2)]
    np.testing.assert_allclose(evaluation.kl_divergence(p, q), expected, rtol=1e-6)
    # Logits are defined up to a constant.
    shift = jnp.float32(7)
    np.testing.assert_allclose(evaluation.kl_divergence(p + shift, q), expected, rtol=1e-5)
    assert evaluation.top1_agreement(p, q).tolist() == [False, True]


def test_abstract_sizes_are_those_of_real_parameters(params) -> None:
    for name in ("bf16", "int8", "int4_g32_asym", "fp8_block"):
        fmt = FORMATS[name]
        real = params if fmt is None else quantize_tree(params, {memory.LINEAR_KERNELS: fmt})
        abstract = evaluation.abstract_params(CONFIG, fmt, dtype=jnp.float32)
        assert evaluation.weight_bytes(abstract) == evaluation.weight_bytes(real)
    head = FORMATS["int8"]
    real = quantize_tree(params, {"lm_head/kernel": head})
    abstract = evaluation.abstract_params(CONFIG, None, head=head, dtype=jnp.float32)
    assert evaluation.weight_bytes(abstract) == evaluation.weight_bytes(real)
    with pytest.raises(ValueError, match="none of its own"):
        tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
        evaluation.abstract_params(tied, None, head=head)
    sizes = evaluation.weight_bytes(evaluation.abstract_params(CONFIG, FORMATS["int4_g32"]))
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    assert sizes.linear_elements == linear and sizes.codes == linear // 2
    assert sizes.scales == linear // 32 * 4
    assert sizes.plain == 2 * 40 * 32 * 2 + 5 * 32 * 4  # embedding and head bf16, norms float32
    assert sizes.bits_per_weight == 8 * sizes.total / sizes.elements


@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "int8", "int4"])
def test_kv_bytes_are_those_of_a_real_cache(name: str) -> None:
    from qjax.kv_cache import QuantizedKVCache

    fmt = parse_kv_format(name, model_dtype=jnp.bfloat16)
    cache = QuantizedKVCache.init(
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        num_pages=1,
        page_size=4,
        max_seqs=1,
        pages_per_seq=1,
        fmt=fmt,
    )
    assert evaluation.kv_bytes_per_token(CONFIG, fmt) == cache.bytes_per_token()
    with pytest.raises(ValueError, match="1 formats for 2 layers"):
        evaluation.kv_bytes_per_token(CONFIG, [fmt])


@pytest.mark.parametrize(
    ("file", "billions", "bf16", "fp8", "int4"),
    [
        # GB = 1e9 bytes. The rule of thumb, parameters times bits, says 16/8/4 and 141/71/35.
        ("Llama-3.1-8B-Instruct", 8.030, 16.06, 9.09, 5.81),
        ("Llama-3.1-70B-Instruct", 70.554, 141.11, 72.69, 40.57),
        ("Llama-2-13B-chat-GPTQ", 13.016, 26.03, 13.35, 7.40),
    ],
)
def test_sizes_of_real_models(
    shared_data: Path, file: str, billions: float, bf16: float, fp8: float, int4: float
) -> None:
    config = ModelConfig.from_hf(shared_data / "configs-real" / f"{file}.json")
    for name, gigabytes in (("bf16", bf16), ("fp8", fp8), ("int4", int4)):
        sizes = evaluation.weight_bytes(evaluation.abstract_params(config, FORMATS[name]))
        assert sizes.elements / 1e9 == pytest.approx(billions, abs=5e-4)
        assert sizes.total / 1e9 == pytest.approx(gigabytes, abs=5e-3)


def test_speed_counts_tokens_without_compiling(params) -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=64)
    module = Decoder(config, dtype=jnp.float32)
    result = speed.measure_speed(
        module, params, PLAIN, batch_size=2, prompt_tokens=16, new_tokens=4
    )
    assert result.prefill_tokens_per_s > 0 and result.decode_tokens_per_s > 0
    with pytest.raises(ValueError, match="new_tokens=1"):
        speed.measure_speed(module, params, PLAIN, new_tokens=1)


def test_report_leaves_empty_columns_out(tmp_path: Path) -> None:
    rows = [
        {"format": "bf16", "kv_cache_dtype": "bf16", "weight_bytes": 2_000_000, "kl": None},
        {"format": "int4", "kv_cache_dtype": "bf16", "weight_bytes": 500_000},
    ]
    paths = report.write_report(rows, tmp_path, "Sizes")
    assert [p.name for p in paths] == ["results.json", "results.md"]
    assert json.loads(paths[0].read_text()) == rows
    lines = paths[1].read_text().splitlines()
    assert lines[0] == "# Sizes" and lines[2] == "| weights | KV cache | weights, MB |"
    assert lines[-1] == "| int4 | bf16 | 0.50 |"
    report.write_report([{**rows[0], "kl": float("inf")}], tmp_path, "Infinite")
    assert json.loads(paths[0].read_text())[0]["kl"] is None
    assert "inf" in paths[1].read_text()


# The real models.


@pytest.fixture(scope="module")
def tiny(shared_data: Path) -> tuple[LoadedModel, list[np.ndarray]]:
    """The 656K model and 100 stories. It was trained without the dummy prefix of its tokenizer."""
    loaded = load_model(
        shared_data / "tinystories-656k-llama-hf", dtype=jnp.float32, progress=False
    )
    text = (shared_data / "exllamav2-cal" / "tiny.utf8").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[:100]]
    tokenizer = loaded.require_tokenizer()
    ids = [np.asarray([1, *tokenizer.encode(story)[2:]][:512], np.int32) for story in stories]
    return loaded, ids


def test_a_destroyed_model_has_an_infinite_perplexity() -> None:
    assert evaluation.Scores(tokens=2, nll=2e4).perplexity == math.inf


@pytest.mark.slow
def test_perplexity_of_the_656k_model(tiny) -> None:
    loaded, ids = tiny
    formats = {
        None: (21.2603, 1e-4),
        FP8_E4M3_CHANNEL: (21.2603, 0.008),
        INT8_CHANNEL: (21.2603, 0.001),
    }
    for fmt, (wanted, tolerance) in formats.items():
        params = loaded.params
        if fmt is not None:
            params = quantize_tree(params, {memory.LINEAR_KERNELS: fmt})
        scores = evaluation.score(loaded.module, params, ids, batch_size=20)
        assert scores.tokens == 17959
        assert scores.perplexity == pytest.approx(wanted, rel=tolerance), fmt


@pytest.fixture(scope="module")
def bundled(shared_data: Path) -> tuple[LoadedModel, list[np.ndarray]]:
    """The bundled model and 2,044 tokens of authors which it has not seen."""
    loaded = load_model(bundled_model_path(), dtype=jnp.float32, progress=False)
    with (shared_data / "books-public-domain" / "test.txt").open(encoding="utf-8") as file:
        text = file.read(40_000)
    ids = loaded.require_tokenizer().encode(text, add_special_tokens=False)
    ids = np.asarray(ids[2000 : 2000 + 4 * 511], np.int32)
    return loaded, evaluation.windows(ids, 512, loaded.config.bos_token_id)


def kv_perplexity(bundled, name: str, mode: str = "tracked") -> float:
    loaded, ids = bundled
    kv = parse_kv_format(name, mode=mode, model_dtype=jnp.float32)
    scores = evaluation.score(loaded.module, loaded.params, ids, kv_format=kv, chunk=256)
    return scores.perplexity


@pytest.mark.slow
@pytest.mark.parametrize("outlier", [1, 50], ids=["as it is", "late outlier"])
def test_tracked_kv_formats_keep_the_perplexity_of_the_bundled_model(
    bundled, monkeypatch: pytest.MonkeyPatch, outlier: float
) -> None:
    """With ``late outlier``, the values of one late token are 50 times what they would be.

    Its tracked scale must not spoil the tokens before it, nor for long those after it. The same
    happens to the model with the bf16 cache, whose perplexity rises by half, so what is compared is
    the cache. It may also be better: rounding moves that one token, which is wrong anyway.
    """
    _append_with_outlier(monkeypatch, keys=1, values=outlier)
    plain = kv_perplexity(bundled, "bf16")
    for name in ("fp8_e4m3", "int8"):
        assert kv_perplexity(bundled, name) < plain * 1.003, name


@pytest.mark.slow
def test_tracking_costs_nothing_after_an_outlier_that_breaks_the_model(
    bundled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of one token 50 times too large: it takes all attention from then on.

    The model's perplexity is several times higher then, and follows every rounding of that one
    token, so the bf16 cache is no yardstick. Dynamic scales are: they know nothing of other tokens.
    """
    _append_with_outlier(monkeypatch, keys=50, values=50)
    dynamic = kv_perplexity(bundled, "int8", "dynamic")
    assert kv_perplexity(bundled, "int8") == pytest.approx(dynamic, rel=0.003)


def _append_with_outlier(monkeypatch: pytest.MonkeyPatch, keys: float, values: float) -> None:
    monkeypatch.setattr(ops_rotary, "append", append_with_outlier(ops_rotary.append, keys, values))
