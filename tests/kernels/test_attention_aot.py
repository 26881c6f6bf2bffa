"""The paged decode kernel compiled for sm_90a, on any Linux machine: it fits and spills nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest

from qjax.pallas_kernels.paged_decode import (
    Config,
    Problem,
    config_unsupported_reason,
    heuristic_config,
    search_space,
    smem_bytes,
    unsupported_reason,
)
from tests.kernels.test_aot import _missing

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPICAL = Problem(64, 8, 4, 128, 64, 128, "float8_e4m3fn", "bfloat16", True)
KINDS = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4"]


def every_problem() -> list[Problem]:
    problems = []
    product = itertools.product(KINDS, (64, 96, 128, 256), (1, 4, 8, 16), (8, 16, 32, 64, 256))
    for kind, dim, ratio, page in product:
        for token_scales in (False, True):
            plain = kind in ("bfloat16", "float16")
            query = kind if plain else "bfloat16"
            problem = Problem(16, 8, ratio, dim, page, 64, kind, query, token_scales)
            if not (plain and token_scales) and unsupported_reason(problem) is None:
                problems.append(problem)
                if not plain:
                    problems.append(dataclasses.replace(problem, logit_bias=True))
    return problems


def _reports(data: Sequence[tuple]) -> list[dict]:
    """What ``aot_attention`` says about each of its cases."""
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_attention"],
        input=json.dumps(data),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(data), run.stderr[-4000:]
    return reports


def _compile(cases: Sequence[tuple[Problem, Config | None, float | None]]) -> list[str]:
    """What is wrong with each problem, one line for each finding."""
    data = [
        (dataclasses.asdict(p), None if c is None else dataclasses.asdict(c), cap)
        for p, c, cap in cases
    ]
    findings = []
    for case, report in zip(cases, _reports(data), strict=True):
        if report["error"] is not None:
            findings.append(f"{case}: {report['error']}")
        elif report["spilled"]:
            findings.append(f"{case}: {report['spilled']} bytes spilled")
    return findings


def test_append_and_decode_update_a_donated_cache_in_place() -> None:
    cases = [
        ("bfloat16", "none", 1),
        ("float8_e4m3fn", "static", 1),
        ("int8", "tracked", 1),
        ("int4", "dynamic", 1),
        ("int8", "tracked", 64),
        ("float8_e4m3fn", "static-unbiased", 1),
    ]
    for case, report in zip(cases, _reports(cases), strict=True):
        assert report["in_place"] >= report["cache"], (case, report)
        unbiased = case[1].endswith("unbiased")  # 4 MB of logits and 3 MB of a table
        assert report["temporary"] < report["cache"] / (10 if unbiased else 20), (case, report)
        assert not report["large"], (case, report)
        # Append, decode and merge in two layers, and the plans they share; for the bias two more
        # in each, and the table that they share, in three steps.
        if case[2] == 1:
            assert report["kernels"] <= 11 + 7 * unbiased, (case, report)


def test_every_kind_of_page_and_the_widest_heads() -> None:
    wide = {"head_dim": 256, "ratio": 16}
    qwen = {"kv_heads": 4, "ratio": 7, "logit_bias": True}  # 7B; 72B has 8 heads and ratio 8
    cases = [
        (TYPICAL, None, None),
        (dataclasses.replace(TYPICAL, token_scales=False, **qwen), None, None),
        (
            dataclasses.replace(TYPICAL, kind="int8", **{**qwen, "kv_heads": 8, "ratio": 8}),
            None,
            None,
        ),
        (dataclasses.replace(TYPICAL, kind="int4", **qwen), None, 30.0),
        (dataclasses.replace(TYPICAL, kind="bfloat16", token_scales=False, **wide), None, None),
        (dataclasses.replace(TYPICAL, kind="int8", **wide), None, 30.0),
        (dataclasses.replace(TYPICAL, kind="int4", page_size=32), None, None),
        (dataclasses.replace(TYPICAL, kind="float8_e5m2", head_dim=96, batch=1), None, None),
    ]
    assert not _compile(cases)


@pytest.mark.slow
def test_every_supported_problem() -> None:
    assert not _compile([(problem, None, None) for problem in every_problem()[::11]])


@pytest.mark.slow
def test_every_config_that_is_searched() -> None:
    problems = [TYPICAL, dataclasses.replace(TYPICAL, kind="int4")]
    cases = [(p, c, None) for p in problems for c in search_space(p) if c.splits == 1]
    assert not _compile(cases)


def test_heuristic_configs_fit_and_fill_the_machine() -> None:
    for problem in every_problem():
        config = heuristic_config(problem)
        assert config_unsupported_reason(config, problem) is None
        if problem.head_dim <= 128:  # two blocks per multiprocessor
            assert smem_bytes(config, problem) <= 112 * 1024
    # All blocks of a large batch at once; a single sequence is spread over the whole machine.
    assert heuristic_config(TYPICAL).splits == 1
    alone = dataclasses.replace(TYPICAL, batch=1, pages_per_seq=512)
    assert heuristic_config(alone).splits * alone.kv_heads >= 264
    few = dataclasses.replace(alone, kv_heads=4, ratio=7)
    assert heuristic_config(few).splits * few.kv_heads == 512
    # No split has nothing to do where the table is full: 500 pages of one tile, 4 for each.
    odd = dataclasses.replace(few, kv_heads=2, pages_per_seq=500)
    assert heuristic_config(odd).splits == 125


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "float32"}, "float32 pages"),
        ({"query": "float32"}, "float32 queries"),
        ({"kind": "bfloat16", "query": "float16", "token_scales": False}, "must be the same"),
        ({"head_dim": 80}, "head_dim=80; there are kernels for 64, 96, 128 and 256"),
        ({"ratio": 17}, "17 query heads per KV head"),
        ({"page_size": 48}, "page_size=48; it must be one of"),
        ({"page_size": 16}, "page_size=16; it must be one of [32, 64] or a multiple of 128"),
    ],
)
def test_reasons(change: dict, reason: str) -> None:
    assert reason in (unsupported_reason(dataclasses.replace(TYPICAL, **change)) or "")


def test_bad_configs() -> None:
    for wrong in ({"tokens": 32}, {"stages": 1}, {"splits": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Config(**{"tokens": 64, "stages": 2, **wrong})
    wide = dataclasses.replace(TYPICAL, kind="bfloat16", head_dim=256, token_scales=False)
    assert "bytes of shared memory" in (config_unsupported_reason(Config(64, 6), wide) or "")
    narrow = dataclasses.replace(TYPICAL, kind="int4", head_dim=64)
    assert "merge of the warps" in (config_unsupported_reason(Config(64, 2), narrow) or "")
