"""modelopt: FP8, NVFP4 and MXFP4, in both places of its config."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qjax import formats
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.modelopt import ModeloptReader
from tests.fake_checkpoints import LAYER, named, pack_bits, read_layer, source, value

K, N = 64, 24
E4M3 = ml_dtypes.float8_e4m3fn
TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def own_file(algorithm: str, **keys: Any) -> tuple[dict[str, Any], str]:
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None} | keys
    producer = {"name": "modelopt", "version": "0.31.0"}
    return {"producer": producer, "quantization": quantization}, "hf_quant_config.json"


def in_config(algorithm: str, **keys: Any) -> tuple[dict[str, Any], str]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **keys}, "config.json"


def reader_of(
    tensors: dict[str, np.ndarray], quantization: tuple[dict[str, Any], str]
) -> ModeloptReader:
    reader = ModeloptReader.from_source(source(tensors, *quantization))
    assert reader is not None
    return reader


def fp8_parts(rng: np.random.Generator, scale_shape: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    return {
        "weight": rng.uniform(-400, 400, (N, K)).astype(E4M3),
        "weight_scale": np.asarray(rng.uniform(0.1, 1, scale_shape), np.float32),
    }


def fp4_parts(rng: np.random.Generator, nv: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes = rng.integers(0, 16, (N, K))
    parts = {"weight": pack_bits(codes, 4, np.uint8)}
    if nv:
        scale = rng.uniform(0.5, 400, (N, K // 16)).astype(E4M3)
        parts["weight_scale_2"] = np.asarray(2**-10, np.float32)
        parts["input_scale"] = np.asarray(0.5, np.float32)
        full = scale.astype(np.float32) * np.float32(2**-10)
        parts["weight_scale"] = scale
    else:
        parts["weight_scale"] = rng.integers(110, 130, (N, K // 32)).astype(np.uint8)
        full = np.exp2(parts["weight_scale"].astype(np.float32) - 127)
    values = TABLE[codes % 8] * np.where(codes >= 8, -1, 1)
    return parts, values * np.repeat(full, 16 if nv else 32, axis=1)


@pytest.mark.parametrize("place", [own_file, in_config])
def test_fp8(place: Any, rng: np.random.Generator) -> None:
    parts = fp8_parts(rng)
    parts["input_scale"] = np.asarray(0.25, np.float32)
    tensors = named(parts)
    q = read_layer(reader_of(tensors, place("FP8")), tensors, (K, N))
    wanted = parts["weight"].astype(np.float32) * parts["weight_scale"]
    np.testing.assert_array_equal(value(q), wanted.T)
    assert q.fmt.activation == formats.FP8_PER_TENSOR
    assert float(np.asarray(q.act_scale)) == 0.25


def test_fp8_per_channel_and_blocks(rng: np.random.Generator) -> None:
    tensors = named(fp8_parts(rng, (N,)))
    reader = reader_of(tensors, own_file("FP8_PER_CHANNEL_PER_TOKEN"))
    q = read_layer(reader, tensors, (K, N))
    assert q.scale.shape == (1, N) and q.fmt.activation == formats.FP8_PER_TOKEN
    tensors = named(
        {
            "weight": rng.uniform(-400, 400, (256, 128)).astype(E4M3),
            "weight_scale": np.array([0.5, 2], np.float32).reshape(2, 1, 1, 1),
        }
    )
    q = read_layer(reader_of(tensors, own_file("FP8_PB_WO")), tensors, (128, 256))
    full = np.repeat(np.array([[0.5], [2]], np.float32), 128, axis=0)
    wanted = tensors[f"{LAYER}.weight"].astype(np.float32) * full
    np.testing.assert_array_equal(value(q), wanted.T)
    assert q.fmt.activation is None


@pytest.mark.parametrize("algorithm", ["NVFP4", "MXFP4"])
def test_fp4(algorithm: str, rng: np.random.Generator) -> None:
    parts, wanted = fp4_parts(rng, algorithm == "NVFP4")
    tensors = named(parts)
    q = read_layer(reader_of(tensors, in_config(algorithm)), tensors, (K, N))
    np.testing.assert_array_equal(value(q), wanted.T)
    assert q.fmt.activation is None and q.act_scale is None
    if algorithm == "NVFP4":
        assert np.asarray(q.scale).dtype == E4M3
        assert float(np.asarray(q.global_scale)) == 2**-10
    else:
        assert np.asarray(q.scale).dtype == ml_dtypes.float8_e8m0fnu


def test_mixed_precision(rng: np.random.Generator) -> None:
    parts, _ = fp4_parts(rng, True)
    other = "model.layers.0.mlp.down_proj"
    eight = {**fp8_parts(rng), "input_scale": np.asarray(0.25, np.float32)}
    tensors = {**named(parts), **named(eight, other)}
    layers = {LAYER: {"quant_algo": "NVFP4", "group_size": 16}, other: {"quant_algo": "FP8"}}
    reader = reader_of(tensors, own_file("MIXED_PRECISION", quantized_layers=layers))
    assert read_layer(reader, tensors, (K, N)).fmt.bits == 4
    assert read_layer(reader, tensors, (K, N), other).fmt.bits == 8
    del layers[other]
    with pytest.raises(CheckpointError, match="quantized_layers does not list .*down_proj"):
        reader_of(tensors, own_file("MIXED_PRECISION", quantized_layers=layers))


def test_kv_cache(rng: np.random.Generator) -> None:
    parts = {**fp8_parts(rng), "input_scale": np.asarray(0.25, np.float32)}
    tensors = named(parts)
    for place in (own_file("FP8"), in_config("FP8")):
        assert reader_of(tensors, place).kv_scales(tensors.__getitem__, 1, 2) is None
    declared = own_file("FP8", kv_cache_quant_algo="FP8")
    assert reader_of(tensors, declared).kv_scales(tensors.__getitem__, 1, 2) is None
    scheme = {"type": "float", "num_bits": 8, "dynamic": False}
    for place in (declared, in_config("FP8", kv_cache_scheme=scheme)):
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = np.asarray(1.0, np.float32)
        tensors["model.layers.0.self_attn.v_proj.v_scale"] = np.asarray(1.5, np.float32)
        scales = reader_of(tensors, place).kv_scales(tensors.__getitem__, 1, 2)
        assert scales is not None and scales.dtype == "float8_e4m3fn"
        np.testing.assert_array_equal(scales.values[0], np.full(2, 1.5, np.float32))


def test_only_the_kv_cache_is_quantized() -> None:
    tensors = {f"{LAYER}.weight": np.zeros((N, K), np.float32)}
    place = own_file("FP8", quant_algo=None, kv_cache_quant_algo="INT8")
    reader = reader_of(tensors, place)
    assert not reader.is_quantized(LAYER)
    with pytest.raises(CheckpointError, match="quant_algo=None is not supported"):
        reader_of(tensors, own_file("FP8", quant_algo=None))


def test_refusals(rng: np.random.Generator) -> None:
    parts = {**fp8_parts(rng), "input_scale": np.asarray(0.25, np.float32)}
    tensors = named(parts)
    for place, message in (
        (own_file("W4A8_AWQ"), "quant_algo='W4A8_AWQ' is not supported"),
        (own_file("FP8", kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo='NVFP4'"),
        (own_file("FP8", exclude_modules=["model.layers.0*"]), "excluded from quantization"),
        (own_file("FP8", exclude_modules="lm_head"), "exclude_modules must be a list"),
        (own_file("NVFP4", group_size=32), "group_size=32 must be 16"),
        (own_file("NVFP4"), "weight is F8_E4M3, which NVFP4 does not store"),
        (own_file("MIXED_PRECISION"), "quantized_layers must be an object"),
        (({"producer": {"name": "other"}}, "hf_quant_config.json"), "producer.name 'modelopt'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reader_of(tensors, place)
    smoothed = {**tensors, f"{LAYER}.pre_quant_scale": np.ones(K, np.float32)}
    with pytest.raises(CheckpointError, match="pre_quant_scale scales activations"):
        reader_of(smoothed, own_file("FP8"))
    orphan = {**tensors, "lm_head.weight_scale": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError, match="lm_head.weight is missing or not quantized"):
        reader_of(orphan, own_file("FP8"))
    with pytest.raises(CheckpointError, match="no weight is quantized"):
        reader_of({"lm_head.weight": np.ones((2, 2), np.float32)}, own_file("FP8"))
    missing = {name: a for name, a in tensors.items() if not name.endswith("input_scale")}
    expected = reader_of(missing, own_file("FP8")).expected(LAYER, (K, N))
    assert f"{LAYER}.input_scale" in expected  # which the loader then misses
