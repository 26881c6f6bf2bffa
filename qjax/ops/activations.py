"""Activations that are quantized once, where they are made, for products with W8A8 weights.

A product quantizes its activations itself; XLA needs three kernels for it. A kernel that has a row
in registers anyway, such as the one that normalises it, can give its codes instead
(``QuantizedActivation``), and ``quantized_dot`` takes these. They are the codes that the product
would have made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.ops._dispatch import kernels_by_default
from qjax.pallas_kernels import _token_codes, token_codes
from qjax.quantize import quantize
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array, DType


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale"],
    meta_fields=["fmt", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedActivation:
    """Activations ``(..., k)`` as 8-bit codes, a row for each token.

    Attributes:
      codes: ``(r, k)`` in the format's type. Rows beyond those of ``shape`` are room that kernels
        want; they mean nothing.
      scale: float32 ``(s,)``, one per token, or ``(k / 128, s)``; ``s`` is at least as large as the
        number of tokens.
      fmt: The format.
      shape: Of the activations.
      dtype: Type of the activations, and of products with them unless another is asked for.
    """

    codes: Array
    scale: Array
    fmt: QuantFormat
    shape: tuple[int, ...]
    dtype: Any

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return math.prod(self.shape[:-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def unpack(self) -> QuantizedArray:
        """The same as a quantized array ``(rows, k)``."""
        scale = jnp.atleast_2d(self.scale)[:, : self.rows].T
        return QuantizedArray.make(self.codes[: self.rows], scale, self.fmt, dtype=self.dtype)


def codes_unsupported_reason(rows: int, columns: int, dtype: DType, fmt: QuantFormat) -> str | None:
    """Why kernels cannot give codes of such activations; None if they can, on a Hopper GPU.

    Args:
      rows: Tokens.
      columns: Values of each.
      dtype: Their type.
      fmt: Format that is wanted.
    """
    if not fmt.dynamic or not fmt.symmetric or fmt.scale_dtype != "float32":
        return f"{fmt.name}: the kernels are for dynamic symmetric formats with float32 scales"
    tile = fmt.tiles((1, columns), -1)[1]
    if tile not in (_token_codes.BLOCK, columns):
        return f"{fmt.name}: a scale for each {tile} values; the kernels have one per token, or 128"
    kind = fmt.storage_dtype.name
    return token_codes.unsupported_reason(rows, columns, dtype, kind, tile != columns)


def codes_by_kernel(rows: int, columns: int, dtype: DType, fmt: QuantFormat) -> bool:
    """Whether kernels give codes of such activations here; see ``codes_unsupported_reason``."""
    return (
        codes_unsupported_reason(rows, columns, dtype, fmt) is None
        and mosaic_gpu_unsupported_reason() is None
        and kernels_by_default()
    )


def kernel_options(columns: int, fmt: QuantFormat) -> tuple[str, bool]:
    """Type of codes, and whether there are blocks, as the kernels want to know them."""
    return fmt.storage_dtype.name, fmt.tiles((1, columns), -1)[1] != columns


def quantize_activation(
    x: Array, fmt: QuantFormat, *, static_scale: Array | None = None
) -> QuantizedActivation:
    """Quantize activations, by a kernel if there is one for them here.

    Args:
      x: ``(..., k)``.
      fmt: The format.
      static_scale: The scale of all, for a format that is not dynamic.

    Returns:
      The codes of ``quantize(x, fmt, axis=-1)``.
    """
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    if codes_by_kernel(flat.shape[0], columns, x.dtype, fmt):
        kind, blocks = kernel_options(columns, fmt)
        codes, scale = token_codes.token_codes(flat, kind=kind, blocks=blocks)
        return QuantizedActivation(codes, scale, fmt, x.shape, x.dtype)
    with jax.named_scope("quantize_activations"):
        given = None if static_scale is None else static_scale.astype(jnp.float32).reshape(1, 1)
        xq = quantize(flat, fmt, axis=-1, scale=given)
        scale = xq.scale.astype(jnp.float32).T
        scale = jnp.broadcast_to(scale, (scale.shape[0], flat.shape[0]))
        scale = scale[0] if scale.shape[0] == 1 else scale
    return QuantizedActivation(xq.qvalue, scale, fmt, x.shape, x.dtype)


def quantize_gated(pair: Array, fmt: QuantFormat) -> QuantizedActivation:
    """Quantize ``silu(gate) * up``; ``codes_by_kernel`` must hold.

    Args:
      pair: ``(..., 2 k)``: gate left, up right, bfloat16 or float16.
      fmt: The format.

    Returns:
      Codes of ``(..., k)`` activations, computed in float32 and rounded once to the type of
      ``pair``.
    """
    columns = pair.shape[-1] // 2
    kind, blocks = kernel_options(columns, fmt)
    flat = pair.reshape(-1, pair.shape[-1])
    codes, scale = token_codes.token_codes(flat, kind=kind, blocks=blocks, gated=True)
    return QuantizedActivation(codes, scale, fmt, (*pair.shape[:-1], columns), pair.dtype)
