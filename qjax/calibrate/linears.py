"""The linear layers of a decoder block: which share an input, and statistics of these inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.correction import CorrectionStats, init_correction, update_correction
from qjax.calibration.stats import (
    ChannelStats,
    HessianStats,
    init_channel,
    init_hessian,
    update_channel,
    update_hessian,
)
from qjax.models.decoder import DecoderLayer
from qjax.quantize import is_quantized
from qjax.typing import Array

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LinearGroup:
    """Linear layers with the same input.

    Attributes:
      members: Paths in the block; the input of all is the tap of the first.
      producer: Norm or linear layer that a factor on the input channels can be folded into.
      residual: Whether the output is added to the residual stream.
    """

    members: tuple[str, ...]
    producer: str
    residual: bool = False

    @property
    def tap(self) -> str:
        return self.members[0]


GROUPS = (
    LinearGroup(("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"), "input_layernorm"),
    LinearGroup(("self_attn/o_proj",), "self_attn/v_proj", residual=True),
    LinearGroup(("mlp/gate_proj", "mlp/up_proj"), "post_attention_layernorm"),
    LinearGroup(("mlp/down_proj",), "mlp/up_proj", residual=True),
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "valid", "original"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """What enters a block.

    Attributes:
      x: ``(b, t, hidden)`` behind the quantized blocks before.
      valid: bool ``(b, t)``, False for padding.
      original: The same in the original model, or None where nobody asks for it.
    """

    x: Array
    valid: Array
    original: Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["hessian", "channel", "correction"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class GroupStats:
    """Statistics of the common input of a group; ``correction`` over its members side by side."""

    hessian: HessianStats
    channel: ChannelStats
    correction: CorrectionStats | None


def get_at(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at a slash-separated path."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def set_at(tree: Tree, path: str, value: Any) -> Tree:
    """A copy of the tree with one leaf replaced."""
    key, _, rest = path.partition("/")
    return {**tree, key: set_at(tree[key], rest, value) if rest else value}


def plain_weights(params: Tree) -> Tree:
    """The parameters with kernels dequantized whose format does not quantize activations."""

    def leaf(value: Any) -> Any:
        if is_quantized(value) and value.fmt.activation is None:
            return value.dequantize()
        return value

    return jax.tree_util.tree_map(leaf, params, is_leaf=is_quantized)


def apply_block(module: DecoderLayer, params: Tree, x: Array, valid: Array) -> tuple[Array, Tree]:
    """Output and taps of a block over whole sequences."""
    b, t, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (b, t))
    out, _, taps = module.apply({"params": params}, x, positions, None, None, valid)  # type: ignore
    return out, taps


def collect(
    module: DecoderLayer,
    params: Tree,
    teacher: Tree | None,
    batches: Sequence[Batch],
    groups: Sequence[LinearGroup],
) -> dict[str, GroupStats]:
    """Statistics of the inputs of some groups.

    Args:
      module: The block.
      params: Its parameters as far as they are quantized, all plain arrays.
      teacher: Its original parameters, to collect corrections against the original activations of
        the batches; None does not.
      batches: What enters the block.
      groups: Which groups; nothing else is computed.

    Returns:
      Statistics by tap.
    """
    stats = {}
    for group in groups:
        kernels = [get_at(params, f"{m}/kernel") for m in group.members]
        k, n = kernels[0].shape[0], sum(kernel.shape[1] for kernel in kernels)
        correction = None if teacher is None else init_correction(k, n)
        stats[group.tap] = GroupStats(init_hessian(k), init_channel(k), correction)
    for batch in batches:
        stats = _update(module, params, teacher, batch, stats, tuple(groups))
    return stats


@functools.partial(jax.jit, static_argnames=("module", "groups"))
def _update(
    module: DecoderLayer,
    params: Tree,
    teacher: Tree | None,
    batch: Batch,
    stats: dict[str, GroupStats],
    groups: tuple[LinearGroup, ...],
) -> dict[str, GroupStats]:
    # What no tap needs is not computed: XLA drops it.
    out, taps = apply_block(module, params, batch.x, batch.valid)
    wanted: tuple[Array, Tree] | None = None
    if teacher is not None:
        assert batch.original is not None, "corrections need the original activations"
        wanted = apply_block(module, teacher, batch.original, batch.valid)
    new = {}
    for group in groups:
        old, x = stats[group.tap], taps[group.tap]
        correction = old.correction
        if wanted is not None and teacher is not None and correction is not None:
            missing = _missing(group, params, teacher, batch, (out, taps), wanted)
            correction = update_correction(correction, x, missing, batch.valid)
        new[group.tap] = GroupStats(
            update_hessian(old.hessian, x, batch.valid),
            update_channel(old.channel, x, batch.valid),
            correction,
        )
    return new


def _missing(
    group: LinearGroup,
    params: Tree,
    teacher: Tree,
    batch: Batch,
    have: tuple[Array, Tree],
    want: tuple[Array, Tree],
) -> Array:
    """float32 ``(b, t, n)``: what the group's outputs need to become the original model's."""
    f32 = jnp.float32
    change = want[1][group.tap].astype(f32) - have[1][group.tap].astype(f32)
    kernels = [get_at(teacher, f"{m}/kernel").astype(f32) for m in group.members]
    missing = change @ jnp.concatenate(kernels, axis=1)
    if not group.residual:
        return missing
    if group.tap == "self_attn/o_proj":
        assert batch.original is not None
        return missing + batch.original.astype(f32) - batch.x.astype(f32)
    # The stream before the MLP is the block's output without what the MLP added. The bias is the
    # same on both sides.
    before = [
        side[0].astype(f32)
        - side[1][group.tap].astype(f32) @ get_at(tree, f"{group.tap}/kernel").astype(f32)
        for side, tree in ((want, teacher), (have, params))
    ]
    return missing + before[0] - before[1]


@functools.partial(jax.jit, static_argnames=("module", "tap"))
def _tap(module: DecoderLayer, params: Tree, batch: Batch, tap: str) -> Array:
    return apply_block(module, params, batch.x, batch.valid)[1][tap]


def sample_inputs(
    module: DecoderLayer, params: Tree, batch: Batch, group: LinearGroup, count: int = 512
) -> Array:
    """Inputs of a group at up to ``count`` tokens spread over a batch, float32 ``(tokens, k)``."""
    values = _tap(module, params, batch, group.tap)
    rows = np.flatnonzero(np.asarray(batch.valid).reshape(-1))
    rows = rows[:: -(-len(rows) // count)] if len(rows) > count else rows
    return values.reshape(-1, values.shape[-1])[jnp.asarray(rows)].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("module",))
def run_block(
    module: DecoderLayer, params: Tree, x: Array, valid: Array
) -> tuple[Array, Array, Array]:
    """Output of a block, and the largest magnitude of keys and values.

    Args:
      module: The block.
      params: Its parameters; kernels may be ``QuantizedArray``.
      x: ``(b, t, hidden)``.
      valid: bool ``(b, t)``.

    Returns:
      ``(b, t, hidden)``, and float32 ``(num_kv_heads,)`` of keys and of values.
    """
    out, taps = apply_block(module, params, x, valid)

    def absmax(name: str) -> Array:
        values = jnp.abs(taps[f"self_attn/{name}"].astype(jnp.float32))
        return jnp.max(jnp.where(valid[:, :, None, None], values, 0.0), axis=(0, 1, 3))

    return out, absmax("keys"), absmax("values")
