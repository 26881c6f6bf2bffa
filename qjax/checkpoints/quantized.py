"""Finds the quantization config of a checkpoint and the reader which takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qjax.checkpoints.auto_round import auto_round_reader
from qjax.checkpoints.awq import AwqReader
from qjax.checkpoints.compressed_tensors import CompressedTensorsReader
from qjax.checkpoints.detect import config_from_tensors
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.fp8 import Fp8Reader
from qjax.checkpoints.gptq import GptqReader
from qjax.checkpoints.modelopt import ModeloptReader
from qjax.checkpoints.reader import CheckpointSource, QuantizedReader
from qjax.checkpoints.safetensors_io import TensorInfo, read_json

ReaderFactory = Callable[[CheckpointSource], QuantizedReader | None]

READERS: tuple[ReaderFactory, ...] = (
    AwqReader.from_source,
    GptqReader.from_source,
    auto_round_reader,
    CompressedTensorsReader.from_source,
    Fp8Reader.from_source,
    ModeloptReader.from_source,
)
"""Asked in order. Each returns None where the checkpoint is not of its format."""

# Where writers put it when not in config.json. hf_quant_config.json (modelopt) wraps it in one more
# object, which is for its reader to open.
_CONFIG_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# Tensors that no plain checkpoint has, and whose they probably are: one of these without a
# quantization config, and with shapes that do not tell one, stops the load. Nothing is guessed.
_TRACES = {
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "HF fp8",
    ".g_idx": "GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".weight_scale": "fp8, compressed-tensors or modelopt",
    "_blocks": "MXFP4",
    "_scales": "MXFP4",
}


def find_reader(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> QuantizedReader | None:
    """The reader of a checkpoint's quantization format; None if the checkpoint is not quantized.

    Args:
      folder: Where the checkpoint lies.
      config: Its config.json.
      tensors: Headers of all tensors.

    Raises:
      CheckpointError: If it is quantized and no reader takes it, or a reader refuses an option.
    """
    quantization, file = quantization_config(folder, config)
    if not quantization:
        quantization, file = config_from_tensors(tensors), "(config told by the tensors)"
    if not quantization:
        _refuse_traces(folder, tensors)
        return None
    source = CheckpointSource(str(folder), config, quantization, file, tensors)
    for factory in READERS:
        reader = factory(source)
        if reader is not None:
            return reader
    method = quantization.get("quant_method") or quantization.get("quant_algo") or "(not named)"
    raise CheckpointError(
        f"{folder / file}: quantization method {method!r} is not supported; load the unquantized "
        "checkpoint and quantize it here instead"
    )


def quantization_config(
    folder: Path, config: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, str]:
    """The quantization config of a folder and the name of the file that holds it.

    Returns:
      ``(config, file)``; config is None if there is none.

    Raises:
      CheckpointError: If it is not an object.
    """
    quantization, file = config.get("quantization_config"), "config.json"
    if quantization is None:
        # The name compressed-tensors used in 2024.
        quantization = config.get("compression_config")
    if quantization is None:
        for name in _CONFIG_FILES:
            if (folder / name).exists():
                quantization, file = read_json(folder / name), name
                break
    if quantization is not None and not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"{folder / file}: the quantization config must be an object, it is {quantization!r}"
        )
    return quantization, file


def _refuse_traces(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for suffix, method in _TRACES.items():
        for name, info in tensors.items():
            if name.endswith(suffix):
                raise CheckpointError(
                    f"{folder} holds quantized tensors ({name}, {info.dtype} {info.shape}; {method}"
                    " by its name) but no quantization config, and their shapes do not tell one; "
                    "looked for quantization_config in "
                    f"config.json and for {', '.join(_CONFIG_FILES)}"
                )
    for name, info in tensors.items():
        if info.dtype.startswith("F8_"):
            raise CheckpointError(
                f"{folder}: {name} is {info.dtype} and there is neither a scale nor a "
                "quantization config; it cannot be told what the codes stand for"
            )
