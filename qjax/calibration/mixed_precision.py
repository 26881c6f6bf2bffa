"""Mixed precision: which format each layer gets, so that the bytes are spent where they help."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.scale_search import search_scale
from qjax.calibration.stats import HessianStats, quadratic
from qjax.formats import QuantFormat
from qjax.quantize import quantize
from qjax.typing import Array


def stored_bits(shape: tuple[int, int], fmt: QuantFormat) -> int:
    """Bits of a kernel in a checkpoint: codes at their own width, scales and zero points."""
    tiles = fmt.tiles(shape, 0)
    scales = math.prod(-(-size // tile) for size, tile in zip(shape, tiles, strict=True))
    per_scale = jnp.dtype(fmt.scale_dtype).itemsize * 8 + (0 if fmt.symmetric else fmt.bits)
    return math.prod(shape) * fmt.bits + scales * per_scale


@functools.partial(jax.jit, static_argnames=("fmt",))
def sensitivity(weight: Array, stats: HessianStats, fmt: QuantFormat) -> Array:
    """Squared relative output error of a kernel in a format, with searched scales.

    Args:
      weight: ``(k, n)``.
      stats: Statistics of its inputs.
      fmt: The format.

    Returns:
      float32 scalar, ``|X W - X W_q|^2 / |X W|^2``.
    """
    w = weight.astype(jnp.float32)
    scale, zero_point = search_scale(w, jnp.diagonal(stats.hessian), fmt)
    value = quantize(w, fmt, scale=scale, zero_point=zero_point).dequantize()
    size = quadratic(w, stats.hessian)
    return quadratic(w - value, stats.hessian) / jnp.where(size > 0, size, jnp.float32(1))


def choose_formats(errors: np.ndarray, bits: np.ndarray, budget: int) -> np.ndarray:
    """The candidate of each layer with the least sum of errors within a budget.

    Every layer starts at its cheapest candidate; then the step with the largest fall of error per
    bit is taken as long as one fits. Steps run along the lower convex hull of each layer's
    candidates, for which this is optimal up to the last step.

    Args:
      errors: ``(layers, candidates)``.
      bits: ``(layers, candidates)``, integers.
      budget: Largest sum of bits.

    Returns:
      int ``(layers,)``: indices of candidates.

    Raises:
      ValueError: If even the cheapest candidates exceed the budget.
    """
    layers = np.arange(len(errors))
    chosen = np.lexsort((errors, bits), axis=1)[:, 0]
    spent = int(bits[layers, chosen].sum())
    if spent > budget:
        raise ValueError(
            f"the cheapest formats take {spent} bits and the budget is {budget}; add a smaller "
            "candidate or raise the target"
        )
    while True:
        extra = bits - bits[layers, chosen][:, None]
        gain = errors[layers, chosen][:, None] - errors
        usable = (extra > 0) & (gain > 0) & (extra <= budget - spent)
        if not usable.any():
            return chosen
        rate = np.where(usable, gain / np.where(extra > 0, extra, 1), -1.0)
        layer, candidate = np.unravel_index(int(np.argmax(rate)), rate.shape)
        spent += int(extra[layer, candidate])
        chosen[layer] = candidate
