"""Any history of sequences that grow, fork, share beginnings, end and are evicted.

After every step all that nobody may read (free pages, places not yet written) is overwritten with
huge values. What is read, and attention over it, must equal a model that keeps every sequence in
NumPy by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops.attention import paged_attention
from qjax.ops.kv import append, read
from qjax.serving.pages import PageTable
from qjax.serving.prefix import PrefixCache
from tests.kv_reference import STATIC, expected
from tests.test_attention import reference
from tests.tolerances import F32_SUM, relative_error

SLOTS, PER_SEQ, PAGES, PAGE, HEADS, DIM, CHUNK = 3, 4, 9, 4, 2, 8, 6
LONGEST = PER_SEQ * PAGE
FORMAT = KVFormat("int8", "tracked")
ROWS = jnp.arange(SLOTS, dtype=jnp.int32)
# Key and value of a token depend on it and its position, as if position were all of its context.
TOKENS = np.random.default_rng(0).normal(size=(2, 2, LONGEST, HEADS, DIM)) * 2.0 ** (
    np.random.default_rng(1).integers(-4, 5, (2, 2, LONGEST, HEADS, 1))
)
TOKENS = TOKENS.astype(np.float32)  # [key or value, token, position, ...]
QUERY = np.random.default_rng(2).normal(size=(SLOTS, 1, 2 * HEADS, DIM)).astype(np.float32)

jit_append = jax.jit(append, static_argnums=1)
jit_read = jax.jit(read, static_argnums=(1, 3))
jit_reset = jax.jit(QuantizedKVCache.reset_slots)


@jax.jit
def attend(cache: QuantizedKVCache, lengths: jax.Array) -> jax.Array:
    positions = jnp.maximum(lengths - 1, 0)[:, None]
    return paged_attention(jnp.asarray(QUERY), cache, 0, positions, ROWS, lengths, scale=0.3)


@jax.jit
def poison(cache: QuantizedKVCache, live: jax.Array) -> QuantizedKVCache:
    """Overwrite the places ``[page, offset]`` that nobody may read."""
    keep = live[:, None, :]

    def codes(pages: jax.Array) -> jax.Array:
        return jnp.where(keep[..., None], pages, jnp.asarray(101, pages.dtype))

    def scales(held: jax.Array) -> jax.Array:
        return jnp.where(keep, held, jnp.float32(1e30))

    (running,) = cache.page_running
    assert running is not None
    full = jnp.all(live, axis=1)[:, None, None]
    return dataclasses.replace(
        cache,
        keys=tuple(map(codes, cache.keys)),
        values=tuple(map(codes, cache.values)),
        key_scales=tuple(s if s is None else scales(s) for s in cache.key_scales),
        value_scales=tuple(s if s is None else scales(s) for s in cache.value_scales),
        page_running=(jnp.where(full, running, jnp.float32(1e30)),),
    )


class Sequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pages = PageTable(PAGES, PAGE, SLOTS, PER_SEQ)
        self.tree = PrefixCache(self.pages)
        self.held: dict[int, list[int]] = {}  # tokens of every running sequence
        self.room: dict[int, int] = {}
        self.remembered: dict[int, int] = {}  # written places of pages that only the tree holds
        self.cache = QuantizedKVCache.init(
            num_layers=1,
            num_kv_heads=HEADS,
            head_dim=DIM,
            num_pages=PAGES,
            page_size=PAGE,
            max_seqs=SLOTS,
            pages_per_seq=PER_SEQ,
            fmt=FORMAT,
            share_pages=True,
        )

    def begin(self, slot: int, tokens: list[int], room: int) -> None:
        """A sequence that takes over these tokens in full pages."""
        self.held[slot], self.room[slot] = tokens, room
        self.cache = self.cache.with_page_table(self.pages.table)
        lengths = np.zeros(SLOTS, np.int32)
        lengths[slot] = len(tokens)
        self.cache = jit_reset(self.cache, np.arange(SLOTS) == slot, lengths)

    @staticmethod
    def keys(tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + PAGE]) for i in range(0, len(tokens) - PAGE + 1, PAGE)]

    @precondition(lambda self: len(self.held) < SLOTS)
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=10), more=st.integers(0, 5))
    def start(self, prompt: list[int], more: int) -> None:
        slot = min(set(range(SLOTS)) - set(self.held))
        prefix = self.tree.match(self.keys(prompt))
        room = min(len(prompt) + more, LONGEST)
        if self.tree.fits(room, prefix):
            self.tree.reserve(slot, room, prefix)
            self.begin(slot, prompt[: len(prefix) * PAGE], room)
            self.write({slot: prompt[len(prefix) * PAGE :]})

    @precondition(lambda self: self.held)
    @rule(chunks=st.lists(st.lists(st.integers(0, 1), max_size=CHUNK), min_size=3, max_size=3))
    def grow(self, chunks: list[list[int]]) -> None:
        self.write({slot: chunks[slot] for slot in self.held})

    def write(self, chunks: dict[int, list[int]]) -> None:
        for at in range(0, LONGEST, CHUNK):
            self.write_chunk({slot: chunk[at : at + CHUNK] for slot, chunk in chunks.items()})

    def write_chunk(self, chunks: dict[int, list[int]]) -> None:
        x = np.full((2, SLOTS, CHUNK, HEADS, DIM), np.nan, np.float32)
        positions, valid = np.zeros((SLOTS, CHUNK), np.int32), np.zeros((SLOTS, CHUNK), bool)
        for slot, chunk in chunks.items():
            start = len(self.held[slot])
            chunk = chunk[: self.room[slot] - start]
            where = np.arange(start, start + len(chunk))
            x[:, slot, : len(chunk)] = TOKENS[:, chunk, where]
            positions[slot, : len(chunk)] = where
            valid[slot, : len(chunk)] = True
            self.held[slot] = self.held[slot] + chunk
        if valid.any():
            self.cache = jit_append(self.cache, 0, x[0], x[1], positions, ROWS, valid)

    @precondition(lambda self: 0 < len(self.held) < SLOTS)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        source = data.draw(st.sampled_from(sorted(self.held)))
        slot = min(set(range(SLOTS)) - set(self.held))
        full = len(self.held[source]) // PAGE
        prefix = self.pages.pages_of(source)[:full]
        if self.tree.fits(self.room[source], prefix):
            self.tree.reserve(slot, self.room[source], prefix)
            self.begin(slot, self.held[source][: full * PAGE], self.room[source])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), remember=st.booleans())
    def free(self, data: Any, remember: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        if remember:
            keys = self.keys(self.held[slot])
            self.tree.insert(keys, self.pages.pages_of(slot))
            self.remembered |= dict.fromkeys(self.pages.pages_of(slot)[: len(keys)], PAGE)
        self.pages.release(slot)
        del self.held[slot], self.room[slot]

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        idle = self.tree.idle_pages
        assert self.tree.evict(count) == min(count, idle)

    @invariant()
    def everything_reads_as_its_model(self) -> None:
        holders = np.zeros(PAGES, int)
        written = np.zeros(PAGES, int)
        for page in self.tree._nodes:
            holders[page] += 1
            written[page] = self.remembered[page]
        for slot, tokens in self.held.items():
            for number, page in enumerate(self.pages.pages_of(slot)):
                holders[page] += 1
                here = min(max(len(tokens) - number * PAGE, 0), PAGE)
                written[page] = max(written[page], here)
        np.testing.assert_array_equal(self.pages.holders, holders)
        assert sorted(self.pages._free) == np.flatnonzero(holders == 0).tolist()
        live = np.arange(PAGE)[None, :] < written[:, None]
        self.cache = poison(self.cache, live)
        if not self.held:
            return
        lengths = np.zeros(SLOTS, np.int32)
        want = np.zeros((2, SLOTS, LONGEST, HEADS, DIM), np.float32)
        for slot, tokens in self.held.items():
            lengths[slot] = len(tokens)
            if tokens:
                x = TOKENS[:, tokens, np.arange(len(tokens))]
                for which in range(2):
                    want[which, slot, : len(tokens)], _ = expected(x[which], FORMAT, STATIC[0])
        got = jit_read(self.cache, 0, ROWS, LONGEST)
        seen = (np.arange(LONGEST)[None, :] < lengths[:, None])[..., None, None]
        np.testing.assert_array_equal(np.where(seen, got, 0), want)
        out = attend(self.cache, lengths)
        positions = np.maximum(lengths - 1, 0)[:, None]
        exact = reference(QUERY, want[0], want[1], positions, lengths, 0.3)
        assert relative_error(out, exact) < 5 * F32_SUM


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=20, stateful_step_count=15)
