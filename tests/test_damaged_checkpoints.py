"""Damaged files and contradicting configs: our own error or the same model, never a crash."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import formats
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.export import save_model
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.layout import Leaf, check_tensors, model_leaves
from qjax.checkpoints.quantized import find_reader
from qjax.checkpoints.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsCheckpoint,
    read_json,
)
from qjax.formats import QuantFormat
from qjax.models.config import ModelConfig
from qjax.quantized_array import QuantizedArray
from tests.checkpoint_models import TINY, random_params, random_quantized

FORMATS = ("compressed-tensors", "fp8", "modelopt", "gptq", "awq")
BLOCK = QuantFormat(
    "float8_e4m3fn",
    "block",
    block=(32, 16),
    activation=QuantFormat("float8_e4m3fn", "group", group_size=32),
)
Contents = dict[str, bytes]


def random_fp8(shape: tuple[int, int], fmt: QuantFormat, seed: int) -> QuantizedArray:
    rng = np.random.default_rng(seed)
    tiles = fmt.tiles(shape, 0)
    counts = tuple(-(-size // tile) for size, tile in zip(shape, tiles, strict=True))
    static = fmt.activation == formats.FP8_PER_TENSOR
    parts: dict[str, Any] = {
        "qvalue": rng.uniform(-448, 448, shape).astype(fmt.storage_dtype),
        "scale": rng.uniform(0.1, 1, counts).astype(np.float32),
        "act_scale": np.asarray(0.5, np.float32) if static else None,
    }
    return QuantizedArray.make(fmt=fmt, dtype=np.float32, **parts)


def write(folder: pathlib.Path, name: str, **options: Any) -> None:
    """A small model in one of the formats."""

    def kernel(leaf: Leaf, seed: int) -> Any:
        if leaf.layer == "lm_head":
            return None
        shape = (leaf.shape[0], leaf.shape[1])
        if name == "fp8":
            return random_fp8(shape, BLOCK, seed)
        if name == "modelopt":
            fmt = formats.FP8_E4M3_TENSOR.replace(activation=formats.FP8_PER_TENSOR)
            return random_fp8(shape, fmt, seed)
        scale = "float32" if name == "compressed-tensors" else "float16"
        fmt = formats.INT4_G32_ASYM.replace(scale_dtype=scale)
        return random_quantized(shape, fmt, seed)

    writer = "fp8" if name == "modelopt" else name
    params = random_params(TINY, kernel)
    save_model(folder, TINY, params, writer, progress=False, **options)
    if name == "modelopt":  # the tensors are those of HF fp8
        config = read_json(folder / "config.json")
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=FORMATS)
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    write(folder, request.param)
    return folder


@pytest.fixture
def damaged(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to be damaged."""
    return pathlib.Path(shutil.copytree(original, tmp_path / "model"))


def contents(folder: pathlib.Path) -> Contents:
    """All that ``load_model`` reads, without moving it to a device."""
    raw = read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw)
    checkpoint = SafetensorsCheckpoint(folder)
    reader = find_reader(folder, raw, checkpoint.tensors)
    leaves = model_leaves(config)
    check_tensors(config, leaves, checkpoint, reader)
    result: Contents = {}
    for leaf in leaves:
        if reader is not None and leaf.is_kernel and reader.is_quantized(leaf.layer):
            shape = (leaf.shape[0], leaf.shape[1])
            q = reader.read(leaf.layer, checkpoint.__getitem__, shape, np.float32)
            parts = (q.qvalue, q.scale, q.zero_point, q.perm, q.act_scale)
            arrays = [np.asarray(part) for part in parts if part is not None]
            result[leaf.path] = b"".join(array.tobytes() for array in arrays)
            result[leaf.path] += repr(q.fmt).encode()
        else:
            result[leaf.path] = checkpoint[leaf.stored_name(checkpoint)].tobytes()
    if reader is not None:
        scales = reader.kv_scales(checkpoint.__getitem__, config.num_layers, config.num_kv_heads)
        assert scales is None
    return result


def refused(folder: pathlib.Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(ValueError) as caught:
        contents(folder)
    assert type(caught.value) in (CheckpointError, ValueError), repr(caught.value)
    return str(caught.value)


def refused_or_same(folder: pathlib.Path, wanted: Contents) -> bool:
    """Whether it was refused. (Some bits of a header and some keys of a config mean nothing.)"""
    try:
        assert contents(folder) == wanted
    except ValueError as e:
        assert type(e) in (CheckpointError, ValueError), repr(e)
        return True
    return False


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    _, start = header_of(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def test_the_undamaged_model_is_read(original: pathlib.Path) -> None:
    assert len(contents(original)) == len(model_leaves(TINY))


def test_truncation(damaged: pathlib.Path) -> None:
    file = damaged / SINGLE_FILE
    data = file.read_bytes()
    header, start = header_of(data)
    header.pop("__metadata__")
    ends = {start + entry["data_offsets"][1] for entry in header.values()} | {start}
    cuts = {0, 1, 7, 8, 9, start // 2, start - 1, len(data) - 1}
    cuts |= {end + step for end in ends for step in (-1, 0, 1)}
    for cut in sorted(cuts):
        if cut < len(data):
            file.write_bytes(data[:cut])
            assert "truncated" in refused(damaged) or cut < start


def test_bit_flips_in_the_header(damaged: pathlib.Path, rng: np.random.Generator) -> None:
    file = damaged / SINGLE_FILE
    data, wanted = bytearray(file.read_bytes()), contents(damaged)
    _, start = header_of(bytes(data))
    places = [*range(8), *rng.choice(np.arange(8, start), 100, replace=False)]
    refusals = 0
    for place in places:
        bit = 1 << int(rng.integers(8))
        data[place] ^= bit
        file.write_bytes(data)
        refusals += refused_or_same(damaged, wanted)
        data[place] ^= bit
    assert refusals > 90


def test_other_types_and_shapes(damaged: pathlib.Path) -> None:
    file = damaged / SINGLE_FILE
    data, wanted = file.read_bytes(), contents(damaged)
    header, _ = header_of(data)
    same_size = {
        "F32": "I32",
        "I32": "F32",
        "I64": "F64",
        "F8_E4M3": "I8",
        "F16": "I16",
    }
    for name, entry in header.items():
        if name == "__metadata__" or ".layers.1." in name:
            continue
        change = {**entry, "dtype": same_size[entry["dtype"]]}
        file.write_bytes(with_header(data, {**header, name: change}))
        refused(damaged)
        change = {**entry, "shape": [*entry["shape"], 1, 1]}
        file.write_bytes(with_header(data, {**header, name: change}))
        # One number is one number in any shape.
        assert refused_or_same(damaged, wanted) or entry["shape"] == []
        file.write_bytes(with_header(data, {n: e for n, e in header.items() if n != name}))
        # Without activation order this tensor says nothing.
        assert refused_or_same(damaged, wanted) or name.endswith("g_idx")
        file.write_bytes(with_header(data, {**header, f"{name}_2": entry}))
        refused(damaged)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the whole included."""
    yield prefix
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, child in items:
        yield from paths_of(child, (*prefix, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    result = copy.copy(value)
    result[path[0]] = replaced(result[path[0]], path[1:], new)
    return result


def test_every_value_of_the_config_replaced(damaged: pathlib.Path) -> None:
    config, wanted = read_json(damaged / "config.json"), contents(damaged)
    odd = [None, {}, [], "x", -1, 0, 3, 1e400, True, [[]], {"a": 1}, ["re:("]]
    refusals = 0
    quantization = config["quantization_config"]
    for path in paths_of(quantization):
        if path == ("checkpoint_format",):
            continue  # GPTQ v1 and v2 files differ in nothing else
        for new in odd:
            changed = replaced(quantization, path, new)
            raw = {**config, "quantization_config": changed}
            (damaged / "config.json").write_text(json.dumps(raw))
            refusals += refused_or_same(damaged, wanted)
    assert refusals > 10


def test_configs_that_contradict_the_tensors(damaged: pathlib.Path) -> None:
    config, wanted = read_json(damaged / "config.json"), contents(damaged)
    quantization = config["quantization_config"]
    (damaged / "quantize_config.json").unlink(missing_ok=True)  # GPTQ's second copy
    changes: list[dict[str, Any]] = [
        {**config, "hidden_size": 32},
        {**config, "num_hidden_layers": 3},
        {**config, "num_hidden_layers": 1},
        {**config, "intermediate_size": 64},
        {**config, "quantization_config": {**quantization, "quant_method": "other"}},
    ]
    other: list[tuple[tuple[str, ...], Any]] = {
        "compressed-tensors": [
            (("config_groups", "group_0", "weights", key), value)
            for key, value in (
                ("num_bits", 8),
                ("group_size", 16),
                ("symmetric", True),
                ("strategy", "channel"),
                ("strategy", "tensor"),
                ("actorder", "group"),
            )
        ]
        + [
            (("config_groups", "group_0", "format"), "int-quantized"),
            (("ignore",), ["re:.*"]),
            (("ignore",), ["re:.*q_proj"]),
            (("config_groups", "group_0", "targets"), ["re:.*q_proj"]),
            (("kv_cache_scheme",), {"num_bits": 8, "type": "float"}),
        ],
        "fp8": [
            (("weight_block_size",), [16, 16]),
            (("activation_scheme",), "static"),
            (("ignored_layers",), ["model.layers.0.self_attn.q_proj"]),
            (("fmt",), "e5m2"),
        ],
        "modelopt": [
            (("quant_algo",), "NVFP4"),
            (("quant_algo",), "FP8_PER_CHANNEL_PER_TOKEN"),
            (("ignore",), ["*q_proj"]),
        ],
        "gptq": [(("bits",), 8), (("group_size",), 16), (("sym",), True)],
        "awq": [(("group_size",), 16), (("zero_point",), False)],
    }[quantization["quant_method"]]
    for path, value in other:
        changed = replaced(quantization, path, value)
        changes.append({**config, "quantization_config": changed})
    for change in changes:
        (damaged / "config.json").write_text(json.dumps(change))
        assert refused(damaged), change
    del config["quantization_config"]
    (damaged / "config.json").write_text(json.dumps(config))
    # The tensors of AWQ tell all that is needed.
    assert refused_or_same(damaged, wanted) or quantization["quant_method"] == "awq"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"a": 1}', '"' + "a" * 10])
def test_files_that_are_no_config(damaged: pathlib.Path, text: str) -> None:
    (damaged / "config.json").write_text(text)
    refused(damaged)


def test_shards_and_index(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    write(folder, "compressed-tensors", max_shard_bytes=20_000)
    wanted = contents(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    index = read_json(folder / INDEX_FILE)
    name, other = next(iter(index["weight_map"])), shards[0]
    for changed, message in (
        ({**index["weight_map"], name: "model-9.safetensors"}, "needs shard model-9.safetensors"),
        ({**index["weight_map"], name: "../model.safetensors"}, "not a file of the folder"),
        ({**index["weight_map"], "x.weight": other}, "it is in no shard"),
        ({n: shards[-1] for n in index["weight_map"]}, "but it is in no shard"),
        ({**index["weight_map"], name: 3}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        (folder / INDEX_FILE).write_text(json.dumps({**index, "weight_map": changed}))
        assert message in refused(folder)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert contents(folder) == wanted
    for shard in shards:
        data = (folder / shard).read_bytes()
        (folder / shard).write_bytes(data[:-1])
        assert "truncated" in refused(folder)
        (folder / shard).unlink()
        assert f"needs shard {shard}" in refused(folder)
        (folder / shard).write_bytes(data)
    (folder / INDEX_FILE).unlink()
    assert "without an index" in refused(folder)


@pytest.fixture(scope="module")
def repairable(original: pathlib.Path) -> pathlib.Path:
    """A copy that each example damages and repairs."""
    return pathlib.Path(shutil.copytree(original, original.parent / "repairable"))


@settings(max_examples=50)
@given(st.data())
def test_any_damage(original: pathlib.Path, repairable: pathlib.Path, data: st.DataObject) -> None:
    """Cuts, flipped bits, changed bytes and lost files, several at once."""
    wanted = contents(original)
    files = [path.name for path in sorted(original.iterdir())]
    damaged_weights = False
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(files))
            content = bytearray((original / name).read_bytes())
            place = data.draw(st.integers(0, min(len(content), 20_000) - 1))
            kind = data.draw(st.sampled_from(["cut", "flip", "change", "remove", "append"]))
            if kind == "cut":
                del content[place:]
            elif kind == "append":
                content += b"0"
            elif kind == "flip":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            else:
                content[place] = data.draw(st.sampled_from(b'0123456789-.",:[]{}x'))
            (repairable / name).unlink(missing_ok=True)
            if kind != "remove":
                (repairable / name).write_bytes(content)
            start = header_of((original / SINGLE_FILE).read_bytes())[1]
            damaged_weights |= name == SINGLE_FILE and place >= start
        try:
            found = contents(repairable)
            # The numbers themselves have no checksum in this format, nor has what a config says
            # of rotary embeddings and the like.
            assert found.keys() == wanted.keys()
            assert damaged_weights or all(len(found[k]) == len(wanted[k]) for k in wanted)
        except ValueError as e:
            assert type(e) in (CheckpointError, ValueError), repr(e)
    finally:
        for name in files:
            shutil.copyfile(original / name, repairable / name)


def test_load_model_reports_the_same(damaged: pathlib.Path) -> None:
    file = damaged / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        load_model(damaged, progress=False)
    assert sorted(path.name for path in damaged.parent.iterdir()) == ["model"]
