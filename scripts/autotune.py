"""Write the fastest measured configs of the matrix kernels to the table of this kind of device.

Measures products with packed weights (correctness first; many configs per product) or takes the
rows of a run of ``bench_matmul.py``, and merges the winners into
``qjax/pallas_kernels/tuned/<device>.json``, from which products take their configs; see
``qjax.pallas_kernels.tuned``. The table is written after every product, so a run may end at any
time. What comes first in --rows, then in --formats and --shapes, is measured first.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from qjax._files import write_text_atomic
from qjax.evaluation.isolated import check_files_and_limits, flags_from
from qjax.evaluation.pool import run_pool, turn, work_through
from qjax.evaluation.products import DTYPES, check_products
from qjax.pallas_kernels.tuned import table_path

EPILOG = """\
examples
  python scripts/autotune.py --time-limit 240
  python scripts/autotune.py --shapes 8b_lm_head --formats int8 --rows 16 --search 24
  python scripts/autotune.py --dtype float16 --formats int4,int8,fp8 --rows 16,64,8
  python scripts/bench_matmul.py --search 8 --every --output rows.jsonl
  python scripts/autotune.py --from rows.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", dest="source", metavar="FILE.jsonl", help="rows of bench_matmul.py --output")
    add("--output", metavar="FILE.json", help="the table (default: that of the device)")
    add(
        "--shapes",
        default="8b_gate_up,8b_down,8b_qkv,8b_o",
        help="see bench_matmul.py (%(default)s)",
    )
    add(
        "--formats",
        default="int4,int8,fp8,w8a8_fp8,w8a8_int8,w4a8_int8",
        help="of weights (%(default)s)",
    )
    add("--rows", default="16,64,8,256,2048,32,128,1024,512,4096", help="tokens (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the activations (%(default)s)")
    add("--search", type=int, default=8, metavar="N", help="configs per product (%(default)s)")
    add("--time-limit", type=float, default=600.0, help="seconds for everything (%(default)s)")
    add("--hold-limit", type=float, default=40.0, help="seconds for one config (%(default)s)")
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that compile (%(default)s)",
    )
    add("--rotate-mb", type=float, default=320.0, help="weights to rotate over (%(default)s)")
    add("--launches", type=int, default=16, help="launches per measurement (%(default)s)")
    add("--rows-output", metavar="FILE.jsonl", help="append every measurement here")
    add("--lock", help=argparse.SUPPRESS)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The measured rows of a file that tell which kernel they are of."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return measured(json.loads(line) for line in lines if line.startswith("{"))


def measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with a time and an entry of a table."""
    return [row for row in rows if row.get("us") is not None and row.get("details")]


def identity(entry: dict[str, Any]) -> str:
    """What two entries for the same product have in common."""
    return json.dumps([entry["kernel"], entry["problem"]], sort_keys=True)


def merge(
    entries: Iterable[dict[str, Any]], rows: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Entries of a table with the winners among new rows.

    A product that was measured anew forgets its old entry: the kernel may have changed. Of several
    kernels with the same problem the fastest stays, as no product would take another.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = {**json.loads(row["details"]), "us": round(row["us"], 2)}
        key = identity(entry)
        if key not in best or entry["us"] < best[key]["us"]:
            best[key] = entry
    merged = {identity(entry): entry for entry in entries} | best
    fastest: dict[str, str] = {}
    for key in sorted(merged, key=lambda key: merged[key]["us"]):
        fastest.setdefault(json.dumps(merged[key]["problem"], sort_keys=True), key)
    return [merged[key] for key in sorted(fastest.values())]


def update_table(rows: Sequence[dict[str, Any]], output: str | None) -> str:
    """Merge measured rows of one device into its table; says what is there now.

    Raises:
      ValueError: If the rows are not of one device.
    """
    devices = sorted({row["device"] for row in rows})
    if len(devices) != 1:
        raise ValueError(f"need rows of one device, found {devices}")
    table = table_path(devices[0]) if output is None else pathlib.Path(output)
    old = json.loads(table.read_text(encoding="utf-8"))["entries"] if table.exists() else []
    entries = merge(old, rows)
    lines = ",\n".join("  " + json.dumps(entry, sort_keys=True) for entry in entries)
    head = json.dumps({"device": devices[0], "jax": rows[-1]["jax"]})[:-1]
    write_text_atomic(table, f'{head}, "entries": [\n{lines}\n]}}\n')
    return f"{len(entries)} entries in {table}"


def work(args: argparse.Namespace) -> None:
    """In a child process: measure the products on standard input."""
    from qjax.evaluation.tuning import Tuner

    tuner = Tuner(
        functools.partial(turn, args.lock),
        search=args.search,
        launches=args.launches,
        rotate_bytes=args.rotate_mb * 1e6,
        dtype=args.dtype,
    )
    work_through((tuple(task) for task in json.load(sys.stdin)), tuner.tune)


def measure(args: argparse.Namespace) -> bool:
    """Measure products in child processes, and update the table after each; whether any was."""
    from qjax.evaluation.tuning import Progress, plan

    # Processes share the device's memory: each takes what it needs, not most of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = [int(m) for m in args.rows.split(",")]
    tasks = plan(args.shapes.split(","), args.formats.split(","), rows, args.workers)
    progress, said = Progress(), None
    with tempfile.TemporaryDirectory() as folder:
        args.lock = str(pathlib.Path(folder, "device"))
        flags = flags_from(args, ("dtype", "search", "launches", "rotate_mb", "lock"))
        command = [sys.executable, __file__, "--worker", *flags]
        limits = {"time_limit": args.time_limit, "hold_limit": args.hold_limit}
        for task, found, error in run_pool(command, tasks, **limits):
            print(progress.line(task, found, error), flush=True)
            if args.rows_output is not None:
                with open(args.rows_output, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
            # Of a product that was not finished the best config may be missing.
            if error is None and (timed := measured(found)):
                said = update_table(timed, args.output)
    total = sum(map(len, tasks))
    told = said or "no entry"
    print(f"{progress.finished} of {total} products, {progress.failed} with errors; {told}")
    return said is not None


def check(args: argparse.Namespace) -> None:
    """Refuse what every child process would refuse.

    Raises:
      ValueError: With the value and what is possible.
    """
    if args.source is not None:
        for name, value in vars(args).items():
            if name not in ("source", "output") and value != build_parser().get_default(name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is about measuring; --from measures nothing, leave it out"
                )
        if not pathlib.Path(args.source).is_file():
            raise ValueError(f"--from {args.source}: no such file; give one of bench_matmul.py")
    check_files_and_limits(args)
    check_products(args.formats, args.shapes, args.rows)
    if args.workers < 1 or args.launches < 1 or args.search < 0:
        raise ValueError("--workers and --launches must be at least 1 and --search at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.worker:
        work(args)
        return 0
    try:
        check(args)
        if args.source is None:
            return int(not measure(args))
        print(update_table(read_rows(pathlib.Path(args.source)), args.output))
    except ValueError as error:
        print(f"autotune.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
