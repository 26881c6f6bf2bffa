"""Compile the weight-only kernel for sm_90a without a GPU and report what ptxas says.

A program of its own, because the target needs environment variables that are read when jax starts:
``python -m tests.kernels.aot < problems.json`` prints one JSON line per problem. It needs jax's
CUDA plugin without the CUDA libraries, and ptxas on PATH::

  pip install --no-deps jax-cuda13-plugin==$JAX jax-cuda13-pjrt==$JAX
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# An H200, as XLA describes it.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one problem.

    Attributes:
      registers: Per thread, or None if it did not compile.
      spilled: Bytes of registers spilled to memory.
      warnings: Messages of ptxas with a number, such as that wgmma was serialized.
      error: The error, or None.
    """

    registers: int | None
    spilled: int
    warnings: list[str]
    error: str | None


def compile_problem(problem: Any, config: Any, sharding: Any) -> Report:
    """Lower and compile one ``weight_only.Problem`` with one ``weight_only.Config``."""
    import jax.numpy as jnp

    from qjax.pallas_kernels import _codes, _layout, weight_only

    p = problem
    compute = jnp.dtype(p.compute)

    shape = shapes_on(sharding)

    words = _layout.words_shape(p.k, p.n, _codes.CODES[p.kind].bits)
    arguments = {
        "x": shape((p.m, p.k), compute),
        "words": shape(words, jnp.int32),
        "scales": None,
        "column": shape((p.n,), jnp.float32),
    }
    if p.group_size is not None:
        dims = (p.k // p.group_size, 2 if p.zero_point else 1, p.n)
        arguments["scales"] = shape(dims, _codes.stored_dtype(p.compute))
        if p.compute == "float16":
            arguments["row_scale"] = shape((p.m,), jnp.float32)

    def product(arguments: dict[str, Any]) -> Any:
        out_dtype = jnp.float32 if p.out_itemsize == 4 else jnp.bfloat16
        return weight_only.matmul(
            **arguments, kind=p.kind, config=config, out_dtype=out_dtype, gated=p.gated
        )

    return compile_program(product, arguments)


def shapes_on(sharding: Any) -> Callable[[tuple[int, ...], Any], Any]:
    """``(dims, dtype)`` to the abstract array of a program for the target."""
    import jax
    import jax.numpy as jnp

    return lambda dims, dtype: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=sharding)


def compile_program(program: Callable[..., Any], *arguments: Any) -> Report:
    """Lower and compile a function of arrays that holds one kernel."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            traced = jax.jit(program).trace(*arguments)
            traced.lower(lowering_platforms=("cuda",)).compile()
        except Exception as error:  # any failure is a finding, and the other problems go on
            return Report(None, 0, [], f"{type(error).__name__}: {str(error)[:2000]}")
        text = "\n".join(path.read_text() for path in pathlib.Path(folder).glob("*.ptxas"))
    registers = re.findall(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    if not registers or not spilled:
        return Report(None, 0, [], f"no report of ptxas: {text[:500]!r}")
    warnings = re.findall(r"\(C7\d+\)[^\n]*", text)
    return Report(max(map(int, registers)), sum(map(int, spilled)), warnings, None)


def target_sharding() -> Any:
    """Where the arguments of a program for the target lie. To be called before jax starts."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_PLATFORMS"] = ""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET
    )
    return SingleDeviceSharding(topology.devices[0])


def compile_listed(module: str, compile_one: Callable[[Any, Any, Any], Report]) -> None:
    """Read a JSON list of (problem, config) from standard input; write a report for each.

    Args:
      module: The kernel's, in ``qjax.pallas_kernels``, with its ``Problem`` and ``Config``.
      compile_one: ``(problem, config, sharding) -> Report``.
    """
    sharding = target_sharding()
    kernel: Any = importlib.import_module(f"qjax.pallas_kernels.{module}")
    for problem, config in json.load(sys.stdin):
        report = compile_one(kernel.Problem(**problem), kernel.Config(**config), sharding)
        print(json.dumps(dataclasses.asdict(report)), flush=True)


if __name__ == "__main__":
    compile_listed("weight_only", compile_problem)
