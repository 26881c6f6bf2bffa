"""Scales as they lie in checkpoints: their types, shapes and what makes one unusable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import GetTensor
from qjax.checkpoints.safetensors_io import TensorInfo
from qjax.formats import QuantFormat
from qjax.numerics import find_scale_step

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""Headers of ordinary scales."""

_NAMES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "float8_e8m0fnu",  # MX scales are often stored as the bytes of their exponents
}


def scale_dtype(name: str, tensors: Mapping[str, TensorInfo], legal: tuple[str, ...]) -> str:
    """``QuantFormat.scale_dtype`` of a stored scale.

    Raises:
      CheckpointError: If there is no such tensor, or its type is not one of ``legal``.
    """
    info = tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"tensor {name} is missing: a quantized weight without its scale cannot be used; "
            "download the checkpoint again"
        )
    if info.dtype not in legal:
        raise CheckpointError(f"{name} is {info.dtype}, a scale here is {' or '.join(legal)}")
    return _NAMES[info.dtype]


def kernel_scale(
    name: str, array: np.ndarray, counts: tuple[int, int], *, check: bool = True
) -> np.ndarray:
    """A weight scale in kernel layout.

    Args:
      name: Tensor name, for messages.
      array: As stored: ``(N tiles, K tiles)``, or without the axes of one tile.
      counts: ``(N tiles, K tiles)`` it must have.
      check: Look for NaN and infinity as well.

    Returns:
      ``(K tiles, N tiles)``, a view; exponent bytes as ``float8_e8m0fnu``.

    Raises:
      CheckpointError: If the number of scales is wrong or one is not finite.
    """
    if array.size != counts[0] * counts[1]:
        raise CheckpointError(
            f"{name} of shape {array.shape} holds {array.size} scales; this layer needs "
            f"{counts[0]} x {counts[1]}"
        )
    if array.dtype == np.uint8:
        array = array.view(ml_dtypes.float8_e8m0fnu)
    if check and not np.isfinite(array.astype(np.float32)).all():
        raise CheckpointError(f"{name} holds scales that are not finite; the file is damaged")
    return array.reshape(counts).T


def with_scale_steps(fmt: QuantFormat, scale: np.ndarray) -> QuantFormat:
    """The format with ``scale_steps``, which no foreign config names, if its scales have them.

    Only for weights that meet int8 activations: the others have no use for steps.

    Args:
      fmt: The format as the config and the type of the scales say.
      scale: ``(K tiles, N tiles)``.
    """
    int8 = fmt.activation is not None and fmt.activation.qtype == "int8"
    if not (int8 and fmt.is_int and fmt.bits <= 4 and fmt.symmetric and fmt.group_size):
        return fmt
    if fmt.scale_dtype != "float32":
        return fmt
    steps = 2 ** (8 - fmt.bits)
    _, exact = find_scale_step(jnp.asarray(scale), steps)
    return fmt.replace(scale_steps=steps) if bool(exact.all()) else fmt


def scalar(name: str, get: GetTensor) -> np.ndarray:
    """A positive scale of a whole tensor, float32 of shape ``()``.

    Raises:
      CheckpointError: If it is not one number, not finite or not positive. (Engines write -1 for
        "not calibrated"; taking 1.0 instead would be a guess.)
    """
    array = get(name)
    if array.size != 1:
        raise CheckpointError(f"{name} has shape {array.shape}, it must hold one number")
    value = array.reshape(()).astype(np.float32)
    if not (np.isfinite(value) and value > 0):
        raise CheckpointError(
            f"{name} is {value}, a scale must be positive and finite; calibrate the model again"
        )
    return np.asarray(value)


def only_zeros(names: Iterable[str], get: GetTensor) -> None:
    """Check zero points which symmetric formats should not have.

    Raises:
      CheckpointError: If one is not zero.
    """
    for name in names:
        if get(name).astype(np.float32).any():
            raise CheckpointError(
                f"{name} is not zero, but the config says that this quantization is symmetric; "
                "set symmetric to false in the config if the tensors are right"
            )


def tile_counts(fmt: QuantFormat, shape: tuple[int, int]) -> tuple[int, int]:
    """``(N tiles, K tiles)`` of a weight of kernel shape ``(K, N)``: the order files store."""
    tile_k, tile_n = fmt.tiles(shape, 0)
    return -(-shape[1] // tile_n), -(-shape[0] // tile_k)


def legal_scale_shapes(fmt: QuantFormat, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Shapes in which writers store the scales of such a weight; the usual one first."""
    counts = tile_counts(fmt, shape)
    if fmt.granularity == "tensor":
        return (1,), (), (1, 1)
    if fmt.granularity == "channel":
        return counts, counts[:1]
    return (counts,)
