"""An engine whose model is cut over devices generates what that of one device does."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import parse_format
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.sharding import own_specs, shard_params, tensor_parallel_mesh
from qjax.nn.parallel import TensorParallel
from qjax.ops._dispatch import kernels_by_default
from qjax.quantize import quantize_tree, quantized_nbytes
from qjax.sampling import SamplingParams
from qjax.serving import Engine, EngineConfig, Request
from qjax.serving.build import ModelChoices, check_model
from qjax.serving.devices import Devices, bytes_per_device
from qjax.serving.weights import prepare_weights
from scripts import serve
from tests.serving_model import write_model
from tests.tolerances import F32_LOGITS

QWEN3 = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_position_embeddings=128,
    qk_norm=True,
    model_type="qwen3",
)
# Every bias, an embedding that is the output layer too, and a vocabulary that cannot be cut.
TIED = dataclasses.replace(
    QWEN3,
    vocab_size=97,
    qk_norm=False,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    model_type="llama",
)
SIZES = EngineConfig(
    max_running_requests=2,
    max_model_len=64,
    page_size=8,
    chunked_prefill_size=16,
    prefix_cache=True,
)
E4M3 = "float8_e4m3fn"


@functools.cache
def plain_params(config: ModelConfig) -> Any:
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Large enough for tokens that differ from step to step; norm weights near one.
        spread = rng.normal(size=leaf.shape) * (0.15 if leaf.ndim == 2 else 0.1)
        return jnp.asarray(spread + (leaf.ndim == 1), jnp.float32)

    return jax.tree.map(values, shapes["params"])


def quantized_params(config: ModelConfig, weights: tuple[str, ...]) -> Any:
    """Layer i in the format weights[i]."""
    rules = {f"model/layers_{i}/.*kernel": parse_format(w) for i, w in enumerate(weights)}
    return quantize_tree(plain_params(config), rules)


def engine_of(
    config: ModelConfig, params: Any, kv: tuple[KVFormat, ...], devices: int, **settings: Any
) -> Engine:
    """An engine for parameters cut over devices; for 1 they stay where they are."""
    mesh = tensor_parallel_mesh(devices) if devices > 1 else None
    params = shard_params(params, config, mesh) if mesh else jax.tree.map(lambda x: x, params)
    how = {name: settings.pop(name, False) for name in ("fuse", "pack")}
    params, _ = prepare_weights(params, jnp.float32, mesh=mesh, **how)
    module = Decoder(config, dtype=jnp.float32)
    return Engine(module, params, SIZES, kv, mesh=mesh, **settings)


def requests() -> list[Request]:
    """Prompts in chunks of one length; two begin alike, and more than there are slots."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 96, n).tolist() for n in (16, 30, 11)]
    prompts.append(prompts[1][:16] + prompts[0][:12])
    sampling = SamplingParams(max_new_tokens=9, ignore_eos=True)
    return [Request(tuple(prompt), sampling) for prompt in prompts]


def tokens_of(engine: Engine) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(requests())]


MIXED = "int4_g32_asym", "fp8"
MIXED_KV = KVFormat(E4M3, "tracked"), KVFormat("int8", "dynamic")


@functools.cache
def mixed_on_one() -> tuple[Engine, list[tuple[int, ...]]]:
    engine = engine_of(QWEN3, quantized_params(QWEN3, MIXED), MIXED_KV, 1)
    return engine, tokens_of(engine)


def test_every_layer_in_another_format() -> None:
    """Over four devices, each of which joins its projections."""
    one, expected = mixed_on_one()
    devices = 4
    assert len({token for tokens in expected for token in tokens}) > 10
    engine = engine_of(QWEN3, quantized_params(QWEN3, MIXED), MIXED_KV, devices, fuse=True)
    assert tokens_of(engine) == expected
    assert engine.stats.reused_tokens == one.stats.reused_tokens > 0
    # Every device counts for itself; what is reported is the sum.
    np.testing.assert_array_equal(engine.cache.underflowed, one.cache.underflowed)
    np.testing.assert_allclose(engine.cache.absmax, one.cache.absmax, rtol=1e-5)
    # Nothing but norms, scales per matrix and page tables is on more than one device.
    assert bytes_per_device(engine.cache) < 1.05 * one.cache.nbytes / devices
    assert bytes_per_device(engine.params) < 1.1 * quantized_nbytes(one.params) / devices
    kernel = engine.params["model"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    assert kernel.qvalue.sharding.shard_shape(kernel.qvalue.shape) == (128 // devices, 64)


def with_activation_order(params: Any) -> Any:
    """``down_proj`` with its rows sorted as by GPTQ: inputs of all devices stand side by side."""
    mlp = params["model"]["layers_0"]["mlp"]
    kernel = mlp["down_proj"]["kernel"]
    perm = jnp.asarray(np.random.default_rng(2).permutation(kernel.shape[0]), jnp.int32)
    w = qjax.quantize(jnp.take(kernel, perm, axis=0), qjax.INT4_G32)
    mlp = mlp | {"down_proj": mlp["down_proj"] | {"kernel": dataclasses.replace(w, perm=perm)}}
    layers = params["model"] | {"layers_0": params["model"]["layers_0"] | {"mlp": mlp}}
    return params | {"model": layers}


def test_biases_activation_order_static_scales_and_keys_without_their_bias() -> None:
    params = with_activation_order(quantized_params(TIED, ("none", "int8")))
    kv = KVFormat(E4M3, "static"), KVFormat("int8", "tracked", without_key_bias=True)
    # Small scales, so that values are clipped on every device, and counted.
    scales = [(np.asarray([0.002, 0.003, 0.004, 0.005], np.float32),) * 2, None]
    one = engine_of(TIED, params, kv, 1, static_scales=scales)
    two = engine_of(TIED, params, kv, 2, static_scales=scales, fuse=True)
    assert tokens_of(one) == tokens_of(two)
    assert one.cache.saturated[0].min() > 0
    np.testing.assert_array_equal(one.cache.saturated, two.cache.saturated)
    absmax = two.cache.layer_absmax[0]
    assert absmax.sharding.shard_shape(absmax.shape) == (2, 2)


def logits_of(config: ModelConfig, params: Any, devices: int) -> np.ndarray:
    """Of one prompt, without a cache."""
    tokens = jnp.asarray(np.arange(24).reshape(2, 12), jnp.int32)
    module = Decoder(config, dtype=jnp.float32)
    if devices == 1:
        return np.asarray(jax.jit(module.apply)({"params": params}, tokens)[0])
    mesh = tensor_parallel_mesh(devices)
    params, _ = prepare_weights(
        shard_params(params, config, mesh), jnp.float32, fuse=True, pack=True, mesh=mesh
    )
    local = module.clone(parallel=TensorParallel("model", devices))
    program = jax.shard_map(
        lambda params: local.apply({"params": params}, tokens)[0],
        mesh=mesh,
        in_specs=(own_specs(params),),
        out_specs=P(),
        check_vma=False,
    )
    return np.asarray(jax.jit(program)(params))


def test_packed_weights_give_the_same_logits() -> None:
    """Every device joins and packs its own; without kernels XLA unpacks them in the program."""
    config = dataclasses.replace(
        QWEN3, num_layers=1, hidden_size=256, intermediate_size=512, head_dim=32, layer_windows=()
    )
    params = quantize_tree(plain_params(config), {"model/.*kernel": qjax.INT4_G128})
    expected, found = logits_of(config, params, 1), logits_of(config, params, 2)
    np.testing.assert_allclose(found, expected, atol=F32_LOGITS * np.abs(expected).max(), rtol=0)


def test_devices_quantize_their_own_part_of_an_activation() -> None:
    """A scale for half the inputs is finer than one for all, so W8A8 results differ a little."""
    config = dataclasses.replace(QWEN3, num_layers=1, layer_windows=())
    params = quantize_tree(plain_params(config), {"model/.*kernel": qjax.W8A8_INT8})
    exact = logits_of(config, plain_params(config), 1)
    errors = [np.abs(logits_of(config, params, n) - exact).mean() for n in (1, 2)]
    assert 0.5 * errors[0] < errors[1] < 1.2 * errors[0]


def test_kernels_run_where_a_program_is_for_one_device() -> None:
    assert jax.device_count() > 1 and not kernels_by_default()
    seen = []

    def probe(x: Any, *rest: Any) -> Any:
        seen.append(kernels_by_default())
        return (x, *rest)[:4]

    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    part: dict[str, Any] = {"mesh": mesh, "in_specs": P(), "out_specs": (P(),), "check_vma": False}
    jax.jit(jax.shard_map(probe, **part))(jnp.zeros(2))
    jax.jit(jax.shard_map(probe, axis_names={"a"}, **part))(jnp.zeros(2))
    assert seen == [True, False]  # not where XLA divides work along another axis


def test_an_engine_on_one_of_several_devices_uses_kernels() -> None:
    params = plain_params(QWEN3)
    assert Devices(params, QWEN3, None).mesh is not None
    engine, _ = mixed_on_one()
    assert engine.devices.count == 1 and engine.devices.parallel is None
    # What XLA shall divide stays its own.
    spread = shard_params(params, QWEN3, tensor_parallel_mesh(2))
    assert Devices(spread, QWEN3, None).mesh is None


def test_errors() -> None:
    with pytest.raises(ValueError, match="over 5 devices; there are 4"):
        tensor_parallel_mesh(5)
    with pytest.raises(ValueError, match="num_kv_heads=4 .* 3 devices.* cut over 1, 2, 4"):
        check_model(QWEN3, ModelChoices(tp_size=3))
    wide = dataclasses.replace(QWEN3, intermediate_size=384)
    with pytest.raises(ValueError, match="down_proj.*over 4 devices.*groups of 128.*groups of 32"):
        check_model(wide, ModelChoices("int4", tp_size=4))
    check_model(wide, ModelChoices("int4_g32", tp_size=4))
    module = types.SimpleNamespace(config=QWEN3)
    with pytest.raises(ValueError, match="load parameters with load_model"):
        Engine(module, plain_params(QWEN3), SIZES, MIXED_KV[0], mesh=tensor_parallel_mesh(2))
    joined, _ = prepare_weights(
        jax.tree.map(lambda x: x, plain_params(QWEN3)), jnp.float32, fuse=True
    )
    joined = shard_params(joined, QWEN3, tensor_parallel_mesh(2))
    with pytest.raises(ValueError, match="layers_0/.*_proj/kernel joins projections"):
        Engine(module, joined, SIZES, MIXED_KV[0], mesh=tensor_parallel_mesh(2))
    both = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    with pytest.raises(ValueError, match="axes .*'a', 'b'"):
        Engine(module, plain_params(QWEN3), SIZES, MIXED_KV[0], mesh=both)


def test_serving_from_files(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loaded, run, measured and reported over two devices: what one device gives."""
    model = write_model(tmp_path, num_kv_heads=2)
    flags = ["--model", str(model), "--max-running-requests", "2", "--kv-cache-dtype", "fp8_e4m3"]
    flags += ["--quantization", "int8", "--prompt", "the cat sat", "--prompt", "the dog"]
    results, scales = [], []
    for devices in ("1", "2"):
        out, measured = tmp_path / f"{devices}.jsonl", tmp_path / f"{devices}.json"
        more = ["--output", str(out), "--export-kv-scales", str(measured), "--max-new-tokens", "8"]
        with monkeypatch.context() as patch:
            if devices == "1":  # as in a process with one device, without jax.shard_map
                patch.setattr(jax, "device_count", lambda: 1)
            assert serve.main([*flags, *more, "--tp-size", devices]) == 0
        results.append(out.read_text())
        layer = json.loads(measured.read_text())
        scales.append(layer)
    assert results[0] == results[1]
    assert re.search(r"devices +2 .* of weights, .* of KV cache", capsys.readouterr().err)
    assert_close(*scales)
    # Before anything is loaded.
    assert serve.main([*flags, "--tp-size", "4"]) == 2
    message = capsys.readouterr().err
    assert "num_kv_heads=2 cannot be cut over 4 devices" in message and "loading" not in message


def assert_close(a: Any, b: Any) -> None:
    """The same tree of JSON, numbers but for their last bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x == (pytest.approx(y, rel=1e-5) if isinstance(y, float) else y)
