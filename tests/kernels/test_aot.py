"""Ahead-of-time compilation for sm_90a, on any Linux machine: no spills, nothing serialized."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax.pallas_kernels.weight_only import Config, Problem, heuristic_config, smem_bytes
from tests.kernels.problems import SHAPES, WEIGHTS, shipped

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What ptxas says (C7510, C7512, C7513 and others) where it makes every wgmma wait for the last.
SERIALIZED = "instructions are serialized"


def _missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        return "the kernels are for jax 0.11.2 and later"
    # The folder of plugins is there if any is; its absence makes find_spec raise.
    plugins = importlib.util.find_spec("jax_plugins")
    if (
        plugins is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
        or importlib.util.find_spec("jax_cuda13_plugin") is None
    ):
        return "needs jax-cuda13-plugin and jax-cuda13-pjrt, installed with pip --no-deps"
    if shutil.which("ptxas") is None:
        return "needs ptxas on PATH (a CUDA 13 toolkit, or the nvidia-cuda-nvcc wheel)"
    return None


@pytest.fixture(autouse=True)
def _needs_compiler() -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)


def _compile(problems: list[tuple[Problem, Config]]) -> list[str]:
    """What is wrong with each problem, one line for each finding."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        input=json.dumps([tuple(map(dataclasses.asdict, pair)) for pair in problems]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(problems), run.stderr[-4000:]
    findings = []
    for problem, report in zip(problems, reports, strict=True):
        if report["error"] is not None:
            findings.append(f"{problem}: {report['error']}")
        if report["spilled"]:
            findings.append(f"{problem}: {report['spilled']} bytes spilled")
        serialized = [text for text in report["warnings"] if SERIALIZED in text]
        findings += [f"{problem}: {text}" for text in serialized]
    return findings


def test_one_config_of_every_kind_of_weight() -> None:
    """The config with the most registers: as many warpgroups as ship, and 64 rows."""
    problems = []
    for weight in WEIGHTS:
        problems.append(max(shipped([weight], rows=(64,)), key=lambda pair: pair[1].warpgroups))
    assert not _compile(problems)


def test_gated_products() -> None:
    problems = []
    for rows in (8, 64):
        for weight in [
            ("int4", 128, False, "bfloat16"),
            ("float8_e4m3fn", None, False, "bfloat16"),
        ]:
            problem = Problem(rows, 4096, 28672, *weight, gated=True)
            problems.append((problem, heuristic_config(problem)))
    assert not _compile(problems)


def test_output_projections() -> None:
    """A quantized ``lm_head``: float32 logits of one row and of many."""
    problems = []
    for kind in ("int8", "float8_e4m3fn"):
        for rows in (1, 64):
            problem = Problem(rows, *SHAPES["8b_lm_head"], kind, compute="bfloat16", out_itemsize=4)
            problems.append((problem, heuristic_config(problem)))
    assert not _compile(problems)


@pytest.mark.slow
def test_every_config_of_two_kinds_of_weight() -> None:
    weights = [("int4", 128, False, "float16"), ("int8", None, False, "bfloat16")]
    assert not _compile(list(shipped(weights, rows=(8, 64))))


@pytest.mark.slow
def test_every_shipped_config() -> None:
    assert not _compile(list(shipped()))


@pytest.mark.slow
def test_float32_outputs() -> None:
    """What language-model heads ask for; it takes twice the shared memory."""
    weights = [("int4", 128, False, "float16"), ("int8", None, False, "bfloat16")]
    assert not _compile(list(shipped(weights, rows=(64,), out_itemsize=4)))


def test_findings_are_found() -> None:
    """Too much shared memory, and too few registers (a config that the heuristic avoids)."""
    problem = Problem(64, 4096, 4096, "int4", 32, True)
    too_deep = Config(4, 8)
    assert smem_bytes(too_deep, problem) > 232448
    crowded = Config(4, 4, 1, True, 104)
    memory, registers = _compile([(problem, too_deep), (problem, crowded)])
    assert "bytes of shared memory" in memory
    assert SERIALIZED in registers
