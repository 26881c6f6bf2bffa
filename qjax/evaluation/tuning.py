"""Measuring the configs of products with packed weights, for ``scripts/autotune.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax._device import device_info
from qjax.evaluation.device_time import device_seconds
from qjax.evaluation.products import (
    MAX_ERROR,
    activations,
    entry_of,
    error_program,
    kernel_configs,
    quantized_activations,
    quick_options,
    reference_program,
    shape_of,
    weight_values,
)
from qjax.formats import QuantFormat, parse_format
from qjax.ops.packed import pack_for_mosaic, packed_dot, packed_unsupported_reason
from qjax.pallas_kernels import dequantize
from qjax.quantize import quantize, quantized_nbytes

Task = tuple[str, str, int]  # shape, format, rows

_SUM_BYTES_PER_S = 3e12  # partial sums come from the L2 cache


def splits_of(config: Any) -> int:
    """Partial sums that a kernel leaves."""
    return getattr(config, "splits", 1)


def plan(
    shapes: Sequence[str], formats: Sequence[str], rows: Sequence[int], workers: int
) -> list[list[Task]]:
    """Products for every worker, the most important first.

    Args:
      shapes, formats, rows: Each in the order of importance. Numbers of rows count most: all
        products of the first are measured before any of the second.
      workers: How many. A weight belongs to one, which makes it once.

    Returns:
      A list of tasks per worker.
    """
    weights = [(shape, name) for name in formats for shape in shapes]
    mine = [weights[i::workers] for i in range(workers)]
    return [[(shape, name, m) for m in rows for shape, name in part] for part in mine]


class Tuner:
    """Measures products; keeps the weights that it has made.

    Attributes:
      turn: A context in which this process has the device to itself. Everything that runs on it
        happens inside; lowering and compiling do not.
      search: See ``kernel_configs``.
      launches: Per config, at least.
      rotate_bytes: Copies of a weight are as large together, so that no cache serves them.
      dtype: Type of the activations.
      seconds: ``device_seconds``, or another for a test.
    """

    def __init__(
        self,
        turn: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        search: int,
        launches: int,
        rotate_bytes: float,
        dtype: str = "bfloat16",
        seconds: Callable[..., tuple[list[list[float]], str]] = device_seconds,
    ) -> None:
        self.turn = turn
        self.search = search
        self.launches = launches
        self.rotate_bytes = rotate_bytes
        self.dtype = dtype
        self.seconds = seconds
        self._weights: dict[tuple[str, str], list[Any]] = {}
        self._platform = jax.devices()[0].platform

    def tune(self, task: Task) -> Iterator[dict[str, Any]]:
        """Measure the configs of a product.

        Yields:
          A row per config with ``shape``, ``format``, ``m`` and ``error``, or ``us`` and
          ``details`` (an entry of a table as JSON) and what ``autotune.merge`` needs.
        """
        shape, name, m = task
        row: dict[str, Any] = {"shape": shape, "format": name, "m": m, "jax": jax.__version__}
        row["device"] = device_info().kind
        fmt, (k, _) = parse_format(name), shape_of(shape)
        if fmt is None:
            yield {**row, "error": f"{name} is no format of packed weights"}
            return
        try:
            weights = self._make(shape, name, fmt)
        except NotImplementedError as error:
            yield {**row, "error": str(error)}
            return
        x = self._run(jax.jit(lambda: activations(m, k, self.dtype)))
        reason = self._unsupported_reason(x, weights[0])
        if reason is not None:
            yield {**row, "error": reason}
            return
        xq = self._run(jax.jit(lambda x: quantized_activations(x, fmt)), x)
        reference = self._run(reference_program(self._platform), xq, weights[0])
        for config, source in kernel_configs(x, weights[0], self.search):
            details = entry_of(x, weights[0], config)
            done = {**row, "config": f"{source} {config}", "details": details}
            try:
                yield {**done, **self._time(x, weights, config, fmt, reference)}
            except Exception as error:  # it is a finding, and the other configs go on
                lines = str(error).strip().splitlines() or [""]
                yield {**done, "error": f"{type(error).__name__}: {lines[0][:300]}"}

    def _unsupported_reason(self, x: jax.Array, w: Any) -> str | None:
        return packed_unsupported_reason(x, w)

    def _product(self, x: jax.Array, w: Any, config: Any) -> jax.Array:
        return packed_dot(x, w, config=config, keep_splits=splits_of(config) > 1)

    def _run(self, program: Any, *arguments: Any) -> Any:
        """Run a jitted function, compiled outside the turn."""
        compiled = program.lower(*arguments).compile()
        with self.turn():
            return jax.block_until_ready(compiled(*arguments))

    def _make(self, shape: str, name: str, fmt: QuantFormat) -> list[Any]:
        """Equal copies of a packed weight."""
        if (shape, name) not in self._weights:
            k, n = shape_of(shape)

            def make() -> Any:
                w = weight_values(jax.random.key(0), k, n)
                return pack_for_mosaic(quantize(w, fmt, dtype=self.dtype))

            first = self._run(jax.jit(make))
            copies = 1
            if self._platform == "gpu":
                copies = min(64, max(2, int(self.rotate_bytes / quantized_nbytes(first)) + 1))
            copy = jax.jit(lambda w: jax.tree.map(jnp.copy, w)).lower(first).compile()
            with self.turn():
                others = jax.block_until_ready([copy(first) for _ in range(copies - 1)])
            self._weights[shape, name] = [first, *others]
        return self._weights[shape, name]

    def _time(
        self, x: jax.Array, weights: list[Any], config: Any, fmt: QuantFormat, reference: jax.Array
    ) -> dict[str, Any]:
        lowered = jax.jit(lambda x, w: self._product(x, w, config)).lower(x, weights[0])
        if isinstance(config, dequantize.Config):
            # XLA tries cuBLAS's algorithms for the product on the device while it compiles. Its own
            # (Triton) would take many seconds of it, for every shape.
            library: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
            with self.turn():
                compiled = lowered.compile(
                    compiler_options=library if self._platform == "gpu" else None
                )
        else:
            compiled = lowered.compile(compiler_options=quick_options(self._platform))
        shape = jax.ShapeDtypeStruct(reference.shape, x.dtype)
        splits = splits_of(config)
        if splits > 1:
            shape = jax.ShapeDtypeStruct((splits, *reference.shape), jnp.float32)
        compare = error_program(self._platform).lower(shape, reference).compile()
        with self.turn():
            error = float(compare(compiled(x, weights[0]), reference))
            if not error < MAX_ERROR:
                return {"error": f"wrong: relative error {error:.2e}, not timed"}
            calls = [lambda w=w: compiled(x, w) for w in weights]
            kernels, timing = self.seconds(calls, max(self.launches, len(weights)))
        us = statistics.median(map(sum, kernels)) * 1e6
        if splits > 1:
            # A model adds them where it reads the product anyway: in a normalisation, a rotation.
            us += splits * reference.size * 4 / _SUM_BYTES_PER_S * 1e6
        return {"us": us, "relative_error": error, "timing": timing}


@dataclasses.dataclass
class Progress:
    """What has been measured so far, for a line on the screen."""

    finished: int = 0
    failed: int = 0

    def line(self, task: Task, rows: Sequence[dict[str, Any]], error: str | None) -> str:
        """Count a task, and say how it went."""
        timed = [row for row in rows if row.get("us") is not None]
        problems = [error, *(row.get("error") for row in rows)]
        first = next((text for text in problems if text is not None), None)
        self.finished += error is None
        self.failed += first is not None
        name = f"{task[0]} {task[1]} m={task[2]}"
        if not timed:
            return f"{name}: {first or 'nothing to measure'}"
        best = min(timed, key=lambda row: row["us"])
        note = "" if first is None else f"; {first}"
        return f"{name}: {best['us']:.2f} us, {best['config']} of {len(timed)}{note}"
