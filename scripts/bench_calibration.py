"""Time and memory of calibrating a model of a real shape with random weights.

Blocks of a model are all alike and are quantized one after the other, so a few tell what the
whole model takes: the first one compiles, every further one costs the same. What a run spends
outside of blocks is counted once (``extrapolate`` says what that is). The vocabulary is cut short,
since embeddings are only looked up and copied.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax._device import device_info, prefer_quick_compilation
from qjax.calibrate.clock import PhaseClock
from qjax.calibrate.run import calibrate_checkpoint
from qjax.calibrate.settings import METHODS, Settings
from qjax.checkpoints.export import save_model
from qjax.evaluation.isolated import check_files_and_limits
from qjax.formats import parse_format
from qjax.models.config import ModelConfig
from qjax.serving.synthetic import SHAPES, random_params

EPILOG = """\
examples
  python scripts/bench_calibration.py --shape llama-3.1-8b --layers 2 --time-limit 300
  python scripts/bench_calibration.py --shape tiny --samples 8 --seq-len 128   (on any machine)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-3.1-8b", help="default: %(default)s")
    add("--layers", type=int, default=2, help="blocks to run, at least 2; default: %(default)s")
    add("--method", choices=METHODS, default="gptq", help="default: %(default)s")
    add("--format", default="int4", help="weight format; default: %(default)s")
    add("--samples", type=int, default=128, help="sequences; default: %(default)s")
    add("--seq-len", type=int, default=2048, help="tokens per sequence; default: %(default)s")
    add("--batch-tokens", type=int, default=8192, help="per forward pass; default: %(default)s")
    add("--sweeps", type=int, help=f"of coordinate descent; default: {Settings.sweeps}")
    add("--no-correction", action="store_true", help="do not aim at the original model's outputs")
    add("--no-sequential", action="store_true", help="one statistics pass per block")
    add("--vocab-size", type=int, default=4096, help="default: %(default)s")
    add("--work-dir", type=Path, help="where the model is written; default: a temporary folder")
    add("--output", type=Path, metavar="FILE.json", help="also write the figures here")
    add("--time-limit", type=float, metavar="SECONDS", help="give up after this time")
    return parser


def compile_seconds() -> dict[str, float]:
    """A table that jax fills from now on: seconds spent tracing, lowering and compiling."""
    names = {
        "/jax/core/compile/jaxpr_trace_duration": "tracing",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
        "/jax/core/compile/backend_compile_duration": "compiling",
    }
    spent = dict.fromkeys(names.values(), 0.0)

    def listener(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event in names:
            spent[names[event]] += duration_secs
        if names.get(event) == "compiling" and duration_secs > 1:
            print(f"compiled {kwargs.get('fun_name')} in {duration_secs:.1f} s", file=sys.stderr)

    jax.monitoring.register_event_duration_secs_listener(listener)
    return spent


class TalkingClock(PhaseClock):
    """Prints the phases of every block, so that a run that is cut short has told something."""

    @contextmanager
    def block(self) -> Iterator[None]:
        with super().block():
            yield
        phases = ", ".join(f"{name} {s:.2f}" for name, s in self.blocks[-1].items())
        print(f"block {len(self.blocks)}: {phases}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """Seconds that a model of many blocks takes.

    Attributes:
      once: What does not depend on the number of blocks.
      first: The first block, which compiles; without writing it.
      phases: One block behind the first, by phase.
      total: The whole model.
    """

    once: float
    first: float
    phases: dict[str, float]
    total: float


def extrapolate(clock: PhaseClock, wall: float, layers: int) -> Extrapolation:
    """What a model of many blocks takes, from a run of a few.

    Per block are the time that it was worked on, by phase, for which the mean of those behind the
    first stands, and its share of writing the model, whose tensors are nearly all in blocks. What
    else the run took is counted once: reading headers, embedding the text, waiting until the last
    block is stored, and the report, for whose picture matplotlib is imported.

    Args:
      clock: Of the run.
      wall: Seconds that the run took as a whole.
      layers: Blocks of the model.
    """
    first, *others = clock.blocks
    phases = {
        name: sum(b.get(name, 0.0) for b in others) / len(others)
        for name in dict.fromkeys(name for b in clock.blocks for name in b)
    }
    writing = clock.seconds.get("writing", 0.0)
    once = wall - writing - sum(sum(b.values()) for b in clock.blocks)
    phases["writing"] = writing / len(clock.blocks)
    begin = sum(first.values())
    total = once + begin + phases["writing"] + (layers - 1) * sum(phases.values())
    return Extrapolation(once, begin, phases, total)


def check(args: argparse.Namespace) -> Settings:
    """Settings of the command line.

    Raises:
      ValueError: With the value and what is possible.
    """
    if args.layers < 2:
        raise ValueError(f"--layers {args.layers} must be at least 2: the first compiles")
    for name in ("samples", "seq_len", "batch_tokens", "vocab_size"):
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(args, name)} must be at least 1")
    fmt = parse_format(args.format)
    if fmt is None:
        raise ValueError(f"--format {args.format} does not quantize; choose int4 or the like")
    check_files_and_limits(args)
    if args.time_limit == 0:
        raise ValueError("--time-limit 0 leaves no time; give more, or leave it out")
    if args.work_dir is not None and not args.work_dir.is_dir():
        raise ValueError(f"--work-dir {args.work_dir} is no folder")
    settings = Settings(
        fmt,
        args.method,
        sweeps=Settings.sweeps if args.sweeps is None else args.sweeps,
        sequential=not args.no_sequential,
        correction=None if args.no_correction else 0.1,
    )
    if args.sweeps is not None and settings.rounding not in ("gptq", "learned"):
        raise ValueError(f"--sweeps {args.sweeps} has no use with --method {args.method}")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        settings = check(args)
    except ValueError as error:
        print(f"bench_calibration.py: error: {error}", file=sys.stderr)
        return 2
    prefer_quick_compilation()
    if args.time_limit is not None:
        faulthandler.dump_traceback_later(args.time_limit, exit=True)
    spent = compile_seconds()
    shape = SHAPES[args.shape]
    config = dataclasses.replace(
        shape,
        num_layers=args.layers,
        vocab_size=min(args.vocab_size, shape.vocab_size),
        layer_windows=(),
    )
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        source, clock = Path(work) / "model", TalkingClock()
        write_model(source, config)
        tokens = np.random.default_rng(0).integers(
            0, config.vocab_size, (args.samples, args.seq_len), np.int32
        )
        before = dict(spent)  # making the random model is not part of it
        started = time.perf_counter()
        report = calibrate_checkpoint(
            source,
            Path(work) / "out",
            settings,
            (tokens, np.ones(tokens.shape, bool)),
            batch_tokens=args.batch_tokens,
            progress=False,
            clock=clock,
        )
        wall = time.perf_counter() - started
    found = extrapolate(clock, wall, shape.num_layers)
    stats = jax.devices()[0].memory_stats() or {}
    result = {
        "device": device_info().kind,
        "jax": jax.__version__,
        "arguments": {k: str(v) for k, v in vars(args).items() if v is not None},
        "wall_seconds": wall,
        "compile_seconds": {name: spent[name] - before[name] for name in spent},
        "blocks": clock.blocks,
        "block_seconds": found.phases,
        "once_seconds": found.once,
        "extrapolated_seconds": found.total,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "mean_error_of_rtn": report.mean_ratio(),
    }
    print_result(result, args, shape.num_layers)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def write_model(folder: Path, config: ModelConfig) -> None:
    """A bfloat16 checkpoint with random weights."""
    started = time.perf_counter()
    save_model(folder, config, random_params(config, None), "none", progress=False)
    print(f"random model written in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def print_result(result: dict[str, Any], args: argparse.Namespace, layers: int) -> None:
    """The figures, for people."""
    compiling = result["compile_seconds"]
    peak = result["peak_bytes"]
    print(
        f"{args.shape}, {args.method} {args.format}, {args.samples} x {args.seq_len} tokens, on "
        f"{result['device']}, jax {result['jax']}"
    )
    print(f"{args.layers} blocks: {result['wall_seconds']:.1f} s")
    print("compile: " + ", ".join(f"{name} {s:.1f} s" for name, s in compiling.items()))
    first = sum(result["blocks"][0].values())
    each = sum(result["block_seconds"].values())
    print(f"once, however many blocks: {result['once_seconds']:.2f} s")
    print(f"first block: {first:.2f} s; every further one, with writing it: {each:.2f} s")
    for name, seconds in sorted(result["block_seconds"].items(), key=lambda item: -item[1]):
        print(f"  {name:<12} {seconds:7.3f} s  {seconds / each:5.1%}")
    print(f"{layers} blocks: {result['extrapolated_seconds']:.0f} s (extrapolated)")
    print("peak device memory: " + ("unknown" if peak is None else f"{peak / 1e9:.2f} GB"))
    print(f"mean layer error: {result['mean_error_of_rtn']:.3f} of RTN's")


if __name__ == "__main__":
    sys.exit(main())
