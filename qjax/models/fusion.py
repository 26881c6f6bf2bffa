"""Projections that read the same input, joined into one: q, k and v; gate and up.

One product instead of three saves launches and reads its input once, and a wide product fills a GPU
where a narrow one does not. The modules accept both forms (``qkv_proj``, ``gate_up_proj``). A
change for inference, which every device makes with what it holds: a joined projection cut into
parts would not give heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax.ops.packed import PackedWeight
from qjax.quantized_array import QuantizedArray
from qjax.typing import Params

FUSED = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}
"""By block: the name of the joined projection and the names of its parts, in order."""


def fuse_unsupported_reason(kernels: list[Any]) -> str | None:
    """Why kernels ``(in, out_i)`` cannot become one; None if they can."""
    first = kernels[0]
    if any(type(kernel) is not type(first) for kernel in kernels):
        return "some are quantized and some are not"
    if isinstance(first, PackedWeight):
        return "they are packed already"
    if not isinstance(first, QuantizedArray):
        same = all(kernel.dtype == first.dtype for kernel in kernels)
        return None if same else "their types differ"
    if any(kernel.fmt != first.fmt or kernel.dtype != first.dtype for kernel in kernels):
        return "their formats differ"
    for name in ("zero_point", "perm", "global_scale", "act_scale"):
        present = {getattr(kernel, name) is not None for kernel in kernels}
        if len(present) > 1:
            return f"some have a {name} and some have not"
        if present == {True} and name != "zero_point":
            # Equal values would do, but they are on the device, and reading them waits for it.
            return f"each has a {name} of its own"
    if first.fmt.granularity == "tensor":
        return "each has one scale for the whole matrix"
    if any(kernel.shape[1] % kernel.tiles[1] for kernel in kernels):
        return "a block of scales would lie across two of them"
    return None


def fuse_kernels(kernels: list[Any]) -> Any:
    """Join kernels ``(in, out_i)`` along their outputs.

    Raises:
      ValueError: If they cannot be joined; says why.
    """
    reason = fuse_unsupported_reason(kernels)
    if reason is not None:
        raise ValueError(f"kernels {[k.shape for k in kernels]} cannot be joined: {reason}")
    if not isinstance(kernels[0], QuantizedArray):
        return jnp.concatenate(kernels, axis=1)
    joined = {
        name: jnp.concatenate([getattr(kernel, name) for kernel in kernels], axis=1)
        for name in ("qvalue", "scale", "zero_point")
        if getattr(kernels[0], name) is not None
    }
    return dataclasses.replace(kernels[0], **joined)


def left_apart(layer: Params) -> list[str]:
    """For each block of a layer that ``fuse_layer`` leaves as it is: its name and why."""
    reasons = ((block, _reason(layer, block)) for block in FUSED)
    return [f"{block}: {reason}" for block, reason in reasons if reason is not None]


def _reason(layer: Params, block: str) -> str | None:
    return fuse_unsupported_reason([layer[block][part]["kernel"] for part in FUSED[block][1]])


def fuse_layer(layer: Params) -> Params:
    """Join the projections of one decoder layer where that is possible.

    Biases stay with the parts. The kernels that were joined are taken out of the given dictionaries
    before their copies are made, so that a model needs little more memory while it is converted.

    Args:
      layer: Parameters of a layer; its kernels are removed.

    Returns:
      The parameters with joined projections; ``left_apart`` tells of the others.
    """
    out: Params = dict(layer)
    for block, (fused, parts) in FUSED.items():
        if _reason(layer, block) is not None:
            continue
        old = layer[block]
        kernels = [old[part].pop("kernel") for part in parts]
        # With what remains, biases if there are any.
        kept = {name: value for name, value in old.items() if name not in parts or value}
        joined = fuse_kernels(kernels)
        del kernels
        out[block] = kept | {fused: {"kernel": joined}}
    return out
