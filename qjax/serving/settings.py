"""From what a user asks for to formats and sizes: presets, KV formats per layer, context length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from qjax.checkpoints.reader import KVScales
from qjax.kv_cache import StaticScales
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.models.config import ModelConfig
from qjax.serving.offline import Job
from qjax.typing import DType

SERVER_CONTEXT = 4096
"""``max_model_len`` of a server that is told nothing: many slots of it fit on a device."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named choice.

    Attributes:
      quantization: Weight format, by its command-line name.
      kv_cache_dtype: KV cache type.
      purpose: One line for the help text.
    """

    quantization: str
    kv_cache_dtype: str
    purpose: str


PRESETS: dict[str, Preset] = {
    "accuracy": Preset("fp8", "auto", "FP8 weights, 16-bit KV cache: closest to the original"),
    "throughput": Preset("fp8", "fp8_e4m3", "FP8 weights and KV cache: most requests at once"),
    "edge": Preset("int4", "auto", "INT4 weights: smallest"),
    "research": Preset("none", "auto", "nothing quantized: the reference"),
}


def presets_help() -> str:
    """Two lines on every preset."""
    return "\n".join(
        f"  {name:<11} --quantization {p.quantization} --kv-cache-dtype {p.kv_cache_dtype}\n"
        f"  {'':<11} {p.purpose}"
        for name, p in PRESETS.items()
    )


def kv_formats(
    name: str,
    mode: str | None,
    skip_layers: Sequence[int],
    num_layers: int,
    model_dtype: DType,
    scales: KVScales | None,
) -> tuple[tuple[KVFormat, ...], StaticScales | None]:
    """KV cache format of every layer, and static scales where it needs them.

    Args:
      name: ``auto``, ``bf16``, ``fp8_e5m2``, ``fp8_e4m3``, ``int8`` or ``int4``. ``auto`` is what
        the checkpoint was calibrated for, or else the model's own type.
      mode: ``tracked``, ``dynamic`` or ``static``; None for ``static`` if the checkpoint has scales
        for this type, or else ``tracked``.
      skip_layers: Layers to keep in the model's own type; negative numbers count from the end.
      num_layers: Layers of the model.
      model_dtype: Type the model computes in.
      scales: Scales of the checkpoint, or None.

    Returns:
      ``(formats, static scales)``, what ``QuantizedKVCache.init`` takes.

    Raises:
      ValueError: If static scales are wanted and the checkpoint has none for this type, or a layer
        does not exist.
    """
    plain = parse_kv_format("auto", model_dtype=model_dtype)
    calibrated = None if scales is None else jnp.dtype(scales.dtype)
    if name == "auto" and scales is not None:
        chosen = KVFormat(scales.dtype, mode or "static")
    else:
        chosen = parse_kv_format(name, mode=mode or "tracked", model_dtype=model_dtype)
        if mode is None and chosen.quantized and calibrated == jnp.dtype(chosen.dtype):
            chosen = KVFormat(chosen.dtype, "static")
    if mode is not None and not chosen.quantized:
        raise ValueError(
            f"a KV cache in {chosen.dtype} has no scales, so the scale mode {mode!r} has no "
            "meaning; leave it out, or choose a quantized type"
        )
    if chosen.mode == "static" and (scales is None or calibrated != jnp.dtype(chosen.dtype)):
        found = "none" if scales is None else f"scales for {scales.dtype}"
        raise ValueError(
            f"static KV scales for {chosen.dtype} need a checkpoint calibrated for it; this one "
            f"has {found}. Use the scale mode 'tracked', which needs no calibration"
        )
    skipped = set()
    for layer in skip_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"KV layer {layer} does not exist; the model has layers 0 to {num_layers - 1}"
            )
        skipped.add(layer % num_layers)
    if skipped and not chosen.quantized:
        raise ValueError(
            f"KV layers {sorted(skipped)} are to be skipped, but a KV cache in {chosen.dtype} is "
            "not quantized in any layer; choose a quantized type, or skip none"
        )
    formats = tuple(plain if i in skipped else chosen for i in range(num_layers))
    if chosen.mode != "static" or scales is None:
        return formats, None
    pairs = zip(formats, scales.keys, scales.values, strict=True)
    return formats, tuple((k, v) if f.mode == "static" else None for f, k, v in pairs)


def parse_layers(text: str) -> list[int]:
    """Layer numbers from ``0,1,-1``.

    Raises:
      ValueError: If a part is no integer.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{text!r} is no list of layer numbers such as 0,1,-1") from None


def context_length(config: ModelConfig, jobs: Sequence[Job], asked: int | None) -> int:
    """``max_model_len`` for a set of jobs.

    Without an explicit length: the longest job rounded up to a power of two (128 at least), so that
    most sets of prompts share their shapes, but not more than the model was made for.
    ``SERVER_CONTEXT`` if there are no jobs.

    Args:
      config: The model.
      jobs: What will run; none for a server.
      asked: The length the user wants, or None.

    Raises:
      ValueError: If a job does not fit (names its place and both lengths), or the model was not
        made for ``asked`` tokens.
    """
    limit = config.max_position_embeddings
    if asked is not None and asked > limit:
        raise ValueError(
            f"max_model_len={asked} exceeds the {limit} positions the model was made for "
            "(max_position_embeddings)"
        )
    bound = limit if asked is None else asked
    for job in jobs:
        if job.request.total > bound:
            raise ValueError(
                f"{job.where}: the prompt has {len(job.request.prompt)} tokens, with "
                f"max_new_tokens={job.request.params.max_new_tokens} more than "
                f"max_model_len={bound}; nothing is cut off silently: shorten the prompt or "
                "lower max_new_tokens" + ("" if bound == limit else ", or raise max_model_len")
            )
    longest = max((job.request.total for job in jobs), default=SERVER_CONTEXT)
    return bound if asked is not None else min(limit, max(128, 1 << (longest - 1).bit_length()))
