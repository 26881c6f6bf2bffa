"""Time that calls take on the device, for benchmarks."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax


def device_seconds(
    calls: Sequence[Callable[[], Any]], launches: int
) -> tuple[list[list[float]], str]:
    """Times of each launch, cycling through the calls: of its kernels, where they can be had.

    Returns:
      ``(seconds, "cupti" or "wall")``, a list of kernel durations per launch.
    """
    jax.block_until_ready([call() for call in calls])
    if jax.devices()[0].platform != "gpu":
        seconds = []
        for i in range(launches):
            begin = time.perf_counter()
            jax.block_until_ready(calls[i % len(calls)]())
            seconds.append([time.perf_counter() - begin])
        return seconds, "wall"
    with _recorded() as kernels:
        jax.block_until_ready([calls[i % len(calls)]() for i in range(launches)])
    count, rest = divmod(len(kernels), launches)
    if not count or rest:
        raise RuntimeError(f"{len(kernels)} kernels in {launches} launches: not the same in each")
    times = [ms * 1e-3 for _, ms in kernels]
    return [times[i * count : (i + 1) * count] for i in range(launches)], "cupti"


def kernel_seconds(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """The kernels of one call on a GPU, the longest first.

    Returns:
      ``(name, launches, seconds of all of them together)`` for every kernel by name.
    """
    with _recorded() as kernels:
        jax.block_until_ready(call())
    found: dict[str, list[float]] = {}
    for name, ms in kernels:
        found.setdefault(name, []).append(ms * 1e-3)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


@contextmanager
def _recorded() -> Iterator[list[tuple[str, float]]]:
    """Names and milliseconds of the kernels that end inside, there when the block has ended."""
    # Through the profiler's own module: its public `measure` cannot change operands between calls.
    profiler: Any = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    kernels: list[tuple[str, float]] = []
    cupti._cupti_init()
    try:
        yield kernels
    finally:
        kernels += cupti._cupti_get_timings(True)
