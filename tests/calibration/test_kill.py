"""quantize.py is killed (SIGKILL, which nothing can catch) at the worst moments, and run again."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

from scripts import quantize as script
from tests.calibration.tiny import write_model

ROOT = pathlib.Path(script.__file__).resolve().parent.parent

# Kills its own process in the n-th call of a function, before the function does anything.
CHILD = """
import importlib, os, signal, sys
module, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
original, calls = getattr(owner, name), []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, dying)
from scripts import quantize
sys.exit(quantize.main(sys.argv[4:]))
"""
MOMENTS = [
    # The second block: its arrays are written, its record is not.
    ("qjax.calibrate.store", "write_json", "2"),
    # The result: its folder is there and empty.
    ("qjax.checkpoints.export", "copy_companions", "1"),
    # The result is complete, and the report is not there.
    ("qjax.calibrate.report", "write_text_atomic", "1"),
]


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_killed_runs_end_with_the_same_bytes(tmp_path: pathlib.Path) -> None:
    write_model(tmp_path / "model", layers=3)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    flags = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--quiet"]
    flags += ["--method", "rtn", "--format", "int4_g32", "--kv-cache-dtype", "int8"]
    flags += ["--no-sequential", "--num-samples", "4", "--output"]
    assert script.main([*flags, str(tmp_path / "whole")]) == 0

    assert script.main([*flags, str(tmp_path / "x"), "--seq-len", "65"]) == 2  # of 64 positions

    killed = tmp_path / "killed"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for moment in MOMENTS:
        command = [sys.executable, "-c", CHILD, *moment, *flags, str(killed)]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True)
        assert result.returncode == -signal.SIGKILL, result.stderr.decode()
        assert not killed.exists()
    left = {path.name for path in (tmp_path / ".killed.calibration").iterdir()}
    assert {"run.json", "block-00000", "block-00001", "block-00002"} <= left
    assert script.main([*flags, str(killed)]) == 0
    assert _contents(killed) == _contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".killed*"))
