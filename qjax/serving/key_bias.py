"""Which layers keep the bias of their keys out of a quantized cache, decided from the weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qjax.checkpoints.reader import KVScales
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.ops.packed import PackedWeight
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array, Params

THRESHOLD = 6.0
"""Largest bias over the largest spread (standard deviation) of a feature in the same head, from
which a bias is left out. A token's own part reaches about three times its spread, so at this ratio
the bias triples the scale; leaving out less would make attention dearer for little."""


@dataclasses.dataclass(frozen=True)
class OutlierBias:
    """A layer with a large key bias.

    Attributes:
      layer: Its index.
      largest: Largest magnitude of the bias.
      ratio: Largest ratio, over its heads, to the spread of what the bias is added to.
    """

    layer: int
    largest: float
    ratio: float


def outlier_biases(params: Params, config: ModelConfig) -> list[OutlierBias]:
    """Layers whose key bias dwarfs the keys themselves.

    The spread of a feature is estimated from the weights alone, for independent inputs of unit
    mean square in front of the norm weights: ``sqrt(sum_i (g_i W_ij)^2)``.

    Args:
      params: Parameters of a ``Decoder``; kernels may be quantized or packed.
      config: The model.

    Returns:
      The layers, in order; none where keys have no bias, or are normalised after it.
    """
    if not config.attention_bias or config.qk_norm:
        return []
    found = []
    for layer in range(config.num_layers):
        block = params["model"][f"layers_{layer}"]
        projection = block["self_attn"]["k_proj"]
        kernel = projection["kernel"]
        if isinstance(kernel, PackedWeight):
            kernel = kernel.unpack()
        largest, ratio = _magnitudes(
            kernel, projection["bias"], block["input_layernorm"]["weight"], config.num_kv_heads
        )
        if ratio >= THRESHOLD:
            found.append(OutlierBias(layer, float(largest), float(ratio)))
    return found


@functools.partial(jax.jit, static_argnums=3)
def _magnitudes(
    kernel: Array | QuantizedArray, bias: Array, gain: Array, heads: int
) -> tuple[Array, Array]:
    if isinstance(kernel, QuantizedArray):
        kernel = kernel.dequantize(jnp.float32)
    weight = kernel.astype(jnp.float32) * gain.astype(jnp.float32)[:, None]
    spread = jnp.sqrt(jnp.sum(weight * weight, axis=0)).reshape(heads, -1).max(axis=1)
    largest = jnp.abs(bias.astype(jnp.float32)).reshape(heads, -1).max(axis=1)
    return largest.max(), jnp.max(largest / jnp.maximum(spread, jnp.finfo(jnp.float32).tiny))


def leave_out_biases(
    formats: Sequence[KVFormat],
    params: Params,
    config: ModelConfig,
    scales: KVScales | None = None,
) -> tuple[tuple[KVFormat, ...], list[OutlierBias]]:
    """Formats of the KV cache that keep outlier key biases out of it.

    Args:
      formats: One per layer.
      params: See ``outlier_biases``.
      config: The model.
      scales: Where static scales come from. Scales measured with the bias serve keys without it,
        but not the other way round.

    Returns:
      The formats, changed in quantized layers with an outlier bias, and what was found there.

    Raises:
      ValueError: If static scales were measured without a bias that is no outlier here.
    """
    found = []
    if any(f.quantized for f in formats):
        found = [b for b in outlier_biases(params, config) if formats[b.layer].quantized]
    layers = {b.layer for b in found}
    for layer in () if scales is None else scales.without_key_bias:
        if formats[layer].mode == "static" and layer not in layers:
            raise ValueError(
                f"layer {layer}: the static key scales were measured on keys without their bias, "
                "which is no outlier with these weights and stays in the cache; measure them again"
            )
    chosen = (
        dataclasses.replace(f, without_key_bias=True) if i in layers else f
        for i, f in enumerate(formats)
    )
    return tuple(chosen), found


def describe(found: Sequence[OutlierBias]) -> str:
    """One line on what was left out."""
    layers = ", ".join(str(b.layer) for b in found)
    return (
        f"key biases kept apart from the quantized cache in layer{'s' * (len(found) > 1)} {layers}"
        f": up to {max(b.largest for b in found):.4g}, {max(b.ratio for b in found):.0f} times the "
        "spread of the keys"
    )
