"""What a reader of one on-disk quantization format must offer to the loader.

A reader turns the tensors of one linear layer, exactly as they lie in the checkpoint, into one
``QuantizedArray`` of the kernel's shape ``(K, N)`` = (in features, out features). Stored integers
and scales are kept unchanged. It is built once per checkpoint from the headers alone (no weight is
touched), so every refusal comes before weight work:

    reader = AwqReader.from_source(source)   # None: not my format; CheckpointError: unsupported
    reader.is_quantized(layer)               # False: the loader reads a plain `weight`
    reader.expected(layer, (K, N))           # the loader compares these with the headers
    reader.read(layer, get, (K, N), dtype)   # one layer at a time; nothing is kept afterwards

Biases, norms, embeddings and layers which are not quantized belong to the loader.
``qjax.checkpoints.quantized`` holds the explicit list of readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qjax.checkpoints.safetensors_io import TensorInfo
from qjax.quantized_array import QuantizedArray

GetTensor = Callable[[str], np.ndarray]
"""Name -> read-only memory-mapped array. bf16 and fp8 arrive as their ml_dtypes types."""


@dataclass(frozen=True)
class CheckpointSource:
    """All that may be known about a checkpoint before its weights are read."""

    location: str
    """Folder, for messages."""
    config: Mapping[str, Any]
    """The whole config.json."""
    quantization: Mapping[str, Any]
    """The quantization config, from whichever file holds it; never empty."""
    quantization_file: str
    """Its file name: ``"config.json"``, ``"hf_quant_config.json"``, ... For messages."""
    tensors: Mapping[str, TensorInfo]
    """Every tensor of every shard: safetensors dtype name and shape."""


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a layer must have: the loader compares it with the header."""

    shape: tuple[int, ...] | None
    """Exact shape, or None where any shape is legal."""
    dtypes: tuple[str, ...]
    """Legal safetensors dtype names, such as ``("F16", "BF16")``."""


@dataclass(frozen=True)
class KVScales:
    """Static scales of the KV cache: ``key ~= stored * keys[layer]`` per head.

    ``keys`` and ``values`` hold one float32 array of shape ``(num_kv_heads,)`` per layer; a per
    tensor scale is repeated over the heads. ``dtype`` names the format they were calibrated for,
    such as ``"float8_e4m3fn"``. ``without_key_bias`` lists layers whose key scales were measured on
    keys without the bias of their projection, and are too small for keys with it.
    """

    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    dtype: str
    without_key_bias: tuple[int, ...] = ()


class QuantizedReader(Protocol):
    """One on-disk quantization format, bound to one checkpoint."""

    @property
    def name(self) -> str:
        """Method and variant, for the log and for messages: ``"gptq 4 bit g128 (v1)"``."""
        ...

    def is_quantized(self, layer: str) -> bool:
        """Whether a layer, such as ``"model.layers.0.self_attn.q_proj"``, is quantized."""
        ...

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        """Full names of the tensors which ``read`` will ask for, with what they must look like.

        Raises:
          CheckpointError: If a layer of this shape ``(K, N)`` cannot be stored in the format.
        """
        ...

    def read(
        self, layer: str, get: GetTensor, shape: tuple[int, int], dtype: Any
    ) -> QuantizedArray:
        """Convert one layer. ``dtype`` is what ``dequantize`` of the result shall give."""
        ...

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        """Names that belong to the KV cache, so that they do not count as extra tensors."""
        ...

    def kv_scales(self, get: GetTensor, num_layers: int, num_kv_heads: int) -> KVScales | None:
        """Static KV cache scales, or None where the checkpoint has none."""
        ...
