"""The paged decode kernel in the Pallas interpreter: copies, barriers, pages, ranges, splits.

The arithmetic of a tile is replaced by the same in jnp; its instructions are executed by
test_attention_ptx.py, compiled by test_attention_aot.py and run by test_gpu_attention.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax.kv_format import KVFormat
from qjax.ops._paged import paged_attention_unsupported_reason
from qjax.pallas_kernels.paged_decode import Config
from tests.kernels.attention_problems import Sizes, by_kernel, filled, queries, reference
from tests.tolerances import ATTENTION_BF16, ATTENTION_F16, relative_error

pytestmark = pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX, reason="no Pallas GPU interpreter that runs this kernel"
)

CASES: dict[str, tuple[KVFormat, Sizes, list[int], Config]] = {
    "bf16": (KVFormat("bfloat16"), Sizes(1, 3, 64), [130, 0], Config(64, 2)),
    "e4m3_static_small_pages_splits": (
        KVFormat("float8_e4m3fn", "static"),
        Sizes(2, 1, 64, page=32, dtype="float16"),
        [129],
        Config(64, 2, 2),
    ),
    "int8_tracked_window_cap": (
        KVFormat("int8", "tracked"),
        Sizes(1, 9, 64, window=70, soft_cap=2.0),
        [200],
        Config(64, 2),
    ),
    "int4_large_pages": (
        KVFormat("int4", "dynamic"),
        Sizes(1, 2, 64, page=256),
        [300],
        Config(128, 2, 2),
    ),
    "e4m3_unbiased": (
        KVFormat("float8_e4m3fn", "static", without_key_bias=True),
        Sizes(1, 7, 64, page=256, dtype="float16"),
        [130, 0, 70],
        Config(64, 2),
    ),
    "int8_unbiased_window_cap_splits": (
        KVFormat("int8", "dynamic", without_key_bias=True),
        Sizes(2, 4, 64, page=32, window=100, soft_cap=50.0),
        [200],
        Config(128, 2, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str) -> None:
    fmt, sizes, lengths, config = CASES[name]
    cache = filled(fmt, lengths, sizes)
    q = queries(sizes, len(lengths))
    assert paged_attention_unsupported_reason(q, cache, 0, interpret=True) is None
    out = by_kernel(cache, q, lengths, sizes, config=config, interpret=True)
    want = reference(cache, q, lengths, sizes)
    tolerance = ATTENTION_F16 if sizes.dtype == "float16" else ATTENTION_BF16
    assert relative_error(out.astype(np.float32), want) < tolerance


def test_no_data_race_and_the_same_twice() -> None:
    """Four tiles through two slots; the interpreter watches every access."""
    races: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    sizes, lengths = Sizes(1, 2, 64), [200]
    cache = filled(KVFormat("int8", "dynamic"), lengths, sizes)
    q = queries(sizes, 1)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        first = by_kernel(cache, q, lengths, sizes, config=Config(64, 2), interpret=True)
        assert not races.get_races().races_found
    assert (
        first == by_kernel(cache, q, lengths, sizes, config=Config(64, 2), interpret=True)
    ).all()
