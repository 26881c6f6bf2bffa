"""Learned rounding and scales: which way each weight is rounded, and each scale, by gradients.

With a kernel ``W``, scales ``s`` and zero points ``z``, a weight stands for

    a s clip(round(W / s + V), qmin - z, qmax - z),

``V`` per weight and ``a`` per tile being learned by gradient descent on the output error of a whole
decoder block (``qjax.calibrate``). Rounding passes gradients straight through, saturation stops
them, so ``V`` decides about rounding up or down and ``a`` about the range that is covered.

References:
  Nagel et al., AdaRound, arXiv:2004.10568; Cheng et al., AutoRound, arXiv:2309.05516; Shao et al.,
  OmniQuant, arXiv:2308.13137; Esser et al., LSQ, arXiv:1902.08153.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.quantize import encode, straight_through
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["position", "start", "step"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Grid:
    """What stays as it is while one kernel is learned.

    Attributes:
      position: float32 ``(k, n)``, weights in units of a code, 0 at the zero point.
      start: The quantized array that learning starts from.
      step: float32 ``(1, n)`` with ``scale_steps``: of which the scales of ``start`` are multiples.
    """

    position: Array
    start: QuantizedArray
    step: Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["offset", "stretch"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Rounding:
    """What is learned of one kernel.

    Attributes:
      offset: float32 ``(k, n)``, ``V``; None if only the scales are learned.
      stretch: float32 in the shape of the scales, ``a``. With ``scale_steps`` ``(1, n)``, for the
        steps: multiples stay as they are. From one to the next is a jump of at least 6 %, and
        gradients that pass as if it were none never lowered the error of a calibrated block.
    """

    offset: Array | None
    stretch: Array


def init_rounding(weight: Array | None, start: QuantizedArray) -> tuple[Grid, Rounding]:
    """Parameters to begin with.

    Args:
      weight: ``(k, n)`` kernel, to learn its rounding on the grid of ``start`` and the scales; None
        to keep the codes of ``start`` and learn its scales only.
      start: A quantized kernel.

    Returns:
      ``(grid, rounding)``: with a weight they stand for rounding it to nearest, without for
      ``start`` itself.

    Raises:
      ValueError: If shapes do not fit, or the format has no rounding to learn.
    """
    if start.ndim != 2 or start.perm is not None or start.global_scale is not None:
        raise ValueError("learning needs a matrix without permutation and global scale")
    step = None
    if start.fmt.scale_steps is not None:
        step, _ = numerics.find_scale_step(start.scale, start.fmt.scale_steps)
    stretch = jnp.ones((start.scale if step is None else step).shape, jnp.float32)
    if weight is None:
        code = start.qvalue.astype(jnp.float32) - _zero_point(start)
        return Grid(code, start, step), Rounding(None, stretch)
    if weight.shape != start.shape:
        raise ValueError(f"{weight.shape=} and a start of {start.shape} must be the same matrix")
    if start.fmt.is_float:
        raise ValueError(
            f"learned rounding is for integer formats, the codes of {start.fmt.name} are not "
            "equally spaced; use gptq"
        )
    position = weight.astype(jnp.float32) / _wide(start, start.scale)
    return Grid(position, start, step), Rounding(jnp.zeros(weight.shape, jnp.float32), stretch)


def rounded(grid: Grid, rounding: Rounding) -> Array:
    """float32 values ``(k, n)`` for a forward pass, with gradients to ``rounding``."""
    code = grid.position
    if rounding.offset is not None:
        fmt, zero = grid.start.fmt, _zero_point(grid.start)
        code = code + rounding.offset
        code = code + jax.lax.stop_gradient(jnp.rint(code) - code)
        # `where`: the gradient of clip is halved where a value is exactly the limit, as codes are.
        low, high = fmt.qmin - zero, fmt.qmax - zero
        code = jnp.where(code < low, low, jnp.where(code > high, high, code))
    return code * _wide(grid.start, _scale(grid, rounding))


@jax.jit
def finish_rounding(grid: Grid, rounding: Rounding) -> QuantizedArray:
    """What was learned, with the structure of the start."""
    start = grid.start
    scale = _scale(grid, rounding).astype(start.scale.dtype)
    if rounding.offset is None:
        return dataclasses.replace(start, scale=scale)
    code = jnp.rint(grid.position + rounding.offset) + _zero_point(start)
    code = encode(code, jnp.ones((1, 1), jnp.float32), None, start.fmt, (1, 1))
    return dataclasses.replace(start, qvalue=code, scale=scale)


def _scale(grid: Grid, rounding: Rounding) -> Array:
    """float32 scales as they will be stored; rounding them passes gradients."""
    start, step = grid.start, grid.step
    scale = start.scale.astype(jnp.float32) * rounding.stretch
    if step is not None:
        step = numerics.round_step(step * rounding.stretch)
    stored = numerics.fit_scale(scale, start.fmt, step).astype(jnp.float32)
    return straight_through(scale, stored)


def _zero_point(start: QuantizedArray) -> Array:
    if start.zero_point is None:
        return jnp.zeros((1, 1), jnp.float32)
    return _wide(start, start.zero_point)


def _wide(start: QuantizedArray, values: Array) -> Array:
    tiles = start.fmt.tiles(start.shape, 0)
    return numerics.expand_tiles(values.astype(jnp.float32), start.shape, tiles)
