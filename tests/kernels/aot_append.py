"""Compile the append kernel, with rotation and without, for sm_90a without a GPU; see ``aot``.

A program of its own: ``python -m tests.kernels.aot_append < cases.json`` prints one JSON line per
case: an append to one layer, or a whole decode step with the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from typing import Any

from tests.kernels.aot import Report, compile_program, target_sharding


def compile_case(case: dict, sharding: Any) -> Report:
    """Compile one append to one layer.

    Args:
      case: ``fmt`` (fields of a ``KVFormat``), ``batch``, ``q_heads`` (0 for keys and values that
        come ready), ``kv_heads``, ``head_dim``, ``splits`` (0 for a 16-bit product) and ``biases``
        (letters of q, k and v).
      sharding: Where arrays lie.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.kv_cache import QuantizedKVCache
    from qjax.kv_format import KVFormat
    from qjax.ops._append import append_by_kernel, rotate_and_append_by_kernel

    fmt = KVFormat(**case["fmt"])
    rows, dim, kv_heads = case["batch"], case["head_dim"], case["kv_heads"]
    dtype = jnp.dtype("float16" if fmt.dtype == "float16" else "bfloat16")
    ones = np.ones(kv_heads, np.float32)

    def init() -> QuantizedKVCache:
        return QuantizedKVCache.init(
            num_layers=1,
            num_kv_heads=kv_heads,
            head_dim=dim,
            num_pages=rows * 16,
            page_size=64,
            max_seqs=rows,
            pages_per_seq=16,
            fmt=fmt,
            static_scales=[(ones, ones)] if fmt.mode == "static" else None,
            counted=False,
            share_pages=True,
        )

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = jax.tree.map(lambda x: array(x.shape, x.dtype), jax.eval_shape(init))
    where = (
        array((rows, 1), jnp.int32),
        array((rows,), jnp.int32),
        array((rows, 1), jnp.bool_),
    )
    if case["q_heads"] == 0:
        new = array((rows, 1, kv_heads, dim), dtype)

        def plain(cache: Any, keys: Any, values: Any, *where: Any) -> Any:
            return append_by_kernel(cache, 0, keys, values, *where)

        return compile_program(plain, cache, new, new, *where)

    counts = (case["q_heads"], kv_heads, kv_heads)
    biases = tuple(
        array((count * dim,), dtype) if name in case["biases"] else None
        for name, count in zip("qkv", counts, strict=True)
    )
    splits = case["splits"]
    shape = (max(splits, 1), rows, 1, sum(counts) * dim)
    product = array(shape, jnp.float32 if splits else dtype)

    def rotated(cache: Any, product: Any, biases: Any, table: Any, *where: Any) -> Any:
        return rotate_and_append_by_kernel(cache, 0, (product,), biases, dtype, table, *where)

    return compile_program(rotated, cache, product, biases, array((rows, 1, dim), "f4"), *where)


def compile_step(case: dict, sharding: Any) -> dict:
    """Compile the decode loop of a small model.

    Args:
      case: ``step`` (fields of a ``KVFormat``), ``layers``, ``batch``, ``bias`` (whether
        projections have biases) and ``kernel`` (whether the append kernel is used).
      sharding: Where arrays lie.

    Returns:
      Bytes of the cache and of what is updated in place, the instructions that make a new array as
      large as a page pool, and the number of kernels in a step.
    """
    import jax
    import jax.numpy as jnp

    import qjax
    from qjax.generate import DecodeState, decode
    from qjax.kv_cache import QuantizedKVCache
    from qjax.kv_format import KVFormat
    from qjax.models.config import ModelConfig
    from qjax.models.decoder import Decoder
    from qjax.models.fusion import fuse_layer
    from qjax.ops import _append, _paged, dot, norm, packed

    modules: list[Any] = [_append, _paged, dot, norm, packed]
    for module in modules:  # the default device of this process is no GPU
        module.mosaic_gpu_unsupported_reason = lambda: None
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2048,
        num_layers=case["layers"],
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=128,
        attention_bias=case["bias"],
    )
    rows = case["batch"]

    def weights() -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        init = Decoder(config, param_dtype=jnp.bfloat16).init(jax.random.key(0), tokens)
        params = qjax.quantize_tree(init["params"], {"model/.*kernel": qjax.INT4_G128})
        for i in range(config.num_layers):
            name = f"layers_{i}"
            params["model"][name] = packed.pack_tree(fuse_layer(params["model"][name]))
        return params

    def new_cache() -> QuantizedKVCache:
        return QuantizedKVCache.init(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_pages=rows * 16,
            page_size=64,
            max_seqs=rows,
            pages_per_seq=16,
            fmt=KVFormat(**case["step"]),
            counted=False,
        )

    shapes = [weights, new_cache, functools.partial(DecodeState.init, rows), lambda: jnp.int32(4)]
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        [jax.eval_shape(make) for make in shapes],
    )
    step = functools.partial(decode, Decoder(config).apply, (), 4, True, True)
    traced = jax.jit(step, donate_argnums=(1, 2)).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    # The computation that calls the kernels is the body of the loop over tokens.
    parts = re.split(r"\n(?=%|ENTRY)", text)
    body = max(parts, key=lambda part: part.count('custom_call_target="mosaic_gpu'))
    cache = arguments[1]
    pool = ",".join(map(str, cache.keys[0].shape))
    return {
        "cache": cache.nbytes,
        "in_place": memory.alias_size_in_bytes,
        "large": re.findall(rf"= \w+\[{pool}\]\S* (?:copy|transpose|convert)\(.*", text),
        "appends": len(re.findall(r"(?m) custom-call\(.*/kv_append_", body)),
        # Without what only converts a weight.
        "kernels": len(re.findall(r"(?m)^ *(?! |%wrapped_conv).* (?:fusion|custom-call)\(", body)),
    }


def main() -> None:
    """Read a JSON list of cases from standard input; write a report for each."""
    sharding = target_sharding()
    for case in json.load(sys.stdin):
        if "step" in case:
            report = compile_step(case, sharding)
        else:
            report = dataclasses.asdict(compile_case(case, sharding))
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
