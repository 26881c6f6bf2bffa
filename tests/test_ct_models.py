"""Models that llm-compressor wrote: their logits, their perplexity, and writing them back."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qjax.checkpoints.export import save_model
from qjax.checkpoints.hf import LoadedModel, load_model
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint, read_json
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.tokenizer import Tokenizer
from tests.checkpoint_models import assert_same_tree
from tests.tolerances import F32_LOGITS, PUBLISHED_PERPLEXITY

NAMES = (
    "ct-w4a16-g128-sym-gptq",
    "ct-w8a16-channel-sym-rtn",
    "ct-fp8-dynamic",
    "ct-fp8-static-kvfp8",
)
PAGE = 64
LENGTH = 5 * PAGE  # the longest story has 310 tokens


def folder_of(shared_data: pathlib.Path, name: str) -> pathlib.Path:
    return shared_data / "quantized-656k" / name


@pytest.mark.parametrize("name", NAMES[:2])
def test_logits_match_transformers(shared_data: pathlib.Path, name: str) -> None:
    model = load_model(folder_of(shared_data, name), progress=False)
    reference = np.load(folder_of(shared_data, name) / "reference_logits.npz")
    ids = np.stack([reference[f"ids{i}"] for i in range(4)]).astype(np.int32)
    logits, _ = jax.jit(model.module.apply)({"params": model.params}, jnp.asarray(ids))
    wanted = np.stack([reference[f"logits{i}"] for i in range(4)])
    assert np.abs(np.asarray(logits) - wanted).max() < F32_LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_written_back_byte_by_byte(
    shared_data: pathlib.Path, name: str, tmp_path: pathlib.Path
) -> None:
    folder = folder_of(shared_data, name)
    model = load_model(folder, progress=False)
    save_model(
        tmp_path / "model",
        model.config,
        model.params,
        "compressed-tensors",
        source=folder,
        kv_scales=model.kv_scales,
        progress=False,
    )
    before, after = SafetensorsCheckpoint(folder), SafetensorsCheckpoint(tmp_path / "model")
    assert set(before) == set(after)
    for tensor in before:
        assert before.tensors[tensor].dtype == after.tensors[tensor].dtype, tensor
        assert before[tensor].shape == after[tensor].shape, tensor
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
    old, new = (read_json(f / "config.json") for f in (folder, tmp_path / "model"))
    _same_config(old["quantization_config"], new["quantization_config"])
    again = load_model(tmp_path / "model", progress=False)
    assert_same_tree(again.params, model.params)


def _same_config(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Equal but for what describes how the scales were found."""
    group_old, group_new = (dict(c.pop("config_groups")["group_0"]) for c in (old, new))
    for key in ("weights", "input_activations"):
        a, b = group_old.pop(key), group_new.pop(key)
        if a is not None:
            for found in ("observer", "actorder"):
                a.pop(found)
                b.pop(found)
        assert a == b
    assert group_old == group_new
    assert old == new


def test_onto_two_devices(shared_data: pathlib.Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    folder = folder_of(shared_data, NAMES[2])
    model = load_model(folder, mesh=mesh, progress=False)
    q = model.params["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert q.qvalue.addressable_shards[0].data.shape == (128, 192)
    assert q.scale.addressable_shards[0].data.shape == (1, 192)
    assert_same_tree(model.params, load_model(folder, progress=False).params)
    with pytest.raises(ValueError, match="down_proj.*cuts groups of 128.*groups of 64"):
        load_model(folder_of(shared_data, NAMES[0]), mesh=mesh, progress=False)


def test_fp8_as_hugging_face_fp8(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in NAMES[2:]:
        model = load_model(folder_of(shared_data, name), progress=False)
        folder = tmp_path / name
        save_model(
            folder,
            model.config,
            model.params,
            "fp8",
            kv_scales=model.kv_scales,
            progress=False,
        )
        again = load_model(folder, progress=False)
        assert again.method is not None and again.method.startswith("fp8")
        assert_same_tree(again.params, model.params)
        assert (again.kv_scales is None) == (model.kv_scales is None)
        if model.kv_scales is not None and again.kv_scales is not None:
            np.testing.assert_array_equal(again.kv_scales.keys, model.kv_scales.keys)


@pytest.mark.parametrize(("name", "published"), [(NAMES[2], 21.394), (NAMES[3], 21.559)])
def test_perplexity_with_quantized_activations(
    shared_data: pathlib.Path, name: str, published: float
) -> None:
    """The figures of transformers and compressed-tensors, KV cache scales included."""
    tokenizer = Tokenizer.from_folder(shared_data / "tinystories-656k-llama-hf")
    text = (shared_data / "exllamav2-cal" / "tiny.utf8").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")][:100]
    # The model was trained without the prefix space that its tokenizer puts in front.
    ids = [([1] + tokenizer.encode(story)[2:]) for story in stories]
    model = load_model(folder_of(shared_data, name), progress=False)
    perplexity = _perplexity(model, ids)
    assert abs(perplexity / published - 1) < PUBLISHED_PERPLEXITY


def _perplexity(model: LoadedModel, ids: list[list[int]], batch: int = 20) -> float:
    cache = None if model.kv_scales is None else _cache(model, model.kv_scales, batch)

    @jax.jit
    def losses(tokens: jax.Array, valid: jax.Array) -> jax.Array:
        if cache is None:
            logits, _ = model.module.apply({"params": model.params}, tokens)
        else:
            logits, _ = model.module.apply(
                {"params": model.params}, tokens, None, cache, valid=valid
            )
        logs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(valid[:, 1:], picked, 0.0).sum()

    total, count = 0.0, 0
    for start in range(0, len(ids), batch):
        chunk = ids[start : start + batch]
        tokens = np.zeros((batch, LENGTH), np.int32)
        valid = np.zeros((batch, LENGTH), bool)
        for row, story in enumerate(chunk):
            tokens[row, : len(story)], valid[row, : len(story)] = story, True
        total += float(losses(jnp.asarray(tokens), jnp.asarray(valid)))
        count += int(valid[:, 1:].sum())
    return math.exp(total / count)


def _cache(model: LoadedModel, scales: KVScales, batch: int) -> QuantizedKVCache:
    c = model.config
    pages = LENGTH // PAGE
    cache = QuantizedKVCache.init(
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        num_pages=batch * pages,
        page_size=PAGE,
        max_seqs=batch,
        pages_per_seq=pages,
        fmt=KVFormat(scales.dtype, "static"),
        static_scales=tuple(zip(scales.keys, scales.values, strict=True)),
    )
    table = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
    return cache.with_page_table(table)
