"""AutoRound's own configs: read like the layout they name, or refused with key and value."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from qjax.checkpoints.awq import AwqReader
from qjax.checkpoints.awq import pack_layer as pack_awq
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.gptq import GptqReader, pack_layer
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.quantized import READERS
from qjax.formats import QuantFormat
from tests.checkpoint_models import assert_same_tree, random_quantized
from tests.fake_checkpoints import named, read_layer, same, source

BASE = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def fmt(bits: int = 4, group_size: int = 32) -> QuantFormat:
    return QuantFormat(f"int{bits}", "group", group_size=group_size, scale_dtype="float16")


def reader_of(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    found = [reader for make in READERS if (reader := make(source(tensors, config))) is not None]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"packing_format": "auto_round:auto_gptq"},
        {"packing_format": "auto_round:gptq"},
        {"backend": "auto_round:gptq:exllamav2"},
    ],
)
def test_gptq_layout_with_overrides(method: str, layout: dict[str, str]) -> None:
    one, two = random_quantized((64, 32), fmt(), 0), random_quantized((64, 32), fmt(8, 16), 1)
    tensors = named(pack_layer(one, "gptq"), UP) | named(pack_layer(two, "gptq"), DOWN)
    tensors["lm_head.weight"] = np.zeros((4, 4), np.float16)
    extra = {
        DOWN: {"bits": 8, "group_size": 16, "data_type": "int"},
        "lm_head": {"bits": 16, "data_type": "float"},
        r".*\.layers\.0\.self_attn\..*": {"bits": 16, "data_type": "float"},
    }
    reader = reader_of({**BASE, "quant_method": method, **layout, "extra_config": extra}, tensors)
    assert isinstance(reader, GptqReader)
    same(read_layer(reader, tensors, (64, 32), UP), one)
    same(read_layer(reader, tensors, (64, 32), DOWN), two)
    assert not reader.is_quantized("lm_head")
    assert not reader.is_quantized("model.layers.0.self_attn.q_proj")
    assert reader.is_quantized("model.layers.1.self_attn.q_proj")


def test_awq_layout() -> None:
    q = random_quantized((64, 32), fmt(), 0)
    tensors = named(pack_awq(q), UP)
    extra = {DOWN: {"bits": 16}, UP: {"bits": 4, "group_size": 32}}
    config = {**BASE, "packing_format": "auto_round:auto_awq", "extra_config": extra}
    reader = reader_of(config, tensors)
    assert isinstance(reader, AwqReader)
    same(read_layer(reader, tensors, (64, 32), UP), q)
    assert not reader.is_quantized(DOWN)
    for change, message in (
        ({UP: {"group_size": 64}}, "gives .*up_proj.* AWQ layout only whole layers"),
        ({".*up_proj": {"bits": 16}}, "AWQ layout only whole layers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reader_of({**config, "extra_config": change}, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "auto_round"}, "key 'packing_format' is 'auto_round', which is not"),
        ({"packing_format": "auto_round:llm_compressor"}, "'auto_round:llm_compressor'"),
        ({"packing_format": "auto_round:gptq:awq"}, "'auto_round:gptq:awq'"),
        ({"backend": "auto_round:exllamav2"}, "key 'backend' is 'auto_round:exllamav2'"),
        ({"data_type": "mx_fp"}, "key 'data_type' is 'mx_fp'"),
        ({"act_bits": 8}, "key 'act_bits' is 8 .quantized activations"),
        ({"super_bits": 6}, "key 'super_bits' is 6"),
        ({"extra_config": []}, "'extra_config' must be an object"),
        ({"extra_config": {"a": 3}}, "'a': settings must be an object"),
        ({"extra_config": {"a": {"data_type": "fp4"}}}, "'a': key 'data_type' is 'fp4'"),
        ({"extra_config": {"a(": {"bits": 16}}}, "no regular expression"),
        ({"extra_config": {UP: {"bits": 5}}}, "'bits' is 5"),
        ({"extra_config": {UP: {"bits": 16}}}, f"excludes {UP}"),
        ({"bits": 16}, "'bits' is 16"),
    ],
)
def test_refusals_name_key_and_value(change: dict[str, Any], message: str) -> None:
    tensors = named(pack_layer(random_quantized((64, 32), fmt(), 0), "gptq"), UP)
    with pytest.raises(CheckpointError, match=message):
        reader_of({**BASE, **change}, tensors)


@pytest.mark.parametrize("name", ["gptq-b4-g128-sym-autoround", "awq-b4-g128-asym-autoround"])
def test_real_files_under_either_name(
    name: str, shared_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = shared_data / "quantized-656k" / name
    folder = pathlib.Path(shutil.copytree(original, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    for key in ("quant_method", "version", "zero_point", "modules_to_not_convert"):
        quantization.pop(key, None)
    layout = f"auto_round:auto_{name[: name.index('-')]}"
    quantization |= {"quant_method": "auto-round", "packing_format": layout}
    (folder / "config.json").write_text(json.dumps(config))
    renamed, plain = load_model(folder, progress=False), load_model(original, progress=False)
    assert renamed.method == plain.method
    assert_same_tree(renamed.params, plain.params)
