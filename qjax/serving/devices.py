"""The devices of an engine: what lies where, and programs that every device runs for itself.

::

    weights and cache   one device        several: each its part (models.sharding)
    state and batches   there             the same on all
    program             as it is          jax.shard_map: as for one device, with sums over all

In a process that sees several devices the program for one of them goes through ``jax.shard_map``
too, over one device. Ops then know that there is nothing to divide, and use kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.kv_cache import QuantizedKVCache
from qjax.models.config import ModelConfig
from qjax.models.fusion import FUSED
from qjax.models.sharding import (
    AXIS,
    cache_specs,
    check_tensor_parallel,
    named_shardings,
    own_specs,
)
from qjax.nn.parallel import TensorParallel
from qjax.quantize import path_string
from qjax.quantized_array import packed_nbytes
from qjax.typing import Params, PyTree


def mesh_of(params: PyTree, mesh: Mesh | None) -> Mesh | None:
    """The mesh on which programs for each device run; None if they are not told.

    Args:
      params: Parameters.
      mesh: The mesh that they are cut over, or None if they are not cut for ``jax.shard_map``.

    Returns:
      ``mesh``, or one of one device if several are visible and all parameters lie on one. None
      where only one is visible, or XLA is to divide the programs.

    Raises:
      ValueError: If the mesh has several axes.
    """
    if mesh is not None:
        if len(mesh.axis_names) != 1:
            raise ValueError(
                f"a mesh with axes {mesh.axis_names}; a model is cut over one, such as that of "
                "qjax.models.sharding.tensor_parallel_mesh"
            )
        return mesh
    if jax.device_count() == 1:
        return None
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    used = {device for array in arrays for device in array.devices()}
    return Mesh(np.asarray(list(used)), (AXIS,)) if len(used) == 1 else None


class Devices:
    """Where the arrays of an engine lie.

    Attributes:
      mesh: See ``mesh_of``.
      count: Devices that a model is cut over.
    """

    def __init__(self, params: Params, config: ModelConfig, mesh: Mesh | None) -> None:
        """For parameters as ``load_model`` and ``prepare_weights`` leave them on this mesh.

        Raises:
          ValueError: If the model cannot be cut over the mesh, or parameters are not on it.
        """
        self.mesh = mesh_of(params, mesh)
        self.count = 1 if self.mesh is None else self.mesh.size
        if self.count > 1:
            check_tensor_parallel(config, self.count)
            jax.tree_util.tree_map_with_path(self._check, params)
        self._param_specs = P() if self.count == 1 else own_specs(params)

    def _check(self, path: Any, leaf: jax.Array) -> None:
        sharding, name = leaf.sharding, path_string(path)
        if getattr(sharding, "mesh", None) != self.mesh:
            raise ValueError(
                f"{name} lies on {sharding}, the engine is for {self.mesh}; load parameters with "
                "load_model(mesh=...), or place them with qjax.models.sharding.shard_params"
            )
        if sharding.is_fully_replicated and any(joined in name for joined, _ in FUSED.values()):
            raise ValueError(
                f"{name} joins projections of the whole model, which cannot be cut into the heads "
                "of each device; load a checkpoint whose projections are apart"
            )

    @property
    def parallel(self) -> TensorParallel | None:
        """What the decoder must know of the other devices."""
        if self.mesh is None or self.count == 1:
            return None
        return TensorParallel(self.mesh.axis_names[0], self.count)

    def put(self, tree: PyTree) -> PyTree:
        """The same arrays on every device."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def new_cache(self, **sizes: Any) -> QuantizedKVCache:
        """``QuantizedKVCache.init(**sizes)``, of which no device ever holds more than its part."""
        return self.make_cache(functools.partial(QuantizedKVCache.init, **sizes))

    def make_cache(self, make: Callable[[], QuantizedKVCache]) -> QuantizedKVCache:
        """The cache that a function makes, likewise; its counters must be 0."""
        if self.mesh is None:
            return make()

        def make_counting() -> QuantizedKVCache:
            cache = make()
            # Every device counts for itself.
            counters = jnp.zeros((2 * self.count,), jnp.int32)
            every = (counters,) * cache.num_layers
            return dataclasses.replace(cache, layer_saturated=every, layer_underflowed=every)

        specs = self._cache_specs(jax.eval_shape(make_counting))
        return jax.jit(make_counting, out_shardings=named_shardings(specs, self.mesh))()

    def _cache_specs(self, cache: QuantizedKVCache) -> QuantizedKVCache:
        assert self.mesh is not None
        if self.count == 1:
            return jax.tree.map(lambda _: P(), cache)
        return cache_specs(cache, self.count, self.mesh.axis_names[0], own_counters=True)

    def program(self, function: Callable[..., Any], cache: QuantizedKVCache) -> Any:
        """A jitted program of an engine.

        Args:
          function: Of parameters, cache, state and one argument more; returns the cache, the state
            and two results. Cache and state are given away.
          cache: A cache like those it will get.
        """
        if self.mesh is not None:
            held = self._cache_specs(cache)
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(self._param_specs, held, P(), P()),
                out_specs=(held, P(), P(), P()),
                check_vma=False,  # it does not know kernels; what is P() is equal by construction
            )
        return jax.jit(function, donate_argnums=(1, 2))


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of a tree on the device that holds most of it."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        size = packed_nbytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for device in leaf.sharding.device_set:
            held[device] = held.get(device, 0) + size
    return max(held.values())
