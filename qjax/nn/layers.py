"""Dense layer over plain or quantized kernels, RMS normalisation, gated MLP: thin Linen modules.

One module serves every weight format: a parameter leaf may be a plain array, a ``QuantizedArray``
or a ``PackedWeight`` of the same logical shape, and ``quantized_dot`` looks at the leaf.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.ops.dot import quantized_dot
from qjax.ops.packed import PackedWeight
from qjax.quantized_array import QuantizedArray

Taps = dict[str, jax.Array]
"""Inputs of linear layers by layer name: what calibration collects statistics on."""


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
      backend: Passed to ``quantized_dot``.
    """

    features: int
    use_bias: bool = False
    add_bias: bool = dataclasses.field(default=True, kw_only=True)
    dtype: Any = jnp.bfloat16
    out_dtype: Any = None
    param_dtype: Any = jnp.float32
    init_std: float = 0.02
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
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
        x = x.astype(self.dtype)
        out_dtype = self.dtype if self.out_dtype is None else self.out_dtype
        y = quantized_dot(x, kernel, out_dtype=out_dtype, backend=self.backend)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            if not self.add_bias:
                return y
            y = y + bias.astype(out_dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis, in float32, rounded once."""

    eps: float
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape; the result has dtype ``dtype``."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        y = y * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(self.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: ``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    intermediate_size: int
    use_bias: bool = False
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    out_init_std: float = 0.02
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Taps]:
        """``(..., hidden)`` to ``(..., hidden)``, and the inputs of the three linear layers."""
        common: dict[str, Any] = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "backend": self.backend,
        }
        if self.has_variable("params", "gate_up_proj"):
            joined = {**common, "use_bias": False}
            both = QuantDense(2 * self.intermediate_size, name="gate_up_proj", **joined)(x)
            gate, up = jnp.split(both, 2, axis=-1)
            if self.use_bias:
                gate, up = gate + self._bias("gate_proj"), up + self._bias("up_proj")
        else:
            gate = QuantDense(self.intermediate_size, name="gate_proj", **common)(x)
            up = QuantDense(self.intermediate_size, name="up_proj", **common)(x)
        hidden = nn.silu(gate) * up
        down = QuantDense(x.shape[-1], init_std=self.out_init_std, name="down_proj", **common)
        return down(hidden), {"gate_proj": x, "up_proj": x, "down_proj": hidden}

    def _bias(self, name: str) -> jax.Array:
        """Bias of a projection that is joined with another, which keeps its own."""
        bias = self.get_variable("params", name)["bias"]
        return bias.astype(self.dtype).reshape(1, 1, -1)
