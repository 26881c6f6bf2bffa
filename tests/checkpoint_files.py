"""Small checkpoints for the tests of loading, written with the safetensors library."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qjax.checkpoints.hf import LoadedModel, load_model
from qjax.checkpoints.layout import model_leaves
from qjax.checkpoints.safetensors_io import INDEX_FILE
from qjax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def tensors_of(config: ModelConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        leaf.name: rng.normal(size=leaf.stored_shape).astype(dtype) for leaf in model_leaves(config)
    }


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig = CONFIG,
    **config_changes: Any,
) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | config_changes))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_shards(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> pathlib.Path:
    write(folder, {})
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: pathlib.Path, **kwargs: Any) -> LoadedModel:
    return load_model(folder, progress=False, **kwargs)
