"""Quantization-aware training: the forward pass sees the weights as they will be quantized."""

from __future__ import annotations

import re
from typing import Any

import jax

from qjax.evaluation.memory import LINEAR_KERNELS
from qjax.formats import QuantFormat
from qjax.quantize import fake_quantize, path_string
from qjax.typing import PyTree


def fake_quantized(params: PyTree, fmt: QuantFormat) -> PyTree:
    """Parameters with the kernels of all linear layers but ``lm_head`` on the format's grid.

    Differentiable: gradients pass the rounding as if it were not there (straight-through), so the
    full-precision kernels are trained to be good after rounding. Quantize them with the same format
    when the training is over.

    Args:
      params: Unquantized parameters.
      fmt: Weight format; scales are computed anew from the kernels at every step.

    Returns:
      The tree, same shapes and dtypes.

    Raises:
      ValueError: If the format also quantizes activations, which this does not simulate.
    """
    if fmt.activation is not None:
        raise ValueError(
            f"{fmt.name} quantizes activations too, which training does not simulate; train with "
            "the weight format alone, and use the activation format when serving"
        )

    def leaf(path: Any, value: jax.Array) -> jax.Array:
        if not re.fullmatch(LINEAR_KERNELS, path_string(path)):
            return value
        return fake_quantize(value, fmt)

    return jax.tree_util.tree_map_with_path(leaf, params)
