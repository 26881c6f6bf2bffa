"""The weight-only kernel for many rows compiled ahead of time: no spills, nothing serialized."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qjax.pallas_kernels.weight_only_large import Config, Problem, heuristic_config
from tests.kernels.problems import SHAPES
from tests.kernels.test_aot import _missing
from tests.kernels.test_aot_w8a8 import compile_all

E4M3 = "float8_e4m3fn"
# Kind, group size, zero point, compute; whole scales.
WEIGHTS: list[tuple[str, int | None, bool, str, bool]] = [
    ("int4", 128, False, "bfloat16", False),
    ("int4", 32, True, "bfloat16", False),
    ("int4", 128, True, "float16", False),
    ("int4", 128, False, "int8", False),
    ("int4", 128, False, "int8", True),
    ("int4", None, False, "int8", False),
    ("int8", None, False, "bfloat16", False),
    (E4M3, 128, False, "bfloat16", False),
    (E4M3, None, False, "bfloat16", False),
]
# The widest tiles that registers allow, whole and cut at the edge.
BRANCHES: list[tuple[Problem, Config]] = [
    (Problem(4096, 4096, 28672, "int4", 128, False, "bfloat16"), Config(160, 6, 2)),
    (Problem(4096, 4096, 4096, "int4", 64, True, "bfloat16"), Config(160, 5)),
    (Problem(4096, 4096, 4096, "int4", 32, True, "bfloat16"), Config(160, 5, 2)),
    (Problem(4096, 4096, 4096, "int4", 32, True, "float16"), Config(256, 4, 2)),
    (Problem(4096, 14336, 4096, "int4", 128, False, "int8"), Config(128, 4, 2, turns="finished")),
    (Problem(4096, 4096, 6144, "int4", 128, False, "bfloat16"), Config(256, 4, 2, turns="started")),
    (Problem(4096, 14336, 4096, "int4", 128, False, "int8"), Config(96, 8, 2, overlap=True)),
    (Problem(4096, 4096, 6144, "int4", 128, False, "int8"), Config(96, 4, overlap=True)),
    (Problem(4096, 14336, 4096, "int4", None, False, "int8"), Config(256, 4)),
    *(
        (Problem(m, 4096, 28672, "int4", group, False, "int8", whole_scales=True), config)
        for m, group, config in (
            (4096, 128, Config(256, 4, 2)),
            (4096, 128, Config(256, 4, turns="started")),
            (4096, 32, Config(256, 4, 2)),
            (4096, 128, Config(256, 5, 2, ahead=4)),
            (64, 128, Config(64, 6, 1, 1, 4, ahead=4)),
            (64, 128, Config(64, 6, 1, 1, 4)),
            (64, 64, Config(80, 4, 2, 1, 4)),
            (128, 128, Config(160, 4, splits=4)),
        )
    ),
    (Problem(4096, 4096, 4096, "int8", None, False, "bfloat16"), Config(256, 4, 2)),
    (Problem(64, 4096, 28672, "int4", 128, False, "bfloat16"), Config(80, 6, 2, 1, 4)),
    (Problem(64, 4096, 28672, E4M3, 128, False, "bfloat16"), Config(80, 5, 1, 1, 4)),
    (Problem(64, 4096, 28672, "int4", 128, False, "bfloat16"), Config(64, 8, 2, 1, 4)),
    (Problem(64, 14336, 4096, "int4", 32, True, "bfloat16"), Config(64, 8, 2, 8, 4)),
    (Problem(128, 4096, 6144, "int4", 32, True, "bfloat16"), Config(160, 5, 1, 1, 3)),
    (Problem(64, 4096, 28672, "int4", 128, False, "int8"), Config(64, 5, 2, 1, 4)),
    (Problem(112, 4096, 6144, "int4", 128, False, "int8"), Config(112, 5, 1, 1, 3)),
    (Problem(100, 4096, 4096, "int8", 128, False, "bfloat16"), Config(104, 8, splits=4)),
    (Problem(4096, 4096, 4096, "float8_e5m2", 128, False, "bfloat16"), Config(160, 5)),
    (Problem(4096, 4096, 4096, E4M3, None, False, "float16", 4), Config(240, 4)),
    (Problem(4096, 4096, 4096, E4M3, None, False, "bfloat16"), Config(256, 5, ahead=4)),
    (Problem(64, 4096, 4096, E4M3, None, False, "bfloat16"), Config(80, 6, 1, 4, 4, ahead=4)),
    (Problem(256, 4096, 6144, "int8", None, False, "float16"), Config(160, 5, 1, 1, 3, ahead=4)),
    *(
        (Problem(*problem, gated=True), config)
        for problem, config in (
            ((64, 4096, 28672, "int4", 128, False, "bfloat16"), Config(64, 8, 2, 1, 4)),
            ((80, 4096, 28672, "int4", 32, True, "bfloat16"), Config(80, 6, 2, 1, 4)),
            ((4096, 4096, 28672, "int4", 128, False, "bfloat16"), Config(160, 6, 2)),
            ((64, 4096, 28672, "int4", 128, False, "bfloat16"), Config(40, 8, 1, 1, 4)),
            ((64, 4096, 28672, "int4", 128, False, "int8"), Config(64, 5, 1, 1, 4)),
            ((4096, 4096, 28672, "int4", 128, False, "int8"), Config(96, 8, 2, overlap=True)),
            ((4096, 4096, 28672, "int4", 128, False, "int8"), Config(128, 4, 2)),
            ((4096, 4096, 28672, "int4", 32, True, "bfloat16"), Config(240, 4)),
            ((4096, 4096, 28672, "int8", None, False, "bfloat16"), Config(256, 5, 2)),
        )
    ),
]


@pytest.fixture(autouse=True)
def _needs_compiler() -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)


def _shipped(rows: tuple[int, ...]) -> Iterator[tuple[Problem, Config]]:
    """Every distinct program that the heuristic chooses; loop bounds make no difference."""
    seen = set()
    for kind, group_size, zero_point, compute, whole in WEIGHTS:
        for m in rows:
            for k, n in SHAPES.values():
                problem = Problem(
                    m, k, n, kind, group_size, zero_point, compute, whole_scales=whole
                )
                config = heuristic_config(problem)
                key = kind, group_size, compute, whole, config
                if key not in seen:
                    seen.add(key)
                    yield problem, config


def test_every_branch() -> None:
    assert not compile_all("tests.kernels.aot_large", BRANCHES)


@pytest.mark.slow
def test_every_shipped_config() -> None:
    assert not compile_all("tests.kernels.aot_large", list(_shipped((64, 65, 128, 512, 4096))))
