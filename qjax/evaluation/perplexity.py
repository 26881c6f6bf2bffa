"""Perplexity of token sequences, through the KV cache, with agreement against a reference model.

Scoring runs the way serving does: a sequence is appended to the cache in chunks and attention reads
every key and value back from it, so a quantized cache shows in the perplexity. Nothing is kept but
sums: the logits of model and reference exist for one chunk at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qjax._device import compiler_options
from qjax.evaluation.agreement import kl_divergence, top1_agreement
from qjax.generate import activation_qtype
from qjax.kv_cache import QuantizedKVCache, StaticScales
from qjax.kv_format import KVFormat
from qjax.models.decoder import Decoder
from qjax.typing import Array, PyTree

KVFormats = KVFormat | Sequence[KVFormat]
"""One format for all layers, or one per layer."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Result over all scored tokens.

    Attributes:
      tokens: Tokens that were predicted.
      nll: Sum of their negative log likelihoods, nats.
      kl: Mean ``KL(reference || model)`` in nats, or None without a reference.
      top1_agreement: Fraction of positions where both prefer the same token, or None.
    """

    tokens: int
    nll: float
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log likelihood; inf beyond the range of floats."""
        try:
            return math.exp(self.nll / self.tokens)
        except OverflowError:  # a model that quantization destroyed
            return math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Code length of the text the tokens spell, which has ``num_bytes`` bytes."""
        return self.nll / math.log(2) / num_bytes


def windows(ids: np.ndarray, seq_len: int, bos_id: int | None) -> list[np.ndarray]:
    """Cuts a long text into sequences to score: bos (if there is one), then ``seq_len - 1`` tokens.

    Args:
      ids: Tokens of the text without special tokens.
      seq_len: Tokens per sequence, bos included. Without bos the first token is not scored.
      bos_id: Begin-of-sequence token, or None.

    Returns:
      int32 sequences which cover all of ``ids``, each scored token in exactly one.
    """
    if seq_len < 2:
        raise ValueError(f"{seq_len=} must be at least 2: a token is predicted from one before it")
    if bos_id is not None:
        first, step = np.asarray([bos_id], np.int32), seq_len - 1
        parts = [ids[i : i + step] for i in range(0, len(ids), step)]
        return [np.concatenate([first, part.astype(np.int32)]) for part in parts]
    # One token of overlap: the last of a window is the first context of the next.
    starts = range(0, max(len(ids) - 1, 1), seq_len - 1)
    return [ids[i : i + seq_len].astype(np.int32) for i in starts]


def score(
    module: Decoder,
    params: PyTree,
    sequences: Sequence[np.ndarray],
    *,
    kv_format: KVFormats | None = None,
    static_scales: StaticScales | None = None,
    reference: tuple[Decoder, PyTree] | None = None,
    batch_size: int = 8,
    chunk: int = 128,
    progress: str | None = None,
) -> Scores:
    """Scores every token of every sequence but the first ones.

    Args:
      module: The model.
      params: Its parameters, quantized or not.
      sequences: Integer arrays of at least two tokens.
      kv_format: Format of the KV cache that the sequences go through, or None to score without a
        cache.
      static_scales: For layers whose format is static, as ``QuantizedKVCache.init`` takes them.
      reference: Model and parameters to compare with; it runs with a cache of its own dtype.
      batch_size: Sequences scored together.
      chunk: Tokens appended to the cache at a time.
      progress: Label of a progress bar on standard error; None for no bar.

    Returns:
      The sums. They do not depend on ``batch_size`` or ``chunk`` beyond float32 rounding.

    Raises:
      ValueError: If there is no sequence, one is too short, or an argument is not positive.
    """
    if not sequences or min(len(s) for s in sequences) < 2:
        raise ValueError(
            f"{len(sequences)} sequences, the shortest of {min(map(len, sequences), default=0)} "
            "tokens: at least one is needed, and two tokens in each"
        )
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"{batch_size=} and {chunk=} must be positive")
    longest = max(len(s) for s in sequences) - 1  # the last token is only predicted
    batch_size = min(batch_size, len(sequences))
    chunk = min(chunk, longest) if kv_format is not None else longest
    padded = -(-longest // chunk) * chunk
    caches: list[QuantizedKVCache | None] = [None, None]
    if kv_format is not None:
        caches[0] = _cache(module, kv_format, static_scales, batch_size, padded)
        if reference is not None:
            plain = KVFormat(jnp.dtype(reference[0].dtype).name)
            caches[1] = _cache(reference[0], plain, None, batch_size, padded)
    step = jax.jit(
        _make_step(module, reference and reference[0]),
        donate_argnums=1,
        compiler_options=compiler_options(activation_qtype(params)),
    )
    both = (params, None if reference is None else reference[1])

    # By length, so that batches have little padding; sums do not mind the order.
    order = sorted(sequences, key=len, reverse=True)
    sums: list[Array] = []
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=progress, disable=progress is None, unit="batch"):
        tokens, targets, counts = _pad(order[start : start + batch_size], batch_size, padded)
        caches = [c if c is None else c.reset_slots(np.ones(batch_size, bool)) for c in caches]
        for begin in range(0, int(counts.max()), chunk):
            part = slice(begin, begin + chunk)
            caches, part_sums = step(
                both, caches, tokens[:, part], targets[:, part], np.int32(begin), counts
            )
            sums.append(part_sums)
    totals = np.sum([np.asarray(s, np.float64) for s in sums], axis=0)
    count = sum(len(s) - 1 for s in sequences)
    if reference is None:
        return Scores(count, float(totals[0]))
    return Scores(count, float(totals[0]), float(totals[1] / count), float(totals[2] / count))


def _make_step(module: Decoder, reference: Decoder | None) -> Callable[..., Any]:
    def step(
        params: tuple[PyTree, PyTree],
        caches: list[QuantizedKVCache | None],
        tokens: Array,
        targets: Array,
        begin: Array,
        counts: Array,
    ) -> tuple[list[QuantizedKVCache | None], Array]:
        """One chunk: the caches, and ``[nll, kl, agreements]`` summed over its scored tokens."""
        offsets = begin + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        valid = offsets < counts[:, None]
        positions = jnp.broadcast_to(offsets, tokens.shape)
        arguments = (tokens, positions)

        def run(model: Decoder, weights: PyTree, cache: QuantizedKVCache | None) -> Any:
            if cache is None:  # trailing padding is never seen by causal attention
                return model.apply({"params": weights}, *arguments)
            return model.apply({"params": weights}, *arguments, cache, None, valid)

        def total(per_token: Array) -> Array:
            return jnp.sum(jnp.where(valid, per_token.astype(jnp.float32), jnp.float32(0)))

        logits, cache = run(module, params[0], caches[0])
        logp = jax.nn.log_softmax(logits, axis=-1)
        nll = -jnp.take_along_axis(logp, targets[:, :, None], axis=-1)[:, :, 0]
        zero = jnp.float32(0)
        if reference is None:
            return [cache, None], jnp.stack([total(nll), zero, zero])
        ref_logits, ref_cache = run(reference, params[1], caches[1])
        kl = total(kl_divergence(ref_logits, logits))
        same = total(top1_agreement(ref_logits, logits))
        return [cache, ref_cache], jnp.stack([total(nll), kl, same])

    return step


def _cache(
    module: Decoder,
    kv_format: KVFormats,
    static_scales: StaticScales | None,
    batch_size: int,
    tokens: int,
) -> QuantizedKVCache:
    """An empty cache where every slot owns the pages of ``tokens`` tokens."""
    config = module.config
    page_size = min(tokens, 64)
    pages_per_seq = -(-tokens // page_size)
    cache = QuantizedKVCache.init(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=batch_size * pages_per_seq,
        page_size=page_size,
        max_seqs=batch_size,
        pages_per_seq=pages_per_seq,
        fmt=kv_format,
        static_scales=static_scales,
    )
    table = np.arange(batch_size * pages_per_seq, dtype=np.int32)
    return cache.with_page_table(table.reshape(batch_size, pages_per_seq))


def _pad(
    sequences: Sequence[np.ndarray], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets int32 ``[rows, length]``, and how many of each row count."""
    tokens = np.zeros((rows, length), np.int32)
    targets = np.zeros((rows, length), np.int32)
    counts = np.zeros(rows, np.int32)
    for row, sequence in enumerate(sequences):
        counts[row] = len(sequence) - 1
        tokens[row, : counts[row]] = sequence[:-1]
        targets[row, : counts[row]] = sequence[1:]
    return tokens, targets, counts
