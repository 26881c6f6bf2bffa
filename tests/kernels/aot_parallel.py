"""Compile decode steps of a model that is cut over GPUs, without one; see ``aot``.

``python -m tests.kernels.aot_parallel 2`` prints one JSON line: how often the compiled program for
two GPUs calls kernels and sums over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from typing import Any

from tests.kernels.aot import TARGET


def main(count: int) -> None:
    """Compile for ``count`` of two devices, and count."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_PLATFORMS"] = ""
    # In a process with one device kernels would run for that reason alone.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import qjax
    from qjax.generate import DecodeState, decode
    from qjax.kv_cache import QuantizedKVCache
    from qjax.kv_format import parse_kv_format
    from qjax.models.config import ModelConfig
    from qjax.models.decoder import Decoder
    from qjax.models.fusion import fuse_layer
    from qjax.models.sharding import PerDevice, cache_specs, named_shardings, param_specs
    from qjax.ops import _paged, dot, norm, packed
    from qjax.serving.devices import Devices

    modules: list[Any] = [_paged, dot, norm, packed]
    for module in modules:  # the default device of this process is no GPU
        module.mosaic_gpu_unsupported_reason = lambda: None
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x2", target_config=TARGET
    )
    mesh = Mesh(np.asarray(topology.devices[:count]), ("model",))
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_layers=2,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=128,
    )

    def placed(tree: Any, specs: Any) -> Any:
        """Abstract arrays on the mesh."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            named_shardings(specs, mesh),
        )

    def per_device(function: Any, tree: Any) -> Any:
        out = jax.eval_shape(PerDevice(function, mesh)._compiled(tree), tree)
        return placed(out, jax.tree.map(lambda x: P("model") if x.ndim else P(), out))

    def weights() -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = Decoder(config, param_dtype=jnp.bfloat16).init(jax.random.key(0), tokens)
        return qjax.quantize_tree(params["params"], {"model/.*kernel": qjax.INT4_G128})

    params = jax.eval_shape(weights)
    params = placed(params, param_specs(params, config, count))
    for i in range(config.num_layers):
        name = f"layers_{i}"
        layer = params["model"][name]
        params["model"][name] = per_device(lambda t: packed.pack_tree(fuse_layer(t)), layer)

    def new_cache() -> QuantizedKVCache:
        cache = QuantizedKVCache.init(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_pages=64,
            page_size=64,
            max_seqs=16,
            pages_per_seq=4,
            fmt=parse_kv_format("fp8_e4m3", model_dtype=jnp.bfloat16),
            counted=False,
        )
        counters = (jnp.zeros((2 * count,), jnp.int32),) * config.num_layers
        return dataclasses.replace(cache, layer_saturated=counters, layer_underflowed=counters)

    cache = jax.eval_shape(new_cache)
    cache = placed(cache, cache_specs(cache, count, own_counters=True))
    whole = lambda tree: placed(tree, jax.tree.map(lambda _: P(), tree))  # noqa: E731
    state = whole(jax.eval_shape(functools.partial(DecodeState.init, 16)))
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    devices = Devices(params, config, mesh)
    module = Decoder(config, parallel=devices.parallel)
    step = functools.partial(decode, module.apply, (), 4, True, True)
    lowered = devices.program(step, cache).trace(params, cache, state, steps)
    compiled = lowered.lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text() or ""
    print(
        json.dumps(
            {
                "kernels": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
                "sums": len(re.findall(r" all-reduce(?:-start)?\(", text)),
                "gathers": len(re.findall(r" all-gather(?:-start)?\(", text)),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
