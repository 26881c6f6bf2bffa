"""Finds the quantization config of a checkpoint and the reader which takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import CheckpointSource, QuantizedReader
from qjax.checkpoints.safetensors_io import TensorInfo, read_json

ReaderFactory = Callable[[CheckpointSource], QuantizedReader | None]

READERS: tuple[ReaderFactory, ...] = ()
"""Asked in order. Each returns None where the checkpoint is not of its format."""

# Where writers put it when not in config.json. hf_quant_config.json (modelopt) wraps it in one more
# object, which is for its reader to open.
_CONFIG_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# Tensors that no plain checkpoint has: one of these without a quantization config stops the load.
_QUANTIZED_SUFFIXES = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    "_blocks",
    "_scales",
)


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
    quantization, file = _quantization_config(folder, config)
    if not quantization:
        for name, info in tensors.items():
            if name.endswith(_QUANTIZED_SUFFIXES) or info.dtype.startswith("F8_"):
                raise CheckpointError(
                    f"{folder} holds quantized tensors ({name}, {info.dtype} {info.shape}) but no "
                    "quantization config; looked for quantization_config in config.json and for "
                    f"{', '.join(_CONFIG_FILES)}"
                )
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


def _quantization_config(
    folder: Path, config: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, str]:
    quantization, file = config.get("quantization_config"), "config.json"
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
