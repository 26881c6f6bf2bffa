"""Loading Hugging Face checkpoints: values, quantization on arrival, memory, and every refusal."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

import qjax
from qjax.checkpoints import hf
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.layout import hf_name, model_leaves
from qjax.checkpoints.reader import ExpectedTensor, KVScales
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint
from qjax.models.config import ModelConfig
from qjax.quantized_array import QuantizedArray
from tests.checkpoint_files import CONFIG, Q_PROJ, TIED, load, tensors_of, write, write_shards

INT4 = qjax.INT4_G32.replace(group_size=8)  # 20 is no multiple: the last group is cut short


def flat(params: Any) -> dict[str, Any]:
    is_leaf = lambda x: isinstance(x, QuantizedArray)  # noqa: E731
    items = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in items}


def assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_names() -> None:
    assert hf_name("model/layers_11/mlp/up_proj/kernel") == "model.layers.11.mlp.up_proj.weight"
    assert hf_name("model/layers_0/self_attn/q_proj/bias") == f"{Q_PROJ}.bias"
    assert hf_name("model/embed_tokens/embedding") == "model.embed_tokens.weight"
    assert hf_name("lm_head/kernel") == "lm_head.weight"


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_values(stored: Any, sharded: bool, tmp_path: pathlib.Path) -> None:
    tensors = tensors_of(CONFIG, stored)
    writer = write_shards if sharded else write
    model = load(writer(tmp_path, tensors), dtype=jnp.bfloat16)
    loaded = flat(model.params)
    assert model.module.dtype == jnp.bfloat16 and model.method is None
    assert loaded.keys() == {leaf.path for leaf in model_leaves(CONFIG)}
    for leaf in model_leaves(CONFIG):
        value, expected = loaded[leaf.path], tensors[leaf.name]
        assert value.dtype == (jnp.float32 if leaf.is_norm else jnp.bfloat16)
        expected = (expected.T if leaf.is_kernel else expected).astype(value.dtype)
        np.testing.assert_array_equal(value, expected)


def test_dtype_of_the_checkpoint_is_the_default(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors_of(CONFIG), torch_dtype="float16")
    model = load(tmp_path)
    assert model.module.dtype == jnp.float16
    assert model.params["lm_head"]["kernel"].dtype == jnp.float16


def test_parameters_do_not_alias_the_file(tmp_path: pathlib.Path) -> None:
    before = load(write(tmp_path, tensors_of(CONFIG)))
    embedding = np.array(before.params["model"]["embed_tokens"]["embedding"])
    with (tmp_path / "model.safetensors").open("r+b") as f:
        f.seek(-embedding.nbytes * 4, 2)
        f.write(bytes(embedding.nbytes * 4))
    np.testing.assert_array_equal(before.params["model"]["embed_tokens"]["embedding"], embedding)


@pytest.mark.parametrize("fmt", [INT4, qjax.W8A8_FP8])
def test_quantized_on_arrival_is_quantize_tree(
    fmt: qjax.QuantFormat, tmp_path: pathlib.Path
) -> None:
    plain = load(write(tmp_path, tensors_of(CONFIG)))
    model = load(tmp_path, quantization=fmt)
    assert_trees_equal(model.params, qjax.quantize_tree(plain.params, {"model/.*/kernel": fmt}))
    assert not isinstance(model.params["lm_head"]["kernel"], QuantizedArray)


def test_codes_come_from_the_stored_values(tmp_path: pathlib.Path) -> None:
    # float32 weights for a bfloat16 model: rounding to bfloat16 first would lose bits.
    tensors = tensors_of(CONFIG)
    model = load(write(tmp_path, tensors), quantization=qjax.INT8_CHANNEL, dtype=jnp.bfloat16)
    kernel = model.params["model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
    expected = jax.jit(lambda w: qjax.quantize(w.T, qjax.INT8_CHANNEL))(tensors[f"{Q_PROJ}.weight"])
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.qvalue, expected.qvalue)
    np.testing.assert_array_equal(kernel.scale, expected.scale)


def test_skip_and_rules(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors_of(CONFIG))
    model = load(
        tmp_path,
        quantization=INT4,
        skip=".*down_proj/kernel",
        rules={"lm_head/kernel": qjax.INT8_CHANNEL, ".*layers_1/mlp/.*": qjax.INT8_TENSOR},
    )
    formats = {
        path: value.fmt if isinstance(value, QuantizedArray) else None
        for path, value in flat(model.params).items()
    }
    assert formats["lm_head/kernel"] == qjax.INT8_CHANNEL
    assert formats["model/layers_0/mlp/up_proj/kernel"] == INT4
    assert formats["model/layers_1/mlp/up_proj/kernel"] == qjax.INT8_TENSOR
    assert formats["model/layers_1/mlp/down_proj/kernel"] is None
    assert formats["model/embed_tokens/embedding"] is None
    for bad in ({"skip": "layers_0"}, {"rules": {".*norm/weight": INT4}}):
        with pytest.raises(ValueError, match="match none of"):
            load(tmp_path, quantization=INT4, **bad)
    with pytest.raises(ValueError, match="leaves nothing to skip"):
        load(tmp_path, skip=".*")


@pytest.mark.parametrize("names", ["model.embed_tokens", "lm_head", "model.embed_tokens lm_head"])
def test_tied_embedding_under_either_name(names: str, tmp_path: pathlib.Path) -> None:
    tensors = tensors_of(TIED)
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {f"{name}.weight": embedding.copy() for name in names.split()}
    model = load(write(tmp_path, tensors, TIED), quantization=qjax.INT8_CHANNEL)
    assert "lm_head" not in model.params
    np.testing.assert_array_equal(model.params["model"]["embed_tokens"]["embedding"], embedding)


def test_hub_download(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tensors_of(CONFIG))
    calls: list[Any] = []

    def download(repo: str, **kwargs: Any) -> str:
        calls.append((repo, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = hf.load_model("qjax-tests/tiny", revision="v1", progress=False)
    assert model.folder == tmp_path
    [(repo, kwargs)] = calls
    assert repo == "qjax-tests/tiny" and kwargs["revision"] == "v1"
    assert not any(fnmatch.fnmatch("pytorch_model.bin", p) for p in kwargs["allow_patterns"])
    # Mistral repositories hold all weights a second time under this name.
    assert "consolidated*" in kwargs["ignore_patterns"]


def test_place_gets_every_parameter(tmp_path: pathlib.Path) -> None:
    seen: list[str] = []

    def place(path: str, value: Any) -> Any:
        seen.append(path)
        return value

    load(write(tmp_path, tensors_of(CONFIG)), place=place)
    assert seen == [leaf.path for leaf in model_leaves(CONFIG)]


def test_mesh(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    write(tmp_path, tensors_of(CONFIG))
    whole = load(tmp_path, quantization=qjax.INT8_CHANNEL)
    cut = load(tmp_path, quantization=qjax.INT8_CHANNEL, mesh=mesh)
    up = cut.params["model"]["layers_1"]["mlp"]["up_proj"]["kernel"]
    assert up.qvalue.sharding.spec == up.scale.sharding.spec == PartitionSpec(None, "model")
    assert_trees_equal(cut.params, whole.params)
    # 20 inputs of down_proj in groups of 8, over two devices: found before a weight is read.
    monkeypatch.setattr(hf, "_read_leaf", None)
    with pytest.raises(ValueError, match="down_proj.* cuts groups of 8 .* groups of 5"):
        load(tmp_path, quantization=INT4, mesh=mesh)
    with pytest.raises(ValueError, match="mesh or place, not both"):
        load(tmp_path, mesh=mesh, place=lambda path, value: value)


def test_dtype_that_cannot_compute(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors_of(CONFIG), torch_dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="dtype of config.json is 'float8_e4m3fn'; pass dtype="):
        load(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'; pass dtype= one of float32"):
        load(tmp_path, dtype=jnp.int8)


def test_generation_config_and_tokenizer(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors_of(CONFIG), eos_token_id=2)
    assert load(tmp_path).config.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    model = load(tmp_path)
    assert model.config.eos_token_ids == (5, 2)
    assert model.tokenizer is None
    with pytest.raises(CheckpointError, match="no tokenizer.json; download it"):
        model.require_tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json is no usable tokenizer"):
        load(tmp_path)


def test_harmless_extras(tmp_path: pathlib.Path) -> None:
    tensors = tensors_of(CONFIG)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load(write(tmp_path, tensors))


class FakeReader:
    """Stores int8 codes of q_proj of layer 0 under its own names."""

    name = "fake int8"

    def is_quantized(self, layer: str) -> bool:
        return layer == Q_PROJ

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        return {
            f"{layer}.codes": ExpectedTensor(shape, ("I8",)),
            f"{layer}.factors": ExpectedTensor(None, ("F32", "F16")),
        }

    def read(self, layer: str, get: Any, shape: tuple[int, int], dtype: Any) -> QuantizedArray:
        # Views of the file, as real readers return them.
        codes, factors = get(f"{layer}.codes"), get(f"{layer}.factors")
        return QuantizedArray.make(codes, factors, qjax.INT8_CHANNEL, dtype=dtype)  # type: ignore

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        return frozenset({"kv"})

    def kv_scales(self, get: Any, num_layers: int, num_kv_heads: int) -> KVScales:
        scales = (get("kv"),) * num_layers
        return KVScales(scales, scales, "float8_e4m3fn")


def test_quantized_checkpoints_go_through_their_reader(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "find_reader", lambda *args: FakeReader())
    tensors = tensors_of(CONFIG)
    del tensors[f"{Q_PROJ}.weight"]
    codes = np.arange(256, dtype=np.int16).astype(np.int8).reshape(16, 16)
    tensors |= {
        f"{Q_PROJ}.codes": codes,
        f"{Q_PROJ}.factors": np.full((1, 16), 0.5, np.float32),
        f"{Q_PROJ}.bias": np.zeros(16, np.float32),  # old quantizers write these
        "kv": np.ones(1, np.float32),
    }
    model = load(write(tmp_path, tensors))
    kernel = model.params["model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(kernel.qvalue, jax.Array)
    np.testing.assert_array_equal(kernel.qvalue, codes)
    other = model.params["model"]["layers_1"]["self_attn"]["q_proj"]["kernel"]
    assert not isinstance(other, QuantizedArray)
    assert model.method == "fake int8" and model.kv_scales is not None
    with pytest.raises(ValueError, match="quantized already .fake int8.; load it without quantiz"):
        load(tmp_path, quantization=INT4)
    rules = {".*layers_1/.*/down_proj/kernel": INT4, ".*/q_proj/kernel": None}
    with pytest.raises(ValueError, match="a rule matches model/layers_0/self_attn/q_proj/kernel, "):
        load(tmp_path, rules=rules)
    del rules[".*/q_proj/kernel"]
    assert load(tmp_path, rules=rules).params["model"]["layers_1"]["mlp"]["down_proj"]["kernel"].fmt
    for name, value, message in [
        (f"{Q_PROJ}.bias", np.ones(16, np.float32), "q_proj.bias; it would not compute"),
        (f"{Q_PROJ}.codes", codes[:8], r"codes has shape \(8, 16\), the model needs \(16, 16\)"),
        (f"{Q_PROJ}.factors", np.ones((1, 16), np.int8), "dtype I8, needed is F32 or F16"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load(write(tmp_path, tensors | {name: value}))


def test_unaligned_tensors_and_scalars(tmp_path: pathlib.Path) -> None:
    # The format promises no alignment: a header of odd length shifts everything.
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.float32)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    body = data[8 : 8 + size] + b" " + data[8 + size :]
    path.write_bytes((size + 1).to_bytes(8, "little") + body)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(checkpoint[name], value)
        checkpoint.release()
        np.testing.assert_array_equal(checkpoint[name], value)


_MEASURE = """
import pathlib, sys
import qjax
from qjax.checkpoints.hf import load_model

def peak():  # kB, since the start of the process
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

small, large = sys.argv[1:]
load_model(small, quantization=qjax.INT4_G128, progress=False)  # the compiler's share
before = peak()
model = load_model(large, quantization=qjax.INT4_G128, progress=False)
print((peak() - before) * 1024, qjax.quantized_nbytes(model.params))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_is_the_quantized_model_and_one_tensor(tmp_path: pathlib.Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_q_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
    }
    for name, layers in (("small", 1), ("large", 20)):
        config = ModelConfig(num_layers=layers, **sizes)
        tensors = {
            leaf.name: np.full(leaf.stored_shape, 0.5, ml_dtypes.bfloat16)
            for leaf in model_leaves(config)
        }
        write(tmp_path / name, tensors, config)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    root = pathlib.Path(qjax.__file__).parent.parent
    # Else each thread's allocator keeps what its strips took: 13 to 55 MB more.
    one_allocator = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=root, env=one_allocator
    )
    grown, quantized = map(int, done.stdout.split())
    file_size = (tmp_path / "large" / "model.safetensors").stat().st_size
    one_tensor = 512 * 2048 * 4  # as float32, on its way through the quantizer
    # Measured: up to 16 MB above the quantized size of 45 MB; the file has 160 MB.
    assert grown < quantized + 8 * one_tensor < 0.5 * file_size
