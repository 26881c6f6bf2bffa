"""Native checkpoints of weights packed for kernels: bit by bit, onto a mesh, and their version."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qjax
from qjax import formats
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.layout import Leaf
from qjax.checkpoints.native import MANIFEST, load_native, save_native
from qjax.models.config import ModelConfig
from qjax.models.fusion import fuse_unsupported_reason
from qjax.models.sharding import leaf_spec, shard_params
from qjax.ops.packed import PackedWeight, pack_for_mosaic, pack_tree, unpack_tree
from qjax.ops.packed_w8a8 import PackedW8A8
from qjax.pallas_kernels._layout import PACKING_VERSION
from tests.checkpoint_models import assert_same_tree, random_params, random_quantized

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=256,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    dtype="bfloat16",
)
FORMATS = {
    "q_proj": formats.INT4_G32_ASYM.replace(scale_dtype="float16"),
    "k_proj": formats.INT4_CHANNEL,
    "v_proj": formats.INT8_CHANNEL,
    "o_proj": formats.INT4_G128.replace(scale_dtype="bfloat16"),
    "gate_proj": formats.W8A8_INT8,
    "down_proj": formats.W4A8_INT8,
    "up_proj": formats.INT4_G64,  # stays as it is: not packed below
}
UP = "model/layers_0/mlp/up_proj/kernel"


def kernel(leaf: Leaf, seed: int) -> Any:
    name = leaf.layer.rpartition(".")[2]
    fmt = FORMATS.get(name)
    if fmt is None:
        return None
    ordered = name == "o_proj"
    q = random_quantized(
        (leaf.shape[0], leaf.shape[1]), fmt, seed, act_order=ordered, dtype=jnp.bfloat16
    )
    q = jax.tree.map(jnp.asarray, q)
    return q if name == "up_proj" else pack_for_mosaic(q, alternating=name == "v_proj")


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), random_params(CONFIG, kernel))


@pytest.fixture(scope="module")
def saved(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_native(folder, CONFIG, params)
    return folder


def layer(params: dict[str, Any]) -> dict[str, Any]:
    return params["model"]["layers_0"]


def test_bits_are_kept(params: dict[str, Any], saved: pathlib.Path) -> None:
    model = load_model(saved, progress=False)
    assert json.loads((saved / MANIFEST).read_text())["version"] == 2
    for block, name in (
        ("self_attn", "o_proj"),
        ("self_attn", "q_proj"),
        ("mlp", "gate_proj"),
        ("mlp", "down_proj"),
    ):
        have, want = layer(model.params)[block][name], layer(params)[block][name]
        kind = PackedW8A8 if name == "gate_proj" else PackedWeight
        assert type(have["kernel"]) is kind
        assert_same_tree(have, want)
        assert_same_tree(have["kernel"].unpack(), want["kernel"].unpack())
    assert_same_tree(layer(model.params)["mlp"]["up_proj"], layer(params)["mlp"]["up_proj"])
    # Serving such a model leaves its projections apart.
    attention = layer(model.params)["self_attn"]
    reason = fuse_unsupported_reason([attention["q_proj"]["kernel"]] * 2)
    assert reason == "they are packed already"
    unpacked = unpack_tree(model.params)
    assert not any(isinstance(x, PackedWeight) for x in layer(unpacked)["self_attn"].values())
    assert_same_tree(
        pack_tree(layer(unpacked)["self_attn"], gated=["v_proj"]), layer(params)["self_attn"]
    )


def test_onto_two_devices(params: dict[str, Any], saved: pathlib.Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    model = load_native(saved, mesh=mesh)
    plain = jax.tree.map(
        lambda x: (
            x.astype(jnp.bfloat16) if getattr(x, "ndim", 1) > 1 and x.dtype == "float32" else x
        ),
        params,
        is_leaf=lambda x: isinstance(x, (PackedWeight, qjax.QuantizedArray)),
    )
    wanted = shard_params(plain, CONFIG, mesh)
    assert_same_tree(model.params, wanted)
    for have, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(wanted), strict=True):
        assert have.sharding.is_equivalent_to(want.sharding, have.ndim)
    down = layer(model.params)["self_attn"]["o_proj"]["kernel"]
    assert down.words.sharding.spec == P("model", None, None, None)
    assert down.words.addressable_shards[0].data.shape == (1, 4, 4, 256)
    assert layer(model.params)["mlp"]["gate_proj"]["kernel"].words.sharding.spec[0] == "model"


@pytest.mark.parametrize(
    ("layer_name", "fmt", "shape", "tile"),
    [
        ("self_attn/o_proj", formats.INT4_G64, (384, 256), 128),
        ("mlp/up_proj", formats.INT8_CHANNEL, (256, 64), 64),
        ("mlp/up_proj", formats.W8A8_FP8_BLOCK, (256, 128), 128),
    ],
)
def test_cut_tiles_are_refused(
    layer_name: str, fmt: qjax.QuantFormat, shape: tuple[int, int], tile: int
) -> None:
    value = jax.eval_shape(lambda w: pack_for_mosaic(qjax.quantize(w, fmt)), jnp.ones(shape))
    with pytest.raises(ValueError, match=f"{layer_name}.* cuts the tiles of {tile} of a packed"):
        leaf_spec(f"model/layers_0/{layer_name}/kernel", value, CONFIG, 2)


def test_other_versions_and_damage(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(shutil.copytree(saved, tmp_path / "model"))
    manifest = json.loads((folder / MANIFEST).read_text())
    path = "model/layers_0/self_attn/q_proj/kernel"
    entry = manifest["params"][path]

    def refused(change: dict[str, Any], message: str) -> None:
        entries = {**manifest["params"], path: {**entry, **change}}
        (folder / MANIFEST).write_text(json.dumps({**manifest, "params": entries}))
        with pytest.raises(CheckpointError, match=message):
            load_native(folder)

    packing = entry["packing"]
    refused({"packing": {**packing, "version": 7}}, "layout version 7 .* has version .*unpack_tree")
    for change in (
        {"version": None},
        {"layout": "w8a8"},
        {"compute": "float32"},
        {"tiles": [64, 1]},
        {"tiles": [0, 0]},
        {"scale_dtype": "int3"},
    ):
        refused({"packing": {**packing, **change}}, "layout version None|damaged")
    for name, field in (
        ("words", {"dtype": "int32", "shape": [2, 4, 8, 256]}),
        ("scales", {"dtype": "float32", "shape": [4, 2, 256]}),
        ("column", {"dtype": "float16", "shape": [256]}),
    ):
        refused({"fields": {**entry["fields"], name: field}}, "damaged")
    fields = {name: field for name, field in entry["fields"].items() if name != "scales"}
    refused({"fields": fields}, "damaged")


def test_the_version_counts_changes_of_the_layout() -> None:
    """If this fails because packing was changed, raise PACKING_VERSION and enter the new digest."""
    digest = hashlib.sha256()

    def add(fmt: formats.QuantFormat, seed: int) -> None:
        q = jax.tree.map(jnp.asarray, random_quantized((256, 128), fmt, seed))
        for compute in ("float16", "bfloat16"):
            packed = pack_for_mosaic(q, compute=compute)
            for array in (packed.words, packed.scales, packed.column):
                if array is not None:
                    digest.update(np.asarray(array).tobytes())

    for seed, fmt in enumerate((*FORMATS.values(), formats.INT8_G128, formats.W4A8_INT8)):
        add(fmt.replace(scale_steps=None), seed)
    assert PACKING_VERSION == 2
    assert digest.hexdigest()[:16] == "4fc010fad3800bb8"
    add(formats.W4A8_INT8, 0)
    assert digest.hexdigest()[:16] == "7fd76af4bc3fdc7b"
