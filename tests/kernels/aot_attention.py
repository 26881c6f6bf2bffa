"""Compile the paged decode kernel for sm_90a without a GPU; see ``aot``.

A program of its own: ``python -m tests.kernels.aot_attention < problems.json`` prints one JSON line
per problem.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from tests.kernels.aot import TARGET


def compile_problem(problem: Any, config: Any, soft_cap: float | None, sharding: Any) -> dict:
    """Registers, bytes spilled and warnings of one problem, or the error."""
    import jax
    import jax.numpy as jnp

    from qjax.kv_format import KVFormat
    from qjax.pallas_kernels import paged_decode

    p = problem

    def shape(dims: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=sharding)

    plain = p.kind in ("bfloat16", "float16")
    fmt = KVFormat(p.kind, "none" if plain else "dynamic")
    pages = (1000, p.kv_heads, p.page_size)
    stored = shape((*pages, p.head_dim // (2 if fmt.packed else 1)), fmt.storage_dtype)
    scales = shape(pages if p.token_scales else (p.kv_heads,), jnp.float32)
    arguments = (
        shape((p.batch, p.kv_heads, p.ratio, p.head_dim), p.query),
        stored,
        stored,
        None if plain else scales,
        None if plain else scales,
        shape((p.batch, p.pages_per_seq), jnp.int32),
        shape((p.batch,), jnp.int32),
        shape((p.batch,), jnp.int32),
    )

    def run(*arguments: Any) -> Any:
        return paged_decode.decode(
            *arguments, kind=p.kind, scale=0.1, soft_cap=soft_cap, config=config
        )

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        except Exception as error:  # any failure is a finding, and the other problems go on
            return {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        text = "\n".join(path.read_text() for path in pathlib.Path(folder).glob("*.ptxas"))
    registers = re.findall(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    if not registers or not spilled:
        return {"error": f"no report of ptxas: {text[:500]!r}"}
    return {
        "error": None,
        "registers": max(map(int, registers)),
        "spilled": sum(map(int, spilled)),
        "warnings": re.findall(r"\(C7\d+\)[^\n]*", text),
    }


def main() -> None:
    """Read a JSON list of (problem, config or null, soft cap); write a report for each."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_PLATFORMS"] = ""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from qjax.pallas_kernels.paged_decode import Config, Problem

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    for problem, config, soft_cap in json.load(sys.stdin):
        chosen = None if config is None else Config(**config)
        report = compile_problem(Problem(**problem), chosen, soft_cap, sharding)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
