"""Weights as inference wants them on this device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from qjax._device import device_info, mosaic_gpu_unsupported_reason
from qjax.models.fusion import fuse_layer, left_apart
from qjax.models.sharding import PerDevice
from qjax.ops._dispatch import kernels_by_default
from qjax.ops.packed import PackedWeight, pack_tree, pack_unsupported_reason
from qjax.quantize import is_quantized
from qjax.serving.devices import mesh_of
from qjax.typing import DType, Params

GATED = ("gate_up_proj",)


def prepare_weights(
    params: Params,
    dtype: DType,
    *,
    fuse: bool | None = None,
    pack: bool | None = None,
    norm_dtype: DType | None = None,
    mesh: Mesh | None = None,
) -> tuple[Params, str]:
    """Join projections that read the same input, and pack what the GPU's kernels take.

    Layer by layer; the given dictionaries give up their kernels on the way, so that the model is
    not in memory twice. The result is for an engine on the same devices: over a mesh every device
    joins and packs what it holds, and its heads lie in its own joined projection.

    Args:
      params: Parameters of a ``Decoder``, plain or quantized. Not to be used afterwards.
      dtype: Compute type of the model, which is that of the activations.
      fuse: Whether to join projections; None does on GPUs, where launches count.
      pack: Whether to pack for the Mosaic GPU kernels; None does where they run.
      norm_dtype: float16 packs joined projections of a bfloat16 model for normalised rows in
        float16, in which their kernels are faster, where no such row can be too large for it. For a
        ``Decoder`` with the same ``norm_dtype``.
      mesh: What the parameters are cut over; see ``Engine``.

    Returns:
      The parameters, and a line on what was done.

    Raises:
      ValueError: If there is no such ``norm_dtype`` for this model, no kernel runs, or no
        projection takes such rows.
    """
    dtype = jnp.dtype(dtype)
    if norm_dtype is not None:
        norm_dtype = jnp.dtype(norm_dtype)
        if (dtype, norm_dtype, mesh) != (jnp.bfloat16, jnp.float16, None):
            raise ValueError(
                f"norm_dtype={norm_dtype} of a model in {dtype}{' over a mesh' if mesh else ''}: "
                "it is float16 for a bfloat16 model on one device; leave it out"
            )
    if fuse is None:
        fuse = device_info().platform == "gpu"
    reason = mosaic_gpu_unsupported_reason()
    if reason is None and dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"the kernels take 16-bit activations and the model computes in {dtype}"
    if reason is None and not kernels_by_default() and mesh_of(params, mesh) is None:
        reason = "several devices, which XLA divides its own products between"
    pack = reason is None if pack is None else pack
    if norm_dtype is not None and not pack:
        raise ValueError(f"norm_dtype={norm_dtype} is for kernels: {reason or 'pack=False'}")
    root = cast(dict[str, Any], params)
    model = root["model"]
    left: Counter[str] = Counter()
    half: list[str] = []

    def prepare(layer: Params) -> Params:
        layer = fuse_layer(layer) if fuse else layer
        if not pack:
            return layer
        for block, name in _of_float16_rows(layer) if norm_dtype is not None else ():
            part = pack_tree({name: layer[block][name]}, compute="float16", gated=GATED)
            layer = {**layer, block: {**layer[block], **part}}
            half.append(name)
        return pack_tree(layer, gated=GATED)

    pack_head: Callable[[Params], Params] = pack_tree
    if mesh is not None:
        pack_head, prepare = PerDevice(pack_tree, mesh), _KernelsPerDevice(prepare, mesh)
    for name in [name for name in model if name.startswith("layers_")]:
        layer = model.pop(name)
        left.update(left_apart(layer) if fuse else ())
        model[name] = prepare(layer) if fuse or pack else layer
    if norm_dtype is not None and not half:
        raise ValueError(
            f"norm_dtype={norm_dtype}: no projection is joined, of a weight-only format and behind "
            "a norm whose rows float16 holds; leave it out"
        )
    if pack and "lm_head" in root:
        root["lm_head"] = pack_head(root["lm_head"])
    note = _describe(params, fuse, reason if not pack else None, left, len(half))
    head = _head_left(params) if pack else None
    return params, note if head is None else f"{note}; XLA multiplies lm_head ({head})"


def _of_float16_rows(layer: Params) -> list[tuple[str, str]]:
    """Joined projections whose input, a normalised row, has no value beyond float16's range.

    A row is ``weight * y`` with a ``y`` whose squares have a mean of at most 1: none of its ``d``
    values is larger than ``d**0.5``. (Half of the range leaves room for roundings.)
    """
    found = []
    for norm, block, name in (
        ("input_layernorm", "self_attn", "qkv_proj"),
        ("post_attention_layernorm", "mlp", "gate_up_proj"),
    ):
        weight = layer[norm]["weight"]
        largest = float(jnp.abs(weight.astype(jnp.float32)).max()) * weight.shape[0] ** 0.5
        kernel: Any = layer[block][name]["kernel"] if name in layer[block] else None
        weight_only = is_quantized(kernel) and kernel.fmt.activation is None
        if weight_only and largest < float(jnp.finfo(jnp.float16).max) / 2:
            found.append((block, name))
    return found


class _KernelsPerDevice:
    """A function of a layer, of which it changes kernels only, on what each device holds of it."""

    def __init__(self, function: Callable[[Params], Params], mesh: Mesh) -> None:
        self._function = PerDevice(function, mesh)

    def __call__(self, layer: Params) -> Params:
        flat = flatten_dict(layer)
        kernels = {path: flat.pop(path) for path in list(flat) if path[-1] == "kernel"}
        return unflatten_dict(flat | flatten_dict(self._function(unflatten_dict(kernels))))


def _head_left(params: Params) -> str | None:
    """Why the output projection, by far the largest matrix, was not packed; None if it need not be.

    Over a mesh a device's part of the vocabulary counts.
    """
    kernel: Any = params["lm_head"]["kernel"] if "lm_head" in params else None
    if not is_quantized(kernel):
        return None
    held = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), kernel
    )
    return pack_unsupported_reason(held)


def _describe(params: Params, fuse: bool, reason: str | None, left: Counter[str], half: int) -> str:
    leaves = jax.tree.leaves(
        params, is_leaf=lambda leaf: is_quantized(leaf) or isinstance(leaf, PackedWeight)
    )
    packed = sum(isinstance(leaf, PackedWeight) for leaf in leaves)
    quantized = sum(is_quantized(leaf) for leaf in leaves)
    parts = [f"{packed} of {packed + quantized} quantized matrices use Mosaic GPU kernels"]
    if packed + quantized == 0:
        parts = ["no quantized matrices"]
    elif reason is not None:
        parts.append(f"XLA multiplies ({reason})")
    if half:
        parts.append(f"{half} take normalised rows in float16")
    if fuse:
        parts.append("q, k, v and gate, up are joined")
        parts += [f"not in {count} layers: {note}" for note, count in left.items()]
    return "; ".join(parts)
