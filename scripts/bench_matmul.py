"""Time of activations times a quantized weight, at the shapes of real models' layers.

For every shape, format, number of rows and backend: the product is first compared with the float32
product of the same quantized operands, then timed on the device (kernel durations by CUPTI on
NVIDIA GPUs, wall time elsewhere) over several copies of the weight, so that no cache serves it.
Every format and backend runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._device import compiler_options, device_info
from qjax.evaluation.device_time import device_seconds
from qjax.evaluation.isolated import check_files_and_limits, flags_from, print_rows, run_isolated
from qjax.evaluation.products import (
    DTYPES,
    MAX_ERROR,
    SHAPES,
    activations,
    check_products,
    entry_of,
    error_program,
    kernel_configs,
    quantized_activations,
    reference_program,
    shape_of,
    weight_values,
)
from qjax.formats import QuantFormat, parse_format
from qjax.ops.dot import quantized_dot, unsupported_reason
from qjax.ops.packed import PackedWeight, pack_for_mosaic, pack_unsupported_reason, packed_dot
from qjax.pallas_kernels import plain
from qjax.quantize import quantize, quantized_nbytes

BACKENDS = ("xla", "mosaic_gpu")

EPILOG = """\
examples
  python scripts/bench_matmul.py --shapes 8b_gate_up,8b_down --formats bf16,int4,int8 --rows 1,16,64
  python scripts/bench_matmul.py --shapes 128x64 --rows 1 --formats bf16,int8    (on any machine)

columns
  us       all kernels of the product; in brackets the longest alone, without the quantization of
           activations and the sums of splits that belong to it
  TB/s     bytes of weights with their scales, activations and result over the time
  floor    the larger of bytes over memory rate and operations over matrix rate (data sheet), over
           the time
  vs bf16  time of bf16 on the xla backend over the time, same shape and rows
  config   the kernel (dequantize: a 16-bit copy of the weight and XLA's product) and where its
           config comes from: the table of measured ones, its heuristic, or --search
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--shapes",
        default="8b_qkv,8b_o,8b_gate_up,8b_down",
        help=f"names or KxN (%(default)s); names: {', '.join(SHAPES)}",
    )
    add(
        "--formats",
        default="bf16,int4,int4_g32,int4_g128_asym,int8,fp8,w8a8_fp8,w8a8_int8",
        help="of the weights, names as in serve.py; bf16, plain weights of --dtype, is what others "
        "are compared with (%(default)s)",
    )
    add(
        "--rows",
        default="1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192",
        help="of the activations (%(default)s)",
    )
    add(
        "--backends",
        default=",".join(BACKENDS),
        help="xla runs anywhere, mosaic_gpu on Hopper GPUs (%(default)s)",
    )
    add(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="also N configs of the kernel, and half as many of others",
    )
    add("--every", action="store_true", help="report every config, not only the fastest")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the activations (%(default)s)")
    add("--rotate-mb", type=float, default=320.0, help="weights to rotate over (%(default)s)")
    add("--launches", type=int, default=24, help="launches per measurement (%(default)s)")
    add("--time-limit", type=float, default=300.0, help="seconds per process (%(default)s)")
    add("--output", metavar="FILE.jsonl", help="append rows here as they are measured")
    add("--plot", metavar="FILE.png", help="draw the speed-up over bf16 against the rows")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or why there is none: ``skipped`` (no such kernel) or ``error``."""

    shape: str
    k: int
    n: int
    m: int
    format: str
    backend: str
    device: str = ""
    jax: str = jax.__version__
    dtype: str = "bfloat16"
    timing: str | None = None
    us: float | None = None
    longest_us: float | None = None
    spread: float | None = None
    tb_per_s: float | None = None
    tflop_per_s: float | None = None
    floor_us: float | None = None
    relative_error: float | None = None
    config: str | None = None
    config_source: str | None = None
    details: str | None = None  # JSON: the kernel's name, problem and config, for autotune.py
    skipped: str | None = None
    error: str | None = None


def relative_error(out: jax.Array, x: jax.Array, w: Any, fmt: QuantFormat | None) -> float:
    """``|out - ref| / |ref|`` for the float32 product of the quantized operands."""
    platform = jax.devices()[0].platform
    reference = reference_program(platform)(quantized_activations(x, fmt), w)
    return float(error_program(platform)(out, reference))


def floor_seconds(row: Row, fmt: QuantFormat | None, weight_bytes: int) -> float | None:
    """Least time by the data sheet, or None for an unknown device."""
    peaks = device_info().peaks
    if peaks is None:
        return None
    rate = peaks.bf16_flops
    if fmt is not None and fmt.activation is not None:
        rate = (peaks.fp8_flops if fmt.is_float else peaks.int8_ops) or rate
    moved = weight_bytes + 2 * row.m * (row.k + row.n)
    return max(moved / peaks.bytes_per_s, 2 * row.m * row.k * row.n / rate)


def measure(args: argparse.Namespace, row: Row, weights: Sequence[Any]) -> list[Row]:
    """Check and time one number of rows; ``weights`` are equal copies.

    Returns:
      The fastest config (with ``--every`` all that ran), and every one that failed.
    """
    x = activations(row.m, row.k, args.dtype)
    configs: list[tuple[Any, str]] = [(None, row.backend)]
    if row.backend == "mosaic_gpu":
        reason = unsupported_reason(x, weights[0])
        if reason is not None:
            return [dataclasses.replace(row, skipped=reason)]
        configs = kernel_configs(x, weights[0], args.search)
    found = [time_one(args, row, x, weights, config, source) for config, source in configs]
    timed = [row for row in found if row.us is not None]
    best = timed if args.every else [min(timed, key=lambda row: row.us or 0.0)] if timed else []
    return best + [row for row in found if row.error is not None]


def time_one(
    args: argparse.Namespace,
    row: Row,
    x: jax.Array,
    weights: Sequence[Any],
    config: Any,
    source: str,
) -> Row:
    """Check and time one config; a row with the error if that fails."""
    named = None if config is None else str(config)
    row = dataclasses.replace(row, config=named, config_source=source)
    if config is not None and isinstance(weights[0], PackedWeight):
        row = dataclasses.replace(row, details=entry_of(x, weights[0], config))
    try:
        return _time_one(args, row, x, weights, config)
    except Exception as error:  # whatever it is, it is a finding, and the other configs go on
        lines = str(error).strip().splitlines() or [""]
        return dataclasses.replace(row, error=f"{type(error).__name__}: {lines[0][:300]}")


def _time_one(
    args: argparse.Namespace,
    row: Row,
    x: jax.Array,
    weights: Sequence[Any],
    config: Any,
) -> Row:
    fmt = parse_format(row.format)

    def product(x: jax.Array, w: Any) -> jax.Array:
        if config is None:
            return quantized_dot(x, w, backend="xla")
        if fmt is None:
            return plain.matmul(x, w, config=config)
        return packed_dot(x, w, config=config)

    qtype = None if fmt is None or fmt.activation is None else fmt.activation.qtype
    lowered = jax.jit(product).lower(x, weights[0])
    options = compiler_options(qtype) if config is None else None
    compiled = lowered.compile(compiler_options=options)
    error = relative_error(compiled(x, weights[0]), x, weights[0], fmt)
    row = dataclasses.replace(row, relative_error=error)
    if not error < MAX_ERROR:
        return dataclasses.replace(row, error=f"wrong: relative error {error:.2e}, not timed")
    kernels, timing = device_seconds(
        [lambda w=w: compiled(x, w) for w in weights], max(args.launches, len(weights))
    )
    seconds = [sum(times) for times in kernels]
    median = statistics.median(seconds)
    weight_bytes = quantized_nbytes(weights[0])
    floor = floor_seconds(row, fmt, weight_bytes)
    return dataclasses.replace(
        row,
        device=device_info().kind,
        timing=timing,
        us=median * 1e6,
        longest_us=statistics.median(map(max, kernels)) * 1e6,
        spread=(max(seconds) - min(seconds)) / median,
        tb_per_s=(weight_bytes + 2 * row.m * (row.k + row.n)) / median / 1e12,
        tflop_per_s=2 * row.m * row.k * row.n / median / 1e12,
        floor_us=None if floor is None else floor * 1e6,
    )


def work(args: argparse.Namespace) -> None:
    """In a child process: one format on one backend; a JSON line per shape and number of rows."""
    fmt = parse_format(args.formats)
    for shape in args.shapes.split(","):
        k, n = shape_of(shape)
        row = Row(shape, k, n, 0, args.formats, args.backends, dtype=args.dtype)
        w: Any = weight_values(jax.random.key(0), k, n)
        w = w.astype(args.dtype) if fmt is None else quantize(w, fmt, dtype=args.dtype)
        skipped = None
        if args.backends == "mosaic_gpu" and fmt is not None:
            skipped = pack_unsupported_reason(w)
            w = w if skipped is not None else pack_for_mosaic(w)
        copies = 1
        if jax.devices()[0].platform == "gpu" and skipped is None:
            copies = int(np.clip(args.rotate_mb * 1e6 // quantized_nbytes(w) + 1, 2, 64))
        weights = [w, *(jax.tree.map(jnp.copy, w) for _ in range(copies - 1))]
        for m in map(int, args.rows.split(",")):
            row = dataclasses.replace(row, m=m, skipped=skipped)
            for done in [row] if skipped is not None else measure(args, row, weights):
                print(json.dumps(dataclasses.asdict(done)), flush=True)


def run_child(args: argparse.Namespace, name: str, backend: str) -> list[Row]:
    """Measure one format on one backend in a child process."""
    flags = flags_from(args, ("shapes", "rows", "search", "dtype", "rotate_mb", "launches"))
    flags += ["--formats", name, "--backends", backend, *(["--every"] if args.every else [])]
    found, reason = run_isolated(__file__, flags, args.time_limit)
    rows = [Row(**row) for row in found]
    measured = {(row.shape, row.m) for row in rows}
    for shape in args.shapes.split(","):
        for m in map(int, args.rows.split(",")):
            if (shape, m) not in measured:
                rows.append(Row(shape, *shape_of(shape), m, name, backend, error=reason))
    return rows


def speedups(rows: Sequence[Row]) -> dict[Row, float]:
    """Time of bf16 on XLA over the time of each row that was measured, where both were."""
    bf16 = {
        (row.shape, row.m): row.us
        for row in rows
        if parse_format(row.format) is None and row.backend == "xla" and row.us is not None
    }
    pairs = ((row, bf16.get((row.shape, row.m))) for row in rows if row.us is not None)
    return {row: base / row.us for row, base in pairs if base is not None and row.us is not None}


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    ratios = speedups(rows)
    lines = [
        "| shape | m | format | backend | us | TB/s | TFLOP/s | floor | vs bf16 | error | config |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row.shape} | {row.m} | {row.format} | {row.backend} |"
        if row.us is None:
            lines.append(f"{head} {row.error or f'skipped: {row.skipped}'} |||||||")
            continue
        floor = "-" if row.floor_us is None else f"{row.floor_us / row.us:.1%}"
        ratio = f"{ratios[row]:.2f}" if row in ratios else "-"
        longest = row.longest_us
        parts = "" if longest is None or longest > 0.999 * row.us else f" ({longest:.2f})"
        lines.append(
            f"{head} {row.us:.2f}{parts} | {row.tb_per_s:.3f} | {row.tflop_per_s:.1f} | {floor} | "
            f"{ratio} | {row.relative_error:.1e} | {row.config_source} |"
        )
    return lines


def plot(rows: Sequence[Row], path: str) -> None:
    """One panel per shape: speed-up over bf16 against the rows, a line per format and backend."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    ratios = speedups(rows)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4.5 * len(shapes), 4), squeeze=False, sharey=True
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name, backend in dict.fromkeys((row.format, row.backend) for row in rows):
            points: dict[int, float] = {}
            for row, ratio in ratios.items():
                if (row.shape, row.format, row.backend) == (shape, name, backend):
                    points[row.m] = max(ratio, points.get(row.m, 0.0))
            if points:
                style = "-" if backend == "mosaic_gpu" else "--"
                line = zip(*sorted(points.items()), strict=True)
                axis.plot(*line, style, label=f"{name} {backend}")
        axis.set(title=f"{shape} {shape_of(shape)}", xlabel="rows", xscale="log")
        axis.axhline(1.0, color="black", linewidth=0.5)
    axes[0][0].set_ylabel("speed-up over bf16 on XLA")
    axes[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check(args: argparse.Namespace) -> None:
    """Refuse what every child process would refuse.

    Raises:
      ValueError: With the value and what is possible.
    """
    check_products(args.formats, args.shapes, args.rows)
    for backend in args.backends.split(","):
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if args.launches < 1 or args.search < 0:
        raise ValueError("--launches must be at least 1 and --search at least 0")
    if (args.search or args.every) and "mosaic_gpu" not in args.backends.split(","):
        flag = "--search" if args.search else "--every"
        raise ValueError(f"{flag} is about configs of kernels; add mosaic_gpu to --backends")
    check_files_and_limits(args)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'qjax[plot]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code, 1 if any row failed."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        print(f"bench_matmul.py: error: {error}", file=sys.stderr)
        return 2
    if args.worker:
        work(args)
        return 0
    rows: list[Row] = []

    def measured() -> Iterator[dict[str, Any]]:
        for name in args.formats.split(","):
            for backend in args.backends.split(","):
                for row in run_child(args, name, backend):
                    rows.append(row)
                    yield dataclasses.asdict(row)

    print_rows(measured(), args.output)
    print("\n" + "\n".join(table(rows)))
    if args.plot is not None:
        plot(rows, args.plot)
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
