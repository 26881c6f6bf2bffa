"""compressed-tensors: every layout against an independent unpacker, configs and refusals."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import formats
from qjax.checkpoints.compressed_tensors import CompressedTensorsReader
from qjax.checkpoints.ct_config import parse_config
from qjax.checkpoints.ct_writer import (
    CompressedTensorsWriter,
    layer_specs,
    pack_layer,
    unwritable_reason,
)
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.writer import Linears
from qjax.formats import QuantFormat
from qjax.quantize import quantize
from qjax.quantized_array import QuantizedArray
from tests.fake_checkpoints import LAYER, named, pack_bits, read_layer, same, source, value

K, N, GROUP = 40, 24, 16  # the last group is short


def config(
    weights: dict[str, Any],
    storage: str = "pack-quantized",
    activations: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A config with one group."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def reader_of(quantization: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    reader = CompressedTensorsReader.from_source(source(tensors, quantization))
    assert reader is not None
    return reader


def written(q: QuantizedArray, tensors: dict[str, np.ndarray]) -> None:
    """Assert that writing gives back the tensors, and that the plan of them is right."""
    assert unwritable_reason(q) is None
    made = named(pack_layer(q))
    assert made.keys() == tensors.keys()
    for name, array in made.items():
        spec = layer_specs(q)[name.removeprefix(f"{LAYER}.")]
        assert (array.dtype, array.shape) == (spec.dtype, spec.shape), name
        assert array.dtype == tensors[name].dtype, name
        assert array.shape == tensors[name].shape, name
        assert array.tobytes() == tensors[name].tobytes(), name


def scale_shape(strategy: str) -> tuple[int, ...]:
    return {"tensor": (1,), "channel": (N, 1), "group": (N, -(-K // GROUP))}[strategy]


def expand(scale: np.ndarray) -> np.ndarray:
    """``(N, K)`` from a stored scale or zero point."""
    if scale.ndim == 2 and scale.shape[1] > 1:
        scale = np.repeat(scale, GROUP, axis=1)[:, :K]
    return np.broadcast_to(scale.astype(np.float32), (N, K))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(
    bits: int, strategy: str, symmetric: bool, rng: np.random.Generator
) -> None:
    half = 2 ** (bits - 1)
    codes = rng.integers(0, 2 * half, (N, K))
    scale = rng.uniform(0.01, 0.1, scale_shape(strategy)).astype(ml_dtypes.bfloat16)
    parts = {
        "weight_packed": pack_bits(codes, bits),
        "weight_shape": np.array([N, K], np.int64),
        "weight_scale": scale,
    }
    zeros = np.full(scale.shape, half)
    if not symmetric:
        zeros = rng.integers(0, 2 * half, scale.shape)
        if strategy == "tensor":
            parts["weight_zero_point"] = (zeros - half).astype(np.int8)
        else:
            parts["weight_zero_point"] = np.ascontiguousarray(pack_bits(zeros.T, bits).T)
    tensors = named(parts)
    args = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        args["group_size"] = GROUP
    q = read_layer(reader_of(config(args), tensors), tensors, (K, N))
    assert q.fmt.scale_dtype == "bfloat16" and q.fmt.bits == bits
    wanted = (codes - expand(zeros)) * expand(scale)
    np.testing.assert_array_equal(value(q), wanted.T.astype(np.float32))
    written(q, tensors)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_packing_with_gaps(bits: int, rng: np.random.Generator) -> None:
    half, per = 2 ** (bits - 1), 32 // bits

    def pack_with_gaps(codes: np.ndarray) -> np.ndarray:
        padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
        words = padded.reshape(len(codes), -1, per).astype(np.uint32)
        shifts = np.arange(per, dtype=np.uint32) * bits
        return np.bitwise_or.reduce(words << shifts, axis=-1).astype(np.uint32).view(np.int32)

    k, n = 96, 72
    codes, zeros = rng.integers(0, 2 * half, (n, k)), rng.integers(0, 2 * half, (n, 3))
    scale = rng.uniform(0.01, 0.1, (n, 3)).astype(np.float32)
    tensors = named(
        {
            "weight_packed": pack_with_gaps(codes),
            "weight_shape": np.array([n, k], np.int64),
            "weight_scale": scale,
            "weight_zero_point": np.ascontiguousarray(pack_with_gaps(zeros.T).T),
        }
    )
    args = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": False}
    reader = reader_of(config(args, quantization_status="frozen"), tensors)
    wanted = (codes - np.repeat(zeros, 32, 1)).astype(np.float32) * np.repeat(scale, 32, 1)
    np.testing.assert_array_equal(value(read_layer(reader, tensors, (k, n))), wanted.T)


PLAIN = {
    "int8 channel, per token": (
        "int-quantized",
        {"strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "int8 tensor, static": (
        "int-quantized",
        {"strategy": "tensor"},
        {"num_bits": 8, "type": "int", "strategy": "tensor"},
    ),
    "fp8 tensor, static": (
        "float-quantized",
        {"type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "fp8 tensor, static, all scales bfloat16": (
        "float-quantized",
        {"type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "fp8 channel, per token": (
        "float-quantized",
        {"type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
    "fp8 channel, weights only": (
        "naive-quantized",
        {"type": "float", "strategy": "channel"},
        None,
    ),
    "fp8 block": (
        "float-quantized",
        {"type": "float", "strategy": "block", "block_structure": [16, 32]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_codes(case: str, rng: np.random.Generator) -> None:
    storage, weights, activations = PLAIN[case]
    values = rng.integers(-127, 128, (N, K))
    is_float = weights.get("type") == "float"
    codes = values.astype(ml_dtypes.float8_e4m3fn if is_float else np.int8)
    shapes = {"tensor": (1,), "channel": (N, 1), "block": (2, 2)}
    scale_type = ml_dtypes.bfloat16 if "bfloat16" in case else np.float32
    scale = rng.uniform(0.01, 0.1, shapes[weights["strategy"]]).astype(scale_type)
    parts = {"weight": codes, "weight_scale": scale}
    static = activations is not None and not activations.get("dynamic")
    if static:
        parts["input_scale"] = np.array([0.25], scale_type)
    tensors = named(parts)
    q = read_layer(reader_of(config(weights, storage, activations), tensors), tensors, (K, N))
    full = scale.astype(np.float32)
    if weights["strategy"] == "block":
        full = np.repeat(np.repeat(full, 16, 0), 32, 1)[:N, :K]
    wanted = codes.astype(np.float32) * np.broadcast_to(full, (N, K))
    np.testing.assert_array_equal(value(q), wanted.T)
    assert (q.fmt.activation is None) == (activations is None)
    assert (q.act_scale is not None) == static
    if activations is not None:
        assert q.fmt.activation is not None
        assert q.fmt.activation.granularity == activations["strategy"]
        assert q.fmt.activation.dynamic == activations.get("dynamic", False)
    written(q, tensors)


@pytest.mark.parametrize("storage", ["nvfp4", "mxfp4", "mxfp8"])
def test_microscaling(storage: str, rng: np.random.Generator) -> None:
    k, tile = 96, 16 if storage == "nvfp4" else 32
    bits = 8 if storage == "mxfp8" else 4
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    scale: np.ndarray
    if bits == 4:
        codes = rng.integers(0, 16, (N, k))
        values = table[codes % 8] * np.where(codes >= 8, -1, 1)
        parts = {"weight_packed": pack_bits(codes, 4, np.uint8)}
    else:
        values = rng.integers(-16, 17, (N, k)).astype(np.float32)
        parts = {"weight": values.astype(ml_dtypes.float8_e4m3fn)}
    args: dict[str, Any] = {"num_bits": bits, "type": "float", "group_size": tile}
    if storage == "nvfp4":
        scale = rng.uniform(0.5, 400, (N, k // tile)).astype(ml_dtypes.float8_e4m3fn)
        parts["weight_scale"] = scale
        parts["weight_global_scale"] = np.array([1024.0], np.float32)
        parts["input_global_scale"] = np.array([3.0], np.float32)
        full = scale.astype(np.float32) / 1024
        args["strategy"] = "tensor_group"
    else:
        exponents = rng.integers(110, 130, (N, k // tile)).astype(np.uint8)
        parts["weight_scale"] = exponents
        full = np.exp2(exponents.astype(np.float32) - 127)
        args["strategy"] = "group"
    name = "mxfp8-quantized" if bits == 8 else f"{storage}-pack-quantized"
    activations = {**args, "dynamic": "local" if storage == "nvfp4" else True}
    tensors = named(parts)
    q = read_layer(reader_of(config(args, name, activations), tensors), tensors, (k, N))
    wanted = values * np.repeat(full, tile, axis=1)
    np.testing.assert_array_equal(value(q), wanted.T)
    assert q.fmt.scale_dtype == ("float8_e4m3fn" if storage == "nvfp4" else "float8_e8m0fnu")
    tensors.pop(f"{LAYER}.input_global_scale", None)  # of activations, which stay in 16 bits
    written(q, tensors)


def test_activation_order(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 16, (N, K))
    scale = rng.uniform(0.01, 0.1, (N, 3)).astype(np.float16)
    g_idx = rng.permutation(np.arange(K, dtype=np.int32) // GROUP)
    parts = {
        "weight_packed": pack_bits(codes, 4),
        "weight_shape": np.array([N, K], np.int64),
        "weight_scale": scale,
        "weight_g_idx": g_idx,
    }
    tensors = named(parts)
    args = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "actorder": "group"}
    reader = reader_of(config(args), tensors)
    q = read_layer(reader, tensors, (K, N))
    wanted = (codes - 8) * scale.astype(np.float32)[:, g_idx]
    np.testing.assert_array_equal(value(q), wanted.T)
    written(q, tensors)
    unset = {**tensors, f"{LAYER}.weight_g_idx": np.full(K, -1, np.int32)}
    assert read_layer(reader, unset, (K, N)).perm is None
    wrong = {**tensors, f"{LAYER}.weight_g_idx": np.zeros(K, np.int32)}
    with pytest.raises(CheckpointError, match="does not divide 40 columns"):
        read_layer(reader, wrong, (K, N))


def test_symmetric_zero_points_of_older_versions_must_be_zero(rng: np.random.Generator) -> None:
    parts = {
        "weight": rng.integers(-127, 128, (N, K)).astype(np.int8),
        "weight_scale": np.ones((N, 1), np.float32),
        "weight_zero_point": np.zeros((N, 1), np.int8),
    }
    tensors = named(parts)
    reader = reader_of(config({"strategy": "channel"}, "naive-quantized"), tensors)
    assert read_layer(reader, tensors, (K, N)).zero_point is None
    tensors[f"{LAYER}.weight_zero_point"][3] = 1
    with pytest.raises(CheckpointError, match="weight_zero_point is not zero"):
        read_layer(reader, tensors, (K, N))


def groups(*targets: list[str], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """A mixed-precision config: group i has i + 2 bits."""
    return {
        "format": "mixed-precision",
        "ignore": list(ignore),
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": {"num_bits": i + 2, "strategy": "channel"},
                "format": "pack-quantized",
            }
            for i, names in enumerate(targets)
        },
    }


MATCHES = [
    (groups(["Linear"]), "model.layers.0.mlp.up_proj", 2),
    (groups(["re:.*up_proj"], ["Linear"]), "model.layers.0.mlp.up_proj", 2),
    (groups(["re:.*up_proj"], ["Linear"]), "model.layers.0.mlp.down_proj", 3),
    (groups(["Linear"], ["re:.*up_proj"]), "model.layers.0.mlp.up_proj", 3),
    (groups(["re:.*up_proj"], ["model.layers.0.mlp.up_proj"]), "model.layers.0.mlp.up_proj", 3),
    (groups(["re:.*layers.0"], ["re:.*layers.1"]), "model.layers.1.mlp.up_proj", 3),
    (groups(["Linear"], ignore=("lm_head",)), "lm_head", None),
    (groups(["Linear"], ignore=("re:.*down_proj$",)), "model.layers.0.mlp.down_proj", None),
    (groups(["Linear"], ignore=("re:down_proj",)), "model.layers.0.mlp.down_proj", 2),
    (groups(["LlamaMLP"]), "model.layers.0.mlp.up_proj", None),
]


@pytest.mark.parametrize("case", range(len(MATCHES)))
def test_targets_and_ignore(case: int) -> None:
    quantization, layer, bits = MATCHES[case]
    scheme = parse_config(quantization, "config.json").scheme(layer)
    assert (None if scheme is None else scheme.fmt.bits) == bits


def test_config_without_strategy_takes_it_from_the_group_size() -> None:
    for size, wanted in ((None, "tensor"), (-1, "channel"), (32, "group")):
        parsed = parse_config(config({"num_bits": 4, "group_size": size}), "config.json")
        scheme = parsed.scheme(LAYER)
        assert scheme is not None and scheme.fmt.granularity == wanted


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (config(INT8, "marlin-24"), "format='marlin-24' is not supported"),
    (config(INT8, "sparse-24-bitmask"), "format='sparse-24-bitmask'"),
    (config({**FP8, "num_bits": 6}, "mxfp6-pack-quantized"), "format='mxfp6-pack-quantized'"),
    (config(INT8, "mixed-precision"), "format='mixed-precision'.*each group"),
    (config(FP8, "pack-quantized"), "num_bits=8 type='float' is not supported"),
    (config({**INT8, "num_bits": 1}), "num_bits=1 type='int'"),
    (config({**INT8, "num_bits": "4"}), "num_bits='4' must be of type int"),
    (config({**INT8, "num_bits": True}), "num_bits=True must be of type int"),
    (config({**INT8, "strategy": "attn_head"}), "strategy='attn_head'"),
    (config({**INT8, "strategy": "group"}), "strategy='group' needs a group_size"),
    (config({**INT8, "strategy": "group", "group_size": 0}), "group_size=0"),
    (config({**INT8, "dynamic": True}), "weights must be static"),
    (config({**INT8, "actorder": "other"}), "actorder='other'"),
    (config({**INT8, "newer_key": 3}), "newer_key=3 is not supported"),
    (config({**FP8, "symmetric": False}, "float-quantized"), "symmetric=False"),
    (config({**FP8, "strategy": "block"}, "float-quantized"), "block_structure=None"),
    (config(INT8, "int-quantized", {**TOKEN, "symmetric": False}), "input_activations.symmetric"),
    (config(INT8, "int-quantized", {**TOKEN, "num_bits": 4}), "input_activations: num_bits=4"),
    (config(INT8, "int-quantized", {**TOKEN, "dynamic": False}), "dynamic=False is not supported"),
    (config(INT8, "pack-quantized", {**TOKEN, "type": "float"}), "both must be integers"),
    (config(INT8, transform_config={"config_groups": {"u": {}}}), "transform_config"),
    (config(INT8, sparsity_config={"format": "sparse-bitmask"}), "sparsity_config"),
    (config(INT8, moe_sparsity_config={"method": "prune"}), "moe_sparsity_config"),
    (config(INT8, ignore="lm_head"), "ignore must be a list"),
    (config(INT8, ignore=["re:("]), "is no regular expression"),
    (config(INT8, kv_cache_scheme={"num_bits": 4}), "kv_cache_scheme: num_bits=4"),
    (config(INT8, kv_cache_scheme={"symmetric": False}), "kv_cache_scheme.symmetric=False"),
    (config(INT8, kv_cache_scheme={"strategy": "channel"}), "kv_cache_scheme.strategy='channel'"),
    (config(INT8, config_groups=[]), "config_groups must be an object"),
    (config(INT8, config_groups={"W4A16": ["Linear"]}), "preset names are not supported"),
    (
        config(INT8, config_groups={"a": {"targets": ["LlamaAttention"], "input_activations": {}}}),
        "quantized attention",
    ),
    (
        config(
            INT8,
            config_groups={"a": {"targets": ["Linear"], "weights": {}, "output_activations": {}}},
        ),
        "quantized outputs",
    ),
    (config({"num_bits": 4, "type": "float"}, "nvfp4-pack-quantized"), "'tensor_group' and 16"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda i: REFUSED[i][1][:30])
def test_refusals_name_key_and_value(case: int) -> None:
    quantization, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        CompressedTensorsReader.from_source(source({}, quantization))


def test_quantized_tensors_outside_the_config_are_refused() -> None:
    tensors = {"lm_head.weight_packed": np.zeros((4, 4), np.int32)}
    with pytest.raises(CheckpointError, match="lm_head.weight_packed .*ignored"):
        reader_of(config(INT8), tensors)
    tensors = {"lm_head.weight": np.zeros((4, 4), np.int8)}
    with pytest.raises(CheckpointError, match="lm_head.weight "):
        reader_of(config(INT8), tensors)


def test_damaged_values_are_refused(rng: np.random.Generator) -> None:
    parts = {
        "weight": rng.integers(-8, 8, (N, K)).astype(np.int8),
        "weight_scale": np.ones((N, 1), np.float32),
    }
    tensors = named(parts)
    reader = reader_of(config({"num_bits": 4, "strategy": "channel"}, "naive-quantized"), tensors)
    read_layer(reader, tensors, (K, N))
    tensors[f"{LAYER}.weight"][0, 0] = 8
    with pytest.raises(CheckpointError, match=r"codes in \[-8, 8\], the config says 4 bits"):
        read_layer(reader, tensors, (K, N))
    tensors[f"{LAYER}.weight"][0, 0] = 0
    tensors[f"{LAYER}.weight_scale"][2] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        read_layer(reader, tensors, (K, N))
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        reader_of(config(INT8, "naive-quantized"), {}).format(LAYER)


FORMATS: list[QuantFormat] = [
    formats.INT4_G32,
    formats.INT4_G32_ASYM,
    formats.INT4_CHANNEL_ASYM,
    formats.INT3_G128,
    formats.INT8_TENSOR,
    formats.INT8_G128.replace(scale_dtype="bfloat16"),
    formats.W8A8_INT8,
    formats.W8A8_FP8,
    formats.FP8_E4M3_TENSOR,
    formats.FP8_E4M3_BLOCK128,
    formats.W8A8_FP8_BLOCK,
    formats.INT4_G32.replace(activation=formats.INT8_PER_TOKEN),
    formats.W4A8_INT8,
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_quantize_write_read_is_the_identity(fmt: QuantFormat, rng: np.random.Generator) -> None:
    k, n = 160, 136
    q = quantize(jnp.asarray(rng.standard_normal((k, n)), jnp.float32), fmt)
    writer = CompressedTensorsWriter(Linears({LAYER: q}, {"lm_head": (k, n)}))
    quantization = json.loads(json.dumps(writer.config()))
    tensors = dict(writer.tensors(LAYER, q))
    reader = reader_of(quantization, tensors)
    assert not reader.is_quantized("lm_head")
    same(read_layer(reader, tensors, (k, n)), q)


def test_several_schemes_and_kv_scales_in_one_config(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    layers = {f"model.layers.{i}.mlp.up_proj": quantize(x, formats.INT8_CHANNEL) for i in range(2)}
    layers["model.layers.1.mlp.down_proj"] = quantize(x, formats.W8A8_FP8)
    kv = KVScales((np.array([0.5, 0.25], np.float32),), (np.array([2, 2], np.float32),), "int8")
    writer = CompressedTensorsWriter(Linears(layers, {}, kv))
    tensors = dict(writer.extra())
    for layer, q in layers.items():
        assert writer.layout(layer, q).keys() == writer.tensors(layer, q).keys()
        tensors.update(writer.tensors(layer, q))
    quantization = writer.config()
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["lm_head"]
    reader = reader_of(quantization, tensors)
    for layer, q in layers.items():
        same(read_layer(reader, tensors, (32, 8), layer), q)
    read = reader.kv_scales(tensors.__getitem__, 1, 2)
    assert read.dtype == "int8"
    np.testing.assert_array_equal(read.keys[0], kv.keys[0])
    np.testing.assert_array_equal(read.values[0], kv.values[0])


def test_what_cannot_be_written_is_refused(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    for fmt, message in (
        (formats.FP8_E5M2_CHANNEL, "e4m3 only"),
        (formats.INT4_G32.replace(activation=formats.FP8_PER_TOKEN), "activations with"),
        (formats.INT4_G32.replace(scale_dtype="float8_e4m3fn"), "only MXFP4"),
        (formats.W8A8_FP8.replace(activation=formats.FP8_PER_TENSOR), "stored with the weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CompressedTensorsWriter(Linears({LAYER: quantize(x, fmt)}, {}))
    with pytest.raises(CheckpointError, match="no layer is quantized"):
        CompressedTensorsWriter(Linears({}, {}))


def test_example_configs_are_understood(shared_data: pathlib.Path) -> None:
    folder = shared_data / "configs-real"
    packed = json.loads((folder / "ct_int4_config.json").read_text())
    scheme = parse_config(packed, "x").scheme(LAYER)
    assert scheme is not None
    assert scheme.fmt == QuantFormat("int4", "tensor", symmetric=False)
    naive = json.loads((folder / "ct_example_quant_config.json").read_text())
    scheme = parse_config(naive, "x").scheme(LAYER)
    assert scheme is not None
    assert scheme.fmt == formats.INT8_TENSOR.replace(activation=formats.INT8_PER_TENSOR)
    changed = copy.deepcopy(naive)
    changed["config_groups"]["group_1"]["weights"]["num_bits"] = 9
    with pytest.raises(CheckpointError, match="num_bits=9"):
        parse_config(changed, "x")
