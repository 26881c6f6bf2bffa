"""A real model against what published tools reach on the same calibration text."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate import Settings, calibrate_checkpoint
from qjax.checkpoints.hf import load_model
from qjax.formats import INT4_G128
from qjax.quantize import dequantize_tree
from qjax.tokenizer import Tokenizer

ASYM = INT4_G128.replace(symmetric=False)


def _rows(tokenizer: Tokenizer, stories: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Stories as the model was trained on them: without the dummy prefix of its tokenizer."""
    ids = [[1, *tokenizer.encode(story, add_special_tokens=True)[2:]][:512] for story in stories]
    length = max(map(len, ids))
    tokens = np.zeros((len(ids), length), np.int32)
    for row, story in zip(tokens, ids, strict=True):
        row[: len(story)] = story
    return tokens, np.arange(length)[None, :] < np.asarray([len(x) for x in ids])[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "published"),
    # AutoRound asymmetric 22.14, RTN 22.66 by our own rounding; measured here: 21.84.
    [("gptq", 22.0)],
)
def test_int4_on_the_656k_model(
    method: str, published: float, shared_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = shared_data / "tinystories-656k-llama-hf"
    text = (shared_data / "exllamav2-cal" / "tiny.utf8").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    tokenizer = Tokenizer.from_folder(source)
    calibrate_checkpoint(
        source,
        tmp_path / "out",
        Settings(ASYM, method),
        _rows(tokenizer, stories[200:317]),
        progress=False,
    )
    report = json.loads((tmp_path / "out" / "calibration_report.json").read_text())
    assert all(x["error"] < x["error_rtn"] for x in report["layers"]) and report["layers"]
    model = load_model(tmp_path / "out", dtype=jnp.float32, progress=False)
    params = dequantize_tree(model.params, jnp.float32)

    @jax.jit
    def score(tokens: jax.Array, valid: jax.Array) -> jax.Array:
        logits = model.module.apply({"params": params}, tokens[:, :-1])[0]  # type: ignore[index]
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.sum(jnp.where(valid[:, 1:], found[..., 0], 0.0))

    tokens, valid = _rows(tokenizer, stories[:100])
    total = sum(float(score(tokens[i : i + 25], valid[i : i + 25])) for i in range(0, 100, 25))
    assert math.exp(total / valid[:, 1:].sum()) < published
