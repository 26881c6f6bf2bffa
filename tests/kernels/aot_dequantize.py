"""Compile the kernel that dequantizes for sm_90a without a GPU: ``aot`` for that kernel.

``python -m tests.kernels.aot_dequantize < problems.json`` prints one JSON line per problem.
"""

from __future__ import annotations

from typing import Any

from tests.kernels.aot import Report, compile_listed, compile_program, shapes_on


def compile_problem(problem: Any, config: Any, sharding: Any) -> Report:
    """Lower and compile one ``Problem`` with one ``dequantize.Config``.

    The matrix is bfloat16, or float16 where the problem's products are.
    """

    from qjax.pallas_kernels import _codes, _layout, dequantize

    p = problem

    shape = shapes_on(sharding)

    arguments = {
        "words": shape(_layout.words_shape(p.k, p.n, p.bits), "int32"),
        "scales": None,
        "column": shape((p.n,), "float32"),
    }
    if p.group_size is not None:
        dims = (p.k // p.group_size, 2 if p.zero_point else 1, p.n)
        arguments["scales"] = shape(dims, _codes.stored_dtype(p.compute))

    def program(arguments: dict[str, Any]) -> Any:
        return dequantize.dequantize(
            **arguments, kind=p.kind, dtype=p.compute, config=config, alternating=p.m % 2 == 1
        )

    return compile_program(program, arguments)


if __name__ == "__main__":
    compile_listed("dequantize", compile_problem)
