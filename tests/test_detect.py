"""Checkpoints without a quantization config: told by their tensors, or refused."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import formats
from qjax.checkpoints.awq import pack_layer as pack_awq
from qjax.checkpoints.detect import config_from_tensors
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.fp8_writer import Fp8Writer
from qjax.checkpoints.gptq import pack_layer
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.quantized import find_reader
from qjax.checkpoints.writer import Linears
from qjax.formats import QuantFormat
from qjax.quantize import dequantize, quantize
from tests.checkpoint_models import random_quantized
from tests.fake_checkpoints import LAYER, infos, named, read_layer, same

OTHER = "model.layers.0.mlp.down_proj"


def int_format(bits: int, group_size: int, symmetric: bool = True) -> QuantFormat:
    return QuantFormat(
        f"int{bits}", "group", group_size=group_size, symmetric=symmetric, scale_dtype="float16"
    )


@pytest.mark.parametrize(("bits", "act_order"), [(2, False), (3, True), (4, True), (8, False)])
def test_gptq(bits: int, act_order: bool, tmp_path: pathlib.Path) -> None:
    fmt = int_format(bits, 32)
    first = random_quantized((96, 32), fmt, 0, act_order=act_order)
    second = random_quantized((32, 32), fmt, 1)  # a single group
    tensors = named(pack_layer(first, "gptq")) | named(pack_layer(second, "gptq"), OTHER)
    reader = find_reader(tmp_path, {}, infos(tensors))
    assert reader is not None and reader.name == f"gptq {bits} bit g32 (v1)"
    same(read_layer(reader, tensors, (96, 32)), first)
    same(read_layer(reader, tensors, (32, 32), OTHER), second)


def test_groups_that_do_not_divide_are_noticed(tmp_path: pathlib.Path) -> None:
    tensors = named(pack_layer(random_quantized((96, 32), int_format(4, 36), 0), "gptq"))
    reader = find_reader(tmp_path, {}, infos(tensors))
    assert reader is not None and reader.name == "gptq 4 bit g32 (v1)"
    with pytest.raises(CheckpointError, match="g_idx gives group 0 36 rows instead of 32"):
        read_layer(reader, tensors, (96, 32))


@pytest.mark.parametrize(("symmetric", "version"), [(False, "gptq"), (True, "gptq_v2")])
def test_versions_and_zero_points_are_not_guessed(
    symmetric: bool, version: str, tmp_path: pathlib.Path
) -> None:
    q = random_quantized((96, 32), int_format(4, 32, symmetric), 0)
    tensors = named(pack_layer(q, version))
    reader = find_reader(tmp_path, {}, infos(tensors))
    assert reader is not None
    with pytest.raises(CheckpointError, match="qzeros"):
        read_layer(reader, tensors, (96, 32))


def test_awq(tmp_path: pathlib.Path) -> None:
    first, second = (random_quantized((k, 32), int_format(4, 32, False), k) for k in (64, 32))
    tensors = named(pack_awq(first)) | named(pack_awq(second), OTHER)
    reader = find_reader(tmp_path, {}, infos(tensors))
    assert reader is not None and reader.name == "awq 4 bit g32 (gemm)"
    same(read_layer(reader, tensors, (64, 32)), first)
    same(read_layer(reader, tensors, (32, 32), OTHER), second)


def test_fp8_blocks(rng: np.random.Generator, tmp_path: pathlib.Path) -> None:
    q = quantize(jnp.asarray(rng.standard_normal((160, 136)), jnp.float32), formats.W8A8_FP8_BLOCK)
    tensors = dict(Fp8Writer(Linears({LAYER: q}, {})).tensors(LAYER, q))
    tensors["lm_head.weight"] = np.zeros((8, 8), np.float32)
    reader = find_reader(tmp_path, {}, infos(tensors))
    assert reader is not None and not reader.is_quantized("lm_head")
    same(read_layer(reader, tensors, (160, 136)), q)


def test_what_shapes_do_not_tell_is_refused(tmp_path: pathlib.Path) -> None:
    good = named(pack_layer(random_quantized((96, 32), int_format(4, 32), 0), "gptq"))
    eight = named(pack_layer(random_quantized((96, 32), int_format(8, 32), 0), "gptq"), OTHER)
    wider = named(pack_layer(random_quantized((96, 32), int_format(4, 48), 0), "gptq"), OTHER)
    assert config_from_tensors(infos(good)) is not None
    assert config_from_tensors({}) is None
    for tensors in (
        good | eight,  # two settings
        good | wider,
        good | {f"{LAYER}.g_idx": np.zeros(95, np.int32)},
        good | {f"{LAYER}.scales": np.zeros((3, 16), np.float16)},
        {name: t for name, t in good.items() if not name.endswith("qzeros")},
        {f"{LAYER}.weight_packed": np.zeros((4, 4), np.int32)},
        {f"{LAYER}.weight_scale_inv": np.zeros((1, 1), np.float32)},
    ):
        with pytest.raises(CheckpointError, match="no quantization config, and their shapes do"):
            find_reader(tmp_path, {}, infos(tensors))


@pytest.mark.parametrize("name", ["gptq-b4-g128-sym", "gptq-b8-g128-sym", "awq-b4-g128-asym"])
def test_real_files_without_their_config(
    name: str, shared_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = shared_data / "quantized-656k" / f"{name}-autoround"
    folder = pathlib.Path(shutil.copytree(original, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    wanted: Any = load_model(original, progress=False)
    model = load_model(folder, progress=False)
    assert model.method == wanted.method
    for path in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        layers = (m.params["model"]["layers_1"][path[0]][path[1]] for m in (model, wanted))
        a, b = (dequantize(layer["kernel"]) for layer in layers)
        np.testing.assert_array_equal(a, b)
