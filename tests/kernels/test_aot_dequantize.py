"""The kernel that dequantizes compiled ahead of time for sm_90a: no spills."""

from __future__ import annotations

import pytest

from qjax.pallas_kernels.dequantize import Problem, heuristic_config, search_space
from tests.kernels.problems import WEIGHTS
from tests.kernels.test_aot import _missing
from tests.kernels.test_aot_w8a8 import compile_all


def test_compiles_without_spills() -> None:
    """Every kind of weight as it ships, in order and (odd rows) from alternating tiles."""
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    problems = []
    for i, (kind, group, zero_point, compute) in enumerate(WEIGHTS[::2]):
        p = Problem(256 + i % 2, 4096, 6144, kind, group, zero_point, compute)
        problems.append((p, heuristic_config(p)))
    for kind, group in (("int4", 128), ("int8", None)):
        p = Problem(4096, 4096, 28672, kind, group, compute="bfloat16")
        problems += [(p, config) for config in search_space(p)[:6]]
    assert not compile_all("tests.kernels.aot_dequantize", problems)
