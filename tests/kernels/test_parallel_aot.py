"""Kernels run where every device has a program of its own, as the compiled program shows."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.kernels.test_aot import _missing

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("devices", "sums", "gathers"),
    # Of the embedding and of two sums in each of two layers.
    [(2, 5, 1), pytest.param(1, 0, 0, marks=pytest.mark.slow)],
)
def test_kernels_of_a_model_over_several_gpus(devices: int, sums: int, gathers: int) -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_parallel", str(devices)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # Two layers of four products and attention, and the output layer.
    assert found["kernels"] >= 11, found
    assert (found["sums"], found["gathers"]) == (sums, gathers), found
