"""GPTQ tensors and configs against plain loops written from the format's definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.gptq import (
    GptqReader,
    decode_zeros,
    encode_zeros,
    pack_layer,
    unpack_layer,
)
from qjax.checkpoints.gptq_config import V1, V2, GptqConfig, GptqLayer
from qjax.checkpoints.gptq_writer import GptqWriter
from qjax.checkpoints.quantized import find_reader
from qjax.checkpoints.reader import CheckpointSource
from qjax.checkpoints.safetensors_io import TensorInfo, read_json
from qjax.checkpoints.writer import Linears
from qjax.formats import FP8_E4M3_CHANNEL, W8A8_INT8, QuantFormat
from tests.checkpoint_models import assert_same_tree, json_values, random_quantized

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def int_format(bits, group_size, sym=True, scale_dtype="float16"):
    tile = "channel" if group_size is None else "group"
    return QuantFormat(
        f"int{bits}", tile, group_size=group_size, symmetric=sym, scale_dtype=scale_dtype
    )


def loop_field(words, index, bits):
    """Code ``index`` of a dense bit stream in int32 words."""
    value = 0
    for i in range(bits):
        word, bit = divmod(index * bits + i, 32)
        value |= (int(words[word]) >> bit & 1) << i
    return value


def loop_dequantize(tensors, bits, checkpoint_format):
    """``w[k, n] = scales[g_idx[k], n] * (q - z)``, one element at a time.

    v1 zero points are decoded as GPTQModel does: 2, 4 and 8 bits by adding a constant to the whole
    word, 3 bits field by field.
    """
    k, n = tensors["g_idx"].shape[0], tensors["scales"].shape[1]
    out = np.zeros((k, n), np.float64)
    qzeros = [[int(w) & 0xFFFFFFFF for w in row] for row in tensors["qzeros"]]
    if checkpoint_format == V1 and bits != 3:
        ones = sum(1 << i for i in range(0, 32, bits))
        qzeros = [[(w + ones) & 0xFFFFFFFF for w in row] for row in qzeros]
    for row in range(k):
        group = int(tensors["g_idx"][row])
        for column in range(n):
            code = loop_field(tensors["qweight"][:, column], row, bits)
            zero = loop_field(qzeros[group], column, bits)
            if checkpoint_format == V1 and bits == 3:
                zero = (zero + 1) % 8
            out[row, column] = float(tensors["scales"][group, column]) * (code - zero)
    return out


def dequantize(q):
    """In float64 and numpy; without the library's own dequantize."""
    tile = q.fmt.group_size or q.shape[0]
    groups = np.arange(q.shape[0]) // tile
    codes = np.asarray(q.qvalue).astype(np.float64)
    if q.zero_point is not None:
        codes = codes - np.asarray(q.zero_point)[groups]
    values = codes * np.asarray(q.scale).astype(np.float64)[groups]
    if q.perm is None:
        return values
    out = np.empty_like(values)
    out[np.asarray(q.perm)] = values
    return out


@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size, act_order", [(32, False), (32, True), (None, False)])
def test_tensors_mean_what_the_definition_says(bits, sym, version, group_size, act_order):
    fmt = int_format(bits, group_size, sym)
    q = random_quantized((96, 32), fmt, bits, act_order=act_order)
    tensors = pack_layer(q, version)
    np.testing.assert_array_equal(loop_dequantize(tensors, bits, version), dequantize(q))
    settings = GptqLayer(bits, group_size, sym, act_order)
    assert_same_tree(unpack_layer(tensors, settings, version), q)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_last_group_cut_short(act_order):
    q = random_quantized((80, 32), int_format(4, 32), 0, act_order=act_order)
    tensors = pack_layer(q, V1)
    assert tensors["scales"].shape == (3, 32)
    np.testing.assert_array_equal(loop_dequantize(tensors, 4, V1), dequantize(q))
    assert_same_tree(unpack_layer(tensors, GptqLayer(4, 32, True, None), V1), q)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales_keep_their_type_and_sign(scale_dtype):
    q = random_quantized((32, 32), int_format(4, None, scale_dtype=scale_dtype), 1)
    assert (np.asarray(q.scale).astype(np.float32) < 0).any()
    back = unpack_layer(pack_layer(q, V1), GptqLayer(4, None, True, None), V1)
    assert back.scale.dtype == scale_dtype and back.fmt.scale_dtype == scale_dtype
    assert_same_tree(back, q)


def test_v1_zero_point_of_zero_borrows_from_its_neighbours():
    zeros = np.array([[0, 5, 0, 3, 15, 0, 0, 1]], np.uint8)
    words = encode_zeros(zeros, 4, V1)
    stored = [int(words[0, 0]) >> 4 * i & 15 for i in range(8)]
    # Not [15, 4, 15, 2, ...]: the borrow of a field comes out of the next one.
    assert stored == [15, 3, 15, 1, 14, 15, 14, 15]
    np.testing.assert_array_equal(decode_zeros(words, 4, 8, V1), zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [V1, V2])
def test_every_word_of_zero_points_survives(bits, version):
    words = np.random.default_rng(bits).integers(-(2**31), 2**31, (5, 3)).astype(np.int32)
    zeros = decode_zeros(words, bits, 96 // bits, version)
    np.testing.assert_array_equal(encode_zeros(zeros, bits, version), words)


def test_act_order_is_restored_exactly():
    rng = np.random.default_rng(3)
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (16, 32)).astype(np.int32),
        "qzeros": np.full((4, 4), 0x77777777, np.int32),
        "scales": rng.uniform(size=(4, 32)).astype(np.float16),
        "g_idx": rng.permutation(np.repeat(np.arange(4, dtype=np.int32), 32)),
    }
    q = unpack_layer(tensors, GptqLayer(4, 32, True, True), V1)
    assert q.perm is not None
    np.testing.assert_array_equal(dequantize(q), loop_dequantize(tensors, 4, V1))
    for name, tensor in pack_layer(q, V1).items():
        assert tensor.dtype == tensors[name].dtype
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def layer_tensors(**changes):
    """A layer of 64 x 32 in 4 bits, groups of 32."""
    tensors = pack_layer(random_quantized((64, 32), int_format(4, 32), 0), V1)
    return {**tensors, **changes}


def test_contradictions_name_the_tensor():
    settings = GptqLayer(4, 32, True, False)
    cases = [
        (
            {"g_idx": np.repeat(np.array([0, 1], np.int32), [20, 44])},
            "l.g_idx gives group 0 20 rows",
        ),
        ({"g_idx": np.repeat(np.array([0, 2], np.int32), 32)}, "l.g_idx names groups 0 to 2"),
        (
            {"g_idx": np.repeat(np.array([1, 0], np.int32), 32)},
            "l.g_idx is not sorted, but desc_act",
        ),
        ({"qzeros": np.full((2, 4), 0x77777778, np.int32)}, "l.qzeros decodes to zero points 8"),
        ({"qzeros": np.full((2, 4), -0x77777778, np.int32)}, "checkpoint_format='gptq_v2'"),
        ({"scales": np.ones((1, 32), np.float16)}, r"l.scales has shape \(1, 32\)"),
        ({"scales": np.full((2, 32), np.nan, np.float16)}, "l.scales holds values"),
    ]
    for changes, message in cases:
        with pytest.raises(CheckpointError, match=message):
            unpack_layer(layer_tensors(**changes), settings, V1, layer="l")


def source(quantization, tensors=None, file="config.json"):
    if tensors is None:
        tensors = {f"a.q_proj.{name}": t for name, t in layer_tensors().items()}
    names = {"int32": "I32", "float16": "F16"}
    infos = {n: TensorInfo(names[str(t.dtype)], t.shape) for n, t in tensors.items()}
    return CheckpointSource("folder", {}, quantization, file, infos)


def test_reader_reads_a_layer():
    tensors = {f"a.q_proj.{name}": t for name, t in layer_tensors().items()}
    reader = GptqReader.from_source(source(BASE, tensors))
    assert reader is not None and reader.name == "gptq 4 bit g32 (v1)"
    assert reader.is_quantized("a.q_proj") and not reader.is_quantized("lm_head")
    expected = reader.expected("a.q_proj", (64, 32))
    assert {n: e.shape for n, e in expected.items()} == {n: t.shape for n, t in tensors.items()}
    q = reader.read("a.q_proj", tensors.__getitem__, (64, 32), np.float32)
    assert_same_tree(q, random_quantized((64, 32), int_format(4, 32), 0))


def test_files_without_g_idx():
    tensors = {f"a.q_proj.{n}": t for n, t in layer_tensors().items() if n != "g_idx"}
    reader = GptqReader(source(BASE, tensors))
    q = reader.read("a.q_proj", tensors.__getitem__, (64, 32), np.float32)
    assert q.perm is None
    reader = GptqReader(source({**BASE, "desc_act": True}, tensors))
    with pytest.raises(CheckpointError, match="a.q_proj.g_idx is missing"):
        reader.expected("a.q_proj", (64, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 5}, "key 'bits' is 5; supported are 2, 3, 4, 8"),
        ({"bits": "4"}, "key 'bits' is '4'"),
        ({"group_size": 0}, "key 'group_size' is 0"),
        ({"group_size": None}, "key 'group_size' is None"),
        ({"checkpoint_format": "gptq_p"}, "key 'checkpoint_format' is 'gptq_p'"),
        ({"checkpoint_format": "marlin"}, "key 'checkpoint_format' is 'marlin'"),
        ({"format": "bitblas"}, "key 'format' is 'bitblas'"),
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "keys contradict each other"),
        ({"is_marlin_format": True}, "'is_marlin_format' is True .weight shuffled|Marlin"),
        ({"pack_dtype": "int16"}, "key 'pack_dtype' is 'int16'"),
        ({"rotation": "hadamard"}, "key 'rotation' is 'hadamard'"),
        ({"act_bits": 8}, "key 'act_bits' is 8"),
        ({"sym": "yes"}, "key 'sym' is 'yes'"),
        ({"dynamic": {"+:(": {"bits": 8}}}, r"'\+:\(', no regular expression"),
        ({"dynamic": {"+:a": 8}}, "the settings 8"),
        ({"dynamic": {"+:a": {"bits": 16}}}, r"'dynamic' '\+:a', key 'bits' is 16"),
        ({"dynamic": {"+:a": {"format": "gptq_v2"}}}, "another checkpoint format"),
        ({"dynamic": [1]}, "must map patterns"),
        ({"dynamic": {"-:.*q_proj": {}}}, "excludes a.q_proj, but tensor a.q_proj.qweight"),
    ],
)
def test_unsupported_configs_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        GptqReader.from_source(source({**BASE, **changes}))
    assert "folder/config.json" in str(error.value) and "gptq" in str(error.value)


def test_config_contradicting_headers():
    reader = GptqReader(source({**BASE, "bits": 8}))
    with pytest.raises(CheckpointError, match="a.q_proj.qweight.*looks like 4 bits"):
        reader.expected("a.q_proj", (64, 32))
    reader = GptqReader(source({**BASE, "group_size": 64}))
    with pytest.raises(CheckpointError, match="a.q_proj.scales.*group_size=64 need"):
        reader.expected("a.q_proj", (64, 32))
    with pytest.raises(CheckpointError, match="which 172 in features do not fill"):
        reader.expected("a.q_proj", (172, 64))
    with pytest.raises(CheckpointError, match=r"no tensor is named \*.qweight"):
        GptqReader(source(BASE, {"a.weight": np.zeros((1, 1), np.float16)}))


def test_dynamic_takes_the_first_match_from_the_start_of_the_name():
    config = GptqConfig(
        {
            **BASE,
            "dynamic": {
                r"-:.*\.0\..*gate": {},
                r"+:.*\.[01]\.": {"bits": 8, "group_size": -1},
                r".*down_proj": {"sym": False, "desc_act": True},
                r"gate": {"bits": 2},  # matches no name: it would have to begin with it
            },
        }
    )
    base = GptqLayer(4, 32, True, False)
    assert config.layer("model.layers.0.mlp.gate_proj") is None
    assert config.layer("model.layers.0.mlp.down_proj") == GptqLayer(8, None, True, False)
    assert config.layer("model.layers.2.mlp.down_proj") == GptqLayer(4, 32, False, True)
    assert config.layer("model.layers.2.mlp.gate_proj") == base
    assert GptqConfig(BASE).layer("anything") == base


@given(
    st.dictionaries(
        st.sampled_from(
            "bits group_size sym desc_act lm_head dynamic checkpoint_format pack_dtype act_bits "
            "is_marlin_format rotation adapter".split()
        ),
        json_values(),
    )
)
def test_any_config_is_understood_or_refused(values):
    try:
        GptqConfig({**BASE, **values}).layer("model.layers.0.mlp.up_proj")
    except CheckpointError as error:
        assert "gptq" in str(error)


def test_real_configs(shared_data, tmp_path):
    folder = shared_data / "configs-real"
    three_bit = read_json(folder / "Genz-70b-GPTQ-3bit-actorder.json")
    q = random_quantized((64, 32), int_format(3, None), 0)
    packed = {f"a.{name}": t for name, t in pack_layer(q, V1).items()}
    infos = source({}, packed).tensors
    reader = find_reader(tmp_path, three_bit, infos)
    assert reader is not None and reader.name == "gptq 3 bit per channel (v1)"
    assert_same_tree(reader.read("a", packed.__getitem__, (64, 32), np.float32), q)

    llama = read_json(folder / "Llama-2-13B-chat-GPTQ.json")
    # The older way: a file of its own, which does not name its method.
    del llama["quantization_config"]
    text = (folder / "Llama-2-13B-chat-GPTQ.quantize_config.json").read_text()
    (tmp_path / "quantize_config.json").write_text(text)
    reader = find_reader(tmp_path, llama, infos)
    assert reader is not None and reader.name == "gptq 4 bit g128 (v1)"


def writer(layers, plain=None, **options):
    return GptqWriter(Linears(layers, plain or {}), **options)


def test_writer_chooses_v1_unless_a_zero_point_is_zero():
    fmt = int_format(4, 32, sym=False)
    above = random_quantized((64, 32), fmt, 0, lowest_zero=1)
    below = random_quantized((64, 32), fmt, 0)
    assert np.asarray(below.zero_point).min() == -8
    assert writer({"a": above}).config()["checkpoint_format"] == V1
    assert writer({"a": above, "b": below}).config()["checkpoint_format"] == V2
    assert writer({"a": below}, checkpoint_format=V1).config()["checkpoint_format"] == V1
    sym = random_quantized((64, 32), int_format(4, 32), 0)
    assert writer({"a": sym}).config()["checkpoint_format"] == V1


def test_writer_describes_mixed_models():
    fmt, wide = int_format(4, 32), int_format(8, None)
    layers = {}
    for i in range(3):
        layers[f"model.layers.{i}.mlp.up_proj"] = random_quantized((64, 32), fmt, i)
        layers[f"model.layers.{i}.mlp.down_proj"] = random_quantized((64, 32), wide, i)
    layers["model.layers.0.self_attn.q_proj"] = random_quantized((64, 32), fmt, 9, act_order=True)
    plain = {f"model.layers.{i}.self_attn.q_proj": (64, 32) for i in (1, 2)} | {"lm_head": (64, 32)}
    config = writer(layers, plain).config()
    assert config["dynamic"] == {
        r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^model\.layers\.1\.self_attn\.q_proj$": {},
        r"-:^model\.layers\.2\.self_attn\.q_proj$": {},
    }
    assert config["desc_act"] and not config["lm_head"]
    read = GptqConfig(config)
    for layer, q in layers.items():
        settings = read.layer(layer)
        assert settings is not None and settings.format("float16") == q.fmt
    assert all(read.layer(layer) is None for layer in plain if layer != "lm_head")


@pytest.mark.parametrize(
    "q, reason",
    [
        (random_quantized((64, 32), W8A8_INT8, 0), "activations are quantized too"),
        (random_quantized((40, 32), int_format(3, None), 0), "which 40 in features do not fill"),
        (
            random_quantized((64, 32), int_format(4, 32, scale_dtype="float8_e4m3fn"), 0),
            "its scales are float8_e4m3fn",
        ),
    ],
)
def test_writer_refuses_what_it_cannot_store(q, reason):
    with pytest.raises(CheckpointError, match=f"a.*{reason}"):
        writer({"a": q})


def test_writer_refuses_zero_points_of_sixteen_and_floats():
    q = random_quantized((64, 32), int_format(4, 32, sym=False), 0)
    zero_point = np.asarray(q.zero_point).copy()
    zero_point[0, 0] = 8
    with pytest.raises(CheckpointError, match="its zero points, -8 to 8, do not fit 4 bits"):
        writer({"a": q.__class__(**{**vars(q), "zero_point": zero_point})})
    with pytest.raises(CheckpointError, match="its codes are float8_e4m3fn, not integers"):
        writer({"a": q.__class__(**{**vars(q), "fmt": FP8_E4M3_CHANNEL})})
    with pytest.raises(CheckpointError, match="checkpoint_format='gptq_p' must be"):
        writer({"a": q}, checkpoint_format="gptq_p")
