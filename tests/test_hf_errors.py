"""Files that cannot be loaded: each is one clear error, raised before any weight is read."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.checkpoints import hf
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.safetensors_io import INDEX_FILE
from tests.checkpoint_files import CONFIG, Q_PROJ, TIED, load, tensors_of, write, write_shards


def truncate(name: str, keep: int) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def retensor(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def overwrite(name: str, data: bytes) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def reheader(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        overwrite("model.safetensors", len(text).to_bytes(8, "little") + text + data[8 + size :])(
            folder
        )

    return damage


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; download it"),
    "config is no JSON": (truncate("config.json", 40), "config.json is not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin.*can run code; convert them",
    ),
    "empty file": (truncate("model.safetensors", 0), "model.safetensors is truncated.*0 bytes"),
    "header cut": (truncate("model.safetensors", 200), "truncated.*200 bytes, header length"),
    "data cut": (truncate("model.safetensors", -4), "truncated: .* its header needs"),
    "lfs pointer": (
        overwrite("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n" * 3),
        "git lfs pull",
    ),
    "header is no JSON": (
        overwrite("model.safetensors", (16).to_bytes(8, "little") + b"{" * 16),
        "damaged safetensors header",
    ),
    "unknown dtype": (
        reheader(lambda h: h[NORM].update(dtype="F6")),
        "model.norm.weight has dtype F6, which is not known",
    ),
    "offsets": (
        reheader(lambda h: h[NORM].update(shape=[17])),
        r"model.norm.weight \(F32 \(17,\)\) needs 68 bytes, its header gives it 64",
    ),
    "entry without a field": (
        reheader(lambda h: h[NORM].pop("data_offsets")),
        "damaged safetensors header.*data_offsets",
    ),
    "missing tensor": (
        retensor(lambda t: t.pop(f"{Q_PROJ}.weight")),
        f"lacks 1 of 21 tensors, such as {Q_PROJ}.weight",
    ),
    "renamed tensor": (
        retensor(lambda t: t.update({"norm.weight": t.pop(NORM)})),
        "such as model.norm.weight; it holds 1 unknown ones instead, such as norm.weight",
    ),
    "extra tensor": (
        retensor(lambda t: t.update({f"{Q_PROJ}.bias": np.ones(16, np.float32)})),
        f"holds 1 tensors that the model .* does not use, such as {Q_PROJ}.bias",
    ),
    "wrong shape": (
        retensor(lambda t: t.update({f"{Q_PROJ}.weight": np.ones((16, 17), np.float32)})),
        rf"{Q_PROJ}.weight has shape \(16, 17\), the model needs \(16, 16\)",
    ),
    "wrong dtype": (
        retensor(lambda t: t.update({NORM: np.ones(16, np.int32)})),
        "model.norm.weight has dtype I32, needed is F32 or F16 or BF16",
    ),
    "no output projection": (
        retensor(lambda t: t.pop("lm_head.weight")),
        "lm_head.weight; if the embedding is tied, config.json must say",
    ),
    "quantized without config": (
        retensor(lambda t: t.update({f"{Q_PROJ}.qweight": np.ones((2, 16), np.int32)})),
        f"holds quantized tensors .{Q_PROJ}.qweight.*no quantization config",
    ),
}


@pytest.fixture
def no_weight_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if loading gets as far as its first weight."""

    def read(*args: Any) -> Any:
        raise AssertionError("a weight was read before the files were checked")

    monkeypatch.setattr(hf, "_read_leaf", read)


@pytest.mark.usefixtures("no_weight_work")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_before_any_weight_is_read(damage: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors_of(CONFIG))
    act, message = DAMAGES[damage]
    act(tmp_path)
    with pytest.raises(CheckpointError, match=message) as info:
        load(tmp_path)
    assert str(tmp_path) in str(info.value)  # names the file or folder


@pytest.mark.usefixtures("no_weight_work")
def test_damaged_index(tmp_path: pathlib.Path) -> None:
    write_shards(tmp_path, tensors_of(CONFIG))
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shard = "model-00002-of-00002.safetensors"

    def reindex(change: Callable[[dict[str, str]], Any]) -> None:
        weight_map = dict(index["weight_map"])
        change(weight_map)
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(tmp_path)
    reindex(lambda m: m.update({"ghost": shard}))
    with pytest.raises(CheckpointError, match="says that tensor ghost is in .*but it is in no"):
        load(tmp_path)
    reindex(lambda m: m.update({"lm_head.weight": shard}))
    with pytest.raises(CheckpointError, match="lm_head.weight is in .*but it is in model-00001"):
        load(tmp_path)
    reindex(lambda m: m.update({"lm_head.weight": "../secret.safetensors"}))
    with pytest.raises(CheckpointError, match="not a file of the folder"):
        load(tmp_path)
    reindex(lambda m: None)
    shutil.copy(tmp_path / shard, tmp_path / "copy.safetensors")
    reindex(lambda m: m.update({"lm_head.weight": "copy.safetensors"}))
    with pytest.raises(CheckpointError, match="stands in copy.safetensors and in model-00002"):
        load(tmp_path)
    reindex(lambda m: None)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=r"needs shard model-00002.*\(10 tensors\)"):
        load(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match="2 .safetensors files .* without an index"):
        load(tmp_path)


@pytest.mark.usefixtures("no_weight_work")
def test_tied_matrices_that_differ(tmp_path: pathlib.Path) -> None:
    tensors = tensors_of(TIED) | {"lm_head.weight": np.ones((24, 16), np.float32)}
    with pytest.raises(CheckpointError, match="does not use, such as lm_head.weight"):
        load(write(tmp_path, tensors, TIED))


@pytest.mark.usefixtures("no_weight_work")
def test_unknown_quantization_method_is_named(tmp_path: pathlib.Path) -> None:
    quantization = {"quant_method": "hqq", "bits": 4}
    write(tmp_path, tensors_of(CONFIG), quantization_config=quantization)
    with pytest.raises(CheckpointError, match="quantization method 'hqq' is not supported"):
        load(tmp_path)


def test_paths_and_hub_ids(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a folder or a hub id"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load(tmp_path / "file")
    # conftest takes the hub offline.
    with pytest.raises(CheckpointError, match="could not be downloaded from the Hugging Face hub"):
        hf.load_model("qjax-tests/no-such-model", progress=False)
