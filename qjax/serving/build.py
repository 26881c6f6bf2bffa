"""From a checkpoint folder and a user's choices to a running engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax

from qjax.checkpoints.hf import check_cuts, load_model
from qjax.checkpoints.layout import HEAD, head_rules
from qjax.checkpoints.reader import KVScales
from qjax.formats import parse_format
from qjax.kv_format import parse_kv_format
from qjax.models.config import ModelConfig
from qjax.models.sharding import check_tensor_parallel, tensor_parallel_mesh
from qjax.serving.engine import Engine, EngineConfig
from qjax.serving.key_bias import describe, leave_out_biases
from qjax.serving.settings import kv_formats, parse_layers
from qjax.serving.weights import prepare_weights


@dataclasses.dataclass(frozen=True)
class ModelChoices:
    """What a user may choose about a model; results depend on all of it.

    Attributes:
      quantization: Weight format by its command-line name.
      lm_head_format: That of the output projection, which the other does not touch.
      skip_layers: Regular expression on parameter paths to leave unquantized, or None.
      dtype: Compute type, or ``auto`` for the checkpoint's.
      kv_cache_dtype: See ``kv_formats``.
      kv_scale_mode: See ``kv_formats``.
      kv_skip_layers: Layers with an unquantized KV cache, such as ``0,1,-1``.
      tp_size: Devices over which every layer is cut.
    """

    quantization: str = "none"
    lm_head_format: str = "none"
    skip_layers: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_scale_mode: str | None = None
    kv_skip_layers: str = ""
    tp_size: int = 1


def static_kv_dtype(choices: ModelChoices, given: KVScales | None) -> str | None:
    """Type to calibrate static KV cache scales for; None if none are asked for, or are given."""
    if choices.kv_scale_mode != "static" or given is not None:
        return None
    chosen = parse_kv_format(choices.kv_cache_dtype, mode="static", model_dtype="bfloat16")
    return chosen.dtype if chosen.quantized else None


def engine_config(
    max_model_len: int,
    page_size: int,
    *,
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
    chunked_prefill_size: int | None = None,
    prefix_cache: bool = True,
    kv_counters: bool | None = None,
) -> EngineConfig:
    """Sizes of an engine; None for what suits the default device.

    Args:
      max_model_len: Longest prompt plus continuation.
      page_size: Tokens per KV cache page.
      max_running_requests: Slots; 8 on CPU, 32 on GPU.
      max_total_tokens: Tokens in the whole KV cache; all slots at their longest.
      chunked_prefill_size: Prompt tokens per pass; 256 on CPU, 2048 on GPU.
      prefix_cache: Share pages of prompts that begin alike.
      kv_counters: Count what the KV cache loses; None does on CPUs, where it costs nothing much.

    Raises:
      ValueError: If a size is out of range.
    """
    on_gpu = jax.devices()[0].platform == "gpu"
    if max_running_requests is None:
        max_running_requests = 32 if on_gpu else 8
    if chunked_prefill_size is None:
        chunked_prefill_size = 2048 if on_gpu else 256
    if max_total_tokens is not None and max_total_tokens < max_model_len:
        raise ValueError(
            f"max_total_tokens={max_total_tokens} must hold one longest request of "
            f"max_model_len={max_model_len} tokens"
        )
    pages = None if max_total_tokens is None else -(-max_total_tokens // page_size)
    return EngineConfig(
        max_running_requests=max_running_requests,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=pages,
        chunked_prefill_size=chunked_prefill_size,
        prefix_cache=prefix_cache,
        kv_counters=not on_gpu if kv_counters is None else kv_counters,
    )


def check_model(config: ModelConfig, choices: ModelChoices) -> None:
    """Find out before weights are read, or calibrated, whether choices fit a model.

    Args:
      config: The model.
      choices: With the weight format of a calibration in place of the calibration's name.

    Raises:
      ValueError: If there are fewer devices, heads or widths do not divide, or a format has groups
        that would be cut; if there is no ``lm_head`` to quantize, or it is to be skipped as well.
        Stored formats are checked as their layers are read.
    """
    fmt, skip = parse_format(choices.quantization), choices.skip_layers
    rules = head_rules(config, parse_format(choices.lm_head_format))
    if rules is not None and skip is not None:
        if fmt is None:
            raise ValueError(
                f"{skip=} without a quantization leaves nothing to skip, lm_head has its own "
                "format; leave it out"
            )
        if _matches(skip, HEAD):
            raise ValueError(
                f"{skip=} matches {HEAD}, which is to be quantized to {choices.lm_head_format}; "
                "leave one of them out"
            )
    devices = tensor_parallel_mesh(choices.tp_size).size
    check_tensor_parallel(config, devices)
    if devices > 1:
        check_cuts(config, devices, fmt, skip, rules)


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False  # the loader says what is wrong with it


def build_engine(
    folder: Path,
    choices: ModelChoices,
    config: EngineConfig,
    *,
    kv_scales: KVScales | None = None,
    progress: bool = True,
    on_compile: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[Engine, str, str]:
    """Load a model and make an engine for it.

    Args:
      folder: Checkpoint folder.
      choices: Formats and types.
      config: Sizes.
      kv_scales: Static KV cache scales to use instead of the checkpoint's.
      progress: Show a progress bar while weights load.
      on_compile: See ``Engine``.
      on_note: Called with a line on what was decided from the weights.

    Returns:
      The engine, and the names of its weight and KV cache formats.

    Raises:
      ValueError: If the choices do not fit the checkpoint or the devices, or it is damaged.
    """
    mesh = tensor_parallel_mesh(choices.tp_size) if choices.tp_size != 1 else None
    head = parse_format(choices.lm_head_format)
    model = load_model(
        folder,
        quantization=parse_format(choices.quantization),
        skip=choices.skip_layers,
        rules=None if head is None else head_rules(ModelConfig.from_hf(folder), head),
        dtype=None if choices.dtype == "auto" else choices.dtype,
        progress=progress,
        mesh=mesh,
    )
    given = model.kv_scales if kv_scales is None else kv_scales
    formats, scales = kv_formats(
        choices.kv_cache_dtype,
        choices.kv_scale_mode,
        parse_layers(choices.kv_skip_layers),
        model.config.num_layers,
        model.module.dtype,
        given,
    )
    formats, biases = leave_out_biases(formats, model.params, model.config, given)
    if biases and on_note is not None:
        on_note(describe(biases))
    params, note = prepare_weights(model.params, model.module.dtype, mesh=mesh)
    if on_note is not None and jax.devices()[0].platform == "gpu":
        on_note(note)
        if jax.device_count() > choices.tp_size:
            on_note(
                f"{choices.tp_size} of {jax.device_count()} GPUs used; --tp-size cuts the model "
                "over more"
            )
    engine = Engine(
        model.module,
        params,
        config,
        formats,
        static_scales=scales,
        on_compile=on_compile,
        mesh=mesh,
    )
    names = dict.fromkeys(f.name for f in formats)
    weights = model.method or choices.quantization
    if head is not None:
        weights += f", lm_head {choices.lm_head_format}"
    return engine, weights, " and ".join(names)
