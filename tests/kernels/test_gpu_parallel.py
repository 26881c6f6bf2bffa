"""A model over two GPUs against the same on one, with kernels on all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import parse_format
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.sharding import placer, tensor_parallel_mesh
from qjax.sampling import SamplingParams
from qjax.serving import Engine, EngineConfig, Request
from qjax.serving.devices import Devices
from qjax.serving.synthetic import random_params
from qjax.serving.weights import prepare_weights
from tests.tolerances import TENSOR_PARALLEL_BF16, relative_error

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=4096,
    num_layers=2,
    num_q_heads=16,
    num_kv_heads=4,
    head_dim=128,
    max_position_embeddings=512,
)
ROWS, PROMPT = 4, 24
KV = KVFormat("float8_e4m3fn", "dynamic")


@pytest.fixture(autouse=True)
def _needs_two_hoppers() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is None and jax.device_count() < 2:
        reason = "one GPU; this needs two"
    if reason is not None:
        pytest.skip(reason)


def model_over(weights: str, count: int) -> tuple[Any, Any]:
    """Parameters, the same for any number of devices, and their mesh."""
    mesh = tensor_parallel_mesh(count) if count > 1 else None
    place = None if mesh is None else placer(MODEL, mesh)
    params = random_params(MODEL, parse_format(weights), place=place)
    return prepare_weights(params, jnp.bfloat16, mesh=mesh)[0], mesh


def logits_over(weights: str, count: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Logits of a prefill and of the decode step behind it, and the text of the latter."""
    params, mesh = model_over(weights, count)
    devices = Devices(params, MODEL, mesh)
    apply: Any = Decoder(MODEL, parallel=devices.parallel).apply
    cache = devices.new_cache(
        num_layers=MODEL.num_layers,
        num_kv_heads=MODEL.num_kv_heads,
        head_dim=MODEL.head_dim,
        num_pages=2 * ROWS,
        page_size=64,
        max_seqs=ROWS,
        pages_per_seq=2,
        fmt=KV,
    )
    table = np.arange(2 * ROWS, dtype=np.int32).reshape(ROWS, 2)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, PROMPT + 1))

    def run(params: Any, cache: QuantizedKVCache, state: Any, part: Any) -> tuple[Any, ...]:
        cache = cache.with_page_table(jnp.asarray(table))
        at = jnp.full((ROWS,), part["tokens"].shape[1] - 1, jnp.int32)
        logits, cache = apply(
            {"params": params}, part["tokens"], part["positions"], cache, logits_at=at
        )
        return cache, state, logits, at

    program, found, text = devices.program(run, cache), [], ""
    for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1)):
        positions = np.broadcast_to(np.arange(start, end), (ROWS, end - start))
        part = {"tokens": tokens[:, start:end], "positions": positions}
        part = devices.put({name: x.astype(np.int32) for name, x in part.items()})
        state = devices.put(jnp.zeros((1,)))
        compiled = program.lower(params, cache, state, part).compile()
        cache, _, logits, _ = compiled(params, cache, state, part)
        found.append(np.asarray(logits))
        text = compiled.as_text() or ""
    return found[0], found[1], text


@pytest.mark.parametrize("weights", ["int4", "fp8", "none"])
def test_two_gpus_give_the_logits_of_one(weights: str) -> None:
    # One of two that are visible, which is told by jax.shard_map too.
    (*expected, alone), (*found, together) = (logits_over(weights, count) for count in (1, 2))
    assert "mosaic_gpu" in alone and "all-reduce" not in alone
    assert "mosaic_gpu" in together and "all-reduce" in together
    for one, two in zip(expected, found, strict=True):
        assert relative_error(two, one) < TENSOR_PARALLEL_BF16


def test_an_engine_over_two_gpus_repeats_itself() -> None:
    params, mesh = model_over("int4", 2)
    sizes = EngineConfig(max_running_requests=4, max_model_len=128, prefix_cache=True)
    engine = Engine(Decoder(MODEL), params, sizes, KV, mesh=mesh)
    rng = np.random.default_rng(1)
    work = [
        Request(tuple(rng.integers(0, 4096, n).tolist()), SamplingParams(max_new_tokens=20, seed=n))
        for n in (5, 30, 17, 9, 40)
    ]
    tokens = [completion.token_ids for completion in engine.generate(work)]
    assert tokens == [completion.token_ids for completion in engine.generate(work)]
    assert len({token for row in tokens for token in row}) > 10
