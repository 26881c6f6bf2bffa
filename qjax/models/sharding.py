"""Tensor parallelism: how parameters and cache are laid out over the devices of one mesh axis.

Megatron's layout: q, k, v, gate and up are cut along their outputs, o and down along their inputs,
so that a block needs one sum over devices after attention and one after the MLP. Embedding and
output layer are cut along the vocabulary. Scales and zero points are cut together with the codes
they belong to, packed weights between their tiles.

Two kinds of programs run on this layout. XLA can divide a program for one device, and inserts the
sums. Or ``Decoder(parallel=...)`` is run by ``jax.shard_map``, which the engine does: every device
then computes with arrays of its own, as kernels need them. ``PerDevice`` changes these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.kv_cache import QuantizedKVCache
from qjax.models.config import ModelConfig
from qjax.ops.packed import PackedWeight
from qjax.ops.packed_w8a8 import PackedW8A8
from qjax.pallas_kernels._layout import BLOCK_K, BLOCK_N
from qjax.quantize import is_quantized, path_string
from qjax.quantized_array import QuantizedArray

AXIS = "model"
"""Name of the mesh axis over which ``tensor_parallel_mesh`` cuts a model."""

_CUT_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_CUT_INPUT = ("o_proj", "down_proj")
_GROUP_SIZES = (128, 64, 32, 16)
_COUNTERS = ("layer_saturated", "layer_underflowed")
_HEAD_AXIS = {
    "keys": 1,
    "values": 1,
    "key_scales": 1,
    "value_scales": 1,
    "running": -1,
    "page_running": -1,
    "layer_absmax": -1,
}


def leaf_spec(path: str, value: Any, config: ModelConfig, devices: int, axis: str = "model") -> Any:
    """Layout of one parameter.

    Args:
      path: Parameter path, ``model/layers_0/mlp/up_proj/kernel``.
      value: The array, ``QuantizedArray``, ``PackedWeight``, or their abstract values.
      config: The model.
      devices: Size of the mesh axis.
      axis: Its name.

    Returns:
      A ``PartitionSpec``; for a quantized or packed weight one of the same structure holding specs.

    Raises:
      ValueError: If the devices do not divide the parameter, or a shard would cut a group of
        weights that share a scale, or a tile of a packed weight. Names the layer, the sizes, and
        what works.
    """
    cut = _cut_axis(path, value, config, devices)
    if cut is None:
        spec = P()
    else:
        if value.shape[cut] % devices:
            raise ValueError(
                f"{path} of shape {value.shape} cannot be cut over {devices} devices: axis {cut} "
                f"must be a multiple of {devices}"
            )
        spec = P(*(axis if i == cut else None for i in range(value.ndim)))
    if isinstance(value, PackedWeight):
        return _packed_spec(path, value, cut, devices, axis)
    if not isinstance(value, QuantizedArray):
        return spec
    scale_spec = _scale_spec(path, value, cut, spec, devices)
    return dataclasses.replace(
        value,
        qvalue=spec,
        scale=scale_spec,
        zero_point=None if value.zero_point is None else scale_spec,
        # Activation order mixes the inputs of all devices; rows know where theirs come from.
        perm=None if value.perm is None else (P(axis) if cut == 0 else P()),
        global_scale=None if value.global_scale is None else P(),
        act_scale=None if value.act_scale is None else P(),
    )


def _cut_axis(path: str, value: Any, config: ModelConfig, devices: int) -> int | None:
    if config.num_q_heads % devices:
        raise ValueError(
            f"num_q_heads={config.num_q_heads} must be a multiple of {devices} devices; each holds "
            "whole heads"
        )
    layer, _, leaf = path.rpartition("/")
    name = layer.rpartition("/")[2]
    if name == "embed_tokens":
        # Cut along the vocabulary, like lm_head: a tied table serves as both.
        return 0 if value.shape[0] % devices == 0 else None
    if name in ("k_proj", "v_proj") and config.num_kv_heads % devices:
        return None  # fewer KV heads than devices: every device keeps them all
    if name == "lm_head" and value.shape[-1] % devices:
        return None
    if name in _CUT_OUTPUT:
        return value.ndim - 1
    if name in _CUT_INPUT and leaf == "kernel":
        return 0
    return None


def _scale_spec(path: str, w: QuantizedArray, cut: int | None, spec: P, devices: int) -> P:
    if cut is None or w.scale.shape[cut] == 1:
        return P()
    tile, shard = w.tiles[cut], w.shape[cut] // devices
    if shard % tile:
        fits = [g for g in _GROUP_SIZES if g < tile and shard % g == 0]
        fits = fits or [g for g in range(min(tile, shard), 0, -1) if shard % g == 0]
        raise ValueError(
            f"{path} of shape {w.shape} over {devices} devices gives shards of {shard} along axis "
            f"{cut}, which cuts groups of {tile} that share a scale; quantize this layer with "
            f"groups of {fits[0]}, or use fewer devices"
        )
    return spec


def _packed_spec(path: str, w: PackedWeight, cut: int | None, devices: int, axis: str) -> Any:
    k_axis, n_axis = (axis if cut == i else None for i in range(2))
    transposed = isinstance(w, PackedW8A8)
    if cut is not None:
        # Block scales of W8A8 weights are square, the others have groups along k only.
        squares = transposed and w.scales is not None
        tile = (BLOCK_K, BLOCK_K if squares else BLOCK_N)[cut]
        shard = w.shape[cut] // devices
        if shard % tile:
            raise ValueError(
                f"{path} of shape {w.shape} over {devices} devices gives shards of {shard} along "
                f"axis {cut}, which cuts the tiles of {tile} of a packed weight; unpack it "
                "(qjax.ops.packed.unpack_tree), or use fewer devices"
            )
    words, scales = P(k_axis, n_axis, None, None), P(k_axis, None, n_axis)
    if transposed:
        words = scales = P(n_axis, k_axis)
    return dataclasses.replace(
        w,
        words=words,
        # A tile along k holds whole groups: they are no longer than it.
        scales=None if w.scales is None else scales,
        column=P(n_axis),
        perm=None if w.perm is None else (P(k_axis) if cut == 0 else P()),
        act_scale=None if w.act_scale is None else P(),
    )


def param_specs(params: Any, config: ModelConfig, devices: int, axis: str = "model") -> Any:
    """``leaf_spec`` of every parameter, in the structure of ``params``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: leaf_spec(path_string(path), value, config, devices, axis),
        params,
        is_leaf=lambda x: is_quantized(x) or isinstance(x, PackedWeight),
    )


def shard_params(params: Any, config: ModelConfig, mesh: Mesh, axis: str = "model") -> Any:
    """Lay parameters out over a mesh."""
    specs = param_specs(params, config, mesh.shape[axis], axis)
    return jax.device_put(params, named_shardings(specs, mesh))


def placer(config: ModelConfig, mesh: Mesh, axis: str = "model") -> Callable[[str, Any], Any]:
    """The ``place`` argument of ``load_model``: each parameter goes to its devices as it is read.

    No device ever holds the whole model, only one whole parameter at a time.
    """

    def place(path: str, value: Any) -> Any:
        spec = leaf_spec(path, value, config, mesh.shape[axis], axis)
        return jax.device_put(value, named_shardings(spec, mesh))

    return place


def cache_specs(
    cache: QuantizedKVCache, devices: int, axis: str = "model", *, own_counters: bool = False
) -> QuantizedKVCache:
    """Layout of a KV cache: cut by KV heads, or whole on every device where they do not divide.

    Args:
      cache: The cache, or its abstract value.
      devices: Size of the mesh axis.
      axis: Its name.
      own_counters: Every device counts for itself what it loses; see ``QuantizedKVCache``.

    Returns:
      A cache that holds ``PartitionSpec`` in place of arrays.
    """
    whole = cache.num_kv_heads % devices != 0

    def field_specs(name: str) -> Any:
        head_axis = _HEAD_AXIS.get(name)

        def spec(x: Any) -> P:
            if own_counters and name in _COUNTERS:
                return P(axis)
            if whole or head_axis is None:
                return P()
            # Static scales are [kv_heads], those of tokens [pages, kv_heads, page_size].
            cut = 0 if x.ndim == 1 else head_axis % x.ndim
            return P(*(axis if i == cut else None for i in range(x.ndim)))

        return jax.tree.map(spec, getattr(cache, name))

    arrays = [f.name for f in dataclasses.fields(cache) if not f.metadata.get("static")]
    return dataclasses.replace(cache, **{name: field_specs(name) for name in arrays})


def shard_cache(cache: QuantizedKVCache, mesh: Mesh, axis: str = "model") -> QuantizedKVCache:
    """Lay a cache out over a mesh."""
    return jax.device_put(cache, named_shardings(cache_specs(cache, mesh.shape[axis], axis), mesh))


def check_tensor_parallel(config: ModelConfig, devices: int) -> None:
    """Find out before weights are read whether a model can be cut for ``Decoder(parallel=...)``.

    Raises:
      ValueError: If heads or MLP features do not divide; says which numbers of devices work.
    """
    sizes = {
        name: getattr(config, name) for name in ("num_kv_heads", "num_q_heads", "intermediate_size")
    }
    for name, size in sizes.items():
        if size % devices:
            common = math.gcd(*sizes.values())
            works = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ValueError(
                f"{name}={size} cannot be cut over {devices} devices, each of which holds whole "
                f"heads and as much of every layer as the others; this model can be cut over "
                f"{', '.join(works)}"
            )


def tensor_parallel_mesh(devices: int) -> Mesh:
    """The first devices, in a row.

    Raises:
      ValueError: If there are fewer.
    """
    found = jax.devices()
    if not 1 <= devices <= len(found):
        raise ValueError(
            f"tensor parallelism over {devices} devices; there are {len(found)} "
            f"({found[0].device_kind}), so it must be from 1 to {len(found)}"
        )
    return Mesh(np.asarray(found[:devices]), (AXIS,))


def own_specs(tree: Any) -> Any:
    """How arrays lie on their mesh, as ``jax.shard_map`` is told to take them."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


class PerDevice:
    """A function of what each device holds, whose results stay where they are.

    Results of all devices lie end to end along their first axis: the whole is no array of the
    model, but ``own_specs`` gives every device its own again. Called again with arrays of the same
    shapes it compiles nothing.
    """

    def __init__(self, function: Callable[[Any], Any], mesh: Mesh) -> None:
        """For trees of arrays on ``mesh``; ``function`` must be pure."""
        self._function = function
        self._mesh = mesh
        self._programs: dict[Any, Any] = {}

    def __call__(self, tree: Any) -> Any:
        """Apply the function on every device."""
        leaves, structure = jax.tree.flatten(tree)
        key = structure, tuple((x.shape, x.dtype, x.sharding.spec) for x in leaves)
        if key not in self._programs:
            self._programs[key] = self._compiled(tree)
        return self._programs[key](tree)

    def _compiled(self, tree: Any) -> Any:
        (axis,) = self._mesh.axis_names
        local = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), tree
        )
        # A scalar has no axis to lie along; those of weights are the same on all devices.
        specs = jax.tree.map(
            lambda x: P(axis) if x.ndim else P(), jax.eval_shape(self._function, local)
        )
        return jax.jit(
            jax.shard_map(
                self._function,
                mesh=self._mesh,
                in_specs=(own_specs(tree),),
                out_specs=specs,
                check_vma=False,
            )
        )


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Specs of a tree as shardings on a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
