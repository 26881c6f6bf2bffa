"""Writes AutoAWQ checkpoints in the "gemm" layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.awq import GEMM, AwqConfig, layer_shapes, pack_layer
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.gptq_writer import unwritable_reason
from qjax.checkpoints.writer import Linears, TensorSpec
from qjax.quantized_array import QuantizedArray


class AwqWriter:
    """Writer of one AutoAWQ checkpoint.

    Symmetric weights are written with ``zero_point: false`` and with zero points of 8 all the same,
    because most kernels read them without looking at the config.

    Args:
      linears: All linear layers. The format has one group size and one kind of zero point for all.

    Raises:
      CheckpointError: If a layer cannot be stored; names it and the reason.
    """

    def __init__(self, linears: Linears):
        if linears.kv_scales is not None:
            raise CheckpointError(
                "awq has no place for KV cache scales; use compressed-tensors, or leave them out"
            )
        first_layer, first = next(iter(linears.quantized.items()))
        self._config = AwqConfig(
            version=GEMM,
            group_size=first.fmt.group_size,
            zero_point=not first.fmt.symmetric,
            excluded=tuple(linears.plain),
        )
        for layer, q in linears.quantized.items():
            reason = unwritable_reason(q)
            if reason is None and q.fmt.bits != 4:
                reason = f"its codes have {q.fmt.bits} bits, not 4"
            if reason is None and q.perm is not None:
                reason = "its rows are in activation order; use gptq"
            if reason is None and layer == "lm_head":
                reason = "engines take lm_head for unquantized; leave it so"
            if reason is None and (q.fmt.group_size, q.fmt.symmetric) != (
                first.fmt.group_size,
                first.fmt.symmetric,
            ):
                reason = f"it is {q.fmt.name} and {first_layer} is {first.fmt.name}; use gptq"
            if reason is None and self._config.excludes(layer):
                reason = (
                    "its name contains that of a layer which is not quantized, and engines "
                    f"exclude by substring: {[e for e in self._config.excluded if e in layer]}"
                )
            if reason is not None:
                raise CheckpointError(f"awq cannot store {layer}: {reason}")
            layer_shapes(self._config, (q.shape[0], q.shape[1]), layer)

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        group_size = self._config.group_size
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1 if group_size is None else group_size,
            "zero_point": self._config.zero_point,
            "version": self._config.version,
            "modules_to_not_convert": list(self._config.excluded) or None,
        }

    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """None: engines read config.json."""
        return {}

    def layout(self, layer: str, q: QuantizedArray) -> Mapping[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors."""
        shapes = layer_shapes(self._config, (q.shape[0], q.shape[1]), layer)
        scale = np.dtype(q.scale.dtype)
        return {
            f"{layer}.{suffix}": TensorSpec(scale if suffix == "scales" else np.dtype("i4"), shape)
            for suffix, shape in shapes.items()
        }

    def tensors(self, layer: str, q: QuantizedArray) -> Mapping[str, np.ndarray]:
        """The tensors of one layer."""
        return {f"{layer}.{suffix}": tensor for suffix, tensor in pack_layer(q).items()}

    def extra(self) -> Mapping[str, np.ndarray]:
        """Nothing else."""
        return {}
