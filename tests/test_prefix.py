"""Pages shared by prompts that begin alike: bookkeeping, and results that do not change."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ops.kv import read
from qjax.sampling import SamplingParams
from qjax.serving import Engine, Request
from qjax.serving.pages import PageTable
from qjax.serving.prefix import PrefixCache
from qjax.serving.scheduler import chunk_at, page_keys
from tests.test_engine import VOCAB, kv_of, make_engine


def table(num_pages: int = 8) -> PageTable:
    return PageTable(num_pages, page_size=4, max_seqs=3, pages_per_seq=4)


def keys(*tokens: int) -> list[tuple[int, ...]]:
    """Of a prompt with one more token."""
    return page_keys((*tokens, 0), 4, 256)


# --- bookkeeping ------------------------------------------------------------------------------


def test_chunks_begin_at_the_same_places_in_every_prompt():
    assert [chunk_at(p, 150, 64) for p in (0, 40, 63, 64, 130)] == [
        (64, 64),
        (64, 64),
        (64, 64),
        (64, 128),
        (32, 150),
    ]
    assert chunk_at(20, 30, 64) == (32, 30)


def test_a_page_is_the_same_only_if_the_same_programs_computed_it():
    tokens = tuple(range(100))
    short, long, longer = (page_keys(tokens[:n], 8, 32) for n in (30, 70, 100))
    assert [len(k) for k in (short, long, longer)] == [3, 8, 12]
    assert short == long[:3] == longer[:3]  # the first 32 tokens are one chunk of 32 in all
    assert long[:8] == longer[:8] and page_keys(tokens[:10], 8, 32)[0] != short[0]
    # Pages across two chunks, of which the second differs.
    assert page_keys(tokens[:70], 20, 32)[1] == page_keys(tokens[:90], 20, 32)[1]
    assert page_keys(tokens[:45], 20, 32)[1] != page_keys(tokens[:70], 20, 32)[1]
    assert page_keys(tokens[:20], 20, 32) == []  # one token is left over


def test_the_longest_known_beginning_is_found():
    pages = table()
    tree = PrefixCache(pages)
    pages.reserve(0, 16)
    held = pages.pages_of(0)
    tree.insert(keys(*range(12)), held)
    assert tree.match(keys(*range(12))) == held[:3] == tree.match(keys(*range(14)))
    assert tree.match(keys(0, 1, 2, 3, 9, 9, 9, 9)) == held[:1]
    assert tree.match(keys(1, 1, 2, 3)) == tree.match(keys(0, 1)) == []
    assert len(tree) == 3 and tree.idle_pages == 0
    pages.reserve(1, 16)
    tree.insert(keys(*range(8)), pages.pages_of(1))  # is there: the second pages stay private
    assert tree.match(keys(*range(8))) == held[:2] and len(tree) == 3
    pages.release(0)
    pages.release(1)
    assert pages.free_pages == 5 and tree.idle_pages == 3


def test_what_is_longest_unused_goes_first_and_what_is_in_use_stays():
    pages = table()
    tree = PrefixCache(pages)
    for first in (10, 20):  # two pages each
        pages.reserve(0, 8)
        tree.insert(keys(*range(first, first + 8)), pages.pages_of(0))
        pages.release(0)
    old, new = (tree.match(keys(*range(first, first + 8))) for first in (20, 10))
    assert pages.free_pages == 4 and tree.fits(16, new)
    tree.reserve(0, 16, new)
    assert pages.pages_of(0)[:2] == new and pages.free_pages == 2 and tree.idle_pages == 2
    tree.reserve(1, 12, [])  # needs one of the two idle pages: the end of the older prompt
    assert tree.match(keys(*range(20, 28))) == old[:1]
    assert tree.match(keys(*range(10, 18))) == new
    assert tree.fits(4, []) and not tree.fits(8, []) and not tree.fits(12, old[:1])
    assert tree.evict(5) == 1 and len(tree) == 2
    pages.release(0)
    pages.release(1)
    assert tree.evict(5) == 2 and pages.free_pages == 8 and pages.holders.max() == 0


def test_pages_nobody_holds_cannot_be_shared():
    pages = table()
    with pytest.raises(ValueError, match="page=3 is free; only pages that someone holds"):
        pages.reserve(0, 8, [3])
    pages.reserve(0, 8)
    with pytest.raises(ValueError, match="slot=0 has 2 pages; 3 cannot be shared"):
        pages.share(0, [0, 1, 0])
    with pytest.raises(ValueError, match="length=4 needs 1 pages, 2 of them shared"):
        pages.reserve(1, 4, pages.pages_of(0))
    pages.reserve(1, 12, pages.pages_of(0))
    pages.release(0)
    assert pages.free_pages == 5  # the second still holds all three
    pages.release(1)
    with pytest.raises(ValueError, match="page=0 is free already"):
        pages.drop([0])


# --- results ----------------------------------------------------------------------------------


@functools.cache
def engines() -> tuple[Engine, Engine]:
    """Without and with a prefix cache; room for two longest sequences in three slots."""
    kv = kv_of("fp8_e4m3", "int8")
    plain, _ = make_engine(("none", "int8"), kv, num_pages=16)
    shared, _ = make_engine(("none", "int8"), kv, num_pages=16, prefix_cache=True)
    return plain, shared


def prompts(*shape: tuple[int, int]) -> list[tuple[int, ...]]:
    """Prompts of ``n`` tokens, of which the first ``common`` are the same in all."""
    rng = np.random.default_rng(7)
    base = rng.integers(4, VOCAB, 64).tolist()
    return [(*base[:common], *rng.integers(4, VOCAB, n - common).tolist()) for n, common in shape]


def requests(texts: Any, new: int = 14) -> list[Request]:
    return [Request(p, SamplingParams(max_new_tokens=new, ignore_eos=True)) for p in texts]


def test_tokens_are_the_same_and_work_is_saved():
    plain, shared = engines()
    work = requests(prompts((40, 36), (44, 36), (50, 20), (38, 36), (30, 0), (9, 8), (42, 36)))
    want = [c.token_ids for c in plain.generate(work)]
    before = shared.stats.prefill_tokens, shared.stats.reused_tokens
    assert [c.token_ids for c in shared.generate(work)] == want
    computed = shared.stats.prefill_tokens - before[0]
    reused = shared.stats.reused_tokens - before[1]
    total = sum(len(r.prompt) for r in work)
    assert computed + reused == total and reused >= 3 * 32
    assert [c.token_ids for c in shared.generate(work[::-1])] == want[::-1]
    # All at once: the first computes what the others wait for, 32 tokens of 40 in full pages.
    before = shared.stats.prefill_tokens
    same = requests([prompts((40, 0))[0]] * 3)
    assert len({c.token_ids for c in shared.generate(same)}) == 1
    assert shared.stats.prefill_tokens - before <= 40 + 2 * 8
    assert shared.free_pages == shared.config.total_pages
    assert shared.stats.programs <= 3


def test_what_is_stored_is_the_same_to_the_bit():
    """Keys, values, scales and running statistics, after prefill and after some decode steps."""
    _, engine = engines()
    texts = prompts((44, 36), (39, 33))

    def run(texts: Any) -> list[list[np.ndarray]]:
        for request in requests(texts, new=20):
            engine.submit(request)
        engine.step()
        held = [
            [
                np.asarray(x)
                for layer in range(2)
                for x in (
                    *read(engine.cache, layer, jnp.asarray([slot], jnp.int32), len(text) + 16),
                    *(r[:, slot] for r in engine.cache.running if r is not None),
                )
            ]
            for slot, text in enumerate(texts)
        ]
        rows = np.asarray(engine.cache.page_table)[: len(texts)]
        while engine.has_work:
            engine.step()
        assert engine._prefixes is not None
        shares.append((rows[0, :4] == rows[-1, :4]).all() and len(texts) == 2)
        engine._prefixes.evict(99)
        return held

    shares: list[bool] = []
    alone = [run([text])[0] for text in texts]
    together = run(texts)
    assert shares == [False, False, True]
    for one, other in zip(alone, together, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_room_is_made_for_new_prompts():
    plain, shared = engines()
    work = requests(prompts(*((17 + 3 * i, 16 * (i % 2)) for i in range(9))), new=9)
    want = [c.token_ids for c in plain.generate(work)]
    assert [c.token_ids for c in shared.generate(work)] == want
    assert shared.free_pages == 16 and shared._pages.free_pages < 16  # some are remembered
    assert shared._pages.holders.max() == 1
