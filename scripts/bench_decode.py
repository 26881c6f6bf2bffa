"""Decode speed at a model's real shape with random weights, for every format and batch size.

One decode program runs many steps with unrolled layers and a donated cache; blocks of it are queued
without waiting, and the clock is read when the last has finished, so host overhead is spread over
all steps. Every format runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qjax._compat import compile_lowered
from qjax._device import compiler_options, device_info
from qjax.checkpoints.hf import check_cuts
from qjax.checkpoints.layout import head_rules
from qjax.evaluation.device_time import kernel_seconds
from qjax.evaluation.heads import check_head_format, head_beside, label
from qjax.evaluation.isolated import check_files_and_limits, flags_from, print_rows, run_isolated
from qjax.formats import FORMATS, parse_format
from qjax.generate import activation_qtype, decode
from qjax.kv_format import parse_kv_format
from qjax.models.decoder import Decoder
from qjax.models.sharding import check_tensor_parallel, placer, tensor_parallel_mesh
from qjax.quantize import quantized_nbytes
from qjax.serving.devices import Devices
from qjax.serving.report import format_bytes
from qjax.serving.synthetic import SHAPES, random_cache, random_params, running_state, step_bytes
from qjax.serving.weights import prepare_weights

EPILOG = """\
examples
  python scripts/bench_decode.py --shape llama-3.1-8b --formats bf16,fp8,int8,int4
  python scripts/bench_decode.py --shape tiny --formats bf16,int4 --steps 8   (on any machine)

columns
  TB/s     bytes that a step must read (all weights, cached tokens) over its time
  floor    time to read these bytes at the memory's data-sheet rate, over the time taken
  vs bf16  tokens/s over those of bf16 at the same batch size

With --kernels 12 the 12 kernels that take most of a step are listed after the table, and what is
left of the step: other kernels, and time in which none ran.
"""

PASSED_ON = (
    "shape",
    "batch_sizes",
    "context",
    "dtype",
    "norm_dtype",
    "lm_head_format",
    "kv_cache_dtype",
    "kv_scale_mode",
    "backend",
    "page_size",
    "steps",
    "blocks",
    "repeats",
    "kernels",
    "tp_size",
)
"""Flags that a child process gets as they are."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-3.1-8b", help="model shape (%(default)s)")
    add("--formats", default="bf16,fp8,int8,int4,w8a8_fp8,w8a8_int8", help="(%(default)s)")
    add("--batch-sizes", default="1,64", help="sequences that decode together (%(default)s)")
    add("--context", type=int, default=1024, help="cached tokens per sequence (%(default)s)")
    add(
        "--dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="of activations and of all that is not quantized (%(default)s)",
    )
    add(
        "--norm-dtype",
        choices=("float16",),
        help="type of normalised rows on their way to the kernels of weight-only formats (--dtype)",
    )
    add(
        "--lm-head-format",
        default="none",
        metavar="FORMAT",
        help="weight format of the output projection with each of --formats but bf16, which is the "
        "baseline and keeps 16 bits (none: 16 bits with all)",
    )
    add("--kv-cache-dtype", help="as in serve.py (16 bits, as --dtype)")
    add(
        "--kv-scale-mode",
        choices=("tracked", "dynamic", "static"),
        help="scales of a quantized KV cache, as in serve.py (tracked)",
    )
    add("--page-size", type=int, default=64, help="tokens per page (%(default)s)")
    add("--steps", type=int, default=32, help="decode steps per program (%(default)s)")
    add("--blocks", type=int, default=4, help="programs per measurement (%(default)s)")
    add("--repeats", type=int, default=3, help="measurements; the median counts (%(default)s)")
    add("--kernels", type=int, default=0, metavar="N", help="list N kernels (%(default)s; GPU)")
    add(
        "--tp-size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs over which the model is cut; TB/s and floor are of all together (%(default)s)",
    )
    add("--time-limit", type=float, default=300.0, help="seconds per format (%(default)s)")
    add("--output", metavar="FILE.jsonl", help="append rows here as they are measured")
    add(
        "--backend",
        choices=("auto", "xla"),
        default="auto",
        help="kernels where they run, or XLA alone (%(default)s)",
    )
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with the defaults that depend on others."""
    args = build_parser().parse_args(argv)
    if args.kv_cache_dtype is None:
        args.kv_cache_dtype = parse_kv_format("auto", model_dtype=jnp.dtype(args.dtype)).name
    return args


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none."""

    shape: str
    format: str
    kv_cache_dtype: str
    batch: int
    context: int
    backend: str
    device: str = ""
    devices: int = 1
    dtype: str = "bfloat16"
    norm_dtype: str | None = None
    lm_head_format: str | None = None
    jax: str = jax.__version__
    tokens_per_s: float | None = None
    ms_per_step: float | None = None
    spread: float | None = None
    weight_bytes: int | None = None
    step_bytes: int | None = None
    tb_per_s: float | None = None
    floor_fraction: float | None = None
    compile_s: float | None = None
    kernels: list[tuple[str, int, float]] | None = None
    error: str | None = None


def measure(args: argparse.Namespace, name: str, batch: int, params: Any, mesh: Mesh | None) -> Row:
    """Time decode steps of one batch size."""
    if args.kernels and jax.devices()[0].platform != "gpu":
        raise NotImplementedError("--kernels needs a GPU: elsewhere steps are not made of kernels")
    config = SHAPES[args.shape]
    backend = None if args.backend == "auto" else args.backend
    devices = Devices(params, config, mesh)
    module = Decoder(
        config,
        dtype=jnp.dtype(args.dtype),
        dot_backend=backend,
        attention_backend=backend,
        parallel=devices.parallel,
        norm_dtype=None if args.norm_dtype is None else jnp.dtype(args.norm_dtype),
    )
    fmt = parse_kv_format(
        args.kv_cache_dtype, mode=args.kv_scale_mode or "tracked", model_dtype=module.dtype
    )
    # Every block starts at the same length, so that the middle of it is at the context length.
    start = args.context - args.steps // 2
    cache = devices.make_cache(
        functools.partial(random_cache, config, fmt, batch, start + args.steps, args.page_size)
    )
    state = devices.put(running_state(config.vocab_size, batch, start))
    read = step_bytes(params, cache, batch, args.context)
    program = devices.program(
        functools.partial(decode, module.apply, (), args.steps, True, True), cache
    )
    steps = devices.put(jnp.int32(args.steps))
    begin = time.perf_counter()
    lowered = program.lower(params, cache, state, steps)
    compiled = compile_lowered(lowered, compiler_options(activation_qtype(params)))
    compile_s = time.perf_counter() - begin
    lengths = np.full((batch,), start, np.int32)

    def block() -> tuple[Any, Any]:
        nonlocal cache, state
        state = dataclasses.replace(state, lengths=devices.put(lengths))
        cache, state, tokens, finite = compiled(params, cache, state, steps)
        return tokens, finite

    tokens, finite = jax.device_get(block())
    if not finite.all() or not ((tokens >= 0) & (tokens < config.vocab_size)).all():
        raise FloatingPointError("logits are not finite: this time would mean nothing")
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        for _ in range(args.blocks):
            last = block()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - begin) / (args.blocks * args.steps))
    median = statistics.median(seconds)
    kernels = kernel_seconds(block)[: args.kernels] if args.kernels else None
    info = device_info()
    rate = None if info.peaks is None else info.peaks.bytes_per_s * devices.count
    floor = None if rate is None else read / rate / median
    return Row(
        shape=args.shape,
        format=name,
        kv_cache_dtype=fmt.name,
        batch=batch,
        context=args.context,
        backend=args.backend,
        device=info.kind,
        devices=devices.count,
        dtype=args.dtype,
        norm_dtype=args.norm_dtype,
        lm_head_format=head_beside(args.lm_head_format, parse_format(name)),
        tokens_per_s=batch / median,
        ms_per_step=median * 1e3,
        spread=(max(seconds) - min(seconds)) / median,
        weight_bytes=quantized_nbytes(params),
        step_bytes=read,
        tb_per_s=read / median / 1e12,
        floor_fraction=floor,
        compile_s=compile_s,
        kernels=kernels,
    )


def work(args: argparse.Namespace) -> None:
    """In a child process: measure one format and print one JSON line per batch size."""
    (name,) = args.formats.split(",")
    config = SHAPES[args.shape]
    batches = [int(part) for part in args.batch_sizes.split(",")]
    dtype = jnp.dtype(args.dtype)
    try:
        mesh = tensor_parallel_mesh(args.tp_size) if args.tp_size > 1 else None
        place = None if mesh is None else placer(config, mesh)
        fmt = parse_format(name)
        head = parse_format(head_beside(args.lm_head_format, fmt) or "none")
        params = random_params(config, fmt, dtype, place=place, head=head)
        pack = None if args.backend == "auto" else False
        options = {"pack": pack, "norm_dtype": args.norm_dtype, "mesh": mesh}
        params, note = prepare_weights(params, dtype, **options)
    except ValueError as error:
        for batch in batches:
            print(json.dumps(dataclasses.asdict(failed(args, name, batch, str(error)))), flush=True)
        return
    print(note, file=sys.stderr)
    for batch in batches:
        try:
            row = measure(args, name, batch, params, mesh)
        except (jax.errors.JaxRuntimeError, FloatingPointError, NotImplementedError) as error:
            row = failed(args, name, batch, str(error).strip().splitlines()[0][:200])
        print(json.dumps(dataclasses.asdict(row)), flush=True)


def failed(args: argparse.Namespace, name: str, batch: int, reason: str) -> Row:
    """A row without figures."""
    settings = args.shape, name, args.kv_cache_dtype, batch, args.context, args.backend
    head = head_beside(args.lm_head_format, parse_format(name))
    types = {"dtype": args.dtype, "norm_dtype": args.norm_dtype, "lm_head_format": head}
    return Row(*settings, **types, error=reason)


def run_format(args: argparse.Namespace, name: str) -> list[Row]:
    """Measure one format in a child process."""
    flags = flags_from(args, PASSED_ON)
    if parse_format(name) is None:
        flags += ["--lm-head-format", "none"]  # the last one counts
    found, reason = run_isolated(__file__, ["--formats", name, *flags], args.time_limit)
    rows = [Row(**row) for row in found]
    measured = {row.batch for row in rows}
    missing = [b for b in map(int, args.batch_sizes.split(",")) if b not in measured]
    return rows + [failed(args, name, batch, reason) for batch in missing]


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    plain = [row for row in rows if row.format in ("bf16", "none") and row.dtype == "bfloat16"]
    bf16 = {row.batch: row.tokens_per_s for row in plain}
    lines = [
        "| format | KV | batch | tokens/s | ms/step | weights | TB/s | floor | vs bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = label(row.format, row.lm_head_format)
        name += "" if row.dtype == "bfloat16" else f", {row.dtype}"
        name += "" if row.norm_dtype is None else f", {row.norm_dtype} rows"
        head = f"| {name} | {row.kv_cache_dtype} | {row.batch} |"
        if row.tokens_per_s is None or row.ms_per_step is None or row.weight_bytes is None:
            lines.append(f"{head} {row.error} |||||| |")
            continue
        reference = bf16.get(row.batch)
        floor = "-" if row.floor_fraction is None else f"{row.floor_fraction:.1%}"
        ratio = "-" if not reference else f"{row.tokens_per_s / reference:.2f}"
        lines.append(
            f"{head} {row.tokens_per_s:,.1f} | {row.ms_per_step:.3f} | "
            f"{format_bytes(row.weight_bytes)} | {row.tb_per_s:.3f} | {floor} | {ratio} |"
        )
    return lines


def kernel_table(row: Row, steps: int) -> list[str]:
    """A Markdown table of the kernels of a step."""
    if row.kernels is None or row.ms_per_step is None:
        return []
    name = label(row.format, row.lm_head_format)
    lines = [
        f"\n{name}, batch {row.batch}: a step of {row.ms_per_step * 1e3:,.0f} us",
        "",
        "| kernel | per step | us each | us per step | share |",
        "|---|---:|---:|---:|---:|",
    ]
    rest = row.ms_per_step * 1e3
    for kernel, count, seconds in row.kernels:
        us = seconds / steps * 1e6
        rest -= us
        share = us / row.ms_per_step / 1e3
        each = seconds / count * 1e6
        lines.append(f"| {kernel[:60]} | {count / steps:g} | {each:.2f} | {us:.1f} | {share:.1%} |")
    return [*lines, f"| others, and none | | | {rest:.1f} | {rest / row.ms_per_step / 1e3:.1%} |"]


def check(args: argparse.Namespace) -> None:
    """Refuse what every child process would refuse.

    Raises:
      ValueError: With the value and what is possible.
    """
    config = SHAPES[args.shape]
    if args.tp_size < 1:
        raise ValueError(f"--tp-size {args.tp_size} must be at least 1")
    check_tensor_parallel(config, args.tp_size)
    head = head_rules(config, parse_format(args.lm_head_format))
    for name in args.formats.split(","):
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")
        # Nothing here may look for devices: that would take their memory from the children.
        check_cuts(config, args.tp_size, parse_format(name), None, head)
    check_head_format(args.lm_head_format, [parse_format(x) for x in args.formats.split(",")])
    kv = parse_kv_format(args.kv_cache_dtype, model_dtype=jnp.dtype(args.dtype))
    if args.kv_scale_mode is not None and not kv.quantized:
        raise ValueError(
            f"--kv-scale-mode {args.kv_scale_mode}: --kv-cache-dtype {args.kv_cache_dtype} has no "
            "scales; choose fp8_e4m3, int8 or the like"
        )
    if args.norm_dtype is not None:
        if (args.dtype, args.backend, args.tp_size) != ("bfloat16", "auto", 1):
            raise ValueError(
                f"--norm-dtype {args.norm_dtype} is for kernels of a bfloat16 model on one device; "
                "leave out --dtype, --backend and --tp-size"
            )
        for name in args.formats.split(","):
            fmt = parse_format(name)
            if fmt is None or fmt.activation is not None:
                raise ValueError(
                    f"--norm-dtype {args.norm_dtype} is for weight-only formats; {name} is none"
                )
    check_files_and_limits(args)
    if not all(part.isdigit() and int(part) for part in args.batch_sizes.split(",")):
        raise ValueError(f"--batch-sizes {args.batch_sizes!r} must be numbers such as 1,64")
    for name in ("steps", "blocks", "repeats", "page_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if args.kernels < 0:
        raise ValueError(f"--kernels {args.kernels} must not be negative")
    if args.tp_size > 1 and args.kernels:
        raise ValueError("--kernels lists those of one GPU; leave it out with --tp-size")
    longest = config.max_position_embeddings
    if not args.steps // 2 < args.context <= longest - args.steps:
        raise ValueError(
            f"--context {args.context} must lie between half of --steps {args.steps} and "
            f"{longest - args.steps} for {args.shape}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code, 1 if any row failed."""
    args = parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        print(f"bench_decode.py: error: {error}", file=sys.stderr)
        return 2
    if args.worker:
        work(args)
        return 0
    rows: list[Row] = []

    def measured() -> Iterator[dict[str, Any]]:
        for name in args.formats.split(","):
            for row in run_format(args, name):
                rows.append(row)
                yield dataclasses.asdict(row)

    print_rows(measured(), args.output)
    print("\n" + "\n".join(table(rows)))
    for row in rows:
        print("\n".join(kernel_table(row, args.steps)), end="\n" if row.kernels else "")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
