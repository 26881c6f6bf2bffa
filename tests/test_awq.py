"""AutoAWQ tensors and configs against plain loops written from the format's definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.checkpoints.awq import AwqConfig, AwqReader, pack_layer, unpack_layer
from qjax.checkpoints.awq_writer import AwqWriter
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import CheckpointSource
from qjax.checkpoints.safetensors_io import TensorInfo
from qjax.checkpoints.writer import Linears
from qjax.formats import QuantFormat
from tests.checkpoint_models import assert_same_tree, json_values, random_quantized

BASE = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, within its eight, of the nibble at bits 4i."""


def int4(group_size, sym, scale_dtype="float16"):
    tile = "channel" if group_size is None else "group"
    return QuantFormat("int4", tile, group_size=group_size, symmetric=sym, scale_dtype=scale_dtype)


def loop_gemm(words):
    """Unsigned codes of words packed along the last axis."""
    rows, columns = words.shape
    out = np.zeros((rows, 8 * columns), np.int64)
    for r in range(rows):
        for c in range(columns):
            for i in range(8):
                out[r, 8 * c + ORDER[i]] = int(words[r, c]) >> 4 * i & 15
    return out


def values(codes, zeros, scales, group_size):
    """``(q - z) * s`` in float64, one element at a time."""
    out = np.zeros(codes.shape, np.float64)
    for k in range(codes.shape[0]):
        for n in range(codes.shape[1]):
            g = k // group_size
            out[k, n] = (int(codes[k, n]) - int(zeros[g, n])) * float(scales[g, n])
    return out


def dequantize(q):
    groups = np.arange(q.shape[0]) // (q.fmt.group_size or q.shape[0])
    codes = np.asarray(q.qvalue).astype(np.float64)
    if q.zero_point is not None:
        codes = codes - np.asarray(q.zero_point)[groups]
    return codes * np.asarray(q.scale).astype(np.float64)[groups]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_gemm_means_what_the_definition_says(group_size, sym, scale_dtype):
    q = random_quantized((64, 24), int4(group_size, sym, scale_dtype), 0)
    tensors = pack_layer(q)
    codes, zeros = loop_gemm(tensors["qweight"]), loop_gemm(tensors["qzeros"])
    want = values(codes, zeros, tensors["scales"], group_size or 64)
    np.testing.assert_array_equal(dequantize(q), want)
    config = AwqConfig("gemm", group_size, not sym, ())
    assert_same_tree(unpack_layer(tensors, config), q)


def test_gemm_is_read_and_written_without_a_change():
    rng = np.random.default_rng(0)
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (64, 4)).astype(np.int32),
        "qzeros": rng.integers(-(2**31), 2**31, (2, 4)).astype(np.int32),
        "scales": rng.normal(size=(2, 32)).astype(np.float16),
    }
    written = pack_layer(unpack_layer(tensors, AwqConfig("gemm", 32, True, ())))
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    "k, group_size, width", [(256, 32, 4), (256, 64, 2), (256, 128, 1), (2304, 128, 3)]
)
def test_gemv(k, group_size, width):
    rng = np.random.default_rng(k)
    n, groups = 16, k // group_size
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32),
        "qzeros": rng.integers(-(2**31), 2**31, (n, width)).astype(np.int32),
        "scales": rng.normal(size=(n, 8 * width)).astype(np.float16),
    }

    def loop(words):
        return np.array([[int(w) >> 4 * i & 15 for w in row for i in range(8)] for row in words]).T

    q = unpack_layer(tensors, AwqConfig("gemv", group_size, True, ()))
    assert q.scale.shape == (groups, n)  # without the padding
    want = values(
        loop(tensors["qweight"]),
        loop(tensors["qzeros"])[:groups],
        tensors["scales"].T[:groups],
        group_size,
    )
    np.testing.assert_array_equal(dequantize(q), want)


def source(quantization, file="config.json", extra=()):
    tensors = pack_layer(random_quantized((64, 32), int4(32, False), 0))
    names = {"int32": "I32", "float16": "F16"}
    infos = {
        f"a.0.up_proj.{n}": TensorInfo(names[str(t.dtype)], t.shape) for n, t in tensors.items()
    }
    infos.update({name: TensorInfo("F16", (32, 64)) for name in extra})
    return CheckpointSource("folder", {}, quantization, file, infos)


def test_reader():
    reader = AwqReader.from_source(source(BASE, extra=["lm_head.weight", "b.weight"]))
    assert reader is not None and reader.name == "awq 4 bit g32 (gemm)"
    assert reader.is_quantized("a.0.up_proj")
    # Stored plain: read plain, whether or not the config lists it.
    assert not reader.is_quantized("lm_head") and not reader.is_quantized("b")
    assert reader.is_quantized("missing")
    q = random_quantized((64, 32), int4(32, False), 0)
    tensors = {f"a.0.up_proj.{name}": t for name, t in pack_layer(q).items()}
    expected = reader.expected("a.0.up_proj", (64, 32))
    assert {n: e.shape for n, e in expected.items()} == {n: t.shape for n, t in tensors.items()}
    assert_same_tree(reader.read("a.0.up_proj", tensors.__getitem__, (64, 32), np.float32), q)


def test_older_spellings():
    old = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    reader = AwqReader.from_source(source(old, file="quant_config.json"))
    assert reader is not None and reader.name == "awq 4 bit g32 (gemm)"
    config = AwqConfig.parse({"bits": 4, "group_size": -1, "sym": True, "format": "gemm"})
    assert config == AwqConfig("gemm", None, False, ())


def test_other_methods_are_left_to_their_readers():
    assert AwqReader.from_source(source({"quant_method": "gptq", "bits": 4})) is None
    assert AwqReader.from_source(source({"bits": 4, "group_size": 32, "desc_act": False})) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 8}, "key 'bits' is 8"),
        ({"w_bit": 3}, "keys 'bits'=4 and 'w_bit'=3 contradict"),
        ({"group_size": 0}, "key 'group_size' is 0"),
        ({"version": "gemv_fast"}, "key 'version' is 'gemv_fast' .int16 words"),
        ({"version": "marlin"}, "key 'version' is 'marlin' .weights shuffled"),
        ({"version": "exllama"}, "key 'version' is 'exllama'"),
        ({"version": "exllamav2"}, "key 'version' is 'exllamav2'"),
        ({"version": "new"}, "key 'version' is 'new', which is not supported"),
        ({"backend": "llm-awq"}, "key 'backend' is 'llm-awq' .int16 words"),
        ({"zero_point": "yes"}, "key 'zero_point' is 'yes'"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
        ({"modules_to_not_convert": ["up_proj"]}, "excludes a.0.up_proj, but tensor"),
    ],
)
def test_unsupported_configs_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        AwqReader.from_source(source({**BASE, **changes}))
    assert "folder/config.json" in str(error.value) and "awq" in str(error.value)


@given(
    st.dictionaries(
        st.sampled_from(
            "bits w_bit group_size q_group_size zero_point sym version format backend "
            "modules_to_not_convert".split()
        ),
        json_values(),
    )
)
def test_any_config_is_understood_or_refused(values):
    try:
        AwqConfig.parse({**BASE, **values}).excludes("model.layers.0.mlp.up_proj")
    except CheckpointError as error:
        assert "awq" in str(error)


def test_contradictions_name_the_tensor():
    reader = AwqReader(source({**BASE, "group_size": 64}))
    with pytest.raises(CheckpointError, match=r"a.0.up_proj.qzeros has shape \(2, 4\).*needs"):
        reader.expected("a.0.up_proj", (64, 32))
    reader = AwqReader(source({**BASE, "version": "gemv"}))
    with pytest.raises(CheckpointError, match=r"a.0.up_proj.qweight has shape \(64, 4\)"):
        reader.expected("a.0.up_proj", (64, 32))
    with pytest.raises(CheckpointError, match="172 in features are not a multiple of group_size"):
        reader.expected("a.0.up_proj", (172, 32))
    with pytest.raises(CheckpointError, match="30 out features are not a multiple of 8"):
        reader.expected("a.0.up_proj", (64, 30))
    tensors = pack_layer(random_quantized((64, 32), int4(32, False), 0))
    with pytest.raises(CheckpointError, match="l.qzeros holds zero points 0 to 15"):
        unpack_layer(tensors, AwqConfig("gemm", 32, False, ()), layer="l")
    tensors["scales"] = np.full((2, 32), np.inf, np.float16)
    with pytest.raises(CheckpointError, match="l.scales holds values that are not finite"):
        unpack_layer(tensors, AwqConfig("gemm", 32, True, ()), layer="l")


def test_writer_config_is_read_back():
    q = random_quantized((64, 32), int4(32, True), 0)
    writer = AwqWriter(Linears({"model.layers.0.a": q}, {"model.layers.1.a": (64, 32)}))
    config = writer.config()
    assert config["zero_point"] is False
    assert AwqConfig.parse(config) == AwqConfig("gemm", 32, False, ("model.layers.1.a",))


@pytest.mark.parametrize(
    "layers, plain, reason",
    [
        ({"a": random_quantized((64, 32), int4(32, True), 0, act_order=True)}, [], "use gptq"),
        ({"a": random_quantized((80, 32), int4(32, True), 0)}, [], "needs whole groups"),
        ({"a": random_quantized((64, 20), int4(32, True), 0)}, [], "20 out features"),
        ({"a": random_quantized((64, 32), QuantFormat("int8"), 0)}, [], "8 bits, not 4"),
        ({"lm_head": random_quantized((64, 32), int4(32, True), 0)}, [], "leave it so"),
        ({"b.a": random_quantized((64, 32), int4(32, True), 0)}, ["a"], "by substring"),
        (
            {
                "a": random_quantized((64, 32), int4(32, True), 0),
                "b": random_quantized((64, 32), int4(64, True), 0),
            },
            [],
            "it is int4_g64 and a is int4_g32",
        ),
    ],
)
def test_writer_refuses_what_it_cannot_store(layers, plain, reason):
    with pytest.raises(CheckpointError, match=reason):
        AwqWriter(Linears(layers, dict.fromkeys(plain, (64, 32))))
