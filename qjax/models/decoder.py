"""The decoder of the Llama family: Llama 2 to 3.2, Mistral, Qwen2, Qwen2.5 and Qwen3.

These differ only in what ``ModelConfig`` says: biases, normalised queries and keys, sliding
windows, rotary scaling, tied embeddings. Layers are unrolled, not scanned: a scan slices the
stacked weights and the cache, and XLA copies the slices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.formats import QuantFormat
from qjax.kv_cache import QuantizedKVCache
from qjax.models.config import ModelConfig
from qjax.nn import Attention, GatedMLP, QuantDense, RMSNorm, TensorParallel
from qjax.nn.layers import Taps, codes_format
from qjax.ops.dot import quantized_dot
from qjax.ops.packed import takes_float16


class DecoderLayer(nn.Module):
    """One transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
      config: The model, or the part of it that one device has.
      layer: Index of the layer.
      dtype: Compute dtype.
      param_dtype: Dtype of freshly initialised parameters.
      dot_backend: Passed to ``quantized_dot``.
      attention_backend: Passed to ``paged_attention``.
      norm_dtype: See ``Decoder``.
      sum_over: Mesh axis of the other devices; see ``Attention`` and ``GatedMLP``.
    """

    config: ModelConfig
    layer: int
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    dot_backend: str | None = None
    attention_backend: str | None = None
    norm_dtype: Any = None
    sum_over: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: QuantizedKVCache | None = None,
        slots: jax.Array | None = None,
        valid: jax.Array | None = None,
        delta: jax.Array | None = None,
        keep_delta: bool = False,
    ) -> tuple[Any, QuantizedKVCache | None, Taps]:
        """Apply the block.

        Args:
          x: ``(b, t, hidden)``.
          positions: int32 ``(b, t)``.
          cache: KV cache, or None to attend over these tokens only.
          slots: int32 ``(b,)``, cache slot of each sequence.
          valid: bool ``(b, t)``, False for padding.
          delta: ``(s, b, t, hidden)``: what the block before left to be added to ``x``.
          keep_delta: Leave the last addition to the block after, which does it on the way to its
            first normalisation.

        Returns:
          ``(b, t, hidden)``, or with ``keep_delta`` the pair of that and a delta; the new cache;
          and taps: the input of every linear layer under its name in the block
          (``"self_attn/q_proj"``, ``"mlp/down_proj"``, ...), and the keys and values under
          ``"self_attn/keys"`` and ``"self_attn/values"``. Taps which are not used cost nothing
          under jit.
        """
        c = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Projections back into the residual stream start smaller (GPT-2), so that its variance
        # does not grow with depth.
        out_init_std = 0.02 / (2 * c.num_layers) ** 0.5
        norms: dict[str, Any] = {"backend": self.dot_backend, **dtypes}
        norm = RMSNorm(c.rms_norm_eps, name="input_layernorm", **norms)
        if delta is None:
            h = norm(x, dtype=self._dtype("self_attn", "qkv_proj"))
        else:
            x, h = norm(x, delta, *self._input_of("self_attn", "qkv_proj", x))
        attn = Attention(
            layer=self.layer,
            num_q_heads=c.num_q_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rope_theta=c.rope_theta,
            rope_scaling=c.rope_scaling,
            window=c.layer_windows[self.layer],
            use_bias=c.attention_bias,
            use_out_bias=c.attention_out_bias,
            qk_norm=c.qk_norm,
            norm_eps=c.rms_norm_eps,
            out_init_std=out_init_std,
            dot_backend=self.dot_backend,
            attention_backend=self.attention_backend,
            keep_splits=True,
            sum_over=self.sum_over,
            name="self_attn",
            **dtypes,
        )
        h, cache, attn_taps = attn(h, positions, cache, slots, valid)
        norm = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm", **norms)
        x, h = norm(x, h, *self._input_of("mlp", "gate_up_proj", x))
        mlp = GatedMLP(
            c.intermediate_size,
            use_bias=c.mlp_bias,
            out_init_std=out_init_std,
            backend=self.dot_backend,
            keep_splits=True,
            sum_over=self.sum_over,
            name="mlp",
            **dtypes,
        )
        delta, mlp_taps = mlp(h)
        taps = {f"self_attn/{k}": v for k, v in attn_taps.items()}
        taps |= {f"mlp/{k}": v for k, v in mlp_taps.items()}
        if keep_delta:
            return (x, delta), cache, taps
        return x + delta.astype(jnp.float32).sum(0).astype(x.dtype), cache, taps

    def _input_of(self, block: str, name: str, x: jax.Array) -> tuple[QuantFormat | None, Any]:
        """Format and type in which a projection takes its input from what normalises it."""
        params = self.variables.get("params", {}).get(block, {})
        return codes_format(params, name, x.shape, x.dtype), self._dtype(block, name)

    def _dtype(self, block: str, name: str) -> Any:
        """``norm_dtype`` for a projection that takes it."""
        params = self.variables.get("params", {}).get(block, {})
        taken = name in params and takes_float16(params[name]["kernel"])
        return self.norm_dtype if taken else None


class Embedding(nn.Module):
    """Token embedding ``(vocab, hidden)``; also the output projection of models that tie them.

    With ``parallel`` it is cut along the vocabulary, and the table is the part of one device.
    """

    vocab_size: int
    features: int
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    parallel: TensorParallel | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(b, t)`` to ``(b, t, hidden)``, and the table. Ids outside the vocabulary give NaN."""
        p = self.parallel
        rows = self.vocab_size if p is None else p.share(self.vocab_size)
        shape = (rows, self.features)
        table = self.param("embedding", nn.initializers.normal(0.02), shape, self.param_dtype)
        if p is not None:
            return p.embed(table, tokens, self.vocab_size, self.dtype), table
        return jnp.take(table, tokens, axis=0).astype(self.dtype), table


class Backbone(nn.Module):
    """Embedding, layers and final norm: what a checkpoint calls ``model``."""

    config: ModelConfig
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    remat: bool = False
    dot_backend: str | None = None
    attention_backend: str | None = None
    norm_dtype: Any = None
    parallel: TensorParallel | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: QuantizedKVCache | None,
        slots: jax.Array | None,
        valid: jax.Array | None,
        logits_at: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, QuantizedKVCache | None]:
        """Final hidden states ``(b, t or 1, hidden)``, the embedding table, and the new cache."""
        c = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        p = self.parallel
        embed = Embedding(
            c.vocab_size,
            c.hidden_size,
            parallel=None if p is None else p.of_vocabulary(c.vocab_size),
            name="embed_tokens",
            **dtypes,
        )
        x, table = embed(tokens)
        if p is not None:
            c = _part(c, p)
        block = nn.remat(DecoderLayer, static_argnums=(7,)) if self.remat else DecoderLayer
        delta = None
        for i in range(c.num_layers):
            layer = block(
                config=c,
                layer=i,
                dot_backend=self.dot_backend,
                attention_backend=self.attention_backend,
                norm_dtype=self.norm_dtype,
                sum_over=None if p is None else p.axis,
                name=f"layers_{i}",
                **dtypes,
            )
            (x, delta), cache, _ = layer(x, positions, cache, slots, valid, delta, True)
        if logits_at is not None and tokens.shape[1] > 1:
            at = logits_at[:, None, None]
            x = jnp.take_along_axis(x, at, axis=1)
            delta = None if delta is None else jnp.take_along_axis(delta, at[None], axis=2)
        norm = RMSNorm(c.rms_norm_eps, backend=self.dot_backend, name="norm", **dtypes)
        return norm(x) if delta is None else norm(x, delta)[1], table, cache


class Decoder(nn.Module):
    """A causal language model.

    ``Decoder(config).init(key, tokens)`` makes trainable parameters and
    ``Decoder(config).apply({"params": params}, tokens, ...)`` runs it; kernels in ``params`` may be
    ``QuantizedArray``.

    Attributes:
      config: The model.
      dtype: Compute dtype; norms, rotary angles, softmax, accumulation and logits are float32.
      param_dtype: Dtype of freshly initialised parameters.
      remat: Recompute layers in the backward pass instead of keeping their activations.
      dot_backend: Passed to ``quantized_dot``.
      attention_backend: Passed to ``paged_attention``.
      norm_dtype: Type of normalised rows on their way to weights packed for float16 activations
        (``serving.weights.prepare_weights``), if not ``dtype``.
      parallel: This is the program of one device under ``jax.shard_map``: parameters and cache are
        its part of those of the model (``models.sharding``); tokens and logits are the same on all.
    """

    config: ModelConfig
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    remat: bool = False
    dot_backend: str | None = None
    attention_backend: str | None = None
    norm_dtype: Any = None
    parallel: TensorParallel | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: QuantizedKVCache | None = None,
        slots: jax.Array | None = None,
        valid: jax.Array | None = None,
        *,
        logits_at: jax.Array | None = None,
    ) -> tuple[jax.Array, QuantizedKVCache | None]:
        """Next-token logits.

        Args:
          tokens: int32 ``(b, t)``.
          positions: int32 ``(b, t)``; None counts from 0 in every row.
          cache: KV cache to extend and attend over; None attends over these tokens only.
          slots: int32 ``(b,)``, cache slot of each row; None is ``arange(b)``.
          valid: bool ``(b, t)``, False for padding; None means no padding.
          logits_at: int32 ``(b,)``: index along ``t`` of the only position whose logits are wanted.

        Returns:
          float32 logits ``(b, t, vocab)``, or ``(b, vocab)`` with ``logits_at``; and the new cache.
        """
        c = self.config
        b, t = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (b, t))
        if cache is not None:
            slots = jnp.arange(b, dtype=jnp.int32) if slots is None else slots
            valid = jnp.ones((b, t), bool) if valid is None else valid
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        backbone = Backbone(
            c,
            remat=self.remat,
            dot_backend=self.dot_backend,
            attention_backend=self.attention_backend,
            norm_dtype=self.norm_dtype,
            parallel=self.parallel,
            name="model",
            **common,
        )
        x, table, cache = backbone(tokens, positions, cache, slots, valid, logits_at)
        p = None if self.parallel is None else self.parallel.of_vocabulary(c.vocab_size)
        if c.tie_word_embeddings:
            # By XLA, which reads the table transposed; a kernel would need a transposed copy.
            logits = quantized_dot(x, table.T, out_dtype=jnp.float32, backend="xla")
        else:
            head = QuantDense(
                c.vocab_size if p is None else p.share(c.vocab_size),
                out_dtype=jnp.float32,
                backend=self.dot_backend,
                name="lm_head",
                **common,
            )
            logits = head(x)
        if p is not None:
            logits = p.gather(logits)
        return (logits if logits_at is None else logits[:, 0]), cache


def _part(config: ModelConfig, parallel: TensorParallel) -> ModelConfig:
    """What one device has of every layer."""
    names = "num_q_heads", "num_kv_heads", "intermediate_size"
    sizes: dict[str, Any] = {name: parallel.share(getattr(config, name)) for name in names}
    return dataclasses.replace(config, **sizes)
