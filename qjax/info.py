"""``python -m qjax.info``: what this device runs natively, what falls back, and why.

Nothing here is looked up by device name except peak rates: every dot and every storage type is
compiled once and the compiled program is read.
"""

from __future__ import annotations

import platform
import sys
import textwrap
from importlib import metadata

import jax

from qjax._device import (
    DeviceInfo,
    DotSupport,
    cudnn_unsupported_reason,
    device_info,
    mosaic_gpu_unsupported_reason,
    probe_dot,
)
from qjax.formats import FORMATS, QuantFormat

# Operand pairs that occur: 16-bit products of weight-only formats, and W8A8.
_DOTS = (
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float32"),
    ("float8_e4m3fn", "float8_e4m3fn", "float32"),
    ("float8_e4m3fn", "float8_e5m2", "float32"),
    ("int8", "int8", "int32"),
)


def stored_bits(dtype: str) -> float:
    """Bits that one element of a type takes in a device buffer, as compiled programs see it."""
    count = 4096
    compiled = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((count,), dtype)).compile()
    analysis = compiled.memory_analysis()
    size = getattr(analysis, "argument_size_in_bytes", 0)
    return 8 * size / count


def format_path(fmt: QuantFormat | None, dots: dict[tuple[str, str], DotSupport]) -> str:
    """How the XLA backend multiplies by a weight of this format here, in one line."""
    if fmt is None:
        return "16-bit product of the weights as they are"
    if fmt.activation is None:
        codes = f"codes stay {fmt.storage_dtype} in memory"
        return f"{codes}, converted where they are multiplied; 16-bit product"
    support = dots.get((fmt.activation.qtype, fmt.qtype))
    if support is None:
        support = probe_dot(fmt.activation.qtype, fmt.qtype, "float32" if fmt.is_float else "int32")
    return ("native: " if support.native else "falls back: ") + support.how


def report() -> list[str]:
    """The lines that ``python -m qjax.info`` prints."""
    info = device_info()
    lines = [
        f"qjax {_version('qjax')}, jax {jax.__version__}, jaxlib {_version('jaxlib')}, "
        f"flax {_version('flax')}, Python {platform.python_version()}",
        "",
        *_device_lines(info),
        "",
        "Products (small ones were compiled and read)",
    ]
    dots = {}
    for lhs, rhs, accumulator in _DOTS:
        support = dots[lhs, rhs] = probe_dot(lhs, rhs, accumulator)
        mark = "native    " if support.native else "falls back"
        lines.append(f"  {mark}  {lhs} x {rhs} -> {accumulator}: {support.how}")
    lines += ["", "Storage, bits per element in a device buffer"]
    types = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int4")
    lines.append("  " + ", ".join(f"{name} {stored_bits(name):g}" for name in types))
    lines += ["", "Weight formats on the XLA backend"]
    by_path: dict[str, list[str]] = {}
    for name, fmt in FORMATS.items():
        by_path.setdefault(format_path(fmt, dots), []).append(name)
    for path, names in by_path.items():
        lines += textwrap.wrap(", ".join(names), 96, initial_indent="  ", subsequent_indent="  ")
        lines.append(f"    {path}")
    reason = mosaic_gpu_unsupported_reason(info)
    lines += ["", "Pallas Mosaic GPU kernels"]
    lines.append("  this device can run them" if reason is None else f"  not here: {reason}")
    if reason is None and info.count > 1:
        lines += [
            "  with several devices they run in serve.py, on one or on --tp-size N, and under",
            "  jax.shard_map; elsewhere XLA's form is the default, which it can divide",
        ]
    reason = cudnn_unsupported_reason(info)
    lines += ["", "Prefill attention"]
    lines.append("  cuDNN's" if reason is None else f"  XLA's form: {reason}")
    return lines


def _device_lines(info: DeviceInfo) -> list[str]:
    lines = [f"Device     {info.count} x {info.kind} ({info.platform})"]
    if info.architecture:
        lines[0] += f", {info.architecture}, {info.core_count} multiprocessors"
    if info.memory_bytes:
        lines.append(f"Memory     {info.memory_bytes / 2**30:.1f} GiB for jax")
    if info.peaks is None:
        lines.append("Peak rates not known for this device")
        return lines
    peaks = info.peaks
    rates = [
        f"{peaks.bytes_per_s / 1e12:g} TB/s",
        f"bf16 {peaks.bf16_flops / 1e12:g} TFLOP/s",
        "no fp8 units" if peaks.fp8_flops is None else f"fp8 {peaks.fp8_flops / 1e12:g} TFLOP/s",
        "no int8 units" if peaks.int8_ops is None else f"int8 {peaks.int8_ops / 1e12:g} TOP/s",
    ]
    lines.append(f"Peak rates {', '.join(rates)} (dense; {peaks.source})")
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def main() -> int:
    """Print the report."""
    print("\n".join(report()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
