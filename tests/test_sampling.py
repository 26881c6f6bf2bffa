from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.sampling import SamplingArrays, SamplingParams, sample

TRACES: list[tuple[int, ...]] = []


@jax.jit
def traced_sample(logits, settings, index):
    TRACES.append(logits.shape)
    return sample(logits, settings, index)


def draw(logits, params: list[SamplingParams], index) -> np.ndarray:
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (len(params),))
    logits = jnp.asarray(logits, jnp.float32)
    return np.asarray(traced_sample(logits, SamplingArrays.of(params), index))


def many(logits_row: np.ndarray, params: SamplingParams, draws: int) -> np.ndarray:
    """Token counts over ``draws`` positions of one request."""
    rows = np.broadcast_to(logits_row, (draws, logits_row.size))
    tokens = draw(rows, [params] * draws, np.arange(draws))
    return np.bincount(tokens, minlength=logits_row.size)


DRAWS = 4096
LOGITS = np.log(np.asarray([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))


def expect_distribution(counts: np.ndarray, probabilities: np.ndarray) -> None:
    expected = probabilities * DRAWS
    assert (counts[expected == 0] == 0).all(), counts
    # Five standard deviations of a binomial count: false alarms below 1e-5 for all cells together.
    slack = 5 * np.sqrt(expected * (1 - probabilities))
    assert (np.abs(counts - expected) <= slack).all(), (counts, expected)


@pytest.mark.parametrize(
    ("params", "probabilities"),
    [
        (dict(temperature=1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (dict(temperature=0.5), np.square([0.05, 0.4, 0.1, 0.3, 0.15])),
        (dict(temperature=1.0, top_k=2), [0, 0.4, 0, 0.3, 0]),
        (dict(temperature=1.0, top_k=99), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (dict(temperature=1.0, top_p=0.65), [0, 0.4, 0, 0.3, 0]),  # 0.4 is short, 0.7 reaches it
        (dict(temperature=1.0, top_p=1e-6), [0, 1, 0, 0, 0]),
        (dict(temperature=1.0, top_k=3, top_p=0.8), [0, 0.4, 0, 0.3, 0]),  # 0.7 / 0.85 > 0.8
    ],
    ids=["plain", "temperature", "top_k", "top_k_all", "top_p", "top_p_tiny", "top_k_then_top_p"],
)
def test_distribution(params, probabilities):
    probabilities = np.asarray(probabilities, np.float64)
    counts = many(LOGITS, SamplingParams(seed=7, **params), DRAWS)
    expect_distribution(counts, probabilities / probabilities.sum())


def test_greedy_takes_the_first_of_equals():
    logits = np.asarray([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert draw(logits, [SamplingParams()] * 2, 0).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_of_equals():
    counts = many(np.zeros(8, np.float32), SamplingParams(temperature=1.0, top_k=3), 256)
    assert np.flatnonzero(counts).tolist() == [0, 1, 2]


def test_masked_tokens_are_never_drawn():
    logits = np.where(np.arange(5) == 3, -np.inf, LOGITS)
    assert many(logits, SamplingParams(temperature=5.0, top_p=0.999), DRAWS)[3] == 0


def test_rows_do_not_influence_each_other(key):
    """The same request in another row, with other neighbours, draws the same token."""
    logits = np.asarray(jax.random.normal(key, (4, 300)))
    request = SamplingParams(temperature=0.9, top_p=0.9, seed=5)
    plain = SamplingParams(temperature=1.3, seed=6)
    greedy = SamplingParams()
    filtered = draw(logits, [request, plain, greedy, greedy], 3)
    # Row 1 alone among greedy rows runs the branch without the sort.
    unfiltered = draw(logits, [greedy, plain, greedy, greedy], 3)
    assert filtered[1] == unfiltered[1]
    moved = draw(logits[::-1], [greedy, greedy, greedy, request], 3)
    assert moved[3] == filtered[0]
    assert (filtered[2:] == logits[2:].argmax(-1)).all()


def test_seed_and_index_change_the_draw():
    rows = np.zeros((64, 1000), np.float32)
    by_index = draw(rows, [SamplingParams(temperature=1.0, seed=1)] * 64, np.arange(64))
    by_seed = draw(rows, [SamplingParams(temperature=1.0, seed=s) for s in range(64)], 0)
    again = draw(rows, [SamplingParams(temperature=1.0, seed=s) for s in range(64)], 0)
    assert len(set(by_index)) > 55 and len(set(by_seed)) > 55
    assert (by_seed == again).all()


def test_one_compilation_serves_all_settings():
    draw(np.zeros((4, 11)), [SamplingParams()] * 4, 0)
    before = len(TRACES)
    draw(np.zeros((4, 11)), [SamplingParams(temperature=1.0, top_k=i, seed=i) for i in range(4)], 5)
    assert len(TRACES) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_out_of_range_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        SamplingParams(**{field: value})
