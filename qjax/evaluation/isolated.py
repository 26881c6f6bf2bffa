"""Benchmark rows measured in child processes: a hang, a crash or full memory costs one of them.

The child runs the same script with ``--worker`` and prints one JSON object per row; anything else
on its standard output is ignored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_REASON_LENGTH = 300


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
