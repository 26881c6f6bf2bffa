"""The training loop, its optimizers, its tokenizer, and the files it leaves."""

from __future__ import annotations

import dataclasses
import functools
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.hf import load_model
from qjax.formats import (
    FP8_E4M3_CHANNEL,
    INT2_G32_ASYM,
    INT8_CHANNEL,
    W8A8_INT8,
    QuantFormat,
)
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.training import bpe, folder, loop, optimizers, qat

TEXT = "the cat sat on the mat and the dog sat on the log.\n\nwhy did the cat sit?\n" * 60
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)
TRAINING = loop.TrainingConfig(batch_size=2, seq_len=16, max_steps=6, learning_rate=2e-2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bpe.train_bpe(TEXT, 300)


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> np.ndarray:
    return bpe.encode_corpus(tokenizer, TEXT)


@pytest.fixture(scope="module")
def apply_fn() -> loop.ApplyFn:
    module = Decoder(CONFIG, dtype=jnp.float32)
    return lambda params, tokens, positions: module.apply({"params": params}, tokens, positions)[0]


@pytest.fixture(scope="module")
def train_step(apply_fn: loop.ApplyFn) -> Any:
    return loop.make_train_step(apply_fn, TRAINING)


@functools.cache
def initial_params() -> Any:
    return jax.device_get(loop.init_params(Decoder(CONFIG, dtype=jnp.float32), 0))


def fresh(config: loop.TrainingConfig = TRAINING) -> loop.TrainingState:
    params = jax.tree.map(jnp.array, initial_params())
    return loop.init_state(Decoder(CONFIG, dtype=jnp.float32), config, params)


def run(state: loop.TrainingState, step: Any, tokens: np.ndarray, config: loop.TrainingConfig):
    steps = list(loop.train(state, step, tokens, config, bos_id=0))
    return steps[-1][0], [metrics for _, metrics in steps]


def test_resuming_from_a_checkpoint_is_exact(train_step, tokens, tmp_path: Path) -> None:
    whole, metrics = run(fresh(), train_step, tokens, TRAINING)
    assert metrics[-1].loss < metrics[0].loss
    assert [m.step for m in metrics] == [1, 2, 3, 4, 5, 6]

    store = loop.TrainingCheckpoints(tmp_path / "checkpoints")
    assert store.restore(fresh()) is None
    for state, m in loop.train(fresh(), train_step, tokens, TRAINING, bos_id=0):
        if m.step == 3:
            store.save(state)
            store.save(state)  # a second time is no error
            break
    store.close()

    store = loop.TrainingCheckpoints(tmp_path / "checkpoints")
    restored = store.restore(fresh())
    assert restored is not None and restored.step == 3
    resumed, later = run(restored, train_step, tokens, TRAINING)
    assert [m.loss for m in later] == [m.loss for m in metrics[3:]]
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)

    wider = dataclasses.replace(CONFIG, intermediate_size=96)
    other = loop.init_state(Decoder(wider, dtype=jnp.float32), TRAINING)
    with pytest.raises(ValueError, match=r"does not fit this model .*64.* there and .*96"):
        store.restore(other)
    store.close()


def test_a_time_budget_follows_the_clock(tokens) -> None:
    config = dataclasses.replace(TRAINING, max_steps=None, max_seconds=4.0)
    times = iter(float(t) for t in range(100))

    def step(params, opt_state, batch, rate):
        return params, opt_state, np.float32(1.0)

    state = loop.TrainingState({}, {}, 0, 0.0)
    metrics = [
        m for _, m in loop.train(state, step, tokens, config, bos_id=0, clock=lambda: next(times))
    ]
    assert [m.progress for m in metrics] == [0.25, 0.5, 0.75, 1.0]
    assert metrics[0].learning_rate < metrics[1].learning_rate > metrics[2].learning_rate
    # A resumed run has spent its earlier seconds already.
    state = loop.TrainingState({}, {}, 3, 3.0)
    times = iter(float(t) for t in range(50, 100))
    more = list(loop.train(state, step, tokens, config, bos_id=0, clock=lambda: next(times)))
    assert len(more) == 1 and more[0][0].elapsed == 4.0


def test_training_stops_at_a_loss_that_is_not_finite(tokens) -> None:
    state = loop.TrainingState({}, {}, 0, 0.0)
    step = lambda p, o, b, r: (p, o, np.float32("nan"))  # noqa: E731
    with pytest.raises(ValueError, match=r"loss=nan at step=1 is not finite"):
        list(loop.train(state, step, tokens, TRAINING, bos_id=0))
    with pytest.raises(ValueError, match="are fewer than"):
        list(loop.train(state, step, tokens[:3], TRAINING, bos_id=0))


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [loop.learning_rate_factor(p, 0.1) for p in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < 0.05 and rates[-1] == 0.0
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[11:]) < 0)
    assert max(rates) == 1.0 == loop.learning_rate_factor(0.0, 0.0)


def test_batches_depend_on_seed_and_step_only(tokens) -> None:
    a = loop.sample_batch(tokens, TRAINING, 5, bos_id=7)
    np.testing.assert_array_equal(a, loop.sample_batch(tokens, TRAINING, 5, bos_id=7))
    assert (a != loop.sample_batch(tokens, TRAINING, 6, bos_id=7)).any()
    other = dataclasses.replace(TRAINING, seed=1)
    assert (a != loop.sample_batch(tokens, other, 5, bos_id=7)).any()
    assert a.shape == (2, 17) and (a[:, 0] == 7).all() and a.dtype == np.int32
    # The shortest text has one window.
    row = loop.sample_batch(tokens[:16], TRAINING, 0, bos_id=7)
    np.testing.assert_array_equal(row[0, 1:], tokens[:16])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "both None"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0 must be positive"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be positive and finite"),
        ({"weight_decay": math.nan}, "weight_decay=nan must be 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0 or more"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"optimizer": "sgd"}, "must be 'muon' or 'adamw'"),
        ({"warmup": 1.0}, "fraction of the budget"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **changes)


def test_newton_schulz_gives_nearly_orthogonal_matrices() -> None:
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 16, 48), jnp.float32).at[1].multiply(1e-12)
    singular = np.linalg.svd(np.asarray(optimizers.newton_schulz(x)), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
    zeros = optimizers.newton_schulz(jnp.zeros((1, 4, 8), jnp.float32))
    np.testing.assert_array_equal(zeros, np.zeros((1, 4, 8)))


def test_muon_updates_matrices_of_layers_and_adam_the_rest() -> None:
    params = fresh().params
    tx: Any = optimizers.muon_with_adam(0.0)
    key = jax.random.key(1)
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(params), params)
    layer = updates["model"]["layers_0"]
    kernel = layer["mlp"]["down_proj"]["kernel"]
    singular = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    root_mean_square = 0.2 * math.sqrt(max(kernel.shape))
    assert singular.min() > 0.6 * root_mean_square and singular.max() < 1.3 * root_mean_square
    # The first step of Adam is the sign of the gradient.
    for path in (("model", "embed_tokens", "embedding"), ("model", "norm", "weight")):
        g, u = grads, updates
        for name in path:
            g, u = g[name], u[name]
        np.testing.assert_allclose(u, -np.sign(g), rtol=1e-3)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizers.muon(0.0).update(grads, optimizers.muon(0.0).init(grads))


def test_tokenizer_round_trips_and_knows_every_byte(tokenizer, tokens, tmp_path: Path) -> None:
    assert tokenizer.decode(tokens.tolist()) == TEXT
    strange = "naïve \x00 漢字 🙂\r\n"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    assert tokenizer.encode("the cat").ids[0] == tokenizer.token_to_id(bpe.BOS) == 0
    assert tokens.dtype == np.uint16 and tokens.min() >= 3  # no special tokens inside the corpus

    bpe.save_tokenizer(tokenizer, tmp_path, model_max_length=16)
    again = bpe.load_or_train_tokenizer(tmp_path, TEXT, 300, model_max_length=16)
    assert again.encode("the mat").ids == tokenizer.encode("the mat").ids
    with pytest.raises(ValueError, match=r"entries, more than vocab_size=260"):
        bpe.load_or_train_tokenizer(tmp_path, TEXT, 260, model_max_length=16)
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        bpe.train_bpe(TEXT, 258)


@pytest.mark.parametrize("size", [1, 7, 50, 10**6])
def test_split_text_loses_nothing(size: int) -> None:
    pieces = list(bpe.split_text(TEXT, size))
    assert "".join(pieces) == TEXT
    if size == 50:  # about a line: many cuts are where a line begins
        assert not any(p[0] == "\n" for p in pieces)
        assert sum(p.endswith("\n") for p in pieces) > len(pieces) // 2


def test_read_text_reads_xz_and_refuses_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    assert bpe.read_text(tmp_path / "a.txt.xz") == TEXT
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfgood")
    assert bpe.read_text(tmp_path / "mark.txt") == "good"
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in [("none.txt", "not exist"), ("bad.txt", "UTF-8"), ("empty.txt", "empty")]:
        with pytest.raises(ValueError, match=message):
            bpe.read_text(tmp_path / name)


def test_export_loads_back(tmp_path: Path) -> None:
    params = fresh().params
    folder.export_hf(params, CONFIG, tmp_path)
    loaded = load_model(tmp_path, dtype=jnp.float32, progress=False)
    assert loaded.config == CONFIG
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16).astype(jnp.float32)), b)


def test_run_folder_refuses_other_settings(tmp_path: Path) -> None:
    store = folder.RunFolder(tmp_path)
    store.check_settings({"hidden_size": 32}, TRAINING)
    # Another budget is no other run.
    store.check_settings({"hidden_size": 32}, dataclasses.replace(TRAINING, max_steps=9))
    with pytest.raises(ValueError, match="hidden_size: 32 -> 64"):
        store.check_settings({"hidden_size": 64}, TRAINING)
    with pytest.raises(ValueError, match=r"training\.seed: 0 -> 3"):
        store.check_settings({"hidden_size": 32}, dataclasses.replace(TRAINING, seed=3))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="holds a model and no run to resume"):
        folder.RunFolder(tmp_path / "model").check_settings({"hidden_size": 32}, TRAINING)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    store.save_history([(32, 5.0), (64, 4.00001)])
    assert store.load_history(1) == [(32, 5.0)] and store.load_history(0) == []


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"qjax\[plot\]"):
        folder.plot_losses([(1, 2.0)], tmp_path / "loss.png")


def test_fake_quantized_parameters_are_on_the_grid_and_pass_gradients() -> None:
    params = fresh().params
    rounded = qat.fake_quantized(params, INT2_G32_ASYM)
    kernel = rounded["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert max(len(np.unique(column)) for column in np.asarray(kernel).T) <= 4
    table = rounded["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(table, params["model"]["embed_tokens"]["embedding"])
    grads = jax.grad(
        lambda p: qat.fake_quantized(p, INT2_G32_ASYM)["model"]["layers_0"]["mlp"]["up_proj"][
            "kernel"
        ].sum()
    )(params)
    np.testing.assert_array_equal(grads["model"]["layers_0"]["mlp"]["up_proj"]["kernel"], 1.0)
    with pytest.raises(ValueError, match="quantizes activations too"):
        qat.fake_quantized(params, W8A8_INT8)


@pytest.mark.parametrize("fmt", [INT2_G32_ASYM, FP8_E4M3_CHANNEL], ids=["int2_asym", "fp8"])
def test_learned_scales_are_what_is_quantized_in_the_end(fmt: QuantFormat) -> None:
    params = qat.add_scales(fresh().params, fmt)
    mlp = params["model"]["layers_0"]["mlp"]
    mlp["up_proj"]["kernel"] *= 1.5  # some weights saturate
    shown, trained = qat.fake_quantized(params, fmt), qat.quantize_trained(params, fmt, jnp.float32)
    assert jax.tree.structure(shown) == jax.tree.structure(fresh().params)
    kernel = trained["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.fmt == fmt
    np.testing.assert_allclose(
        shown["model"]["layers_0"]["mlp"]["up_proj"]["kernel"], kernel.dequantize(), rtol=1e-6
    )
    again = qat.add_scales(trained, fmt)  # from a quantized checkpoint: the same codes
    np.testing.assert_allclose(
        again["model"]["layers_0"]["mlp"]["up_proj"][qat.LOG_SCALE],
        mlp["up_proj"][qat.LOG_SCALE],
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="training is for int8_channel"):
        qat.add_scales(trained, INT8_CHANNEL)


def test_activations_and_kv_are_fake_quantized_too(apply_fn, tokens) -> None:
    module, params = Decoder(CONFIG, dtype=jnp.float32), fresh().params
    # Larger than at the start of training, so that rounding shows.
    params = jax.tree.map(lambda x: 5 * x if x.ndim == 2 else x, params)
    batch = jnp.asarray(loop.sample_batch(tokens, TRAINING, 0, 0))[:, :-1]
    fake = jax.jit(
        lambda p, fmt, kv: qat.apply_fake_quantized(module, p, fmt, batch, kv_qtype=kv)[0],
        static_argnums=(1, 2),
    )
    # What serving computes with the same weights and activations.
    served = module.apply({"params": qat.quantize_trained(params, W8A8_INT8, jnp.float32)}, batch)
    plain = fake(params, INT8_CHANNEL, None)
    both = fake(params, W8A8_INT8, None)
    gap = lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))  # noqa: E731
    assert gap(both, served[0]) < 0.3 * gap(plain, served[0])
    assert 1e-3 < gap(fake(params, INT8_CHANNEL, "int4"), plain) < 1
    grads = jax.grad(lambda p: fake(p, W8A8_INT8, "int4").sum())(params)
    for name in ("q_proj", "k_proj", "v_proj"):
        kernel = grads["model"]["layers_0"]["self_attn"][name]["kernel"]
        assert float(jnp.abs(kernel).max()) > 0 and bool(jnp.all(jnp.isfinite(kernel)))


def test_gradients_of_learned_scales() -> None:
    """Inside the range ``round(w / s) - w / s``, at its ends the end; times s for the logarithm."""
    w = jnp.asarray([[0.26], [-0.41], [2.0]], jnp.float32)
    fmt, log_scale = QuantFormat("int4"), jnp.log(jnp.full((1, 1), 0.1, jnp.float32))
    out = qat.learned_step(w, log_scale, None, fmt)
    np.testing.assert_allclose(out[:, 0], [0.3, -0.4, 0.7], rtol=1e-6)
    total = lambda w, s: qat.learned_step(w, s, None, fmt).sum()  # noqa: E731
    by_weight, by_scale = jax.grad(total, argnums=(0, 1))(w, log_scale)
    np.testing.assert_array_equal(by_weight[:, 0], [1, 1, 0])
    np.testing.assert_allclose(by_scale[0, 0], 0.1 * (0.4 + 0.1 + 7), rtol=1e-5)


def test_a_teacher_is_imitated(apply_fn, tokens) -> None:
    params, other = fresh().params, loop.init_params(Decoder(CONFIG, dtype=jnp.float32), 7)
    batch = jnp.asarray(loop.sample_batch(tokens, TRAINING, 0, 0))
    same = loop.distillation_loss(apply_fn, params, loop.Teacher(apply_fn, params), batch)
    different = loop.distillation_loss(apply_fn, params, loop.Teacher(apply_fn, other), batch)
    assert abs(float(same)) < 1e-6 and float(different) > 1e-3


@pytest.mark.slow
def test_training_for_a_format_beats_rounding_afterwards(apply_fn, tokens) -> None:
    """From the same model and for as many steps, with and without the format in the forward pass.

    Two bits per column: harder than any format one would use on so small a model, so that the gain
    is far from chance (measured: 0.83 at the start, then 0.39 with and 0.57 without).
    """
    fmt = QuantFormat("int2")

    def quantized(params: Any, tokens: Any, positions: Any) -> Any:
        return apply_fn(qat.fake_quantized(params, fmt), tokens, positions)

    def loss(fn: loop.ApplyFn, params: Any) -> float:
        return loop.mean_loss(fn, params, tokens, config, bos_id=0)[0]

    config = dataclasses.replace(
        TRAINING, max_steps=60, batch_size=8, learning_rate=1e-2, optimizer="adamw"
    )
    plain_step = loop.make_train_step(apply_fn, config)
    start = run(fresh(config), plain_step, tokens, config)[0].params
    longer = dataclasses.replace(config, max_steps=30, seed=1, learning_rate=3e-3)

    def go_on(step: Any) -> Any:
        params = jax.tree.map(jnp.copy, start)  # a step donates what it gets
        state = loop.init_state(Decoder(CONFIG, dtype=jnp.float32), longer, params)
        return run(state, step, tokens, longer)[0].params

    rounded = loss(quantized, go_on(plain_step))
    trained = loss(quantized, go_on(loop.make_train_step(quantized, longer)))
    assert trained < loss(quantized, start) - 0.2
    assert trained < rounded - 0.1


def test_loss_is_the_tolerance_away_from_uniform_at_the_start(apply_fn, tokens) -> None:
    params = fresh().params
    loss, count = loop.mean_loss(apply_fn, params, tokens, TRAINING, bos_id=0)
    assert abs(loss - math.log(300)) < 0.1
    assert count == len(tokens) // 32 * 32
    with pytest.raises(ValueError, match="fewer than"):
        loop.mean_loss(apply_fn, params, tokens[:5], TRAINING, bos_id=0)
