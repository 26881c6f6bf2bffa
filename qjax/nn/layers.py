"""Dense layer over plain or quantized kernels, RMS normalisation, gated MLP: thin Linen modules.

One module serves every weight format: a parameter leaf may be a plain array, a ``QuantizedArray``
or a ``PackedWeight`` of the same logical shape, and ``quantized_dot`` looks at the leaf.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.formats import QuantFormat
from qjax.nn.parallel import reorder_inputs, sum_over_devices
from qjax.ops.activations import QuantizedActivation, codes_by_kernel, quantize_gated
from qjax.ops.dot import quantized_dot
from qjax.ops.gated import gated_dot
from qjax.ops.norm import (
    add_rms_norm,
    add_rms_norm_codes,
    add_rms_norm_codes_unsupported_reason,
    rms_norm,
)
from qjax.ops.packed import PackedWeight, takes_float16
from qjax.ops.packed_w8a8 import takes_codes
from qjax.quantized_array import QuantizedArray

Taps = dict[str, Any]
"""Inputs of linear layers by layer name: what calibration collects statistics on. Arrays, but for
a model with packed weights, which may have a ``QuantizedActivation``."""


def codes_format(
    block: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: Any
) -> QuantFormat | None:
    """Format in which the kernel of a layer takes its input, if another kernel can make the codes.

    Args:
      block: Parameters of the block with the layer.
      name: Name of the layer.
      shape: Of its input, ``(..., in)``.
      dtype: Of its input.
    """
    fmt = takes_codes(block[name]["kernel"]) if name in block else None
    rows = math.prod(shape[:-1])
    return fmt if fmt is not None and codes_by_kernel(rows, shape[-1], dtype, fmt) else None


class QuantDense(nn.Module):
    """``x @ kernel + bias`` with a kernel ``(in, out)`` that may be quantized.

    Attributes:
      features: Size of the output.
      use_bias: Whether there is a bias ``(out,)``, which is never quantized.
      add_bias: Whether the bias, if there is one, is added; False leaves that to the caller.
      dtype: Compute dtype; products are accumulated in float32.
      out_dtype: Result dtype, ``dtype`` where None.
      param_dtype: Dtype of freshly initialised parameters.
      init_std: Standard deviation of a freshly initialised kernel.
      keep_splits: Return ``(s, ..., out)``, to be summed over ``s``; see ``quantized_dot``.
      gated: Return ``(..., out / 2)``: ``silu`` of the left half of the product times the right
        half. For a product without bias, in ``dtype`` and without splits.
      backend: Passed to ``quantized_dot``.
      sum_over: Mesh axis of ``jax.shard_map`` among whose devices the inputs, and the rows of the
        kernel, are cut: the result is the sum over them, and the bias is added once.
    """

    features: int
    use_bias: bool = False
    add_bias: bool = dataclasses.field(default=True, kw_only=True)
    dtype: Any = jnp.bfloat16
    out_dtype: Any = None
    param_dtype: Any = jnp.float32
    init_std: float = 0.02
    keep_splits: bool = False
    gated: bool = dataclasses.field(default=False, kw_only=True)
    backend: str | None = None
    sum_over: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array | QuantizedActivation) -> jax.Array:
        """``(..., in)`` to ``(..., out)``."""
        shape = (x.shape[-1], self.features)
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, PackedWeight):
            init = nn.initializers.normal(self.init_std)
            kernel = self.param("kernel", init, shape, self.param_dtype)
        elif kernel.shape != shape:
            # Linen compares the shape of the first leaf, which for packed words is not this one.
            raise ValueError(f"packed kernel of shape {kernel.shape}; the layer needs {shape}")
        if not isinstance(kernel, QuantizedArray | PackedWeight):
            kernel = kernel.astype(self.dtype)
        if not isinstance(x, QuantizedActivation) and not (
            x.dtype == jnp.float16 and takes_float16(kernel)
        ):
            x = x.astype(self.dtype)
        if self.gated:
            if self.use_bias or self.keep_splits or self.out_dtype is not None:
                raise ValueError("a gated product has no bias, no splits and no out_dtype")
            return gated_dot(x, kernel, out_dtype=self.dtype, backend=self.backend)
        out_dtype = self.dtype if self.out_dtype is None else self.out_dtype
        ordered = getattr(kernel, "perm", None) is None
        if self.sum_over is not None and not ordered and not isinstance(x, QuantizedActivation):
            x, kernel = reorder_inputs(x, kernel, self.sum_over)
        # A bias is added to the whole sum.
        splits = self.keep_splits and not self.use_bias
        y = quantized_dot(x, kernel, out_dtype=out_dtype, keep_splits=splits, backend=self.backend)
        if self.sum_over is not None:
            y = sum_over_devices(y, self.sum_over, out_dtype, splits=splits)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            if not self.add_bias:
                return y
            y = y + bias.astype(out_dtype).reshape((1,) * (y.ndim - 1) + (-1,))
            y = y[None] if self.keep_splits else y
        return y


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis, in float32, rounded once."""

    eps: float
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        delta: jax.Array | None = None,
        codes: QuantFormat | None = None,
        dtype: Any = None,
    ) -> Any:
        """Normalise, after adding to the residual stream if there is something to add.

        Args:
          x: ``(..., d)``.
          delta: ``(s, ..., d)``, added to ``x`` first; see ``add_rms_norm``.
          codes: With a delta: format in which the result is welcome, from ``codes_format``.
          dtype: Of the result without codes; the layer's by default.

        Returns:
          ``(..., d)`` of ``dtype``, or a ``QuantizedActivation``; with a delta the new ``x`` as
          well, before it.
        """
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        dtype = self.dtype if dtype is None else dtype
        if delta is None:
            return rms_norm(x, weight, self.eps, dtype)
        # A named backend is one for products; of rows that it does not take, XLA takes care here.
        backend = "xla" if self.backend == "xla" else None
        if backend == "xla" or x.dtype != self.dtype:
            codes = None
        if codes is not None and add_rms_norm_codes_unsupported_reason(x, codes) is None:
            return add_rms_norm_codes(x, delta, weight, self.eps, codes)
        # Where the stream has another type than the layer, rows are rounded to that type too.
        given = None if dtype == self.dtype else dtype
        x, y = add_rms_norm(x, delta, weight, self.eps, dtype=given, backend=backend)
        return x, y.astype(dtype)


class GatedMLP(nn.Module):
    """SwiGLU: ``down_proj(silu(gate_proj(x)) * up_proj(x))``.

    With ``sum_over``, a mesh axis of ``jax.shard_map``, these are the features of one device, and
    the result is summed over all.
    """

    intermediate_size: int
    use_bias: bool = False
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    out_init_std: float = 0.02
    backend: str | None = None
    keep_splits: bool = False
    sum_over: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array | QuantizedActivation) -> tuple[jax.Array, Taps]:
        """``(..., hidden)`` to ``(..., hidden)``, and the inputs of the three linear layers.

        With ``keep_splits`` the result is ``(s, ..., hidden)``, to be summed over ``s``.
        """
        common: dict[str, Any] = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "backend": self.backend,
        }
        if self.has_variable("params", "gate_up_proj"):
            codes = self._codes(x.shape)
            gated = not self.use_bias and codes is None
            joined = {**common, "use_bias": False, "gated": gated}
            hidden = QuantDense(2 * self.intermediate_size, name="gate_up_proj", **joined)(x)
            if codes is not None:
                hidden = quantize_gated(hidden, codes)
            elif self.use_bias:
                gate, up = jnp.split(hidden, 2, axis=-1)
                gate, up = gate + self._bias("gate_proj"), up + self._bias("up_proj")
                hidden = nn.silu(gate) * up
        else:
            gate = QuantDense(self.intermediate_size, name="gate_proj", **common)(x)
            up = QuantDense(self.intermediate_size, name="up_proj", **common)(x)
            hidden = nn.silu(gate) * up
        down = QuantDense(
            x.shape[-1],
            init_std=self.out_init_std,
            keep_splits=self.keep_splits,
            sum_over=self.sum_over,
            name="down_proj",
            **common,
        )
        return down(hidden), {"gate_proj": x, "up_proj": x, "down_proj": hidden}

    def _codes(self, shape: tuple[int, ...]) -> QuantFormat | None:
        """Format in which ``down_proj`` takes what a kernel can make of the joined product."""
        if self.use_bias or self.backend == "xla":
            return None
        block = self.variables["params"]
        return codes_format(block, "down_proj", (*shape[:-1], self.intermediate_size), self.dtype)

    def _bias(self, name: str) -> jax.Array:
        """Bias of a projection that is joined with another, which keeps its own."""
        bias = self.get_variable("params", name)["bias"]
        return bias.astype(self.dtype).reshape(1, 1, -1)
