"""Load speed and host memory: a model of a given shape, written to a temporary folder, is loaded.

The file is read once without using it, then loaded in every format, each in a process of its own.
A model of one layer is loaded before the clock starts, so that nothing is compiled after.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from qjax._device import device_info
from qjax.checkpoints.export import EXPORT_FORMATS, save_model
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.layout import model_leaves
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint
from qjax.checkpoints.writer import Source, TensorSpec, write_json, write_tensors
from qjax.evaluation.isolated import check_files_and_limits, flags_from, print_rows, run_isolated
from qjax.formats import FORMATS, QuantFormat, parse_format
from qjax.models.config import ModelConfig
from qjax.quantize import quantized_nbytes
from qjax.quantized_array import QuantizedArray
from qjax.serving.report import format_bytes
from qjax.serving.synthetic import SHAPES

EPILOG = """\
examples
  python scripts/bench_load.py --shape llama-3.1-8b --layers 4 --formats none,fp8,int8,int4
  python scripts/bench_load.py --stored gptq,awq,compressed-tensors --layers 4
  python scripts/bench_load.py --shape tiny --formats int4                  (on any machine)

columns
  read     GB/s of reading the files and dropping what was read, one stream
  load     GB/s of stored bytes until the last parameter is on its device
  per core GB of stored bytes per second of one core's time; the machine may have been shared
  limit    load over the lower of read and 2 GB/s per core; half of that is the aim
  result   bytes of the loaded parameters
  host     growth of the process's peak memory during the load. On a CPU it holds the result.
"""

BLOCK = 16 * 2**20
CORE_RATE = 2e9
"""Bytes/s of a core, with which a machine of few cores and a fast disk is compared."""
STORED = {"fp8": "w8a8_fp8_block", "gptq": "int4", "awq": "int4", "compressed-tensors": "int4"}
"""Format of the weights in a quantized checkpoint that is read."""
PASSED_ON = ("shape", "layers", "repeats", "cold")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none."""

    shape: str
    layers: int
    stored: str
    format: str
    device: str = ""
    cores: int = 0
    jax: str = jax.__version__
    cold: bool = False
    file_bytes: int | None = None
    largest_tensor_bytes: int | None = None
    result_bytes: int | None = None
    read_gb_per_s: float | None = None
    load_gb_per_s: float | None = None
    load_s: float | None = None
    load_core_s: float | None = None
    limit_fraction: float | None = None
    first_load_s: float | None = None
    host_peak_growth_bytes: int | None = None
    error: str | None = None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-3.1-8b", help="model shape (%(default)s)")
    add("--layers", type=int, default=4, help="decoder layers (%(default)s)")
    add("--formats", default="none,fp8,int8,int4", help="quantized to on load (%(default)s)")
    add("--stored", default="", help=f"also load checkpoints in these: {','.join(STORED)}")
    add("--repeats", type=int, default=2, help="loads; the fastest counts (%(default)s)")
    add("--cold", type=int, choices=(0, 1), default=0, help="1: drop the files from memory before")
    add("--folder", metavar="DIR", help="where the temporary folder goes (the system's place)")
    add("--time-limit", type=float, default=300.0, help="seconds per process (%(default)s)")
    add("--output", metavar="FILE.jsonl", help="append rows here as they are measured")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--model", default="", help=argparse.SUPPRESS)
    return parser


def write_plain(folder: Path, config: ModelConfig) -> None:
    """A bf16 checkpoint of random weights, at the speed of the disk."""
    folder.mkdir()
    dtype = np.dtype(ml_dtypes.bfloat16)

    def make(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {name: random_values(shape)}

    sources = [
        Source(
            {leaf.name: TensorSpec(dtype, leaf.stored_shape)},
            functools.partial(make, leaf.name, leaf.stored_shape),
        )
        for leaf in model_leaves(config)
    ]
    write_json(folder / "config.json", config.to_hf())
    write_tensors(folder, sources, max_shard_bytes=5 * 10**9, advance=lambda: None)


def write(folder: Path, config: ModelConfig, stored: str) -> None:
    """A checkpoint in one of the formats of ``--stored``, or ``bf16``."""
    if stored == "bf16":
        write_plain(folder, config)
        return
    fmt = parse_format(STORED[stored])
    assert fmt is not None
    if stored in ("gptq", "awq"):
        fmt = fmt.replace(scale_dtype="float16")
    params = {}
    for leaf in model_leaves(config):
        quantized = leaf.is_kernel and leaf.layer != "lm_head"
        value: Any = random_weight(leaf.shape, fmt) if quantized else random_values(leaf.shape)
        params[tuple(leaf.path.split("/"))] = value
    save_model(folder, config, unflatten_dict(params), stored, progress=False)


def random_values(shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    """Random numbers, repeated after a while: fast to make, and nothing here compresses them."""
    values = np.random.default_rng(0).normal(size=2**20, scale=0.02).astype(np.float32)
    return np.resize(values.astype(dtype), shape)


def random_weight(shape: tuple[int, ...], fmt: QuantFormat) -> QuantizedArray:
    """Random codes and scales on the host."""
    counts = [-(-size // tile) for size, tile in zip(shape, fmt.tiles(shape, 0), strict=True)]
    if fmt.is_int:
        pool = np.random.default_rng(0).integers(int(fmt.qmin), int(fmt.qmax) + 1, 2**20)
        codes = np.resize(pool.astype(np.int8), shape).astype(fmt.storage_dtype)
    else:
        codes = random_values(shape, fmt.storage_dtype)
    parts: dict[str, Any] = {
        "qvalue": codes,
        "scale": np.full(counts, 0.01, fmt.scale_dtype),
    }
    return QuantizedArray.make(fmt=fmt, **parts)


def read_seconds(files: Sequence[Path]) -> float:
    """Time to read files block by block."""
    buffer = memoryview(mmap.mmap(-1, BLOCK))
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def drop(files: Sequence[Path]) -> None:
    """Forget cached pages of files."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(args: argparse.Namespace, stored: str, name: str) -> Row:
    """Load the model of ``--model`` in one format."""
    small, large = Path(args.model, "small"), Path(args.model, "large")
    tensors = SafetensorsCheckpoint(large).tensors
    files = sorted({info.file for info in tensors.values()})
    file_bytes = sum(info.nbytes for info in tensors.values())
    reads = []
    for _ in range(args.repeats):
        if args.cold:
            drop(files)
        reads.append(read_seconds(files))
    fmt = parse_format(name) if stored == "bf16" else None
    begin = time.perf_counter()
    load_model(small, quantization=fmt, progress=False)
    first = time.perf_counter() - begin
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_bytes("VmRSS")
    growth, result, loads, core_seconds = None, 0, [], []
    for _ in range(args.repeats):
        if args.cold:
            drop(files)
        begin, busy = time.perf_counter(), time.process_time()
        params = load_model(large, quantization=fmt, progress=False).params
        loads.append(time.perf_counter() - begin)
        core_seconds.append(time.process_time() - busy)
        growth = memory_bytes("VmHWM") - before if growth is None else growth
        result = quantized_nbytes(params)
        del params
    cores = len(os.sched_getaffinity(0))
    read, load = file_bytes / min(reads), file_bytes / min(loads)
    return Row(
        shape=args.shape,
        layers=args.layers,
        stored=stored,
        format=name,
        device=device_info().kind,
        cores=cores,
        cold=bool(args.cold),
        file_bytes=file_bytes,
        largest_tensor_bytes=max(info.nbytes for info in tensors.values()),
        result_bytes=result,
        read_gb_per_s=read / 1e9,
        load_gb_per_s=load / 1e9,
        load_s=min(loads),
        load_core_s=min(core_seconds),
        limit_fraction=load / min(read, CORE_RATE * cores),
        first_load_s=first,
        host_peak_growth_bytes=growth,
    )


def work(args: argparse.Namespace) -> None:
    """In a child process: write the model, or measure one format of it."""
    config = dataclasses.replace(SHAPES[args.shape], num_layers=args.layers, layer_windows=())
    if args.formats == "write":
        one = dataclasses.replace(config, num_layers=1, layer_windows=())
        write(Path(args.model, "small"), one, args.stored)
        write(Path(args.model, "large"), config, args.stored)
        print(json.dumps({"written": True}))
        return
    print(json.dumps(dataclasses.asdict(measure(args, args.stored, args.formats))), flush=True)


def rows_of(args: argparse.Namespace, stored: str, formats: Sequence[str]) -> Any:
    """Rows of one stored checkpoint, as dictionaries, one after the other."""
    flags = flags_from(args, PASSED_ON)
    with tempfile.TemporaryDirectory(prefix="bench-load-", dir=args.folder) as folder:
        shared = [*flags, "--model", folder, "--stored", stored]
        written, why = run_isolated(__file__, [*shared, "--formats", "write"], args.time_limit)
        for name in formats:
            rows: list[dict[str, Any]] = []
            if written:
                flags = [*shared, "--formats", name]
                rows, why = run_isolated(__file__, flags, args.time_limit)
            failed = Row(args.shape, args.layers, stored, name, error=why)
            yield rows[0] if rows else dataclasses.asdict(failed)


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| stored | loaded as | file | read GB/s | load GB/s | per core | limit | result | host |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row.stored} | {row.format} |"
        if row.file_bytes is None or row.load_core_s is None or row.result_bytes is None:
            lines.append(f"{head} {row.error} ||||||| |")
            continue
        growth = row.host_peak_growth_bytes
        host = "-" if growth is None else format_bytes(growth)
        lines.append(
            f"{head} {format_bytes(row.file_bytes)} | {row.read_gb_per_s:.2f} | "
            f"{row.load_gb_per_s:.2f} | {row.file_bytes / row.load_core_s / 1e9:.2f} | "
            f"{row.limit_fraction:.0%} | "
            f"{format_bytes(row.result_bytes)} | {host} |"
        )
    return lines


def check(args: argparse.Namespace) -> None:
    """Refuse what every child process would refuse.

    Raises:
      ValueError: With the value and what is possible.
    """
    for name in args.formats.split(","):
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")
    for name in filter(None, args.stored.split(",")):
        if name not in STORED or name not in EXPORT_FORMATS:
            raise ValueError(f"--stored {name!r} is unknown; choose from {', '.join(STORED)}")
    for name in ("layers", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if args.folder is not None and not Path(args.folder).is_dir():
        raise ValueError(f"--folder {args.folder} is no folder")
    check_files_and_limits(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code, 1 if any row failed."""
    args = build_parser().parse_args(argv)
    if args.worker:
        work(args)
        return 0
    try:
        check(args)
    except ValueError as error:
        print(f"bench_load.py: error: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []

    def measured() -> Any:
        plan = [("bf16", args.formats.split(","))]
        plan += [(stored, ["as stored"]) for stored in filter(None, args.stored.split(","))]
        for stored, formats in plan:
            for values in rows_of(args, stored, formats):
                rows.append(Row(**values))
                yield values

    print_rows(measured(), args.output)
    print("\n" + "\n".join(table(rows)))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
