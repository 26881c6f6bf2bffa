"""Write the fastest measured configs of the matrix kernels to the table of this kind of device.

Measures with ``bench_matmul.py`` (correctness first; many configs per product) or takes the rows of
an earlier run of it, and merges the winners into ``qjax/pallas_kernels/tuned/<device>.json``, from
which products take their configs; see ``qjax.pallas_kernels.tuned``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from qjax._files import write_text_atomic
from qjax.pallas_kernels.tuned import table_path

EPILOG = """\
examples
  python scripts/autotune.py --shapes 8b_gate_up,8b_down --formats int4,w8a8_fp8 --search 12
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
    add("--output", metavar="FILE.json", help="the table (default: that of the rows' device)")
    add("--shapes", default="8b_qkv,8b_o,8b_gate_up,8b_down", help="see bench_matmul.py")
    add("--formats", default="int4,int8,fp8,w8a8_fp8,w8a8_int8,w4a8_int8", help="(%(default)s)")
    add("--rows", default="1,8,16,32,64,128,256,512,1024,2048,4096", help="(%(default)s)")
    add("--search", type=int, default=12, metavar="N", help="configs per product (%(default)s)")
    add("--time-limit", type=float, default=600.0, help="seconds per format (%(default)s)")
    return parser


def measure(args: argparse.Namespace, path: pathlib.Path) -> None:
    """Run ``bench_matmul.py``, whose rows go to ``path``."""
    script = pathlib.Path(__file__).with_name("bench_matmul.py")
    command = [sys.executable, str(script), "--backends", "mosaic_gpu", "--every"]
    for flag in ("shapes", "formats", "rows", "search", "time_limit"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    # Rows that failed are no reason to lose the others: the exit code is not looked at.
    subprocess.run([*command, "--output", str(path)], check=False)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The measured rows of a file that tell which kernel they are of."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return [row for row in rows if row.get("us") is not None and row.get("details")]


def identity(entry: dict[str, Any]) -> str:
    """What two entries for the same product have in common."""
    return json.dumps([entry["kernel"], entry["problem"]], sort_keys=True)


def merge(
    entries: Iterable[dict[str, Any]], rows: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Entries of a table with the winners among new rows.

    A product that was measured anew forgets its old entry: the kernel may have changed.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = {**json.loads(row["details"]), "us": round(row["us"], 2)}
        key = identity(entry)
        if key not in best or entry["us"] < best[key]["us"]:
            best[key] = entry
    merged = {identity(entry): entry for entry in entries} | best
    return [merged[key] for key in sorted(merged)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "rows.jsonl")
        if args.source is None:
            measure(args, path)
        else:
            path = pathlib.Path(args.source)
        rows = read_rows(path) if path.exists() else []
    devices = sorted({row["device"] for row in rows})
    if len(devices) != 1:
        print(f"autotune.py: error: need rows of one device, found {devices}", file=sys.stderr)
        return 1
    table = table_path(devices[0]) if args.output is None else pathlib.Path(args.output)
    old = json.loads(table.read_text(encoding="utf-8"))["entries"] if table.exists() else []
    entries = merge(old, rows)
    lines = ",\n".join("  " + json.dumps(entry, sort_keys=True) for entry in entries)
    head = json.dumps({"device": devices[0], "jax": rows[-1]["jax"]})[:-1]
    text = f'{head}, "entries": [\n{lines}\n]}}\n'
    write_text_atomic(table, text)
    print(f"{len(entries)} entries in {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
