"""Compile the W8A8 kernel for sm_90a without a GPU: ``aot`` for that kernel.

``python -m tests.kernels.aot_w8a8 < problems.json`` prints one JSON line per problem.
"""

from __future__ import annotations

from typing import Any

from tests.kernels.aot import Report, compile_listed, compile_program, shapes_on


def compile_problem(problem: Any, config: Any, sharding: Any) -> Report:
    """Lower and compile one ``w8a8.Problem`` with one ``w8a8.Config``."""
    import jax.numpy as jnp

    from qjax.pallas_kernels import w8a8

    p = problem
    blocks = p.k // w8a8.BLOCK_K

    shape = shapes_on(sharding)

    def product(*arguments: Any) -> Any:
        out_dtype = jnp.float32 if p.out_itemsize == 4 else jnp.bfloat16
        return w8a8.matmul(*arguments, config=config, out_dtype=out_dtype)

    return compile_program(
        product,
        shape((p.m, p.k), p.x_kind),
        shape((p.n, p.k), p.kind),
        shape((blocks, p.m) if p.blocks else (p.m,), "float32"),
        shape((-(-p.n // 128), blocks) if p.blocks else (p.n,), "float32"),
        *((shape((blocks, p.n), "float32"),) if p.groups else ()),
    )


if __name__ == "__main__":
    compile_listed("w8a8", compile_problem)
