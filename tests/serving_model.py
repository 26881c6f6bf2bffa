"""A tiny random model as files, for tests that serve it."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.models.config import ModelConfig

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}bot:"


def write_model(folder: pathlib.Path, num_kv_heads: int = 1, tied: bool = True) -> pathlib.Path:
    """One layer, a tokenizer and a chat template, in the usual files; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran to the cat"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_q_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_ids=(0,),
        tie_word_embeddings=tied,
        dtype="float32",
    )
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) * np.float32(0.3)

    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": weight(288, 32),
        "model.norm.weight": np.ones(32, np.float32),
        layer + "input_layernorm.weight": np.ones(32, np.float32),
        layer + "post_attention_layernorm.weight": np.ones(32, np.float32),
        layer + "self_attn.q_proj.weight": weight(32, 32),
        layer + "self_attn.k_proj.weight": weight(16 * num_kv_heads, 32),
        layer + "self_attn.v_proj.weight": weight(16 * num_kv_heads, 32),
        layer + "self_attn.o_proj.weight": weight(32, 32),
        layer + "mlp.gate_proj.weight": weight(64, 32),
        layer + "mlp.up_proj.weight": weight(64, 32),
        layer + "mlp.down_proj.weight": weight(32, 64),
    }
    if not tied:
        tensors["lm_head.weight"] = weight(288, 32)
    save_file(tensors, folder / "model.safetensors")
    return folder
