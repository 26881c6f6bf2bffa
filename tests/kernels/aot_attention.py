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

from tests.kernels.aot import TARGET, shapes_on


def compile_problem(problem: Any, config: Any, soft_cap: float | None, sharding: Any) -> dict:
    """Registers, bytes spilled and warnings of one problem, or the error."""
    import jax
    import jax.numpy as jnp

    from qjax.kv_format import KVFormat
    from qjax.pallas_kernels import paged_decode

    p = problem

    shape = shapes_on(sharding)

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
    added = None
    if p.logit_bias:
        length = paged_decode.bias_length(p.page_size * p.pages_per_seq)
        added = shape((p.batch, p.kv_heads, p.ratio, length), jnp.float32)

    def run(added: Any, *arguments: Any) -> Any:
        options = {"kind": p.kind, "soft_cap": soft_cap, "config": config}
        return paged_decode.decode(*arguments, scale=0.1, logit_bias=added, **options)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            jax.jit(run).trace(added, *arguments).lower(lowering_platforms=("cuda",)).compile()
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


def compile_step(dtype: str, mode: str, tokens: int, sharding: Any) -> dict:
    """Memory of a program that appends to two layers of a donated cache and attends.

    With a mode like ``"static-unbiased"`` keys are stored without their bias.

    Returns:
      Bytes of the cache, of it that the program updates in place, of temporaries, the instructions
      that make a new array as large as a page pool, and the number of kernels.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.kv_cache import QuantizedKVCache
    from qjax.kv_format import KVFormat
    from qjax.nn.rotary import rope_frequencies
    from qjax.ops._append import append_by_kernel
    from qjax.ops._paged import decode_by_kernel
    from qjax.ops.key_bias import KeyBias
    from qjax.ops.kv import append

    rows, heads, dim = 16, 8, 128
    ones = np.ones(heads, np.float32)
    mode, _, unbiased = mode.partition("-")
    frequencies = rope_frequencies(dim, 1e6, None)
    cache = QuantizedKVCache.init(
        num_layers=2,
        num_kv_heads=heads,
        head_dim=dim,
        num_pages=512,
        page_size=64,
        max_seqs=rows,
        pages_per_seq=32,
        fmt=KVFormat(dtype, mode, without_key_bias=bool(unbiased)),
        static_scales=[(ones, ones)] * 2 if mode == "static" else None,
        counted=False,
    )

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(
        cache: Any, new: Any, q: Any, positions: Any, slots: Any, valid: Any, bias: Any
    ) -> Any:
        for layer in (0, 1):
            put = append_by_kernel if tokens == 1 else append
            cache = put(cache, layer, new[0], new[1], positions, slots, valid)
            if tokens == 1:
                lengths = positions[:, 0] + 1
                known = KeyBias(bias[layer], frequencies) if unbiased else None
                where = positions, slots, lengths, 0.1, None
                q = decode_by_kernel(q, cache, layer, *where, key_bias=known)
        return cache, q

    arguments = (
        cache,
        jnp.zeros((2, rows, tokens, heads, dim), jnp.bfloat16),
        jnp.zeros((rows, heads, 4, dim), jnp.bfloat16),
        jnp.zeros((rows, tokens), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, tokens), bool),
        jnp.zeros((2, heads, dim), jnp.float32),
    )
    shapes = jax.tree.map(shape, arguments)
    compiled = (
        jax.jit(step, donate_argnums=0).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
    )
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None and text is not None
    pool = ",".join(map(str, cache.keys[0].shape))
    large = re.findall(rf"= \w+\[{pool}\]\S* (?:copy|transpose|convert)\(.*", text)
    return {
        "cache": cache.nbytes,
        "in_place": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "large": large,
        "kernels": len(re.findall(r"(?m) (?:fusion|custom-call)\(", text[text.index("ENTRY") :])),
    }


def main() -> None:
    """Read a JSON list of (problem, config or null, soft cap) or (dtype, mode, tokens)."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_PLATFORMS"] = ""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from qjax.pallas_kernels.paged_decode import Config, Problem

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    for first, config, soft_cap in json.load(sys.stdin):
        if isinstance(first, str):
            with jax.default_device(jax.devices("cpu")[0]):
                print(json.dumps(compile_step(first, config, soft_cap, sharding)), flush=True)
            continue
        problem = first
        chosen = None if config is None else Config(**config)
        report = compile_problem(Problem(**problem), chosen, soft_cap, sharding)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
