"""Prefill and decode speed of a model as the serving engine runs it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from qjax.evaluation.perplexity import KVFormats
from qjax.kv_cache import StaticScales
from qjax.models.decoder import Decoder
from qjax.sampling import SamplingParams
from qjax.serving.engine import Engine, EngineConfig, EngineStats
from qjax.serving.scheduler import Request
from qjax.serving.weights import prepare_weights
from qjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens per second over all sequences, without compiling."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_speed(
    module: Decoder,
    params: Params,
    kv_format: KVFormats,
    *,
    static_scales: StaticScales | None = None,
    batch_size: int = 8,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
) -> Speed:
    """Generates greedily from random prompts, twice; the second time counts.

    Args:
      module: The model.
      params: Its parameters.
      kv_format: Format of the KV cache.
      static_scales: For layers whose format is static.
      batch_size: Sequences that run together.
      prompt_tokens: Length of every prompt.
      new_tokens: Tokens generated for each; at least two, since the first counts as prefill.

    Returns:
      The speeds on the default device.

    Raises:
      ValueError: If prompt and continuation are longer than the model was made for.
    """
    if new_tokens < 2:
        raise ValueError(f"{new_tokens=} must be at least 2: the first counts as prefill")
    config = EngineConfig(
        max_running_requests=batch_size,
        max_model_len=prompt_tokens + new_tokens,
        decode_block=min(32, new_tokens - 1),
    )
    # A copy of the dictionaries: the caller keeps its weights.
    params, _ = prepare_weights(jax.tree.map(lambda leaf: leaf, params), module.dtype)
    engine = Engine(module, params, config, kv_format, static_scales=static_scales)
    rng = np.random.default_rng(0)
    shape = (batch_size, prompt_tokens)
    prompts = rng.integers(0, module.config.vocab_size, shape).tolist()
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    requests = [Request(prompt, sampling) for prompt in prompts]
    engine.generate(requests)  # compiles, and touches all memory
    engine.stats = EngineStats()
    engine.generate(requests)
    return Speed(engine.stats.prefill_rate, engine.stats.decode_rate)
