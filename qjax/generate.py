"""The two device programs of generation: one prefill pass, and a block of decode steps.

Both are pure functions of the cache and a ``DecodeState``, which holds everything the device must
know about the sequences in its slots. A decode block runs many steps in one program, with sampling,
end-of-sequence and length limits inside, so that the host is asked once per block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.kv_cache import QuantizedKVCache
from qjax.quantize import is_quantized
from qjax.sampling import SamplingArrays, sample
from qjax.typing import Array, PyTree

ApplyFn = Callable[..., tuple[Array, Any]]
"""``module.apply`` of a ``Decoder``."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "produced", "limits", "active", "stops", "sampling"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the device knows of each slot; every entry ``(max_seqs,)``.

    Attributes:
      tokens: int32, the newest token: chosen, but not yet in the cache.
      lengths: int32, tokens in the cache.
      produced: int32, tokens chosen so far.
      limits: int32, tokens to choose at most.
      active: bool, whether the slot is generating.
      stops: bool, whether an end-of-sequence token ends the sequence.
      sampling: Settings per slot.
    """

    tokens: Array
    lengths: Array
    produced: Array
    limits: Array
    active: Array
    stops: Array
    sampling: SamplingArrays

    @classmethod
    def init(cls, max_seqs: int) -> DecodeState:
        """A state of ``max_seqs`` idle slots."""

        # One array each: donated buffers must not alias.
        def zeros(dtype: Any) -> Array:
            return jnp.zeros((max_seqs,), dtype)

        sampling = SamplingArrays(
            zeros(jnp.float32), zeros(jnp.int32), jnp.ones((max_seqs,)), zeros(jnp.uint32)
        )
        ints = [zeros(jnp.int32) for _ in range(4)]
        return cls(*ints, active=zeros(bool), stops=zeros(bool), sampling=sampling)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "starts",
        "counts",
        "slots",
        "first",
        "last",
        "limits",
        "stops",
        "sampling",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Chunks of some prompts, one per row; rows not needed have a count of zero.

    Attributes:
      tokens: int32 ``(rows, chunk)``, padded behind ``counts``.
      starts: int32 ``(rows,)``, position of each chunk in its prompt.
      counts: int32 ``(rows,)``, tokens of the chunk.
      slots: int32 ``(rows,)``, each at most once; ``max_seqs`` for rows that are not needed.
      first: bool ``(rows,)``, whether this is the first chunk of its prompt. It begins behind
        position 0 where full pages before it are shared with other sequences.
      last: bool ``(rows,)``, whether this chunk completes its prompt.
      limits: int32 ``(rows,)``, as in ``DecodeState``.
      stops: bool ``(rows,)``, as in ``DecodeState``.
      sampling: Settings per row.
    """

    tokens: Array
    starts: Array
    counts: Array
    slots: Array
    first: Array
    last: Array
    limits: Array
    stops: Array
    sampling: SamplingArrays


def prefill(
    apply: ApplyFn,
    eos_ids: tuple[int, ...],
    params: PyTree,
    cache: QuantizedKVCache,
    state: DecodeState,
    batch: PrefillBatch,
) -> tuple[QuantizedKVCache, DecodeState, Array, Array]:
    """Put prompt chunks into the cache; where a prompt is complete, choose its first token.

    Args:
      apply: ``Decoder.apply``.
      eos_ids: End-of-sequence tokens.
      params: Model parameters.
      cache: KV cache; slots whose prompt starts here forget the statistics of their predecessor,
        and go on from those of the pages they take over.
      state: Decode state; slots whose prompt is complete become active.
      batch: The chunks.

    Returns:
      The cache, the state, int32 ``(rows,)`` first tokens (-1 where the prompt is not complete) and
      bool ``(rows,)``: False where a chosen token came from logits that are not finite.
    """
    rows, chunk = batch.tokens.shape
    max_seqs = cache.max_seqs
    used = batch.counts > 0
    offsets = jnp.arange(chunk, dtype=jnp.int32)[None, :]
    # Beyond the last slot: updates there are dropped.
    fresh = jnp.where(used & batch.first, batch.slots, max_seqs)
    taken_over = None
    if cache.share_pages:
        taken_over = jnp.zeros((max_seqs,), jnp.int32).at[fresh].set(batch.starts, mode="drop")
    mask = jnp.zeros((max_seqs,), bool).at[fresh].set(True, mode="drop")
    cache = cache.reset_slots(mask, taken_over)
    logits, cache = apply(
        {"params": params},
        batch.tokens,
        batch.starts[:, None] + offsets,
        cache,
        batch.slots,
        offsets < batch.counts[:, None],
        logits_at=jnp.maximum(batch.counts - 1, 0),
    )
    tokens = sample(logits, batch.sampling, jnp.zeros((rows,), jnp.int32))
    done = batch.last & used
    alive = done & (batch.limits > 1) & ~(batch.stops & _is_eos(tokens, eos_ids))
    target = jnp.where(done, batch.slots, max_seqs)

    def put(old: Array, new: Array) -> Array:
        return old.at[target].set(new, mode="drop")

    state = DecodeState(
        tokens=put(state.tokens, tokens),
        lengths=put(state.lengths, batch.starts + batch.counts),
        produced=put(state.produced, jnp.ones((rows,), jnp.int32)),
        limits=put(state.limits, batch.limits),
        active=put(state.active, alive),
        stops=put(state.stops, batch.stops),
        sampling=jax.tree.map(put, state.sampling, batch.sampling),
    )
    finite = jnp.isfinite(jnp.max(logits, axis=-1)) | ~done
    return cache, state, jnp.where(done, tokens, -1), finite


def decode(
    apply: ApplyFn,
    eos_ids: tuple[int, ...],
    block: int,
    fixed: bool,
    greedy: bool,
    params: PyTree,
    cache: QuantizedKVCache,
    state: DecodeState,
    steps: Array,
) -> tuple[QuantizedKVCache, DecodeState, Array, Array]:
    """Generate up to ``block`` tokens in every active slot, in one program.

    Args:
      apply: ``Decoder.apply``.
      eos_ids: End-of-sequence tokens.
      block: Room for tokens in the result.
      fixed: Always run ``block`` steps. A loop of known length needs no answer from the device
        between steps, which matters on GPUs; otherwise the loop ends after ``steps`` steps, or as
        soon as no slot is active. Tokens do not depend on it.
      greedy: No active slot samples. The program then has no branch, whose condition a GPU would
        have to tell the host in every step.
      params: Model parameters.
      cache: KV cache.
      state: Decode state.
      steps: int32 scalar; not read if ``fixed``.

    Returns:
      The cache, the state, int32 ``(max_seqs, block)`` tokens (-1 where a slot was not active), and
      bool ``(max_seqs,)``: False where a chosen token came from logits that are not finite.
    """
    max_seqs = cache.max_seqs
    # The type of the carry must not change over the loop: the cache's step counterpart is int32.
    out = jnp.full((max_seqs, block), -1, jnp.int32)
    carry = (jnp.int32(0), cache, state, out, jnp.ones((max_seqs,), bool))

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, cache, state, out, finite = carry
        logits, cache = apply(
            {"params": params},
            state.tokens[:, None],
            state.lengths[:, None],
            cache,
            None,
            state.active[:, None],
            logits_at=jnp.zeros((max_seqs,), jnp.int32),
        )
        if greedy:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            tokens = sample(logits, state.sampling, state.produced)
        finite = finite & (jnp.isfinite(jnp.max(logits, axis=-1)) | ~state.active)
        out = out.at[:, i].set(jnp.where(state.active, tokens, -1))
        advance = state.active.astype(jnp.int32)
        produced = state.produced + advance
        ended = (produced >= state.limits) | (state.stops & _is_eos(tokens, eos_ids))
        state = dataclasses.replace(
            state,
            tokens=jnp.where(state.active, tokens, state.tokens),
            lengths=state.lengths + advance,
            produced=produced,
            active=state.active & ~ended,
        )
        return i + 1, cache, state, out, finite

    if fixed:
        _, *result = jax.lax.fori_loop(0, block, lambda _, carry: step(carry), carry)
    else:
        limit = jnp.minimum(steps, block)
        _, *result = jax.lax.while_loop(
            lambda carry: (carry[0] < limit) & jnp.any(carry[2].active), step, carry
        )
    cache, state, out, finite = result
    return cache, state, out, finite


def _is_eos(tokens: Array, eos_ids: tuple[int, ...]) -> Array:
    hit = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        hit = hit | (tokens == eos)
    return hit


def activation_qtype(params: PyTree) -> str | None:
    """Type of quantized activations (W8A8) in a parameter tree; None if there are none.

    Floating-point types win over integers: they need compiler options (see
    ``qjax._device.compiler_options``).
    """
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    found = {
        leaf.fmt.activation.qtype
        for leaf in leaves
        if is_quantized(leaf) and leaf.fmt.activation is not None
    }
    return min(found, default=None)  # "float8..." sorts before "int8"
