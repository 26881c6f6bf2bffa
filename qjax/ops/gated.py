"""``gated_dot``: the first half of a gated MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.ops._dispatch import choose_backend
from qjax.ops.activations import QuantizedActivation
from qjax.ops.dot import quantized_dot
from qjax.ops.packed import (
    PackedWeight,
    packed_config,
    packed_dot,
    packed_problem,
    packed_unsupported_reason,
)
from qjax.pallas_kernels import weight_only, weight_only_large
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array, DType


def gated_dot(
    x: Array | QuantizedActivation,
    w: Array | QuantizedArray | PackedWeight,
    *,
    out_dtype: DType | None = None,
    backend: str | None = None,
) -> Array:
    """``silu(x @ gate) * (x @ up)`` for gate and up side by side in one weight.

    Both products are rounded to the type of the result before the rest. For few rows and a weight
    packed with ``alternating=True`` one kernel does it all, which spares their way through memory.

    Args:
      x: Activations ``(..., k)``, as for ``quantized_dot``.
      w: Weight ``(k, 2 * f)``, gate left and up right, plain, quantized or packed.
      out_dtype: Result type; ``x.dtype`` by default.
      backend: As for ``quantized_dot``.

    Returns:
      ``(..., f)`` in ``out_dtype``.

    Raises:
      ValueError, NotImplementedError: As ``quantized_dot``.

    References:
      SwiGLU: Shazeer, GLU variants improve transformer (arXiv:2002.05202).
    """
    codes = isinstance(x, QuantizedActivation)
    if not codes and isinstance(w, PackedWeight) and w.alternating and x.shape[-1] == w.shape[0]:
        chosen = choose_backend("gated_dot", backend, packed_unsupported_reason(x, w))
        if (
            chosen == "mosaic_gpu"
            and (config := gated_config(x, w, out_dtype=out_dtype)) is not None
        ):
            return packed_dot(x, w, out_dtype=out_dtype, config=config, gated=True)
    product = quantized_dot(x, w, out_dtype=out_dtype, backend=backend)
    gate, up = jnp.split(product, 2, axis=-1)
    return jax.nn.silu(gate) * up


def gated_config(
    x: Array, w: PackedWeight, *, out_dtype: DType | None = None
) -> weight_only.Config | weight_only_large.Config | None:
    """The config of ``gated_dot`` by one kernel; None where two are needed, or better.

    Args:
      x: Activations that the kernels take.
      w: Packed weight.
      out_dtype: Result type; ``x.dtype`` by default.
    """
    if not w.alternating:
        return None
    # That of the product alone, which may have been measured.
    config, _ = packed_config(x, w, out_dtype=out_dtype)
    return gated_form(packed_problem(x, w, out_dtype=out_dtype), config)


def gated_form(
    problem: weight_only.Problem, config: Any
) -> weight_only.Config | weight_only_large.Config | None:
    """What a product's config becomes where the product is gated; None where it cannot be.

    Args:
      problem: The product alone.
      config: Its config, of any kernel.
    """
    problem = dataclasses.replace(problem, gated=True)
    large = isinstance(config, weight_only_large.Config)
    kernel: Any = weight_only_large if large else weight_only
    if (
        not isinstance(config, kernel.Config)
        or kernel.unsupported_reason(problem) is not None
        or config.splits > 1
    ):
        # Sums of splits must be added before they are gated; dequantized weights have no such end.
        return None
    if large and config.turns == "finished":
        # Warpgroups that wait for each other at this end, too, are slower than without turns.
        config = dataclasses.replace(config, turns=None)
    if kernel.config_unsupported_reason(config, problem) is None:
        return config
    return kernel.heuristic_config(problem)
