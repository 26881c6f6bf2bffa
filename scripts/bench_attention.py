"""Time of decode attention over a paged KV cache, by format, context and batch.

For every case, format and backend: the result is first compared with float32 attention of the
dequantized keys and values (some sequences of the batch), then timed on the device (the sum of all
kernel durations of a call by CUPTI on NVIDIA GPUs, wall time elsewhere). Pages are random, in
random order, and calls take turns on different pages, so that no cache serves them. Every format
and backend runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._device import device_info
from qjax.evaluation.device_time import device_seconds
from qjax.evaluation.isolated import check_files_and_limits, flags_from, print_rows, run_isolated
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.nn.rotary import rope_frequencies
from qjax.ops._paged import decode_by_kernel, decode_problem, paged_attention_unsupported_reason
from qjax.ops._prefill import prefill_unsupported_reason
from qjax.ops.attention import paged_attention
from qjax.ops.key_bias import KeyBias
from qjax.ops.kv import quantize_kv, read, scale_of
from qjax.pallas_kernels import paged_decode

BACKENDS = ("mosaic_gpu", "cudnn", "xla")
MAX_ERROR = 5e-3
"""Largest relative error that is timed: probabilities and result rounded to bfloat16 once each
(1.65e-3 times the root of 2), with room for peaked rows."""

CHILD_FLAGS = (
    "q_heads kv_heads head_dim page_size tokens window dtype search rate rotate_mb launches"
)

EPILOG = """\
examples
  python scripts/bench_attention.py --output rows.jsonl --plot attention.png
  python scripts/bench_attention.py --cases 4096x1 --tokens 4096 --backends cudnn,xla

columns
  TB/s     bytes of visible keys and values with their scales over the time
  floor    those bytes over the memory rate (--rate, or the data sheet), over the time
  vs bf16  time of bf16 pages on the same backend over the time
  vs xla   time of the xla backend over the time, same format
  kernels  each of a call, in their order: what prepares, attends and merges
"""

DTYPES = ("bfloat16", "float16", "float32")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--cases",
        default="8192x64,8192x16,8192x1,1024x64,1024x16,1024x1,32768x1",
        help="CONTEXTxBATCH (%(default)s)",
    )
    add(
        "--formats",
        default="bf16,fp8_e4m3-static,fp8_e4m3-dynamic,fp8_e5m2-static,int8-static,int8-dynamic,"
        "int4-dynamic",
        help="of the pages: NAME, NAME-MODE or NAME-MODE-unbiased, for keys stored without their "
        "bias (%(default)s)",
    )
    add("--backends", default="mosaic_gpu,xla", help="(%(default)s); cudnn needs --tokens above 1")
    add("--tokens", type=int, default=1, help="queries: the context's last (%(default)s)")
    add("--q-heads", type=int, default=32, help="query heads (%(default)s)")
    add("--kv-heads", type=int, default=8, help="heads of keys and values (%(default)s)")
    add("--head-dim", type=int, default=128, help="features per head (%(default)s)")
    add("--page-size", type=int, default=64, help="tokens per page (%(default)s)")
    add("--window", type=int, help="tokens that a query sees at most (all)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the queries (%(default)s)")
    add("--search", type=int, default=0, metavar="N", help="also time N configs of the kernel")
    add(
        "--rate",
        type=float,
        help="memory rate in TB/s for the floor; the data sheet's if not given",
    )
    add("--rotate-mb", type=float, default=512.0, help="pages to rotate over (%(default)s)")
    add("--launches", type=int, default=24, help="launches per measurement (%(default)s)")
    add("--time-limit", type=float, default=120.0, help="seconds per process (%(default)s)")
    add("--total-limit", type=float, default=900.0, help="seconds for all (%(default)s)")
    add("--output", metavar="FILE.jsonl", help="append rows here as they are measured")
    add("--plot", metavar="FILE.png", help="draw the time of every case over its floor")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or why there is none: ``skipped`` (no such kernel) or ``error``."""

    context: int
    batch: int
    format: str
    backend: str
    device: str = ""
    jax: str = jax.__version__
    timing: str | None = None
    us: float | None = None
    spread: float | None = None
    kernels: int | None = None
    kernels_us: str | None = None
    megabytes: float | None = None
    tb_per_s: float | None = None
    tflop_per_s: float | None = None
    floor_us: float | None = None
    relative_error: float | None = None
    config: str | None = None
    config_source: str | None = None
    skipped: str | None = None
    error: str | None = None


def case_of(text: str) -> tuple[int, int]:
    """``(context, batch)`` of ``CONTEXTxBATCH``.

    Raises:
      ValueError: If it is not of that form.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"case {text!r} must be CONTEXTxBATCH, such as 8192x64")
    return int(parts[0]), int(parts[1])


def format_of(text: str) -> KVFormat:
    """Format of ``NAME``, ``NAME-MODE`` or ``NAME-MODE-unbiased``.

    Raises:
      ValueError: If it is unknown.
    """
    plain = text.removesuffix("-unbiased")
    name, _, mode = plain.partition("-")
    fmt = parse_kv_format(name, mode=mode or "dynamic", model_dtype=jnp.bfloat16)
    return fmt if plain == text else dataclasses.replace(fmt, without_key_bias=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_pages(fmt: KVFormat, shape: tuple[int, ...], key: jax.Array) -> tuple[Any, Any]:
    """Codes ``[n, kv_heads, page, ...]`` of normal values and, per token, their scales."""
    x = jax.random.normal(key, shape)
    absmax = jnp.max(jnp.abs(x), axis=-1)
    if not fmt.quantized:
        return quantize_kv(x, None, jnp.full((*absmax.shape, 1), fmt.bound), fmt), None
    scale = scale_of(absmax, fmt) if fmt.stores_scales else jnp.full(absmax.shape, 6 / fmt.bound)
    codes = quantize_kv(x, scale[..., None], absmax[..., None], fmt)
    return codes, scale if fmt.stores_scales else None


def random_cache(
    args: argparse.Namespace, fmt: KVFormat, context: int, batch: int, rotate: bool
) -> tuple[QuantizedKVCache, list[jax.Array]]:
    """A cache full of random values, and tables that each give every sequence its own pages."""
    per_seq = -(-context // args.page_size)
    needed = batch * per_seq
    copies = 1
    if rotate:
        page_bytes = 2 * args.kv_heads * args.page_size * args.head_dim * fmt.bits // 8
        copies = int(np.clip(args.rotate_mb * 1e6 // (needed * page_bytes) + 1, 1, 64))
    static = None
    if fmt.mode == "static":
        scale = np.full(args.kv_heads, 6 / fmt.bound)
        static = [(scale, scale)]
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        num_pages=needed * copies,
        page_size=args.page_size,
        max_seqs=batch,
        pages_per_seq=per_seq,
        fmt=fmt,
        static_scales=static,
    )
    step = max(1, 2**26 // (args.kv_heads * args.page_size * args.head_dim))
    made: list[Any] = []
    for seed in (0, 1):
        parts = []
        for first in range(0, cache.num_pages, step):
            n = min(step, cache.num_pages - first)
            shape = (n, args.kv_heads, args.page_size, args.head_dim)
            key = jax.random.fold_in(jax.random.key(seed), first)
            parts.append(_random_pages(fmt, shape, key))
        codes = jnp.concatenate([p[0] for p in parts])
        scales = jnp.concatenate([p[1] for p in parts]) if fmt.stores_scales else None
        made.append((codes, scales))
        del parts
    cache = dataclasses.replace(cache, keys=(made[0][0],), values=(made[1][0],))
    if fmt.stores_scales:
        scales = {"key_scales": (made[0][1],), "value_scales": (made[1][1],)}
        cache = dataclasses.replace(cache, **scales)
    order = np.random.default_rng(0).permutation(cache.num_pages).astype(np.int32)
    tables = [jnp.asarray(t) for t in order.reshape(copies, batch, per_seq)]
    return cache.with_page_table(tables[0]), tables


def key_bias(args: argparse.Namespace, fmt: KVFormat) -> KeyBias | None:
    """A bias with two outliers per head, where keys are stored without it."""
    if not fmt.without_key_bias:
        return None
    bias = np.zeros((args.kv_heads, args.head_dim), np.float32)
    bias[:, [1, args.head_dim // 2 - 1]] = 30  # a fast feature and a slow one
    return KeyBias(jnp.asarray(bias), rope_frequencies(args.head_dim, 1e6, None))


def relative_error(
    out: jax.Array,
    q: jax.Array,
    cache: QuantizedKVCache,
    context: int,
    window: int | None,
    known: KeyBias | None = None,
) -> float:
    """``|out - ref| / |ref|`` of the last tokens of two sequences, for float32 attention."""
    rows = min(2, q.shape[0])
    first = 0 if window is None else max(0, context - window)

    @jax.jit
    def error(out: jax.Array, q: jax.Array, cache: QuantizedKVCache) -> jax.Array:
        k, v = read(cache, 0, jnp.arange(rows, dtype=jnp.int32), context)
        if known is not None:
            k = k + known.table(context).swapaxes(0, 1)[None]
        k, v = k[:, first:], v[:, first:]
        heads = cache.num_kv_heads
        wide = q[:rows, -1].astype(jnp.float32).reshape(rows, heads, -1, q.shape[-1])
        exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        p = jax.nn.softmax(exact("bhgd,bthd->bhgt", wide, k) * q.shape[-1] ** -0.5, axis=-1)
        reference = exact("bhgt,bthd->bhgd", p, v).reshape(out[:rows, -1].shape)
        difference = out[:rows, -1].astype(jnp.float32) - reference
        return jnp.linalg.norm(difference) / jnp.linalg.norm(reference)

    return float(error(out, q, cache))


def measure(args: argparse.Namespace, row: Row) -> list[Row]:
    """Check and time one case; the fastest config, and every one that failed."""
    fmt = format_of(row.format)
    kernel = row.backend == "mosaic_gpu"
    shape = (row.batch, args.tokens, args.q_heads, args.head_dim)
    q = jax.random.normal(jax.random.key(7), shape).astype(args.dtype)
    # The xla form goes through all pages there are: it gets one set, which has to be large.
    cache, tables = random_cache(args, fmt, row.context, row.batch, kernel)
    configs: list[tuple[Any, str]] = [(None, row.backend)]
    reason = None
    if row.backend == "cudnn":
        reason = prefill_unsupported_reason(q, cache, 0, args.window, None)
    elif kernel:
        reason = paged_attention_unsupported_reason(q, cache, 0)
    if reason is not None:
        return [dataclasses.replace(row, skipped=reason)]
    if kernel:
        problem = decode_problem(q, cache, 0)
        configs = [(paged_decode.heuristic_config(problem), "heuristic")]
        others = [c for c in paged_decode.search_space(problem) if c != configs[0][0]]
        step = max(1, len(others) // max(1, args.search))
        configs += [(other, "search") for other in others[::step][: args.search]]
    found = []
    for config, source in configs:
        one = dataclasses.replace(row, config=config and str(config), config_source=source)
        try:
            found.append(_time_one(args, one, fmt, q, cache, tables, config))
        except Exception as error:  # whatever it is, it is a finding, and the others go on
            message = f"{type(error).__name__}: {str(error).strip()[:300]}"
            found.append(dataclasses.replace(one, error=message))
    timed = [row for row in found if row.us is not None]
    best = [min(timed, key=lambda row: row.us or 0.0)] if timed else []
    return best + [row for row in found if row.error is not None]


def _time_one(
    args: argparse.Namespace,
    row: Row,
    fmt: KVFormat,
    q: jax.Array,
    cache: QuantizedKVCache,
    tables: Sequence[jax.Array],
    config: paged_decode.Config | None,
) -> Row:
    slots = jnp.arange(row.batch, dtype=jnp.int32)
    lengths = jnp.full((row.batch,), row.context, jnp.int32)
    scale, known = args.head_dim**-0.5, key_bias(args, fmt)

    def attend(q: jax.Array, cache: QuantizedKVCache, lengths: jax.Array) -> jax.Array:
        positions = lengths[:, None] + jnp.arange(-args.tokens, 0, dtype=jnp.int32)[None, :]
        if config is None:
            where = positions, slots, lengths
            options = {"scale": scale, "window": args.window, "backend": row.backend}
            options["key_bias"] = known
            return paged_attention(q, cache, 0, *where, consecutive=True, **options)
        grouped = q.reshape(row.batch, args.kv_heads, -1, args.head_dim)
        where = positions, slots, lengths, scale, args.window
        out = decode_by_kernel(grouped, cache, 0, *where, key_bias=known, config=config)
        return out.reshape(q.shape)

    compiled = jax.jit(attend).lower(q, cache, lengths).compile()
    out = compiled(q, cache, lengths)
    error = relative_error(out, q, cache, row.context, args.window, known)
    row = dataclasses.replace(row, relative_error=error)
    if not error < MAX_ERROR:
        return dataclasses.replace(row, error=f"wrong: relative error {error:.2e}, not timed")
    caches = [cache.with_page_table(table) for table in tables]
    kernels, timing = device_seconds(
        [lambda c=c: compiled(q, c, lengths) for c in caches], max(args.launches, len(caches))
    )
    seconds = [sum(times) for times in kernels]
    median = statistics.median(seconds)
    seen = row.context if args.window is None else min(args.window, row.context)
    pairs = args.tokens * (seen - (args.tokens - 1) / 2)  # of a query and a key it sees
    size = args.head_dim * fmt.bits / 8 + (4 if fmt.stores_scales else 0)
    moved = 2 * row.batch * seen * args.kv_heads * size
    rate = args.rate
    if rate is None and (peaks := device_info().peaks) is not None:
        rate = peaks.bytes_per_s / 1e12
    return dataclasses.replace(
        row,
        device=device_info().kind,
        timing=timing,
        us=median * 1e6,
        spread=(max(seconds) - min(seconds)) / median,
        kernels=len(kernels[0]) if timing == "cupti" else None,
        kernels_us=in_parts(kernels) if timing == "cupti" else None,
        megabytes=moved / 1e6,
        tb_per_s=moved / median / 1e12,
        tflop_per_s=4 * row.batch * pairs * args.q_heads * args.head_dim / median / 1e12,
        floor_us=None if rate is None else moved / rate / 1e6,
    )


def in_parts(kernels: Sequence[Sequence[float]]) -> str:
    """Median microseconds of every kernel of a call, from the seconds of each in every call."""
    return " + ".join(f"{statistics.median(x) * 1e6:.1f}" for x in zip(*kernels, strict=True))


def work(args: argparse.Namespace) -> None:
    """In a child process: one format on one backend; a JSON line per case."""
    for case in args.cases.split(","):
        context, batch = case_of(case)
        for done in measure(args, Row(context, batch, args.formats, args.backends)):
            print(json.dumps(dataclasses.asdict(done)), flush=True)


def run_child(args: argparse.Namespace, name: str, backend: str, limit: float) -> list[Row]:
    """Measure one format on one backend in a child process."""
    flags = flags_from(args, ("cases", *CHILD_FLAGS.split()))
    flags += ["--formats", name, "--backends", backend]
    late = f"not finished within {limit:g} s, see --time-limit and --total-limit"
    found, reason = run_isolated(__file__, flags, max(limit, 0), late=late)
    rows = [Row(**row) for row in found]
    measured = {(row.context, row.batch) for row in rows}
    for case in args.cases.split(","):
        if case_of(case) not in measured:
            rows.append(Row(*case_of(case), name, backend, error=reason))
    return rows


def ratios(rows: Sequence[Row]) -> dict[Row, tuple[float | None, float | None]]:
    """Per measured row: time of bf16 on its backend, and of its format on xla, over its time."""
    times = {(r.context, r.batch, r.format, r.backend): r.us for r in rows if r.us is not None}
    result = {}
    for row in rows:
        if row.us is None:
            continue
        bf16 = times.get((row.context, row.batch, "bf16", row.backend))
        xla = times.get((row.context, row.batch, row.format, "xla"))
        result[row] = (bf16 and bf16 / row.us, xla and xla / row.us)
    return result


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    found = ratios(rows)
    lines = [
        "| context | batch | format | backend | us | TB/s | TFLOP/s | floor | vs bf16 | vs xla "
        "| error | config | kernels |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row.context} | {row.batch} | {row.format} | {row.backend} |"
        if row.us is None:
            lines.append(f"{head} {row.error or f'skipped: {row.skipped}'} |||||||||")
            continue
        floor = None if row.floor_us is None else row.floor_us / row.us
        numbers = [(row.tflop_per_s, ".1f"), (floor, ".1%"), *((x, ".2f") for x in found[row])]
        middle = " | ".join("-" if x is None else format(x, form) for x, form in numbers)
        end = f"{row.relative_error:.1e} | {row.config or '-'} | {row.kernels_us or '-'} |"
        lines.append(f"{head} {row.us:.2f} | {row.tb_per_s:.3f} | {middle} | {end}")
    return lines


def plot(rows: Sequence[Row], path: str) -> None:
    """One group per case, a bar per format: the kernel's rate, and the XLA form's hatched."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    cases = list(dict.fromkeys((row.context, row.batch) for row in rows))
    kinds = list(dict.fromkeys((row.format, row.backend) for row in rows))
    figure, axis = pyplot.subplots(figsize=(2 + 1.6 * len(cases), 4.5))
    width = 0.85 / len(kinds)
    for i, (name, backend) in enumerate(kinds):
        bars = [row for row in rows if (row.format, row.backend) == (name, backend)]
        rate = {(row.context, row.batch): row.tb_per_s for row in bars}
        heights = [rate.get(case) or 0.0 for case in cases]
        places = [j + (i - (len(kinds) - 1) / 2) * width for j in range(len(cases))]
        hatch = "//" if backend == "xla" else None
        axis.bar(places, heights, width, label=f"{name} {backend}", hatch=hatch)
    axis.set_xticks(range(len(cases)), [f"{c} x {b}" for c, b in cases])
    axis.set(xlabel="context x batch", ylabel="TB/s of keys and values")
    axis.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check(args: argparse.Namespace) -> None:
    """Refuse what every child process would refuse.

    Raises:
      ValueError: With the value and what is possible.
    """
    for name in args.formats.split(","):
        format_of(name)
    for backend in args.backends.split(","):
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    for case in args.cases.split(","):
        case_of(case)
    if args.kv_heads < 1 or args.q_heads % args.kv_heads:
        raise ValueError(f"--q-heads {args.q_heads} must be a multiple of --kv-heads")
    if args.launches < 1 or args.search < 0 or args.tokens < 1:
        raise ValueError("--launches and --tokens must be at least 1 and --search at least 0")
    for name in ("q_heads", "head_dim", "page_size", "window"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.search and "mosaic_gpu" not in args.backends.split(","):
        raise ValueError(f"--search {args.search} has no use without the backend mosaic_gpu")
    if args.rate is not None and not args.rate > 0:
        raise ValueError(f"--rate {args.rate} must be positive")
    check_files_and_limits(args)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'qjax[plot]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code, 1 if any row failed."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        print(f"bench_attention.py: error: {error}", file=sys.stderr)
        return 2
    if args.worker:
        work(args)
        return 0
    begin = time.monotonic()
    rows: list[Row] = []

    def measured() -> Iterator[dict[str, Any]]:
        # The kernel first: it is what a run that is cut short should have measured.
        for backend in args.backends.split(","):
            for name in args.formats.split(","):
                left = args.total_limit - (time.monotonic() - begin)
                for row in run_child(args, name, backend, min(left, args.time_limit)):
                    rows.append(row)
                    yield dataclasses.asdict(row)

    print_rows(measured(), args.output)
    print("\n" + "\n".join(table(rows)))
    if args.plot is not None:
        plot(rows, args.plot)
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
