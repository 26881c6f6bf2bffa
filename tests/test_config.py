"""ModelConfig: real files parse; what is not implemented is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from qjax.models.config import ModelConfig
from qjax.nn.rotary import RopeScaling, rope_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

REAL = {
    "Llama-2-13B-chat-GPTQ": {"num_kv_heads": 40, "head_dim": 128, "dtype": "float16"},
    "Genz-70b-GPTQ-3bit-actorder": {"num_layers": 80, "num_kv_heads": 8},
    "Llama-3.1-8B-Instruct": {
        "rope_scaling": RopeScaling("llama3", 8.0, 8192),
        "rope_theta": 500000.0,
        "eos_token_ids": (128001, 128008, 128009),
    },
    "Llama-3.1-70B-Instruct": {"num_q_heads": 64, "tie_word_embeddings": False},
    "Llama-3.2-1B-Instruct": {"tie_word_embeddings": True, "head_dim": 64},
    "Mistral-7B-Instruct-v0.3": {"layer_windows": (None,) * 32, "vocab_size": 32768},
    "Qwen2.5-7B-Instruct": {
        "attention_bias": True,
        "attention_out_bias": False,
        "layer_windows": (None,) * 28,
    },
    "Qwen3-8B": {"qk_norm": True, "head_dim": 128, "attention_bias": False},
    "Qwen3-32B": {"head_dim": 128, "num_q_heads": 64, "hidden_size": 5120},
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, shared_data: pathlib.Path) -> None:
    config = ModelConfig.from_hf(shared_data / "configs-real" / f"{name}.json")
    for field, value in REAL[name].items():
        assert getattr(config, field) == value, field
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_from_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(LLAMA)
    assert ModelConfig.from_hf(str(tmp_path / "config.json")) == ModelConfig.from_hf(LLAMA)


def test_defaults_are_those_of_hugging_face() -> None:
    config = ModelConfig.from_hf(
        {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "model_type")}
    )
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert not config.tie_word_embeddings and config.eos_token_ids == ()
    assert ModelConfig.from_hf(MISTRAL).layer_windows == (4096,) * 3
    assert ModelConfig.from_hf(QWEN2).layer_windows == (None,) * 3
    assert ModelConfig.from_hf(QWEN3).head_dim == 128


@pytest.mark.parametrize(
    ("source", "windows"),
    [
        (MISTRAL | {"sliding_window": 8}, (8, 8, 8)),
        (MISTRAL | {"sliding_window": None}, (None, None, None)),
        (
            QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            (None, None, 8),
        ),
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 8}, (None, None, None)),
        (
            QWEN3
            | {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (4, None, 4),
        ),
        (LLAMA | {"sliding_window": None}, (None, None, None)),
    ],
)
def test_sliding_windows(source: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = ModelConfig.from_hf(source)
    assert config.layer_windows == windows
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_biases() -> None:
    def biases(source: dict[str, Any]) -> tuple[bool, bool, bool]:
        c = ModelConfig.from_hf(source)
        return c.attention_bias, c.attention_out_bias, c.mlp_bias

    assert biases(LLAMA) == (False, False, False)
    assert biases(LLAMA | {"attention_bias": True, "mlp_bias": True}) == (True, True, True)
    assert biases(QWEN2) == (True, False, False)
    assert biases(QWEN3 | {"attention_bias": True}) == (True, True, False)


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, 7e3, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, RopeScaling("linear", 2.0)),
        (
            {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4.0}},
            1e4,
            RopeScaling("yarn", 4.0, 256, attention_factor=0.1 * math.log(4.0) + 1),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            5e5,
            RopeScaling("llama3", 8.0, 256),
        ),
    ],
)
def test_rope_spellings(rope: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    config = ModelConfig.from_hf(LLAMA | rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures=.*Mixtral.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": "qwen3"}, "model_type='qwen3'.*does not go with"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
        ({"hidden_size": None}, "hidden_size=None.*positive integer"),
        ({"vocab_size": "128"}, "vocab_size='128'"),
        ({"num_experts": 8}, "num_experts=8.*ignore_keys"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*llama3"),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 must be positive"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"factor": 2.0}}, "the rope types implemented are"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta=10000.0.*contradicts",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {}},
            "contradicts rope_parameters",
        ),
        ({"sliding_window": 8}, "sliding_window=8.*full attention"),
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"layer_types": ["full_attention"]}, "layer_types.*3 entries"),
        ({"use_qk_norm": True}, "use_qk_norm=True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
    ],
)
def test_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | change)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (MISTRAL | {"attention_bias": True}, "attention_bias=True"),
        (QWEN2 | {"attention_bias": False}, "attention_bias=False"),
        (QWEN3 | {"mlp_bias": True}, "mlp_bias=True"),
        (QWEN2 | {"num_key_value_heads": None}, "num_key_value_heads=None"),
    ],
)
def test_refused_for_the_family(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(source)


def test_ignored_keys() -> None:
    source = LLAMA | {"favourite_colour": "blue", "unused": None, "_name_or_path": "x"}
    with pytest.raises(ValueError, match="favourite_colour='blue'"):
        ModelConfig.from_hf(source)
    config = ModelConfig.from_hf(source, ignore_keys=("favourite_colour",))
    assert config == ModelConfig.from_hf(LLAMA)
    with pytest.raises(ValueError, match="'colour', which is not in it"):
        ModelConfig.from_hf(source, ignore_keys=("colour",))


def test_broken_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="a JSON object"):
        ModelConfig.from_hf(tmp_path)


def test_layers_with_different_windows_have_no_config_json() -> None:
    config = ModelConfig.from_hf(QWEN3)
    config = dataclasses.replace(config, layer_windows=(4, 8, None))
    with pytest.raises(ValueError, match="one window"):
        config.to_hf()


def test_llama3_frequencies() -> None:
    # Pairs rotate 31.8, 10.1, 3.2, 1.007 ... times in 200 tokens: above high_freq_factor a pair is
    # kept, below low_freq_factor it is divided, and between the two it is mixed linearly.
    plain = rope_frequencies(8, 10000.0, None)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    scaled = rope_frequencies(8, 10000.0, RopeScaling("llama3", 8.0, 200))
    rotations = 200 * plain / (2 * math.pi)
    mixed = (rotations[1] - 1) / 3
    expected = [1.0, 0.1 * (mixed + (1 - mixed) / 8), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
