"""The append kernel compiled for sm_90a, on any Linux machine: nothing spills, all is in place."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from qjax.kv_format import KVFormat
from tests.kernels.attention_problems import PLAIN, QUANTIZED
from tests.kernels.test_aot import _missing

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Query heads, KV heads, head_dim, biases: of Llama-3.1-8B, Qwen2.5-7B and Llama-3.2-1B.
SHAPES = [(32, 8, 128, ""), (28, 4, 128, "qkv"), (32, 8, 64, "")]


def _case(
    fmt: KVFormat, shape: tuple[int, int, int, str], batch: int = 16, splits: int = 4
) -> dict:
    q_heads, kv_heads, head_dim, biases = shape
    return {
        "fmt": dataclasses.asdict(fmt),
        "batch": batch,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "splits": splits,
        "biases": biases,
    }


def _reports(cases: list[dict]) -> list[dict]:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_append"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Without the several CPU devices of the tests: kernels run by default where there is one.
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        check=False,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(cases), run.stderr[-4000:]
    return reports


def _check(cases: list[dict]) -> None:
    for case, report in zip(cases, _reports(cases), strict=True):
        assert report["error"] is None, (case, report)
        assert report["spilled"] == 0, (case, report)


def test_typical_appends() -> None:
    _check(
        [
            _case(KVFormat("bfloat16"), SHAPES[0], splits=0),
            _case(KVFormat("float8_e4m3fn", "tracked"), SHAPES[1], batch=64),
            _case(KVFormat("int8", "static"), SHAPES[2], batch=1, splits=8),
            _case(KVFormat("int4", "tracked", without_key_bias=True), (8, 8, 256, "qv")),
            _case(KVFormat("int4", "dynamic"), (0, 8, 128, "")),
        ]
    )


@pytest.mark.slow
def test_every_format_and_shape() -> None:
    _check(
        [
            _case(fmt, shape, batch)
            for fmt in PLAIN + QUANTIZED
            for shape in SHAPES
            for batch in (1, 16, 64)
            if not (fmt.packed and shape[2] == 64)
        ]
    )


def test_a_decode_step_appends_in_place_with_one_kernel_per_layer() -> None:
    cases = [
        {"step": dataclasses.asdict(fmt), "layers": n, "batch": 16, "bias": bias}
        for fmt, bias in [
            (KVFormat("bfloat16"), False),
            (KVFormat("float8_e4m3fn", "tracked"), True),
        ]
        for n in (1, 2)
    ]
    reports = _reports(cases)
    for case, report in zip(cases, reports, strict=True):
        assert report["in_place"] >= report["cache"], (case, report)
        assert not report["large"], (case, report)
        assert report["appends"] == case["layers"], (case, report)
    for one, two in (reports[:2], reports[2:]):
        # The products of q, k and v; append; attention in two kernels; output projection; norm;
        # gate and up; activation; down; norm.
        assert two["kernels"] - one["kernels"] <= 10, reports
