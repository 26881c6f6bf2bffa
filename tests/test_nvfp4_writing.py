"""NVFP4 as compressed-tensors: global scales that are stored as reciprocals."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qjax.checkpoints.ct_writer import NVFP4, CompressedTensorsWriter, global_divisor
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.export import save_model
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.layout import Leaf
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint
from qjax.checkpoints.writer import Linears
from qjax.quantized_array import QuantizedArray
from tests.checkpoint_models import TINY, assert_same_tree, random_params
from tests.fake_checkpoints import LAYER


def test_global_scales_are_written_as_they_were_or_refused(rng: np.random.Generator) -> None:
    """Files hold the reciprocal, and not every float32 number is the reciprocal of one."""
    divisors = np.exp(rng.uniform(-20, 20, 300)).astype(np.float32)
    scales = np.float32(1) / divisors
    made = [global_divisor(scale, np.array(d)) for scale, d in zip(scales, divisors, strict=True)]
    np.testing.assert_array_equal(
        np.array([m.item() for m in made if m is not None], np.float32), divisors
    )
    others = [global_divisor(scale) for scale in scales]
    assert all(
        o is not None and np.float32(1) / o == s for o, s in zip(others, scales, strict=True)
    )
    assert any(o != d for o, d in zip(others, divisors, strict=True))  # one of two
    # One that another scale came from is not taken.
    assert global_divisor(np.float32(0.5), np.array([3], np.float32)) == 2
    none = [s for s in divisors if global_divisor(s) is None]
    assert 20 < len(none) < 100
    zeros: Any = np.zeros((16, 8), ml_dtypes.float4_e2m1fn)
    ones: Any = np.ones((1, 8), ml_dtypes.float8_e4m3fn)
    for scale, message in (
        (none[0], "is the reciprocal of no float32"),
        (None, "without a global"),
    ):
        q = QuantizedArray.make(zeros, ones, NVFP4, global_scale=scale)
        with pytest.raises(CheckpointError, match=message):
            CompressedTensorsWriter(Linears({LAYER: q}, {}))


def test_read_and_written_again(tmp_path: pathlib.Path) -> None:
    divisors: dict[str, np.ndarray] = {}

    def kernel(leaf: Leaf, seed: int) -> Any:
        if leaf.layer == "lm_head":
            return None
        rng = np.random.default_rng(seed)
        k, n = leaf.shape
        divisors[leaf.layer] = np.array([rng.uniform(1000, 5000)], np.float32)
        parts: dict[str, Any] = {
            "qvalue": rng.integers(0, 16, (k, n)).astype(np.uint8).view(ml_dtypes.float4_e2m1fn),
            "scale": rng.uniform(1, 448, (k // 16, n)).astype(ml_dtypes.float8_e4m3fn),
            "global_scale": np.asarray(np.float32(1) / divisors[leaf.layer][0]),
        }
        return QuantizedArray.make(fmt=NVFP4, dtype=np.float32, **parts)

    params = random_params(TINY, kernel)
    first, second = tmp_path / "a", tmp_path / "b"
    save_model(first, TINY, params, "compressed-tensors", progress=False)
    config = json.loads((first / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "tensor_group"
    # As another writer may have it: the other number with that reciprocal, where there are two.
    file = first / "model.safetensors"
    data = bytearray(file.read_bytes())
    tensors = SafetensorsCheckpoint(first).tensors
    for layer, divisor in divisors.items():
        info = tensors[f"{layer}.weight_global_scale"]
        data[info.begin : info.end] = divisor.tobytes()
    file.write_bytes(data)
    model = load_model(first, progress=False)
    assert_same_tree(model.params, params)
    save_model(second, TINY, model.params, "compressed-tensors", source=first, progress=False)
    assert (second / "model.safetensors").read_bytes() == bytes(data)
