"""Configs, shared memory and refusals of the weight-only kernel: plain integers, no device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qjax
from qjax.ops import gated
from qjax.ops.packed import pack_for_mosaic, packed_config, packed_kernels
from qjax.pallas_kernels import _codes, weight_only, weight_only_large
from qjax.pallas_kernels.weight_only import (
    SHARED_MEMORY_BYTES,
    Config,
    Problem,
    config_unsupported_reason,
    heuristic_config,
    search_space,
    smem_bytes,
    unsupported_reason,
)
from tests.kernels.problems import SHAPES, WEIGHTS, shipped

PROBLEM = Problem(8, 4096, 4096, "int4", 128)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kind = draw(st.sampled_from(sorted(_codes.CODES)))
    groups = [None, 128] + ([32, 64] if kind == "int4" else [])
    group_size = draw(st.sampled_from(groups))
    return Problem(
        m=draw(st.integers(1, 64)),
        k=128 * draw(st.integers(1, 300)),
        n=64 * draw(st.integers(1, 2400)),
        kind=kind,
        group_size=group_size,
        zero_point=kind == "int4" and group_size is not None and draw(st.booleans()),
        out_itemsize=draw(st.sampled_from([2, 4])),
    )


@given(problems())
def test_the_heuristic_fits_every_supported_problem(p: Problem) -> None:
    assert unsupported_reason(p) is None
    config = heuristic_config(p)
    assert config_unsupported_reason(config, p) is None
    assert smem_bytes(config, p) <= SHARED_MEMORY_BYTES


@given(problems())
def test_search_space_holds_only_what_fits(p: Problem) -> None:
    configs = search_space(p)
    assert len(set(configs)) == len(configs) > 0
    assert all(config_unsupported_reason(config, p) is None for config in configs)


def test_multiprocessors_are_filled_for_real_layers() -> None:
    """The layers of an 8B model get between 112 and 132 CTAs, or several waves of them."""
    for name in ("8b_qkv", "8b_o", "8b_gate_up", "8b_down"):
        k, n = SHAPES[name]
        config = heuristic_config(dataclasses.replace(PROBLEM, k=k, n=n))
        ctas = n // 64 // config.warpgroups * config.splits
        assert 112 <= ctas <= 132, (name, config)


def test_shared_memory_counts_every_buffer() -> None:
    """The sum written out for one case, with scales and offsets."""
    p = Problem(16, 4096, 4096, "int4", 32, zero_point=True, out_itemsize=4)
    words, scales = 3 * 2 * 4096, 3 * 4 * 2 * 128 * 2
    activations, result, barriers = 3 * 16 * 256, 16 * 128 * 4, 1024
    assert smem_bytes(Config(2, 3), p) == words + scales + activations + result + barriers


def test_products_that_lack_registers_go_to_the_other_kernel() -> None:
    """Never up to 16 rows, whose configs were measured; with 64 where two warpgroups are left."""
    for name, (k, n) in SHAPES.items():
        for m in (1, 16):
            for weight in WEIGHTS:
                assert not weight_only.crowded(Problem(m, k, n, *weight)), (name, weight)
    wide = Problem(64, 4096, 28672, "int4", 128, compute="bfloat16")
    assert weight_only.crowded(wide)
    assert not weight_only.crowded(dataclasses.replace(wide, compute="float16"))
    assert not weight_only.crowded(dataclasses.replace(wide, n=6144))
    w = pack_for_mosaic(qjax.quantize(jnp.ones((1024, 28672), jnp.bfloat16), qjax.INT4_G128))
    for m, first in ((16, weight_only), (64, weight_only_large)):
        x: Any = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16)
        assert packed_kernels(x, w)[0][0] is first


def test_gated_products_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one kernel where sums are whole; its config is the product's own wherever that fits."""
    large = weight_only_large
    problem = Problem(64, 4096, 28672, "int4", 128, compute="bfloat16", gated=True)
    for m in (33, 64, 300):
        config = large.heuristic_config(dataclasses.replace(problem, m=m))
        assert config.warpgroups in (2, 4) and config.splits == 1
    refused = large.Config(64, 4, warpgroups=3), large.Config(64, 4, splits=2)
    for config in refused:
        reason = large.config_unsupported_reason(config, problem)
        assert reason is not None and "an even number of warpgroups and one split" in reason

    ones = jnp.ones((1024, 28672), jnp.bfloat16)
    w = pack_for_mosaic(qjax.quantize(ones, qjax.INT4_G128), alternating=True)
    x: Any = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16)
    assert gated.gated_config(x, w) == packed_config(x, w)[0]
    assert isinstance(gated.gated_config(x, w), large.Config)
    chosen = dataclasses.replace(problem, k=1024)
    for config, wanted in zip(refused, (large.heuristic_config(chosen), None), strict=True):
        monkeypatch.setattr(
            gated, "packed_config", lambda *_, config=config, **__: (config, "tuned")
        )
        assert gated.gated_config(x, w) == wanted


def test_shipped_configs_are_distinct() -> None:
    pairs = list(shipped())
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warpgroups": 5, "stages": 4}, "warpgroups=5 must be 1, 2, 3 or 4"),
        ({"warpgroups": 1, "stages": 1}, "stages=1 must be between 2 and 16"),
        ({"warpgroups": 1, "stages": 4, "splits": 0}, "splits=0 must be positive"),
        # 640 threads: 96 registers each at launch; 4 * 112 + 40 is more than 5 * 96.
        ({"warpgroups": 4, "stages": 4, "registers": 112}, "registers of a pool of 61440"),
        ({"warpgroups": 2, "stages": 4, "registers": 100}, "use a smaller multiple of 8"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 65}, "m=65 rows; this kernel is for 1 to 64"),
        ({"k": 4000}, "must be multiples of"),
        ({"n": 4080}, "must be multiples of"),
        ({"kind": "int2"}, "int2 codes; there are kernels for"),
        ({"group_size": 256}, "group_size=256"),
        ({"compute": "float32"}, "float32 activations"),
    ],
)
def test_unsupported_problems(changes: dict[str, Any], message: str) -> None:
    reason = unsupported_reason(dataclasses.replace(PROBLEM, **changes))
    assert reason is not None and message in reason


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(3, 4), "n=4096 is no multiple of 3 * 64"),
        (Config(2, 4, 3), "k=4096 cannot be cut into 3"),
        (Config(2, 4, 32, True), "an even number of steps, not 1"),
        (Config(4, 16), "bytes of shared memory"),
    ],
)
def test_configs_that_do_not_fit(config: Config, message: str) -> None:
    reason = config_unsupported_reason(config, PROBLEM)
    assert reason is not None and message in reason
    x = jnp.zeros((8, 4096), jnp.float16)
    words = jnp.zeros((32, 64, 4, 256), jnp.int32)
    scales, column = jnp.zeros((32, 1, 4096), jnp.float16), jnp.zeros((4096,))
    with pytest.raises(NotImplementedError, match="weight_only.matmul: "):
        weight_only.matmul(x, words, scales, column, kind="int4", config=config)
