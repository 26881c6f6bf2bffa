"""Whole model folders: written, read back, never half there."""

from __future__ import annotations

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import qjax
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.export import save_model
from qjax.checkpoints.gptq_writer import GptqWriter
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint, read_header, read_json
from qjax.checkpoints.writer import Source, TensorSpec, replacing_folder, write_tensors
from qjax.formats import QuantFormat, parse_format
from tests.checkpoint_models import TINY, assert_same_tree, random_params, random_quantized

INT4 = QuantFormat("int4", "group", group_size=32, scale_dtype="float16")


def quantized_kernel(leaf, seed, fmt=INT4, **options):
    if leaf.layer == "lm_head":
        return None
    return random_quantized(leaf.shape, fmt, seed, **options)


def save(folder, params, format, config=TINY, **options):
    save_model(folder, config, params, format, progress=False, **options)


def load(folder, dtype=jnp.float32):
    return load_model(folder, dtype=dtype, progress=False)


@pytest.mark.parametrize("name", ["awq", "gptq"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_written_models_read_back_identical(tmp_path, name, sym):
    fmt = INT4.replace(symmetric=sym)
    params = random_params(TINY, functools.partial(quantized_kernel, fmt=fmt))
    save(tmp_path / "m", params, name)
    model = load(tmp_path / "m")
    assert_same_tree(model.params, params)
    assert model.config == TINY
    assert model.method is not None and model.method.startswith(f"{name} 4 bit g32")
    assert os.listdir(tmp_path) == ["m"]


def test_mixed_gptq_models(tmp_path):
    wide = QuantFormat("int8", scale_dtype="float32")
    three = QuantFormat("int3", "group", group_size=32, symmetric=False, scale_dtype="float16")

    def kernel(leaf, seed):
        if "gate_proj" in leaf.path:
            return None
        if "down_proj" in leaf.path:
            return random_quantized(leaf.shape, wide, seed)
        if leaf.path.startswith("model/layers_1"):
            return random_quantized(leaf.shape, three, seed)
        return random_quantized(leaf.shape, INT4, seed, act_order=True)

    params = random_params(TINY, kernel)
    save(tmp_path / "m", params, "gptq")
    assert read_json(tmp_path / "m" / "quantize_config.json")["checkpoint_format"] == "gptq_v2"
    assert_same_tree(load(tmp_path / "m").params, params)


def test_rtn_then_gptq_then_read(tmp_path):
    """The user's way: quantize, save, load; every bit is kept and the logits with it."""
    params = random_params(TINY, lambda leaf, seed: None)
    rules = {".*_proj/kernel": qjax.INT4_G32}
    params = qjax.quantize_tree(jax.tree.map(jnp.asarray, params), rules)
    save(tmp_path / "m", params, "gptq")
    assert_same_tree(load(tmp_path / "m").params, params)


def test_shards_and_index(tmp_path):
    params = random_params(TINY, quantized_kernel)
    save(tmp_path / "m", params, "gptq", max_shard_bytes=9000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        infos = read_header(tmp_path / "m" / shard)
        size = sum(info.nbytes for info in infos.values())
        # Beyond the limit only where one tensor alone is.
        assert size <= 9000 or len(infos) == 1
        assert all(info.begin % 4 == 0 for info in infos.values() if info.dtype != "F16")
        total += size
    assert index["metadata"]["total_size"] == total
    assert_same_tree(load(tmp_path / "m").params, params)


def test_files_open_with_the_reference_implementation(tmp_path):
    params = random_params(TINY, quantized_kernel)
    save(tmp_path / "m", params, "gptq")
    ours = SafetensorsCheckpoint(tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m" / "model.safetensors", "np") as theirs:
        assert theirs.metadata() == {"format": "pt"}
        assert set(theirs.keys()) == set(ours)
        for name in ours:
            np.testing.assert_array_equal(theirs.get_tensor(name), ours[name])


def test_plain_models(tmp_path):
    params = random_params(TINY, lambda leaf, seed: None)
    save(tmp_path / "m", params, "none")
    assert "quantization_config" not in read_json(tmp_path / "m" / "config.json")
    assert_same_tree(load(tmp_path / "m").params, params)


def test_companions_and_dtypes_come_from_the_source(tmp_path):
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(np.float32),
        random_params(TINY, lambda leaf, seed: None),
    )
    config = TINY.__class__(**{**vars(TINY), "dtype": "bfloat16"})
    source = tmp_path / "source"
    save(source, rounded, "none", config)
    for name in ("README.md", "tokenizer.model", "merges.txt", "LICENSE.txt", "other.txt"):
        (source / name).write_text(name)
    values = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps({**values, "pad_token_id": None}))

    model = load(source)  # in float32: what is written need not be as wide
    save(tmp_path / "m", model.params, "none", model.config, source=source)
    kept = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"README.md", "tokenizer.model", "merges.txt", "LICENSE.txt"} < kept
    assert "other.txt" not in kept
    assert "pad_token_id" in read_json(tmp_path / "m" / "config.json")
    first, second = SafetensorsCheckpoint(source), SafetensorsCheckpoint(tmp_path / "m")
    assert {i.dtype for i in first.tensors.values()} == {"BF16"}
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name

    model.params["model"]["norm"]["weight"] *= 1.001  # not a bfloat16 any more
    save(tmp_path / "m", model.params, "none", model.config, source=source, overwrite=True)
    infos = SafetensorsCheckpoint(tmp_path / "m").tensors
    assert {n for n, i in infos.items() if i.dtype == "F32"} == {"model.norm.weight"}


def test_refusals_leave_nothing_behind(tmp_path):
    plain = random_params(TINY, lambda leaf, seed: None)
    quantized = random_params(TINY, quantized_kernel)
    ragged = random_params(
        TINY, functools.partial(quantized_kernel, fmt=INT4.replace(group_size=24))
    )
    cases = [
        (plain, "gptq", "no layer is quantized"),
        (plain, "gguf", "unknown format='gguf'; choose one of none"),
        (quantized, "none", "format='none' has no place for model.layers.0"),
        (ragged, "awq", "64 in features are not a multiple of group_size=24"),
        ({"model": plain["model"]}, "none", "lm_head/kernel is only in the config"),
    ]
    for params, name, message in cases:
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "m", params, name)
    with pytest.raises(CheckpointError, match="max_shard_bytes=0 must be positive"):
        save(tmp_path / "m", plain, "none", max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_occupied_folders(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious.txt").write_text("old")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        with replacing_folder(tmp_path / "m", overwrite=False):
            raise AssertionError("not reached")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "m", overwrite=True) as folder:
        (folder / "half.txt").write_text("new")
        raise RuntimeError("stopped in the middle")
    assert (tmp_path / "m" / "precious.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["m"]
    with replacing_folder(tmp_path / "m", overwrite=True) as folder:
        (folder / "whole.txt").write_text("new")
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == ["whole.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        with replacing_folder(tmp_path / "file", overwrite=True):
            raise AssertionError("not reached")


def test_tensors_must_be_as_planned(tmp_path):
    spec = TensorSpec(np.dtype(np.float32), (2,))
    write = functools.partial(write_tensors, tmp_path, max_shard_bytes=100, advance=lambda: None)
    with pytest.raises(CheckpointError, match="was planned as .* but is float64"):
        write([Source({"a": spec}, lambda: {"a": np.zeros(2)})])
    with pytest.raises(CheckpointError, match=r"planned \['a'\], made \['b'\]"):
        write([Source({"a": spec}, lambda: {"b": np.zeros(2, np.float32)})])
    with pytest.raises(CheckpointError, match="tensor a would be written twice"):
        write([Source({"a": spec}, dict), Source({"a": spec}, dict)])


def test_what_a_thread_could_not_make_is_told(tmp_path):
    spec = TensorSpec(np.dtype(np.int32), (3,))

    def make(i):
        if i == 7:
            raise ValueError("no room for tensor 7")
        return {str(i): np.full(3, i, np.int32)}

    def sources(count):
        return [Source({str(i): spec}, functools.partial(make, i)) for i in range(count)]

    written = []
    write = functools.partial(write_tensors, tmp_path, advance=lambda: written.append(1))
    with pytest.raises(ValueError, match="no room for tensor 7"):
        write(sources(9), max_shard_bytes=24)
    assert len(written) == 7
    write(sources(6), max_shard_bytes=24)
    found = SafetensorsCheckpoint(tmp_path)
    assert [found[str(i)].tolist() for i in range(6)] == [[i] * 3 for i in range(6)]


@pytest.mark.parametrize("name", ["gptq-b4-g128-sym", "gptq-b8-g128-sym", "awq-b4-g128-asym"])
def test_published_checkpoints(shared_data, tmp_path, name):
    """Made by AutoRound; reference logits of an independent unpacker."""
    folder = shared_data / "quantized-656k" / f"{name}-autoround"
    model = load(folder)
    saved = np.load(folder / "reference_logits.npz")
    tokens = jnp.asarray(np.stack([saved[f"ids{i}"] for i in range(4)]))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    logits, _ = jax.jit(model.module.apply)({"params": model.params}, tokens, positions)
    reference = np.stack([saved[f"logits{i}"] for i in range(4)])
    np.testing.assert_allclose(logits, reference, rtol=0, atol=2e-4)

    method = name.partition("-")[0]
    save(tmp_path / "m", model.params, method, model.config, source=folder)
    first, second = SafetensorsCheckpoint(folder), SafetensorsCheckpoint(tmp_path / "m")
    assert first.keys() == second.keys()
    for tensor in first:
        assert first.tensors[tensor].dtype == second.tensors[tensor].dtype
        assert first[tensor].tobytes() == second[tensor].tobytes(), tensor
    assert (tmp_path / "m" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["w8a8_fp8_block", "w8a8_fp8"])
def test_whole_fp8_models_are_written_as_they_were_read(tmp_path, name):
    """Layers made by hand, as published models have them, are in test_fp8_checkpoints.py."""
    params = jax.tree.map(jnp.asarray, random_params(TINY, lambda leaf, seed: None))
    fmt = parse_format(name)
    assert fmt is not None
    save(tmp_path / "a", qjax.quantize_tree(params, {".*_proj/kernel": fmt}), "fp8")
    model = load(tmp_path / "a")
    save(tmp_path / "b", model.params, "fp8", model.config, source=tmp_path / "a")
    first, second = SafetensorsCheckpoint(tmp_path / "a"), SafetensorsCheckpoint(tmp_path / "b")
    assert first.keys() == second.keys()
    for tensor in first:
        assert first.tensors[tensor].dtype == second.tensors[tensor].dtype
        assert first[tensor].tobytes() == second[tensor].tobytes(), tensor


def test_v1_files_with_borrows_survive_when_asked_to(tmp_path):
    fmt = INT4.replace(symmetric=False)
    params = random_params(TINY, functools.partial(quantized_kernel, fmt=fmt))
    save(tmp_path / "v1", params, functools.partial(GptqWriter, checkpoint_format="gptq"))
    model = load(tmp_path / "v1")
    assert model.method == "gptq 4 bit g32 (v1)"
    assert_same_tree(model.params, params)
