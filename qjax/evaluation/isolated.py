"""Benchmark rows measured in child processes: a hang, a crash or full memory costs one of them.

The child runs the same script with ``--worker`` and prints one JSON object per row; anything else
on its standard output is ignored.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_REASON_LENGTH = 300


def check_files_and_limits(args: argparse.Namespace) -> None:
    """Refuse what would be noticed after the first measurement only, or never.

    Args:
      args: Parsed arguments; those among them that are called ``output``, ``rows_output`` or
        ``plot`` are files to write, ``*_limit`` are seconds, and ``rotate_mb`` megabytes.

    Raises:
      ValueError: If a file has no folder or is one, or a number is negative, infinite or none.
    """
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("output", "rows_output", "plot") and value is not None:
            path = Path(value)
            if path.is_dir() or not path.resolve().parent.is_dir():
                what = "is a folder; name a file" if path.is_dir() else "no such folder; make it"
                raise ValueError(f"{flag} {value}: {what}")
            if name == "plot" and path.suffix not in (".png", ".pdf", ".svg"):
                raise ValueError(f"{flag} {value}: name it .png, .pdf or .svg")
        if name.endswith("_limit") or name == "rotate_mb":
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{flag} {value} must be 0 or more, and finite")


def flags_from(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Parsed arguments as command-line flags again; those that are None are left out."""
    flags = []
    for name in names:
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return flags


def run_isolated(
    script: str, flags: Sequence[str], time_limit: float, *, late: str | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Run ``script --worker flags`` and collect the rows that it prints.

    Args:
      script: Path of the script.
      flags: Its other arguments.
      time_limit: Seconds after which the process is killed; rows printed before count.
      late: What to say then; by default that ``--time-limit`` was too short.

    Returns:
      The rows, and why there may be fewer than asked for: the time limit, or the last line the
      process wrote to standard error.
    """
    command = [sys.executable, script, "--worker", *flags]
    reason = "the process ended without a result"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit)
        output = done.stdout
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [reason])[-1][:_REASON_LENGTH]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        output = output.decode() if isinstance(output, bytes) else output
        reason = late or f"not finished within --time-limit {time_limit:g} s"
    # A line may have been cut in the middle when the process was killed.
    lines = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    return [json.loads(line) for line in lines], reason


def print_rows(rows: Iterator[Mapping[str, Any]], path: str | None) -> None:
    """Print rows as JSON lines while they arrive, and append them to a file."""
    for row in rows:
        line = json.dumps(row)
        print(line, flush=True)
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
