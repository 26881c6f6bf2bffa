"""Grouped-query self-attention, with or without a KV cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.calibration.rotation import random_hadamard, rotate
from qjax.kv_cache import QuantizedKVCache
from qjax.nn.layers import QuantDense, RMSNorm, Taps
from qjax.nn.rotary import RopeScaling, apply_rotary, rope_frequencies
from qjax.ops.attention import attention, paged_attention
from qjax.ops.key_bias import KeyBias
from qjax.ops.kv import append


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
      attention_backend: Passed to ``paged_attention``.
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
        x: jax.Array,
        positions: jax.Array,
        cache: QuantizedKVCache | None = None,
        slots: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, QuantizedKVCache | None, Taps]:
        """Attend over the given tokens, or over the cache after adding them to it.

        Args:
          x: ``(b, t, hidden)``.
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
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "backend": self.dot_backend,
        }

        fmt = None if cache is None else cache.formats[self.layer]
        unbiased = fmt is not None and fmt.without_key_bias
        if fmt is not None and unbiased and (self.qk_norm or not self.use_bias):
            raise ValueError(
                f"layer {self.layer} has the KV format {fmt.name}, but its "
                "keys have no bias that could be left out"
            )

        heads = (self.num_q_heads, self.num_kv_heads, self.num_kv_heads)
        add_bias = (self.use_bias, self.use_bias and not unbiased, self.use_bias)
        sizes = [self.head_dim * count for count in heads]
        if self.has_variable("params", "qkv_proj"):
            joined = QuantDense(sum(sizes), name="qkv_proj", **common)(x)
            parts = jnp.split(joined, [sizes[0], sizes[0] + sizes[1]], axis=-1)
            parts = [
                part + self._bias(name).reshape(1, 1, -1) if wanted else part
                for part, name, wanted in zip(parts, "qkv", add_bias, strict=True)
            ]
        else:
            parts = [
                QuantDense(size, self.use_bias, add_bias=wanted, name=f"{name}_proj", **common)(x)
                for size, name, wanted in zip(sizes, "qkv", add_bias, strict=True)
            ]
        q, k, v = (
            part.reshape(b, t, count, self.head_dim)
            for part, count in zip(parts, heads, strict=True)
        )
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name="q_norm")(q)
            k = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name="k_norm")(k)
        q = apply_rotary(q, positions, self.rope_theta, self.rope_scaling)
        k = apply_rotary(k, positions, self.rope_theta, self.rope_scaling)

        scale = self.head_dim**-0.5
        if cache is None:
            mask = None if valid is None else jnp.broadcast_to(valid[:, None, :], (b, t, t))
            out = attention(q, k, v, scale=scale, window=self.window, mask=mask)
        else:
            if slots is None or valid is None:
                raise ValueError("attention over a cache needs slots and valid")
            queries, keys = q, k
            if fmt is not None and fmt.mixes_keys:
                basis = random_hadamard(self.head_dim)
                queries, keys = (rotate(x, basis).astype(x.dtype) for x in (q, k))
            cache = append(
                cache,
                self.layer,
                keys,
                v,
                positions,
                slots,
                valid,
                backend=self.attention_backend,
            )
            lengths = jnp.max(jnp.where(valid, positions + 1, 0), axis=1)
            out = paged_attention(
                queries,
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

    def _bias(self, name: str) -> jax.Array:
        """Bias of a projection that is joined with others, which keep their own."""
        return self.get_variable("params", f"{name}_proj")["bias"].astype(self.dtype)

    def _key_bias(self) -> KeyBias:
        """What keys in the cache lack; in float32, since nothing forces it into fewer bits."""
        bias = self.get_variable("params", "k_proj")["bias"].astype(jnp.float32)
        return KeyBias(
            bias.reshape(self.num_kv_heads, self.head_dim),
            rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling),
            1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor,
        )
