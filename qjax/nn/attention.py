"""Grouped-query self-attention, with or without a KV cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.rotation import random_hadamard, rotate
from qjax.kv_cache import QuantizedKVCache
from qjax.nn.layers import QuantDense, RMSNorm, Taps
from qjax.nn.rotary import RopeScaling, rope_frequencies
from qjax.ops.activations import QuantizedActivation
from qjax.ops.attention import attention, paged_attention
from qjax.ops.key_bias import KeyBias
from qjax.ops.rotary import Projected, rotary_table, rotate_and_append, rotate_heads


class Attention(nn.Module):
    """Causal self-attention of one decoder layer.

    Attributes:
      layer: Index of the layer in the cache.
      num_q_heads: Query heads.
      num_kv_heads: Key/value heads; divides ``num_q_heads``.
      head_dim: Features per head.
      rope_theta: Base of the rotary wavelengths.
      rope_scaling: Context extension, or None.
      window: Sliding window in tokens, or None for full attention.
      use_bias: Biases on q, k and v.
      use_out_bias: Bias on the output projection.
      qk_norm: RMS normalisation of each query and key head before rotation.
      norm_eps: Epsilon of that normalisation.
      dtype: Compute dtype.
      param_dtype: Dtype of freshly initialised parameters.
      out_init_std: Standard deviation of a freshly initialised output projection.
      dot_backend: Passed to ``quantized_dot``.
      attention_backend: Passed to ``paged_attention``; ``"xla"`` is for the cache's update too.
      keep_splits: Return ``(s, b, t, hidden)``, to be summed over ``s``.
      sum_over: Mesh axis of ``jax.shard_map`` over whose devices the result is summed: the heads
        are those of one device.
    """

    layer: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    use_bias: bool = False
    use_out_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    out_init_std: float = 0.02
    dot_backend: str | None = None
    attention_backend: str | None = None
    keep_splits: bool = False
    sum_over: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array | QuantizedActivation,
        positions: jax.Array,
        cache: QuantizedKVCache | None = None,
        slots: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, QuantizedKVCache | None, Taps]:
        """Attend over the given tokens, or over the cache after adding them to it.

        Args:
          x: ``(b, t, hidden)``, codes if that is how the joined projection takes it.
          positions: int32 ``(b, t)``; with a cache those of a row follow each other, padding last.
          cache: KV cache; None to attend over the ``t`` tokens only, in their order.
          slots: int32 ``(b,)``, the cache slot of each sequence; needed with a cache.
          valid: bool ``(b, t)``; padding is False. Needed with a cache, None means all without one.

        Returns:
          ``(b, t, hidden)``, the new cache, and the inputs of the four linear layers together with
          keys (after the rotary embedding) and values, ``(b, t, num_kv_heads, head_dim)``.

        Raises:
          ValueError: If there is a cache without slots or valid, or its format leaves out a key
            bias that the layer does not have.
        """
        b, t, hidden_size = x.shape
        fmt = None if cache is None else cache.formats[self.layer]
        unbiased = fmt is not None and fmt.without_key_bias
        if fmt is not None and unbiased and (self.qk_norm or not self.use_bias):
            raise ValueError(
                f"layer {self.layer} has the KV format {fmt.name}, but its "
                "keys have no bias that could be left out"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "backend": self.dot_backend,
        }
        projected = self._project(x, unbiased, common)
        q, k, v = projected.heads(self.num_q_heads, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name="q_norm")(q)
            k = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name="k_norm")(k)
        table = rotary_table(positions, *self._rotation())

        scale = self.head_dim**-0.5
        if cache is None:
            q, k = rotate_heads(q, table), rotate_heads(k, table)
            mask = None if valid is None else jnp.broadcast_to(valid[:, None, :], (b, t, t))
            out = attention(q, k, v, scale=scale, window=self.window, mask=mask)
        else:
            if slots is None or valid is None:
                raise ValueError("attention over a cache needs slots and valid")
            q, k, cache = rotate_and_append(
                cache,
                self.layer,
                q,
                k,
                v,
                table,
                positions,
                slots,
                valid,
                projected=None if self.qk_norm else projected,
                mix=self._mix if fmt is not None and fmt.mixes_keys else None,
                # Another backend's name is for attention; it says nothing about the cache.
                backend="xla" if self.attention_backend == "xla" else None,
            )
            lengths = jnp.max(jnp.where(valid, positions + 1, 0), axis=1)
            out = paged_attention(
                q,
                cache,
                self.layer,
                positions,
                slots,
                lengths,
                scale=scale,
                window=self.window,
                key_bias=self._key_bias() if unbiased else None,
                consecutive=True,
                backend=self.attention_backend,
            )
        out = out.reshape(b, t, self.num_q_heads * self.head_dim)
        o_proj = QuantDense(
            hidden_size,
            use_bias=self.use_out_bias,
            init_std=self.out_init_std,
            keep_splits=self.keep_splits,
            sum_over=self.sum_over,
            name="o_proj",
            **common,
        )
        taps = {"q_proj": x, "k_proj": x, "v_proj": x, "o_proj": out, "keys": k, "values": v}
        return o_proj(out), cache, taps

    def _project(
        self, x: jax.Array | QuantizedActivation, unbiased: bool, common: dict[str, Any]
    ) -> Projected:
        """Queries, keys and values; keys without their bias if ``unbiased``."""
        counts = (self.num_q_heads, self.num_kv_heads, self.num_kv_heads)
        sizes = [self.head_dim * count for count in counts]
        add_bias = (self.use_bias, self.use_bias and not unbiased, self.use_bias)
        if self.has_variable("params", "qkv_proj"):
            joined = QuantDense(sum(sizes), keep_splits=True, name="qkv_proj", **common)
            q, k, v = (
                self._bias(name) if wanted else None
                for name, wanted in zip("qkv", add_bias, strict=True)
            )
            return Projected((joined(x),), (q, k, v), self.dtype)
        parts = [
            QuantDense(size, self.use_bias, add_bias=wanted, name=f"{name}_proj", **common)(x)
            for size, name, wanted in zip(sizes, "qkv", add_bias, strict=True)
        ]
        return Projected(tuple(part[None] for part in parts), (None, None, None), self.dtype)

    def _rotation(self) -> tuple[np.ndarray, float]:
        """Angle per position of every pair of features, and a factor of what is rotated."""
        scaling = self.rope_scaling
        frequencies = rope_frequencies(self.head_dim, self.rope_theta, scaling)
        return frequencies, 1.0 if scaling is None else scaling.attention_factor

    def _mix(self, x: jax.Array) -> jax.Array:
        """Queries or keys in a basis in which their features are about equally large."""
        return rotate(x, random_hadamard(self.head_dim)).astype(x.dtype)

    def _bias(self, name: str) -> jax.Array:
        """Bias of a projection that is joined with others, which keep their own."""
        return self.get_variable("params", f"{name}_proj")["bias"].astype(self.dtype)

    def _key_bias(self) -> KeyBias:
        """What keys in the cache lack; in float32, since nothing forces it into fewer bits."""
        bias = self.get_variable("params", "k_proj")["bias"].astype(jnp.float32)
        return KeyBias(bias.reshape(self.num_kv_heads, self.head_dim), *self._rotation())
