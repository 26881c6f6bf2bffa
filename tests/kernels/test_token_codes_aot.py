"""The kernels that give codes of activations, compiled ahead of time for sm_90a: no spills."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.test_aot import ROOT, _missing

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def _rows(rows: int, columns: int, kind: str, blocks: bool, gated: bool) -> dict[str, Any]:
    return {"rows": rows, "columns": columns, "kind": kind, "blocks": blocks, "gated": gated}


def _norm(
    rows: int, columns: int, kind: str | None, blocks: bool, splits: int, weight: str = "bfloat16"
) -> dict[str, Any]:
    return {
        "rows": rows,
        "columns": columns,
        "kind": kind,
        "blocks": blocks,
        "splits": splits,
        "weight": weight,
    }


CASES = [
    # A row to a cluster of four CTAs, of two, and to one.
    _rows(16, 4096, E4M3, False, False),
    _rows(64, 14336, E4M3, False, True),
    _rows(100, 14336, "int8", False, True),
    _norm(64, 4096, None, False, 8),
    _norm(64, 4096, E4M3, False, 8),
    _norm(100, 4096, E4M3, False, 4),
    _rows(1, 8192, "int8", False, False),
    _rows(5, 14336, E4M3, False, True),
    _rows(16, 28672, "int8", False, True),
    _rows(16, 8192, E5M2, False, True),
    _rows(16, 4096, E4M3, True, False),
    _rows(16, 14336, E4M3, True, True),
    _rows(16, 8192, E5M2, True, True),
    _norm(16, 4096, E4M3, False, 4),
    _norm(1, 8192, "int8", False, 8),
    _norm(5, 8192, E4M3, True, 4),
    _norm(16, 4096, E4M3, True, 1),
    _norm(16, 5120, E5M2, False, 4, "float32"),
    _norm(16, 8192, None, False, 8, "float32"),
    _norm(16, 7936, None, False, 4),
    _norm(16, 12288, "int8", False, 8, "float32"),
    _norm(16, 12288, E4M3, True, 8),
    _norm(16, 896, None, False, 2),
    {**_norm(64, 4096, None, False, 8), "normed": "float16"},
]


def test_no_spills() -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_token_codes"],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(CASES), run.stderr[-4000:]
    pairs = zip(CASES, reports, strict=True)
    findings = [f"{case}: {got}" for case, got in pairs if got["error"] or got["spilled"]]
    assert not findings, "\n".join(findings)
