"""The W8A8 kernel compiled ahead of time for sm_90a: no spills, nothing serialized."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from qjax.pallas_kernels.w8a8 import Config, Problem, heuristic_config, smem_bytes
from tests.kernels.problems import SHAPES
from tests.kernels.test_aot import ROOT, SERIALIZED, _missing

E4M3 = "float8_e4m3fn"
# Every branch of the kernel, with the most registers that a config may ask for.
BRANCHES: list[tuple[Problem, Config]] = [
    (Problem(4096, 4096, 6144, E4M3), Config(128, 192, 3, cluster=2)),
    (Problem(4096, 4096, 28672, "int8"), Config(128, 176, 3, cluster=2)),
    (Problem(4096, 14336, 4096, E4M3), Config(64, 256, 4)),
    (Problem(256, 4096, 4096, "float8_e5m2", E4M3), Config(64, 128, 6, splits=2)),
    (Problem(16, 4096, 4096, E4M3), Config(64, 16, 12, swap=True, splits=4)),
    (Problem(64, 4096, 28672, "int8"), Config(128, 64, 4, swap=True)),
    (Problem(200, 4096, 4096, "int8"), Config(64, 112, 4, swap=True, splits=2)),
    (Problem(4096, 14336, 4096, E4M3), Config(64, 192, 4, cluster=2, promote=True)),
    (Problem(4096, 4096, 4096, E4M3, blocks=True), Config(64, 128, 4, cluster=2, promote=True)),
    (Problem(4096, 4096, 4096, E4M3, blocks=True), Config(64, 160, 3, True, 1, 2, True)),
    (Problem(16, 4096, 4096, E4M3, blocks=True), Config(128, 16, 6, True, 4, 1, True)),
    (Problem(4096, 4096, 4096, "int8", groups=True), Config(64, 112, 6, True, 1, 2, True)),
    (Problem(4096, 4096, 4096, "int8", groups=True), Config(64, 64, 8, True, 1, 1, True)),
    (Problem(4096, 4096, 4096, E4M3, out_itemsize=4), Config(128, 128, 3, cluster=2)),
]


@pytest.fixture(autouse=True)
def _needs_compiler() -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)


def compile_all(module: str, problems: list[tuple[Any, Any]]) -> list[str]:
    """What a module that compiles finds wrong with each problem and config, a line each."""
    run = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps([tuple(map(dataclasses.asdict, pair)) for pair in problems]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(problems), run.stderr[-4000:]
    findings = []
    for (problem, config), report in zip(problems, reports, strict=True):
        name = f"{problem} {config}"
        if report["error"] is not None:
            findings.append(f"{name}: {report['error']}")
        if report["spilled"]:
            findings.append(f"{name}: {report['spilled']} bytes spilled")
        serialized = [text for text in report["warnings"] if SERIALIZED in text]
        findings += [f"{name}: {text}" for text in serialized]
    return findings


def _compile(problems: list[tuple[Problem, Config]]) -> list[str]:
    return compile_all("tests.kernels.aot_w8a8", problems)


def _shipped(rows: tuple[int, ...]) -> Iterator[tuple[Problem, Config]]:
    """Every distinct program that the heuristic chooses; loop bounds make no difference."""
    seen = set()
    for kind, blocks in ((E4M3, False), ("int8", False), (E4M3, True)):
        for m in rows:
            for k, n in SHAPES.values():
                problem = Problem(m, k, n, kind, blocks=blocks)
                config = heuristic_config(problem)
                key = kind, blocks, dataclasses.replace(config, splits=min(config.splits, 2))
                if key not in seen:
                    seen.add(key)
                    yield problem, config


def test_every_branch() -> None:
    assert not _compile(BRANCHES)


@pytest.mark.slow
def test_every_shipped_config() -> None:
    assert not _compile(list(_shipped((1, 16, 100, 256, 1024, 4096))))


def test_shared_memory_is_counted_as_the_compiler_does() -> None:
    """The largest configs that are thought to fit do fit."""
    problem = Problem(4096, 4096, 28672, E4M3)
    config = Config(64, 240, 4, cluster=2)
    assert 224 * 1024 <= smem_bytes(config, problem) <= 227 * 1024
    assert not _compile([(problem, config)])
