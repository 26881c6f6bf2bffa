"""HF fp8: blocks with short edges, per tensor and channel, KV cache scales in every spelling."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import formats
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.fp8 import Fp8Reader
from qjax.checkpoints.fp8_writer import Fp8Writer
from qjax.checkpoints.kv_scales import kv_scale_names, read_kv_scales
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.writer import Linears
from qjax.formats import QuantFormat
from qjax.quantize import quantize
from tests.fake_checkpoints import LAYER, infos, named, read_layer, same, source, value

E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu


def config(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **keys}


def reader_of(tensors: dict[str, np.ndarray], quantization: dict[str, Any]) -> Fp8Reader:
    reader = Fp8Reader.from_source(source(tensors, quantization))
    assert reader is not None
    return reader


def written(reader: Fp8Reader, tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> None:
    """Assert that a layer is written as it was read."""
    q = read_layer(reader, tensors, shape)
    writer = Fp8Writer(Linears({LAYER: q}, {}))
    made = writer.tensors(LAYER, q)
    assert made.keys() == tensors.keys() == writer.layout(LAYER, q).keys()
    for name, spec in writer.layout(LAYER, q).items():
        array = made[name]
        assert (array.dtype, array.shape) == (spec.dtype, spec.shape)
        assert (array.dtype, array.shape) == (tensors[name].dtype, tensors[name].shape), name
        assert array.tobytes() == tensors[name].tobytes(), name
    config = writer.config()
    for key, stored in reader.source.quantization.items():
        assert config[key] == stored


@pytest.mark.parametrize(("k", "n"), [(128, 128), (256, 384), (200, 130), (8, 8)])
@pytest.mark.parametrize("scale_type", [np.float32, ml_dtypes.bfloat16, E8M0])
def test_blocks(k: int, n: int, scale_type: Any, rng: np.random.Generator) -> None:
    codes = rng.uniform(-400, 400, (n, k)).astype(E4M3)
    scale = np.exp2(rng.integers(-8, 2, (-(-n // 128), -(-k // 128)))).astype(scale_type)
    tensors = named({"weight": codes, "weight_scale_inv": scale})
    quantization = config(weight_block_size=[128, 128], fmt="e4m3")
    if scale_type is E8M0:
        quantization["scale_fmt"] = "ue8m0"
    reader = reader_of(tensors, quantization)
    q = read_layer(reader, tensors, (k, n))
    full = np.repeat(np.repeat(scale.astype(np.float32), 128, 0), 128, 1)[:n, :k]
    np.testing.assert_array_equal(value(q), (codes.astype(np.float32) * full).T)
    assert q.fmt.block == (128, 128)
    assert q.fmt.activation == formats.FP8_TOKEN_G128
    written(reader, tensors, (k, n))


def test_blocks_that_are_not_square(rng: np.random.Generator) -> None:
    codes = rng.uniform(-400, 400, (24, 40)).astype(E4M3)
    scale = rng.uniform(0.1, 1, (3, 2)).astype(np.float32)
    tensors = named({"weight": codes, "weight_scale_inv": scale})
    reader = reader_of(tensors, config(weight_block_size=[8, 32]))
    q = read_layer(reader, tensors, (40, 24))
    full = np.repeat(np.repeat(scale, 8, 0), 32, 1)[:, :40]
    np.testing.assert_array_equal(value(q), (codes.astype(np.float32) * full).T)
    written(reader, tensors, (40, 24))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("scale_shape", [(), (24, 1)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_per_tensor_and_channel(
    static: bool, scale_shape: tuple[int, ...], dtype: Any, rng: np.random.Generator
) -> None:
    codes = rng.uniform(-400, 400, (24, 40)).astype(dtype)
    scale = np.asarray(rng.uniform(0.1, 1, scale_shape), np.float32)
    parts = {"weight": codes, "weight_scale": scale}
    if static:
        parts["input_scale"] = np.asarray(0.125, np.float32)
    tensors = named(parts)
    keys = {"activation_scheme": "static" if static else "dynamic"}
    keys["fmt"] = "e4m3" if dtype is E4M3 else "e5m2"
    reader = reader_of(tensors, config(**keys))
    q = read_layer(reader, tensors, (40, 24))
    np.testing.assert_array_equal(value(q), (codes.astype(np.float32) * scale).T)
    assert q.fmt.granularity == ("tensor" if scale_shape == () else "channel")
    assert q.fmt.activation == (formats.FP8_PER_TENSOR if static else formats.FP8_PER_TOKEN)
    assert (q.act_scale is not None) == static
    written(reader, tensors, (40, 24))


def test_names_that_transformers_writes_without_blocks(rng: np.random.Generator) -> None:
    parts = {
        "weight": rng.uniform(-400, 400, (24, 40)).astype(E4M3),
        "weight_scale_inv": np.asarray(0.5, ml_dtypes.bfloat16),
        "activation_scale": np.asarray(0.25, np.float32),
    }
    tensors = named(parts)
    reader = reader_of(tensors, config(activation_scheme="static", weight_block_size=None))
    q = read_layer(reader, tensors, (40, 24))
    assert float(np.asarray(q.act_scale)) == 0.25 and q.fmt.scale_dtype == "bfloat16"


def test_layers_stored_plain_are_left_plain(rng: np.random.Generator) -> None:
    tensors = named(
        {"weight": rng.uniform(-1, 1, (8, 8)).astype(E4M3), "weight_scale": np.ones(1, np.float32)}
    )
    tensors["lm_head.weight"] = np.zeros((8, 8), ml_dtypes.bfloat16)
    reader = reader_of(tensors, config(ignored_layers=["lm_head"]))
    assert reader.is_quantized(LAYER) and not reader.is_quantized("lm_head")


CODES = np.zeros((8, 8), E4M3)
ONE = np.ones(1, np.float32)
GOOD = {"weight": CODES, "weight_scale": ONE}
REFUSED: list[tuple[dict[str, np.ndarray], dict[str, Any], str]] = [
    ({"weight": CODES}, {}, "weight_scale_inv or .*weight_scale is missing"),
    ({**GOOD, "weight_scale_inv": ONE}, {}, "contradict each other"),
    (GOOD, {"activation_scheme": "static"}, "input_scale or .*is missing"),
    (GOOD, {"activation_scheme": "other"}, "'other' of activation_scheme"),
    (GOOD, {"activation_scheme": "static", "weight_block_size": [128, 128]}, "has no meaning"),
    (GOOD, {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
    (GOOD, {"weight_block_size": [0, 128]}, r"weight_block_size=\[0, 128\]"),
    (GOOD, {"weight_block_size": "128"}, "weight_block_size='128'"),
    (GOOD, {"fmt": "e5m2"}, "fmt='e5m2' but .*F8_E4M3"),
    (GOOD, {"fmt": "e3m4"}, "fmt='e3m4' is not supported"),
    (GOOD, {"weight_scale_semantics": "inverse"}, "weight_scale_semantics='inverse'"),
    (GOOD, {"kv_cache_scheme": "dynamic"}, "kv_cache_scheme='dynamic'"),
    (GOOD, {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
    (GOOD, {"ignored_layers": [LAYER]}, "excluded from quantization but its weight is F8_E4M3"),
    (GOOD, {"modules_to_not_convert": "lm_head"}, "must be a list of names"),
    ({**GOOD, "weight": np.zeros((8, 8), np.float16)}, {}, "weight is F16, not fp8"),
    ({"weight_scale": ONE}, {}, "weight is missing"),
    ({**GOOD, "weight_scale": np.ones(1, np.int32)}, {}, "weight_scale is I32"),
    ({"weight": np.zeros((8, 8), np.float32)}, {}, "no weight is stored in fp8"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda i: REFUSED[i][2][:30])
def test_refusals(case: int) -> None:
    parts, keys, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        reader_of(named(parts), config(**keys))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_static_scales_must_be_positive_numbers(bad: float) -> None:
    tensors = named({**GOOD, "input_scale": np.array([bad], np.float32)})
    reader = reader_of(tensors, config(activation_scheme="static"))
    with pytest.raises(CheckpointError, match="input_scale is .* positive and finite"):
        read_layer(reader, tensors, (8, 8))


@pytest.mark.parametrize(
    "fmt", [formats.W8A8_FP8, formats.W8A8_FP8_BLOCK, formats.FP8_E5M2_TENSOR], ids=lambda f: f.name
)
def test_quantize_write_read_is_the_identity(fmt: QuantFormat, rng: np.random.Generator) -> None:
    fmt = fmt if fmt.activation is not None else fmt.replace(activation=formats.FP8_PER_TOKEN)
    q = quantize(jnp.asarray(rng.standard_normal((160, 136)), jnp.float32), fmt)
    writer = Fp8Writer(Linears({LAYER: q}, {"lm_head": (8, 8)}))
    tensors = dict(writer.tensors(LAYER, q))
    same(read_layer(reader_of(tensors, writer.config()), tensors, (160, 136)), q)


def test_what_cannot_be_written_is_refused(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    for fmt, message in (
        (formats.INT8_CHANNEL, "only fp8 matrices"),
        (formats.FP8_E4M3_CHANNEL, "unquantized activations.*write compressed-tensors"),
        (formats.FP8_E4M3_BLOCK128, "blocks without dynamic activations"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Fp8Writer(Linears({LAYER: quantize(x, fmt)}, {}))
    a, b = quantize(x, formats.W8A8_FP8), quantize(x, formats.W8A8_FP8_BLOCK)
    with pytest.raises(CheckpointError, match="says once for all layers"):
        Fp8Writer(Linears({"a": a, "b": b}, {}))


ATTENTION = "model.layers.{}.self_attn."
SPELLINGS = [
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
    ("attn.kv_scale", "attn.kv_scale"),
]


def kv_tensors(
    spelling: tuple[str, str], layers: int = 2, shape: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    key, val = spelling
    tensors = {}
    for i in range(layers):
        tensors[ATTENTION.format(i) + val] = np.full(shape, 0.5 + i, np.float32)
        tensors[ATTENTION.format(i) + key] = np.full(shape, 0.25 + i, np.float32)
    return tensors


def read_kv(tensors: dict[str, np.ndarray], **keys: Any) -> KVScales | None:
    return read_kv_scales(infos(tensors), tensors.__getitem__, 2, 4, **keys)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s[0])
@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1)])
def test_kv_scales(spelling: tuple[str, str], shape: tuple[int, ...]) -> None:
    tensors = kv_tensors(spelling, shape=shape)
    scales = read_kv(tensors)
    assert scales is not None and scales.dtype == "float8_e4m3fn"
    for i in range(2):
        np.testing.assert_array_equal(scales.keys[i], np.full(4, 0.25 + i, np.float32))
        shared = spelling[0] == spelling[1]
        np.testing.assert_array_equal(scales.values[i], np.full(4, (0.25 if shared else 0.5) + i))
    assert kv_scale_names(infos(tensors), 2) == set(tensors)
    reader = reader_of({**named(GOOD), **tensors}, config())
    assert reader.kv_scale_names(2) == set(tensors)
    assert reader.kv_scales(tensors.__getitem__, 2, 4) is not None
    bare = reader_of(named(GOOD), config(kv_cache_scheme="static"))
    with pytest.raises(CheckpointError, match="kv_cache_scheme announces"):
        bare.kv_scales(tensors.__getitem__, 2, 4)


def test_kv_scales_that_are_missing_or_wrong() -> None:
    assert read_kv({}) is None
    with pytest.raises(CheckpointError, match="kv_cache_scheme announces"):
        read_kv({}, declared="kv_cache_scheme")
    tensors = kv_tensors(SPELLINGS[0])
    with pytest.raises(CheckpointError, match=r"layers \[1\] have no KV cache scale"):
        read_kv({name: a for name, a in tensors.items() if ".1." not in name})
    with pytest.raises(CheckpointError, match="v_scale is not; both are needed"):
        read_kv({name: a for name, a in tensors.items() if "v_scale" not in name})
    for bad in (-1.0, 0.0, np.nan, np.inf):
        with pytest.raises(CheckpointError, match="k_scale holds .*positive and finite"):
            read_kv({**tensors, ATTENTION.format(1) + "k_scale": np.array([bad], np.float32)})
    with pytest.raises(CheckpointError, match="one per KV head, 4"):
        read_kv({**tensors, ATTENTION.format(1) + "k_scale": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="both give KV cache scales and they differ"):
        read_kv({**tensors, ATTENTION.format(0) + "kv_scale": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match="k_zero_point is not zero"):
        read_kv({**tensors, ATTENTION.format(0) + "k_zero_point": np.ones(1, np.float32)})
