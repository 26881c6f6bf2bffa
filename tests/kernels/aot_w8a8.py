"""Compile the W8A8 kernel for sm_90a without a GPU: ``aot`` for that kernel.

``python -m tests.kernels.aot_w8a8 < problems.json`` prints one JSON line per problem.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tests.kernels.aot import Report, compile_program, target_sharding


def compile_problem(problem: Any, config: Any, sharding: Any) -> Report:
    """Lower and compile one ``w8a8.Problem`` with one ``w8a8.Config``."""
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels import w8a8

    p = problem
    blocks = p.k // w8a8.BLOCK_K

    def shape(dims: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=sharding)

    def product(*arguments: Any) -> Any:
        out_dtype = jnp.float32 if p.out_itemsize == 4 else jnp.bfloat16
        return w8a8.matmul(*arguments, config=config, out_dtype=out_dtype)

    return compile_program(
        product,
        shape((p.m, p.k), p.x_kind),
        shape((p.n, p.k), p.kind),
        shape((blocks, p.m) if p.blocks else (p.m,), "float32"),
        shape((-(-p.n // 128), blocks) if p.blocks else (p.n,), "float32"),
    )


def main() -> None:
    """Read a JSON list of (problem, config) from standard input; write a report for each."""
    sharding = target_sharding()
    from qjax.pallas_kernels.w8a8 import Config, Problem

    for problem, config in json.load(sys.stdin):
        report = compile_problem(Problem(**problem), Config(**config), sharding)
        print(json.dumps(dataclasses.asdict(report)), flush=True)


if __name__ == "__main__":
    main()
