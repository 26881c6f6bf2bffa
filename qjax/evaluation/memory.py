"""Bytes of weights and KV cache, of loaded models and of a ``config.json`` without any weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.layout import HEAD, head_rules, model_leaves
from qjax.formats import QuantFormat
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.quantize import is_quantized, quantize, quantized_nbytes
from qjax.quantized_array import QuantizedArray, packed_nbytes
from qjax.typing import DType, PyTree

LINEAR_KERNELS = r"model/layers_\d+/.*/kernel"
"""Parameter paths of what a weight format applies to: every linear layer but ``lm_head``, which has
a format of its own."""


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Where the bytes of a parameter tree are.

    Attributes:
      codes: Quantized values.
      scales: Scales, zero points, permutations and global scales that belong to them.
      plain: Everything that is not quantized: embedding, head, norms, biases.
      linear_elements: Number of values in quantized matrices.
      elements: Number of all values.
    """

    codes: int
    scales: int
    plain: int
    linear_elements: int
    elements: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.scales + self.plain

    @property
    def bits_per_weight(self) -> float:
        """Bits per value over the whole tree."""
        return 8 * self.total / self.elements


def weight_bytes(params: PyTree) -> WeightBytes:
    """Bytes of a parameter tree of arrays or abstract values, sub-byte types packed."""
    codes = scales = plain = linear = elements = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_quantized):
        if isinstance(leaf, QuantizedArray):
            packed = packed_nbytes(leaf.qvalue.shape, leaf.qvalue.dtype)
            codes += packed
            scales += quantized_nbytes(leaf) - packed
            linear += leaf.size
        else:
            plain += quantized_nbytes(leaf)
        elements += math.prod(np.shape(leaf))
    return WeightBytes(codes, scales, plain, linear, elements)


def abstract_params(
    config: ModelConfig,
    fmt: QuantFormat | None,
    *,
    head: QuantFormat | None = None,
    dtype: DType = jnp.bfloat16,
) -> dict[str, Any]:
    """The parameters a model would have, as shapes and types: no weights and no memory needed.

    Args:
      config: The model.
      fmt: Format of the linear layers but ``lm_head``; None leaves them in ``dtype``.
      head: Format of ``lm_head``, likewise.
      dtype: Type of what is not quantized; norm weights are float32, as they are when loaded.

    Returns:
      ``{path: ShapeDtypeStruct}``, with ``QuantizedArray`` of such for what is quantized.

    Raises:
      ValueError: If there is a format for ``lm_head`` and the model has none of its own.
    """
    head_rules(config, head)
    params: dict[str, Any] = {}
    # Layers are alike, and tracing eighty of them takes seconds.
    one_layer = dataclasses.replace(config, num_layers=1, layer_windows=())
    for leaf in model_leaves(one_layer):
        value: Any = jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if leaf.is_norm else dtype)
        chosen = head if leaf.path == HEAD else fmt
        if chosen is not None and (leaf.path == HEAD or re.fullmatch(LINEAR_KERNELS, leaf.path)):
            value = _abstract_quantize(leaf.shape, jnp.dtype(dtype), chosen)
        copies = config.num_layers if "/layers_0/" in leaf.path else 1
        for i in range(copies):
            params[leaf.path.replace("/layers_0/", f"/layers_{i}/")] = value
    return params


@functools.cache
def _abstract_quantize(shape: tuple[int, ...], dtype: DType, fmt: QuantFormat) -> Any:
    return jax.eval_shape(lambda w: quantize(w, fmt), jax.ShapeDtypeStruct(shape, dtype))


def kv_bytes_per_token(config: ModelConfig, fmt: KVFormat | Sequence[KVFormat]) -> int:
    """Bytes one token takes in the KV cache over all layers, with the scales stored beside it."""
    formats = [fmt] * config.num_layers if isinstance(fmt, KVFormat) else fmt
    if len(formats) != config.num_layers:
        raise ValueError(f"{len(formats)} formats for {config.num_layers} layers")
    per_head = [config.head_dim * f.bits // 8 + 4 * f.stores_scales for f in formats]
    return 2 * config.num_kv_heads * sum(per_head)
