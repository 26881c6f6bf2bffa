"""A random model of a few thousand parameters with a tokenizer of bytes, in the usual files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qjax.checkpoints.export import save_model
from qjax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=32,  # every kernel of one shape: few compilations
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    dtype="float32",
)


def write_model(folder: pathlib.Path, layers: int, tied: bool = True) -> None:
    """Write the checkpoint."""
    rng = np.random.default_rng(0)

    def kernel() -> dict[str, Any]:
        return {"kernel": (0.2 * rng.normal(size=(32, 32))).astype(np.float32)}

    norm = {"weight": np.ones(32, np.float32)}
    model: dict[str, Any] = {
        "embed_tokens": {"embedding": rng.normal(size=(256, 32)).astype(np.float32)},
        "norm": norm,
    }
    for index in range(layers):
        model[f"layers_{index}"] = {
            "input_layernorm": norm,
            "post_attention_layernorm": norm,
            "self_attn": {name: kernel() for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "mlp": {name: kernel() for name in ("gate_proj", "up_proj", "down_proj")},
        }
    params: dict[str, Any] = {"model": model}
    if not tied:
        params["lm_head"] = {"kernel": rng.normal(size=(32, 256)).astype(np.float32)}
    sizes: dict[str, Any] = {"num_layers": layers, "layer_windows": ()}
    config = dataclasses.replace(CONFIG, **sizes, tie_word_embeddings=tied)
    save_model(folder, config, params, "none", progress=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
