"""What we write is understood by Hugging Face transformers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.export import save_model
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.safetensors_io import read_json
from qjax.formats import QuantFormat
from tests.checkpoint_models import TINY, random_params, random_quantized
from tests.tolerances import F32_LOGITS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_plain_models_give_our_logits(tmp_path):
    # Weights of the size that models have: logits of magnitude 1.
    params = jax.tree.map(lambda x: x * 0.2, random_params(TINY, lambda leaf, seed: None))
    save_model(tmp_path / "m", TINY, params, "none", progress=False)
    tokens = np.arange(24).reshape(2, 12) % TINY.vocab_size
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    model = load_model(tmp_path / "m", progress=False)
    positions = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    logits, _ = model.module.apply(
        {"params": model.params}, jnp.asarray(tokens, jnp.int32), positions
    )
    np.testing.assert_allclose(logits, reference, rtol=0, atol=F32_LOGITS)


@pytest.mark.parametrize("sym", [True, False])
def test_gptq_and_awq_configs_are_understood(tmp_path, sym):
    fmt = QuantFormat("int4", "group", group_size=32, symmetric=sym, scale_dtype="float16")

    def kernel(leaf, seed):
        return None if leaf.layer == "lm_head" else random_quantized(leaf.shape, fmt, seed)

    params = random_params(TINY, kernel)
    classes = {"gptq": transformers.GPTQConfig, "awq": transformers.AwqConfig}
    for name, cls in classes.items():
        save = functools.partial(save_model, tmp_path / name, TINY, params, progress=False)
        save(name)
        config = transformers.AutoConfig.from_pretrained(tmp_path / name)
        parsed = cls.from_dict(dict(config.quantization_config))
        assert (parsed.bits, parsed.group_size) == (4, 32)
        if name == "gptq":
            assert (parsed.sym, parsed.desc_act) == (sym, False)
            assert parsed.format == ("gptq" if sym else "gptq_v2")
            values = read_json(tmp_path / name / "config.json")["quantization_config"]
            assert read_json(tmp_path / name / "quantize_config.json") == values
        else:
            assert parsed.zero_point is not sym and parsed.format == "gemm"
            assert parsed.modules_to_not_convert == ["lm_head"]
