"""Products that the weight-only kernel is compiled and measured for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from qjax.evaluation import products
from qjax.pallas_kernels.weight_only import Config, Problem, heuristic_config

SHAPES = {name: size for name, size in products.SHAPES.items() if name != "ideal"}
"""``(k, n)`` of the linear layers of real models, projections fused where they may be."""


# What pack_for_mosaic and packed_dot make of the formats: (kind, group size, zero point, compute).
WEIGHTS: list[tuple[str, int | None, bool, str]] = [
    ("int4", 128, False, "float16"),
    ("int4", 128, True, "float16"),
    ("int4", 64, False, "float16"),
    ("int4", 64, True, "float16"),
    ("int4", 32, False, "float16"),
    ("int4", 32, True, "float16"),
    ("int4", 128, False, "bfloat16"),
    ("int4", 64, False, "bfloat16"),
    ("int4", 32, False, "bfloat16"),
    ("int4", 128, True, "bfloat16"),
    ("int4", 64, True, "bfloat16"),
    ("int4", 32, True, "bfloat16"),
    ("int4", None, False, "float16"),
    ("int4", None, False, "bfloat16"),
    ("int8", None, False, "float16"),
    ("int8", None, False, "bfloat16"),
    ("int8", 128, False, "float16"),
    ("int8", 128, False, "bfloat16"),
    ("float8_e4m3fn", None, False, "float16"),
    ("float8_e4m3fn", None, False, "bfloat16"),
    ("float8_e4m3fn", 128, False, "float16"),
    ("float8_e4m3fn", 128, False, "bfloat16"),
    ("float8_e5m2", None, False, "float16"),
    ("float8_e5m2", None, False, "bfloat16"),
    ("float8_e5m2", 128, False, "float16"),
    ("float8_e5m2", 128, False, "bfloat16"),
]


def shipped(
    weights: list[tuple[str, int | None, bool, str]] = WEIGHTS,
    rows: tuple[int, ...] = (8, 16, 32, 64),
    out_itemsize: int = 2,
) -> Iterator[tuple[Problem, Config]]:
    """Every distinct program that the heuristic chooses for the shapes above.

    Two problems whose programs differ only in loop bounds count as one.
    """
    seen = set()
    for kind, group_size, zero_point, compute in weights:
        for m in rows:
            for k, n in SHAPES.values():
                problem = Problem(m, k, n, kind, group_size, zero_point, compute, out_itemsize)
                config = heuristic_config(problem)
                program = dataclasses.replace(config, splits=min(config.splits, 2))
                key = dataclasses.replace(problem, k=0, n=0), program
                if key not in seen:
                    seen.add(key)
                    yield problem, config
