"""The bundled model is an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.assets import bundled_model_path
from qjax.checkpoints.hf import load_model
from tests import tolerances

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "It was the best of times, it was the worst of times; naïve ☃ readers may differ.\n\n“Well?”"


def test_transformers_loads_it_unchanged() -> None:
    path = str(bundled_model_path())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ours = load_model(path, dtype=jnp.float32, progress=False)

    ids = ours.require_tokenizer().encode(TEXT)
    assert ids == their_tokenizer(TEXT)["input_ids"]
    assert ids[0] == theirs.config.bos_token_id == their_tokenizer.bos_token_id
    assert ours.require_tokenizer().decode(ids) == TEXT
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert theirs.generation_config.eos_token_id == [their_tokenizer.eos_token_id]

    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
    logits, _ = ours.module.apply({"params": ours.params}, jnp.asarray([ids], jnp.int32))
    assert np.abs(np.asarray(logits) - wanted).max() < tolerances.F32_LOGITS
