"""Logits of every model family against Hugging Face transformers, from files written by it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.hf import load_model
from qjax.models.config import ModelConfig
from qjax.tokenizer import Tokenizer
from tests.tolerances import F32_LOGITS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
# With theta 10000 and 8 or 16 features per head, wavelengths are 6 to 6,000 tokens: an original
# context of 32 puts some on each side of both ends of the ramps, and 48 tokens go beyond it.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3-gqa": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama3.1-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-yarn-window": (
        "Qwen2",
        {
            "rope_parameters": YARN_ROPE,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias-tied": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
}


def write_model(family: str, folder: pathlib.Path) -> Any:
    """A randomly initialised model of transformers, saved to ``folder``."""
    name, changes = FAMILIES[family]
    torch.manual_seed(sum(family.encode()))
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Biases start at zero and norm weights at one, where mistakes would not show.
            if value.ndim == 1:
                value.normal_(mean=0.0 if key.endswith("bias") else 1.0, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, tmp_path: pathlib.Path, rng: np.random.Generator):
    reference = write_model(family, tmp_path)
    tokens = rng.integers(0, SIZES["vocab_size"], (2, 48))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    model = load_model(tmp_path, progress=False)
    assert model.module.dtype == jnp.float32
    apply = jax.jit(lambda params, t: model.module.apply({"params": params}, t)[0])
    logits = apply(model.params, jnp.asarray(tokens, jnp.int32))
    assert np.abs(expected).max() > 1  # not the small logits of a default initialisation
    np.testing.assert_allclose(logits, expected, atol=F32_LOGITS, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_config_json_is_read_by_transformers(family: str, tmp_path: pathlib.Path):
    name, changes = FAMILIES[family]
    original = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    original.architectures = [f"{name}ForCausalLM"]
    ours = ModelConfig.from_hf(original.to_dict())
    again = transformers.AutoConfig.for_model(**ours.to_hf())
    assert type(again) is type(original)
    assert ModelConfig.from_hf(again.to_dict()) == ours


def test_greedy_text_of_a_real_model(shared_data: pathlib.Path):
    folder = shared_data / "tinystories-656k-llama-hf"
    stored = np.load(folder / "reference_hf_transformers_fp32.npz")
    ids = stored["greedy_ids"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(stored["logits"], expected, atol=F32_LOGITS, rtol=0)
    model = load_model(folder, progress=False)
    apply = jax.jit(lambda params, t: model.module.apply({"params": params}, t)[0])
    logits = apply(model.params, jnp.asarray(ids)[None])[0]
    np.testing.assert_allclose(logits, expected, atol=F32_LOGITS, rtol=0)


def test_tokenizer_and_chat_template(shared_data: pathlib.Path):
    folder = shared_data / "tok-llama2"
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    ours = Tokenizer.from_folder(folder)
    for text in (
        "Once upon a time",
        "  two  spaces\n\n",
        "naïve 日本 🙂",
        "",
        "1 + 2 = 3;\treturn",
    ):
        ids = reference(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    # The constructs of published templates: trimming, loops, exceptions, json, generation blocks.
    template = """{%- set ns = namespace(first=true) %}
    {{- bos_token }}
    {%- for message in messages %}
        {%- if message['role'] not in ['system', 'user', 'assistant'] %}
            {{- raise_exception('role ' + message['role']) }}
        {%- endif %}
        {%- if message['role'] == 'assistant' %}
            {%- generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
        {%- else %}
            {{- '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}
        {%- endif %}
        {%- set ns.first = false %}
    {%- endfor %}
    {%- if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}
    {%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
    ours.chat_template = template
    messages = [
        {"role": "system", "content": "Be <brief> & 'exact'."},
        {"role": "user", "content": "héllo\n"},
        {"role": "assistant", "content": "  hi "},
        {"role": "user", "content": "again"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "<ü>"}}]
    for prompt in (True, False):
        for tool in (None, tools):
            expected = reference.apply_chat_template(
                messages,
                tools=tool,
                chat_template=template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
            text = ours.render_chat(messages, add_generation_prompt=prompt, tools=tool)
            assert text == expected
