"""Products with quantized weights that are worth measuring: shapes, operands, configs, errors."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats import FORMATS, QuantFormat
from qjax.ops.packed import packed_config, packed_kernels
from qjax.pallas_kernels import plain
from qjax.quantize import quantize

SHAPES: dict[str, tuple[int, int]] = {
    "8b_qkv": (4096, 6144),
    "8b_o": (4096, 4096),
    "8b_gate_up": (4096, 28672),
    "8b_down": (14336, 4096),
    "8b_lm_head": (4096, 128256),
    "70b_qkv": (8192, 10240),
    "70b_o": (8192, 8192),
    "70b_gate_up": (8192, 57344),
    "70b_down": (28672, 8192),
    "qwen3_8b_gate_up": (4096, 24576),
    "qwen3_8b_down": (12288, 4096),
    "qwen3_8b_lm_head": (4096, 151936),
    "ideal": (8192, 33792),  # 132 multiprocessors times 256 features
}
"""``(k, n)`` of linear layers, projections that share their input fused."""

MAX_ERROR = 5e-3
"""Largest relative error that is timed: thrice the rounding of a bfloat16 result (1.65e-3), which
leaves room for weights that a backend rounds to bfloat16."""


def shape_of(name: str) -> tuple[int, int]:
    """``(k, n)`` of a name or of ``KxN``.

    Raises:
      ValueError: If it is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    parts = name.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"unknown shape {name!r}; use KxN or one of {', '.join(SHAPES)}")
    return int(parts[0]), int(parts[1])


DTYPES = ("bfloat16", "float16")
"""Types of activations that the kernels take."""


def check_products(formats: str, shapes: str, rows: str) -> None:
    """Refuse what is not lists, parted by commas, of formats, shapes and numbers of rows.

    Raises:
      ValueError: With the value and what is possible.
    """
    for name in formats.split(","):
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")
    for shape in shapes.split(","):
        shape_of(shape)
    if not all(part.isdigit() and int(part) for part in rows.split(",")):
        raise ValueError(f"--rows {rows!r} must be numbers such as 1,64")


def activations(m: int, k: int, dtype: str = "bfloat16") -> jax.Array:
    """Random activations ``(m, k)``, the same in every process."""
    return jax.random.normal(jax.random.key(m), (m, k), jnp.float32).astype(dtype)


def weight_values(key: jax.Array, k: int, n: int) -> jax.Array:
    """Random float32 weights ``(k, n)`` of a layer's size."""
    return jax.random.normal(key, (k, n), jnp.float32) * k**-0.5


def kernel_configs(x: jax.Array, w: Any, search: int) -> list[tuple[Any, str]]:
    """Configs to time, each with its kernel and where it comes from, such as ``w8a8: search``.

    Args:
      x: Activations ``(m, k)``.
      w: A packed weight, or a plain 16-bit one.
      search: How many configs of the kernel that is preferred besides the one that ``packed_dot``
        would take, and half as many of the others: each kernel's best guesses or their neighbours.
    """
    if isinstance(w, jax.Array):
        m, (k, n) = x.shape[0], w.shape
        best = plain.heuristic_config(m, k, n)
        others = [config for config in plain.search_space(m, k, n) if config != best]
        others = others[:: max(1, len(others) // max(1, search))][:search]
        return [(best, "heuristic"), *((other, "search") for other in others)]
    best, source = packed_config(x, w)
    found = [(best, f"{kernel_name(best)}: {source}")]
    for place, (kernel, problem) in enumerate(packed_kernels(x, w)):
        others = [other for other in kernel.search_space(problem) if other != best]
        count = search if place == 0 else (search + 1) // 2
        found += [(other, f"{kernel_name(other)}: search") for other in others[:count]]
    return found


def kernel_name(config: Any) -> str:
    """The kernel that a config belongs to, as tables of measured configs name it."""
    return type(config).__module__.rsplit(".", 1)[-1]


def entry_of(x: jax.Array, w: Any, config: Any) -> str:
    """Kernel, problem and config of a product of a packed weight, JSON: an entry of a table."""
    name = kernel_name(config)
    problem = next(p for kernel, p in packed_kernels(x, w) if kernel.__name__.endswith(f".{name}"))
    entry = {
        "kernel": name,
        "problem": dataclasses.asdict(problem),
        "config": dataclasses.asdict(config),
    }
    return json.dumps(entry)


def quantized_activations(x: jax.Array, fmt: QuantFormat | None) -> Any:
    """Activations as the kernels multiply them, for ``reference_program``.

    In a program of its own: within one, XLA on GPUs takes the rounding to fp8 and back for excess
    and drops it.
    """
    if fmt is None or fmt.activation is None:
        return x
    return quantize(x, fmt.activation, axis=-1, dtype=jnp.float32)


@functools.cache
def reference_program(platform: str) -> Any:
    """``(x, w) -> float32 product``; without autotuning, which would take seconds."""

    def reference(x: Any, w: Any) -> jax.Array:
        wide, weight = (dequantized(value) for value in (x, w))
        return jnp.dot(wide, weight, precision=jax.lax.Precision.HIGHEST)

    def dequantized(value: Any) -> jax.Array:
        if isinstance(value, jax.Array):
            return value.astype(jnp.float32)
        return value.dequantize(jnp.float32)

    return jax.jit(reference, compiler_options=quick_options(platform))


@functools.cache
def error_program(platform: str) -> Any:
    """``(out, reference) -> |out - reference| / |reference|``; ``out`` may be partial sums."""

    def error(out: jax.Array, reference: jax.Array) -> jax.Array:
        out = out.sum(0) if out.ndim > reference.ndim else out
        off = jnp.linalg.norm(out.astype(jnp.float32) - reference)
        return off / jnp.linalg.norm(reference)

    return jax.jit(error, compiler_options=quick_options(platform))


def quick_options(platform: str) -> dict[str, Any] | None:
    """Options with which XLA tries nothing on the device while it compiles."""
    return {"xla_gpu_autotune_level": 0} if platform == "gpu" else None
