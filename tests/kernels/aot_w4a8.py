"""Compile W4A8 by way of int8 codes for sm_90a without a GPU: ``aot`` for its two kernels.

``python -m tests.kernels.aot_w4a8 < problems.json`` prints one JSON line per problem.
"""

from __future__ import annotations

from typing import Any

from tests.kernels.aot import Report, compile_listed, compile_program, shapes_on


def compile_problem(problem: Any, config: Any, sharding: Any) -> Report:
    """Lower and compile one ``w4a8.Problem`` with one ``w4a8.Config``."""
    import jax.numpy as jnp

    from qjax.pallas_kernels import _layout, w4a8

    p = problem

    shape = shapes_on(sharding)

    def product(*arguments: Any) -> Any:
        out_dtype = jnp.float32 if p.out_itemsize == 4 else jnp.bfloat16
        return w4a8.matmul(*arguments, config=config, out_dtype=out_dtype)

    return compile_program(
        product,
        shape((p.m, p.k), "int8"),
        shape(_layout.words_shape(p.k, p.n, 4), "int32"),
        shape((p.k // 128, 1, p.n), "float32"),
        shape((p.n,), "float32"),
        shape((p.m,), "float32"),
    )


if __name__ == "__main__":
    compile_listed("w4a8", compile_problem)
