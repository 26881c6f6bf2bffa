"""Native checkpoints: exact, packed, onto other devices and back, atomic."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from qjax import formats
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.layout import Leaf
from qjax.checkpoints.native import MANIFEST, is_native, load_native, save_native
from qjax.checkpoints.reader import KVScales
from qjax.formats import QuantFormat
from qjax.models.sharding import placer, shard_params
from qjax.quantize import is_quantized
from qjax.quantized_array import QuantizedArray
from tests.checkpoint_models import TINY, assert_same_tree, random_params, random_quantized

KEYS, VALUES = np.array([[0.1, 1 / 3], [1e-7, 3]], np.float32)
CONFIG = dataclasses.replace(TINY, num_layers=1, layer_windows=(None,))
MX = QuantFormat("float4_e2m1fn", "group", group_size=32, scale_dtype="float8_e8m0fnu")


def kernel(leaf: Leaf, seed: int) -> Any:
    """Another format for every kind of layer; lm_head stays plain."""
    k, n = leaf.shape
    name = leaf.layer.rpartition(".")[2]
    if name in ("q_proj", "k_proj"):
        return random_quantized((k, n), formats.INT4_G32_ASYM, seed, act_order=name == "q_proj")
    if name in ("v_proj", "gate_proj"):
        fmt = formats.INT4_CHANNEL.replace(scale_dtype="bfloat16")
        return random_quantized((k, n), fmt, seed, dtype=jnp.bfloat16)
    if name == "o_proj":
        q = random_quantized((k, n), formats.INT8_CHANNEL, seed)
        fmt = q.fmt.replace(activation=formats.INT8_PER_TENSOR)
        return dataclasses.replace(q, fmt=fmt, act_scale=np.asarray(0.5, np.float32))
    if name == "up_proj":
        rng = np.random.default_rng(seed)
        parts: dict[str, Any] = {
            "qvalue": rng.integers(0, 16, (k, n)).astype(np.uint8).view(ml_dtypes.float4_e2m1fn),
            "scale": np.exp2(rng.integers(-3, 3, (k // 32, n))).astype(ml_dtypes.float8_e8m0fnu),
        }
        return QuantizedArray.make(fmt=MX, dtype=np.float32, **parts)
    return None


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, random_params(CONFIG, kernel))


@pytest.fixture(scope="module")
def saved(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    save_native(folder, CONFIG, params, kv_scales=KVScales((KEYS,), (VALUES,), "int8"))
    return folder


def mesh(devices: int = 2) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("model",))


def plain_dtypes(params: dict[str, Any]) -> dict[str, Any]:
    """As loaded: the result type of quantized arrays is the compute dtype."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def test_restores_exactly(params: dict[str, Any], saved: pathlib.Path) -> None:
    assert is_native(saved)
    model = load_native(saved)
    assert model.config == CONFIG
    assert_same_tree(model.params, plain_dtypes(params))
    assert model.kv_scales is not None and model.kv_scales.dtype == "int8"
    np.testing.assert_array_equal(model.kv_scales.keys[0], KEYS)
    np.testing.assert_array_equal(model.kv_scales.values[0], VALUES)


def test_load_model_finds_native_folders(params: dict[str, Any], saved: pathlib.Path) -> None:
    assert_same_tree(load_model(saved, progress=False).params, plain_dtypes(params))
    with pytest.raises(ValueError, match="is a native checkpoint"):
        load_model(saved, quantization=formats.INT8_CHANNEL, progress=False)


def test_onto_two_devices_and_back(
    params: dict[str, Any], saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = load_native(saved, mesh=mesh())
    wanted = shard_params(plain_dtypes(params), CONFIG, mesh())
    assert_same_tree(model.params, wanted)
    for have, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(wanted), strict=True):
        assert have.sharding.is_equivalent_to(want.sharding, have.ndim)
    save_native(tmp_path / "model", CONFIG, model.params)
    assert_same_tree(load_native(tmp_path / "model").params, plain_dtypes(params))


def test_place_and_dtype(params: dict[str, Any], saved: pathlib.Path) -> None:
    model = load_native(saved, place=placer(CONFIG, mesh()), dtype=jnp.bfloat16)
    layer = model.params["model"]["layers_0"]
    q = layer["self_attn"]["v_proj"]["kernel"]
    assert len(q.qvalue.sharding.device_set) == 2 and q.dtype == jnp.bfloat16
    assert layer["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
    assert layer["input_layernorm"]["weight"].dtype == jnp.float32
    original = params["model"]["layers_0"]["self_attn"]["v_proj"]["kernel"]
    np.testing.assert_array_equal(
        np.asarray(q.qvalue).astype(np.int8), np.asarray(original.qvalue).astype(np.int8)
    )
    with pytest.raises(ValueError, match="mesh or place"):
        load_native(saved, mesh=mesh(), place=placer(CONFIG, mesh()))


def test_four_bits_take_half_a_byte(saved: pathlib.Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    entry = manifest["params"]["model/layers_0/self_attn/v_proj/kernel"]
    assert entry["fields"]["qvalue"] == {"dtype": "int4", "shape": [64, 32]}
    text = (saved / "params" / "array_metadatas" / "process_0").read_text()
    stored = {
        entry["array_metadata"]["param_name"]: entry["array_metadata"]["write_shape"]
        for entry in json.loads(text)["array_metadatas"]
    }
    assert stored["model.layers_0.self_attn.v_proj.kernel.qvalue"] == [64, 16]
    assert stored["model.layers_0.mlp.up_proj.kernel.qvalue"] == [64, 48]
    assert stored["model.layers_0.self_attn.o_proj.kernel.qvalue"] == [64, 64]


def test_occupied_folders_and_failures_leave_nothing(
    params: dict[str, Any],
    saved: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save_native(saved, CONFIG, params)
    wrong = {**params, "extra": jnp.zeros(3)}
    with pytest.raises(CheckpointError, match="extra is only in the parameters"):
        save_native(tmp_path / "a", CONFIG, wrong)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qjax.checkpoints.native.ocp.StandardCheckpointer.save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_native(tmp_path / "b", CONFIG, params)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_reported(
    saved: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(saved, tmp_path / name))

    with pytest.raises(CheckpointError, match="no native qjax checkpoint"):
        load_native(tmp_path)
    folder = copy("version")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "version": 3}))
    with pytest.raises(CheckpointError, match="version=3; this qjax reads versions 1 and 2"):
        load_native(folder)
    path = "model/layers_0/self_attn/q_proj/kernel"
    for change, message in (
        ({"fields": {}}, "damaged"),
        ({"fields": {"value": {"dtype": "float32", "shape": [3]}}}, "has shape"),
        ({**manifest["params"][path], "format": {"qtype": "int5"}}, "damaged"),
    ):
        entries = {**manifest["params"], path: change}
        (folder / MANIFEST).write_text(json.dumps({**manifest, "params": entries}))
        with pytest.raises(CheckpointError, match=message):
            load_native(folder)
    entries = {name: entry for name, entry in manifest["params"].items() if name != path}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "params": entries}))
    with pytest.raises(CheckpointError, match="is only in the config"):
        load_native(folder)
    folder = copy("arrays")
    file = folder / "params" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="manifest.ocdbt has .* bytes, it was written with"):
        load_native(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="manifest.ocdbt is missing"):
        load_native(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DATA_LOSS: checksum")

    monkeypatch.setattr("qjax.checkpoints.native.ocp.StandardCheckpointer.restore", fail)
    with pytest.raises(CheckpointError, match="params cannot be read .*DATA_LOSS"):
        load_native(saved)


@pytest.fixture(scope="module")
def damaged(saved: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy that each example damages and repairs."""
    return pathlib.Path(shutil.copytree(saved, tmp_path_factory.mktemp("damaged") / "model"))


@given(st.data())
def test_any_damage_is_our_error(
    saved: pathlib.Path, damaged: pathlib.Path, data: st.DataObject
) -> None:
    """Truncation, flipped bits, missing files: refused before Orbax opens anything, or harmless."""
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(files))
    content = (saved / name).read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "remove", "zeros"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "remove":
        (damaged / name).unlink()
    else:
        bit = bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))])
        rest = {
            "cut": b"",
            "flip": bit + content[place + 1 :],
            "zeros": bytes(len(content) - place),
        }
        (damaged / name).write_bytes(content[:place] + rest[kind])
    same = (damaged / name).exists() and (damaged / name).read_bytes() == content

    def stop(*_: Any, **__: Any) -> None:
        raise _ReadError

    before = sorted(damaged.parent.iterdir())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qjax.checkpoints.native.ocp.StandardCheckpointer.restore", stop)
            load_native(damaged)
    except ValueError as e:
        reached = isinstance(e.__cause__, _ReadError)
        assert type(e) is CheckpointError or (type(e) is ValueError and "config.json" in str(e))
        # What only config.json says cannot be compared with anything else.
        assert not reached or same or name.name in ("config.json", MANIFEST)
        if reached and name.name == MANIFEST:  # white space or the like
            assert json.loads((damaged / name).read_text()) == json.loads(content)
    finally:
        (damaged / name).write_bytes(content)
    assert sorted(damaged.parent.iterdir()) == before


class _ReadError(Exception):
    """Raised in place of reading the arrays."""
