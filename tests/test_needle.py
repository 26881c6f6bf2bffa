"""Facts anywhere in 100,000 tokens are retrieved from a quantized cache as from a 16-bit one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops.attention import paged_attention
from qjax.ops.kv import append, read
from tests.tolerances import relative_error

LENGTH, PAGE, DIM = 100_000, 64, 64
PLACES = (0, 1, 63, 64, 31_415, 50_000, 99_967, 99_998)
"""Where the facts are: ends and middle, both sides of a page's edge, a page that is not full."""
SCALE = DIM**-0.5
# The largest relative error of an element; of int8 for values of 1 where the largest is 4.
FORMATS = {
    KVFormat("bfloat16"): 2.0**-8,
    KVFormat("int8", "tracked"): 2.0**-6,
    KVFormat("float8_e4m3fn", "tracked"): 2.0**-4,
    KVFormat("float8_e5m2", "tracked"): 2.0**-3,
}


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries ``[8, d]``, keys and values ``[length, d]``.

    Query ``i`` has the direction of the key at ``PLACES[i]``. All other logits have a standard
    deviation of 1, so that together they weigh ``1e5 * exp(1 / 2)``, ``exp(12)``; the fact's is 20.
    Its value is a word of signs, of magnitudes around 1.
    """
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, LENGTH, DIM)).astype(np.float32)
    words = np.sign(rng.normal(size=(len(PLACES), DIM))) * rng.uniform(0.7, 1.3, DIM)
    directions = rng.normal(size=(len(PLACES), DIM))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    keys[list(PLACES)], values[list(PLACES)] = 20 * directions, words
    return (directions / SCALE).astype(np.float32), keys, values


def exact(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention of all queries in float64."""
    logits = SCALE * problem()[0].astype(np.float64) @ keys.astype(np.float64).T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ values.astype(np.float64)


@functools.cache
def reference() -> np.ndarray:
    return exact(*problem()[1:])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_fact_is_found_wherever_it_is(fmt):
    """And the result is as far from float64 attention as its own rounding allows.

    With element errors of at most ``e``, independent and uniform, the fact's logit of 20 is off by
    ``20 e sqrt(sum u^4 / 3)``, 5 sigma of which move its weight of 0.9997 by less than ``e / 100``.
    So the result is the fact's value, off by ``e``, and the rest, which weighs nothing.
    """
    queries, keys, values = problem()
    pages = -(-LENGTH // PAGE)
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=1,
        head_dim=DIM,
        num_pages=pages,
        page_size=PAGE,
        max_seqs=1,
        pages_per_seq=pages,
        fmt=fmt,
    ).with_page_table(np.random.default_rng(1).permutation(pages)[None].astype(np.int32))
    at, slot = jnp.arange(LENGTH, dtype=jnp.int32)[None], jnp.zeros((1,), jnp.int32)

    @jax.jit
    def run(cache: QuantizedKVCache, queries, keys, values):
        """The last token asks by itself (page by page), and with the one before it (in chunks)."""
        cache = append(cache, 0, keys[None, :, None], values[None, :, None], at, slot, at >= 0)

        def ask(q: jax.Array) -> jax.Array:
            last = at[:, -q.shape[1] :]
            return paged_attention(q, cache, 0, last, slot, slot + LENGTH, scale=SCALE)[0, -1]

        one = queries[None, None]
        return ask(one), ask(jnp.repeat(one, 2, axis=1)), read(cache, 0, slot, LENGTH)

    decoded, chunked, held = run(cache, queries, keys, values)
    held = [np.asarray(x)[0, :, 0] for x in held]
    # Summed in float32 over 100,000 tokens, nothing is lost beyond what was rounded at the start.
    stored = exact(held[0], held[1])
    for out in (decoded, chunked):
        assert relative_error(out, stored) < 1e-5
        np.testing.assert_array_equal(np.sign(out), np.sign(reference()))
        np.testing.assert_array_equal(np.sign(out), np.sign(values[list(PLACES)]))
        assert np.abs(np.asarray(out) - reference()).max() <= 1.3 * FORMATS[fmt]
