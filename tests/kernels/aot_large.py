"""Compile the weight-only kernel for many rows for sm_90a without a GPU: ``aot`` for that kernel.

``python -m tests.kernels.aot_large < problems.json`` prints one JSON line per problem.
"""

from __future__ import annotations

from typing import Any

from tests.kernels.aot import Report, compile_listed, compile_program, shapes_on


def compile_problem(problem: Any, config: Any, sharding: Any) -> Report:
    """Lower and compile one ``Problem`` with one ``weight_only_large.Config``."""
    import jax.numpy as jnp

    from qjax.pallas_kernels import _layout, weight_only_large

    p = problem

    shape = shapes_on(sharding)

    arguments = {
        "x": shape((p.m, p.k), p.compute),
        "words": shape(_layout.words_shape(p.k, p.n, p.bits), "int32"),
        "scales": None,
        "column": shape((p.n,), "float32"),
    }
    if p.group_size is not None:
        dims = (p.k // p.group_size, 2 if p.zero_point else 1, p.n)
        arguments["scales"] = shape(dims, weight_only_large.stored_dtype(p))
    if p.compute != "bfloat16":
        arguments["row_scale"] = shape((p.m,), "float32")

    def product(arguments: dict[str, Any]) -> Any:
        out_dtype = jnp.float32 if p.out_itemsize == 4 else jnp.bfloat16
        return weight_only_large.matmul(
            **arguments, kind=p.kind, config=config, out_dtype=out_dtype, gated=p.gated
        )

    return compile_program(product, arguments)


if __name__ == "__main__":
    compile_listed("weight_only_large", compile_problem)
