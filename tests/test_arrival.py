"""What arrives is what ``quantize`` makes of the whole matrix; threads keep order and bounds."""

from __future__ import annotations

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.checkpoints import arrival
from qjax.checkpoints.arrival import plain_parameter, quantized_parameter, stored_parameter
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.pipeline import Workers
from qjax.formats import QuantFormat
from tests.checkpoint_models import assert_same_tree

N, K = 96, 80
BLOCK = QuantFormat("float8_e4m3fn", "block", block=(16, 32))
MX = QuantFormat("float4_e2m1fn", "group", group_size=16, scale_dtype="float8_e8m0fnu")


@pytest.fixture
def stored(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(N, K)).astype(np.float32).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("strip_rows", [7, 32])
@pytest.mark.parametrize(
    "fmt",
    [
        qjax.FP8_E4M3_CHANNEL,
        qjax.FP8_E4M3_TENSOR,
        BLOCK,
        qjax.INT8_CHANNEL,
        qjax.INT4_G32_ASYM,  # 80 columns: the last group is cut short
        qjax.W4A8_INT8.replace(group_size=32),  # steps over the whole of a row, in each strip
        MX,
    ],
    ids=lambda fmt: fmt.name,
)
def test_strips_give_the_codes_of_the_whole(
    fmt: QuantFormat, strip_rows: int, stored: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "_STRIP_BYTES", strip_rows * K * 2)
    with Workers() as workers:
        q = quantized_parameter(stored, fmt, jnp.float32, each=workers.each)
    expected = qjax.quantize(jnp.asarray(stored.T), fmt, dtype=jnp.float32)
    assert_same_tree(q, expected)
    assert isinstance(q.qvalue, jax.Array) and isinstance(q.scale, jax.Array)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_plain(
    transpose: bool, dtype: Any, stored: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "_STRIP_BYTES", 7 * K * 2)
    value = plain_parameter(stored, dtype, transpose=transpose)
    expected = (stored.T if transpose else stored).astype(dtype)
    np.testing.assert_array_equal(value, expected)
    stored[:] = 0
    np.testing.assert_array_equal(value, expected)
    vector = plain_parameter(np.array([1e30, 1.5], np.float32), jnp.float16, transpose=False)
    np.testing.assert_array_equal(vector, np.array([np.inf, 1.5], np.float16))


def test_what_accelerators_do_gives_the_same(
    stored: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = qjax.INT4_G32
    host = quantized_parameter(stored, fmt, jnp.bfloat16)
    plain = plain_parameter(stored, jnp.float32, transpose=True)
    monkeypatch.setattr(arrival, "_on_host", lambda: False)
    assert_same_tree(quantized_parameter(stored, fmt, jnp.bfloat16), host)
    np.testing.assert_array_equal(plain_parameter(stored, jnp.float32, transpose=True), plain)
    moved = stored_parameter({"a": stored.T, "b": plain})
    np.testing.assert_array_equal(moved["a"], stored.T)
    assert moved["b"] is plain


def test_results_can_be_donated(stored: np.ndarray) -> None:
    # jax does not own this memory and must not write to it.
    value = plain_parameter(stored, jnp.bfloat16, transpose=False)
    again = np.array(value)
    add = jax.jit(lambda x: x + jnp.ones((), x.dtype), donate_argnums=0)
    np.testing.assert_array_equal(add(value), again + np.ones((), again.dtype))


def test_workers_keep_order_and_the_limit() -> None:
    lock, running, most = threading.Lock(), 0, 0
    sizes = [5, 1, 1, 9, 3, 3, 1, 2, 9, 1]

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += sizes[item]
            most = max(most, running)
        time.sleep(0.002 * (item % 3))
        with lock:
            running -= sizes[item]
        return item

    with Workers() as workers:
        found = list(workers.in_order(range(len(sizes)), work, sizes.__getitem__, 6))
    assert found == list(range(len(sizes)))
    assert most == 9  # alone: it is larger than the limit


def test_errors_of_workers_come_in_their_place_and_leave_no_thread() -> None:
    seen: list[int] = []

    def work(item: int) -> int:
        seen.append(item)
        if item == 3:
            raise CheckpointError("damaged")
        return item

    found: list[int] = []
    with pytest.raises(ValueError, match="damaged"), Workers() as workers:
        for value in workers.in_order(range(50), work, lambda _: 1, 4):
            found.append(value)
    assert found == [0, 1, 2] and len(seen) < 20
    assert not [t for t in threading.enumerate() if t.name.startswith("qjax-")]


def test_the_default_device_holds_in_threads(stored: np.ndarray) -> None:
    device = jax.devices()[1]
    with jax.default_device(device), Workers() as workers:
        work = lambda array: plain_parameter(array, jnp.bfloat16, transpose=True)  # noqa: E731
        (value,) = workers.in_order([stored], work, lambda _: 1, 1)
    assert value.devices() == {device}
