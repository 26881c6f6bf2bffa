"""Choosing the next token: greedy, temperature, top-k and top-p, with every setting per request.

All settings are arrays with one entry per row, so requests with different settings share one
compiled function. Randomness depends on the request's own seed and on how many tokens it has
produced, never on the row it occupies or on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qjax.typing import Array

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it stops.

    Attributes:
      max_new_tokens: Tokens to generate at most, at least 1.
      temperature: 0 for greedy; otherwise logits are divided by it.
      top_k: Keep the k most likely tokens; 0 keeps all.
      top_p: Of these, keep the smallest set of most likely tokens whose probability reaches top_p;
        1 keeps all.
      seed: Of this request's random numbers, 0 to 2**32 - 1.
      ignore_eos: Go on after the end-of-sequence token, to ``max_new_tokens``.

    Raises:
      ValueError: If a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0.0 <= self.temperature <= 1e4:
            raise ValueError(
                f"temperature={self.temperature} must lie in [0, 1e4]; 0 chooses the most likely"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 keeps all tokens")
        if self.top_k >= 2**31:
            raise ValueError(f"top_k={self.top_k} is too large; 0 keeps all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} must lie in [0, {MAX_SEED}]")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "seed"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The settings of a batch on the device, each ``(batch,)``.

    Attributes:
      temperature: float32; 0 is greedy.
      top_k: int32; 0 keeps all.
      top_p: float32; 1 keeps all.
      seed: uint32.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    seed: Array

    @classmethod
    def of(cls, params: list[SamplingParams]) -> SamplingArrays:
        """Arrays of a list of requests' settings."""
        return cls(
            jnp.asarray([p.temperature for p in params], jnp.float32),
            jnp.asarray([p.top_k for p in params], jnp.int32),
            jnp.asarray([p.top_p for p in params], jnp.float32),
            jnp.asarray([p.seed for p in params], jnp.uint32),
        )


def sample(logits: Array, settings: SamplingArrays, index: Array) -> Array:
    """Choose one token per row.

    Temperature comes first, then top-k, then top-p on the probabilities that are left. A row's
    result is bitwise the same whatever the other rows hold.

    Args:
      logits: ``(batch, vocab)`` float32.
      settings: One entry per row.
      index: int32 ``(batch,)``: how many tokens the request has produced before this one.

    Returns:
      int32 ``(batch,)`` token ids.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    random = settings.temperature > 0
    # Greedy batches, the most common, skip the random numbers and the sort altogether.
    return jax.lax.cond(
        jnp.any(random),
        lambda: jnp.where(random, _sample_random(logits, settings, index), greedy),
        lambda: greedy,
    )


def _sample_random(logits: Array, settings: SamplingArrays, index: Array) -> Array:
    temperature = jnp.where(settings.temperature > 0, settings.temperature, jnp.float32(1))
    logits = logits / temperature[:, None]
    filtering = (settings.temperature > 0) & ((settings.top_k > 0) | (settings.top_p < 1))
    keep = jax.lax.cond(
        jnp.any(filtering),
        lambda: _kept(logits, settings),
        lambda: jnp.ones(logits.shape, bool),
    )
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(settings.seed, index, logits.shape[-1])
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    scores = jnp.where(keep, logits + noise, -jnp.inf)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _gumbel(seed: Array, index: Array, size: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _kept(logits: Array, settings: SamplingArrays) -> Array:
    """Mask ``(batch, vocab)`` of the tokens that top-k and top-p leave; never empty."""
    batch, vocab = logits.shape
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    top_k = jnp.where(settings.top_k > 0, settings.top_k, vocab)[:, None]
    in_top_k = jnp.arange(vocab, dtype=jnp.int32)[None, :] < top_k
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    # Mass before each token: the one that crosses top_p is kept, so the first always is.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # top_p = 1 must keep all, though rounding may bring the sum to 1 before the last token.
    in_top_p = (before < settings.top_p[:, None]) | (settings.top_p >= 1)[:, None]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    # Back to vocabulary order, so that ties are broken as in a batch which filters nothing.
    mask = jnp.zeros((batch, vocab), bool)
    return mask.at[rows, order].set(in_top_k & in_top_p, unique_indices=True)
