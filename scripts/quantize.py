"""Quantize a checkpoint with calibration: GPTQ, AWQ, SmoothQuant, AutoRound and combinations."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax._device import end_process, prefer_quick_compilation
from qjax.calibrate.run import EXPORTS, calibrate_checkpoint
from qjax.calibrate.settings import METHODS, Settings
from qjax.calibrate.text import read_documents, sample_tokens
from qjax.checkpoints.hf import resolve_folder
from qjax.formats import FORMATS, QuantFormat, parse_format
from qjax.models.config import ModelConfig
from qjax.tokenizer import Tokenizer

KV_DTYPES = {"none": None, "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int8": "int8"}
CANDIDATES = "int4_g128,int4_g64,int4_g32,int8_g128"
NUM_SAMPLES = 128

EPILOG = """\
methods
  rtn               round to nearest; needs no text
  gptq              GPTQ with searched scales, then coordinate descent
  gptq+scales       the same, then scales learned by gradients over each block; the best for INT4
  awq               channel scaling and clipping
  awq+gptq          channel scaling, then GPTQ; for models with strong outlier channels
  awq+gptq+scales   and then learned scales
  autoround         roundings and scales learned by gradients over each block, then coordinate
                    descent; takes several times as long as gptq
  smoothquant       for w8a8_*: moves outliers of the activations into the weights
  smoothquant+gptq  the same, then GPTQ

examples
  INT4 for any engine that reads compressed-tensors:
    python scripts/quantize.py --model DIR --method gptq --format int4 \\
      --text calibration.txt --output DIR-int4
  W8A8 with static FP8 KV cache scales, the last projections of the MLP left alone:
    python scripts/quantize.py --model DIR --method smoothquant --format w8a8_int8 \\
      --kv-cache-dtype fp8_e4m3 --skip-layers '.*/down_proj/kernel' \\
      --text calibration.txt --output DIR-w8a8

calibration text
  .jsonl (an object with "text" per line), .json (a list of strings), or plain text in which
  <|endoftext|> separates documents. It should look like what the model will be used for.

output
  A checkpoint folder with calibration_report.json, .md and (with matplotlib) .png in it. Finished
  blocks wait in .OUTPUT.calibration beside it: after an interruption the same command goes on from
  there, and ends with the same bytes.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of an unquantized checkpoint, or a hub id")
    add("--output", required=True, type=Path, help="folder to write")
    add("--method", default="gptq", choices=METHODS, help="default: %(default)s")
    add(
        "--format",
        default="int4",
        choices=[name for name, fmt in FORMATS.items() if fmt is not None],
        help="weight format (and activation format, w8a8_*); default: %(default)s",
    )
    add(
        "--scale-dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="type that scales are rounded to and stored in; default: %(default)s",
    )
    add(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=FORMAT",
        help="format of kernels whose path matches (such as 'lm_head/kernel=int8'); repeatable",
    )
    add(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="mixed precision: bits per weight, scales included; each layer that no rule decides "
        "gets the candidate that its output error is worth",
    )
    add(
        "--candidates",
        metavar="FORMATS",
        help=f"formats that --target-bits chooses from; default: {CANDIDATES}",
    )
    add(
        "--rotate",
        action="store_true",
        help="rotate the residual stream and value heads by Hadamard matrices first (QuaRot), "
        "which spreads outlier channels; a tied output projection becomes a matrix of its own",
    )
    add("--skip-layers", metavar="REGEX", help="kernels to leave unquantized")
    add(
        "--kv-cache-dtype",
        default="none",
        choices=list(KV_DTYPES),
        help="also calibrate static KV cache scales for this type; default: %(default)s",
    )
    add("--text", "--calibration-data", type=Path, metavar="FILE", help="calibration text")
    add("--num-samples", type=int, help=f"sequences of text; default: {NUM_SAMPLES}")
    add(
        "--seq-len",
        type=int,
        help="tokens per sequence; default: 2048, or what the model was made for if that is less",
    )
    add("--batch-tokens", type=int, default=8192, help="per forward pass; default: %(default)s")
    add("--damping", type=float, help=f"of gptq; default: {Settings.damping}")
    add(
        "--sweeps",
        type=int,
        help=f"coordinate descent sweeps of gptq and autoround; default: {Settings.sweeps}",
    )
    add(
        "--steps",
        type=int,
        help=f"updates of learning, of autoround and +scales; default: {Settings.steps}",
    )
    add(
        "--correction",
        type=float,
        help="ridge for aiming at the original model's outputs, 0 for off, of all but rtn and "
        f"smoothquant; default: {Settings.correction}",
    )
    add(
        "--no-sequential",
        action="store_true",
        help="one statistics pass per block instead of four: faster, less exact",
    )
    add("--export", default="compressed-tensors", choices=EXPORTS, help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace the output folder")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def parse_settings(args: argparse.Namespace) -> Settings:
    """Settings of the command line.

    Raises:
      ValueError: If an option cannot be used.
    """

    def with_scale(fmt: QuantFormat | None) -> QuantFormat | None:
        return None if fmt is None else fmt.replace(scale_dtype=args.scale_dtype)

    rules: list[tuple[str, QuantFormat | None]] = []
    if args.skip_layers is not None:
        rules.append((args.skip_layers, None))
    for rule in args.rule:
        pattern, separator, name = rule.rpartition("=")
        if not separator:
            raise ValueError(f"--rule {rule!r} must be REGEX=FORMAT")
        rules.append((pattern, with_scale(parse_format(name))))
    candidates: list[QuantFormat] = []
    for name in (args.candidates or CANDIDATES).split(",") if args.target_bits is not None else ():
        candidate = with_scale(parse_format(name))
        if candidate is None:
            raise ValueError(f"--candidates {args.candidates}: {name!r} does not quantize")
        candidates.append(candidate)
    if args.candidates is not None and args.target_bits is None:
        raise ValueError(f"--candidates {args.candidates} has no use without --target-bits")
    if args.batch_tokens < 1:
        raise ValueError(f"--batch-tokens {args.batch_tokens} must be at least 1")
    if args.text is None:
        for name in ("num_samples", "seq_len"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(args, name)} has no use without --text")
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("damping", "sweeps", "steps", "correction")
        if getattr(args, name) is not None
    }
    settings = Settings(
        fmt=with_scale(parse_format(args.format)),
        method=args.method,
        rules=tuple(rules),
        damping=given.get("damping", Settings.damping),
        sweeps=given.get("sweeps", Settings.sweeps),
        steps=given.get("steps", Settings.steps),
        correction=given.get("correction", Settings.correction) or None,
        target_bits=args.target_bits,
        candidates=tuple(candidates),
        sequential=not args.no_sequential,
        rotate=args.rotate,
        kv_dtype=KV_DTYPES[args.kv_cache_dtype],
    )
    used = {
        "damping": settings.rounding == "gptq",
        "sweeps": settings.rounding in ("gptq", "learned"),
        "steps": settings.learns_scales,
        "correction": settings.rounding != "rtn",
    }
    for name, value in given.items():
        if not used[name]:
            raise ValueError(f"--{name} {value} has no use with --method {args.method}")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = build_parser().parse_args(argv)
    prefer_quick_compilation()
    started = time.monotonic()
    try:
        settings = parse_settings(args)
        folder = resolve_folder(args.model)
        samples = None
        if args.text is not None:
            tokenizer = Tokenizer.from_folder(folder)
            limit = ModelConfig.from_hf(folder).max_position_embeddings
            seq_len = min(2048, limit) if args.seq_len is None else args.seq_len
            if seq_len > limit:
                raise ValueError(
                    f"--seq-len {seq_len} exceeds the {limit} positions of the model; lower it"
                )
            samples = sample_tokens(
                read_documents(args.text),
                tokenizer.encode,
                num_samples=NUM_SAMPLES if args.num_samples is None else args.num_samples,
                seq_len=seq_len,
                bos_id=tokenizer.bos_id,
            )
        elif settings.needs_data:
            raise ValueError(f"--method {args.method} needs calibration text: give --text FILE")
        report = calibrate_checkpoint(
            folder,
            args.output,
            settings,
            samples,
            export=args.export,
            batch_tokens=args.batch_tokens,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print("quantize.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ratio = report.mean_ratio()
    compared = "" if ratio is None else f", mean layer error {ratio:.3f} of RTN's"
    print(
        f"{args.output}: {report.bytes_before / 1e6:.2f} MB -> {report.bytes_after / 1e6:.2f} MB"
        f"{compared}, {time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    end_process(main())
