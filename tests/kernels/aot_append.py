"""Compile the append kernel, with rotation and without, for sm_90a without a GPU; see ``aot``.

A program of its own: ``python -m tests.kernels.aot_append < cases.json`` prints one JSON line per
case.
"""

from __future__ import annotations

import dataclasses
import json
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


def main() -> None:
    """Read a JSON list of cases from standard input; write a report for each."""
    sharding = target_sharding()
    for case in json.load(sys.stdin):
        print(json.dumps(dataclasses.asdict(compile_case(case, sharding))), flush=True)


if __name__ == "__main__":
    main()
