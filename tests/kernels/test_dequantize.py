"""Dequantizing once: when it is chosen, and what fits; plain integers, no device."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.evaluation.products import entry_of, kernel_configs
from qjax.ops.packed import pack_for_mosaic, packed_kernels
from qjax.pallas_kernels import dequantize, weight_only, weight_only_large
from qjax.pallas_kernels.dequantize import Config, Problem, config_unsupported_reason
from tests.kernels.problems import WEIGHTS

PROBLEM = Problem(4096, 4096, 28672, "int4", 128, compute="bfloat16")


def test_products_take_it_only_when_told() -> None:
    """By a measured table, that is: measuring tools see it as the last candidate."""
    w = pack_for_mosaic(qjax.quantize(jnp.ones((512, 128), jnp.bfloat16), qjax.INT4_G128))

    def kernels(m: int) -> list[Any]:
        x: Any = jax.ShapeDtypeStruct((2, m // 2, 512), jnp.bfloat16)
        return [kernel for kernel, _ in packed_kernels(x, w)]

    assert kernels(16384) == [weight_only_large, dequantize]
    assert kernels(254) == [weight_only_large]
    assert kernels(16) == [weight_only, weight_only_large]


def test_it_is_among_the_configs_to_time() -> None:
    w = pack_for_mosaic(qjax.quantize(jnp.ones((512, 128), jnp.bfloat16), qjax.INT4_G128))
    x = jnp.zeros((256, 512), jnp.bfloat16)
    configs = kernel_configs(x, w, 3)
    sources = [source for _, source in configs]
    assert sources[0] == "weight_only_large: heuristic"
    assert sources[1:] == ["weight_only_large: search"] * 3 + ["dequantize: search"] * 2
    entry = json.loads(entry_of(x, w, configs[-1][0]))
    assert entry["kernel"] == "dequantize" and Config(**entry["config"]) == configs[-1][0]
    assert Problem(**entry["problem"]).m == 256


def test_a_weight_of_64_columns_more_has_no_other_kernel() -> None:
    w = pack_for_mosaic(qjax.quantize(jnp.ones((128, 192), jnp.bfloat16), qjax.INT8_CHANNEL))
    x: Any = jax.ShapeDtypeStruct((300, 128), jnp.bfloat16)
    assert [kernel for kernel, _ in packed_kernels(x, w)] == [dequantize]


def test_configs() -> None:
    for m, k, n in ((256, 128, 64), (4096, 4096, 28672), (300, 384, 192)):
        for kind, group, zero_point, compute in WEIGHTS:
            p = Problem(m, k, n, kind, group, zero_point, compute)
            configs = dequantize.search_space(p)
            assert len(set(configs)) == len(configs) > 0
            assert all(config_unsupported_reason(config, p) is None for config in configs)
            assert config_unsupported_reason(dequantize.heuristic_config(p), p) is None
    assert "no multiple of 4 * 128" in (
        config_unsupported_reason(Config(4, 2), dataclasses.replace(PROBLEM, k=256)) or ""
    )
    for bad in ({"steps": 3}, {"steps": 2, "buffers": 3}, {"buffers": 0}):
        with pytest.raises(ValueError, match="must be"):
            Config(**bad)


def test_refusals() -> None:
    x = jnp.zeros((16, 256), jnp.bfloat16)
    w = pack_for_mosaic(qjax.quantize(jnp.ones((256, 64), jnp.bfloat16), qjax.INT8_CHANNEL))
    parts = w.words, w.scales, w.column
    with pytest.raises(NotImplementedError, match="m=16 rows; dequantizing first is for 256"):
        dequantize.matmul(x, *parts, kind="int8")
    with pytest.raises(NotImplementedError, match="float32 activations"):
        dequantize.dequantize(*parts, kind="int8", dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"k=256 is no multiple of 4 \* 128"):
        dequantize.dequantize(*parts, kind="int8", dtype=jnp.float16, config=Config(4))
