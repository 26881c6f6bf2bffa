"""Rotation of the residual stream by a randomised Hadamard matrix, folded into the weights.

Quantization loses most where a few channels are much larger than the rest. For an orthogonal ``Q``
the model whose residual stream is ``x Q`` computes the same, and spreads such channels over all:

    embedding        E -> E Q
    norm, then W     g -> 1, W -> Q.T diag(g) W     x / rms(x) has the same rms after a rotation
    o_proj, down_proj    W -> W Q, b -> b Q
    lm_head          W -> Q.T diag(g) W             differs from the embedding, so no longer tied

Values may be rotated as well, every head by the same ``R``: ``v_proj`` takes ``W R`` per head and
``o_proj`` ``R.T W``, because attention mixes tokens and not channels. That leaves nothing to do at
run time. What would need a Hadamard transform in the forward pass is not rotated: the input of
``down_proj`` (behind the gate), and queries and keys (behind rotary embedding).

Reference: QuaRot (arXiv:2404.00456), section 4, its stages 1a and the values of 1c.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.quantize import is_quantized
from qjax.typing import Array

_LARGEST_FACTOR = 64
_INPUTS = {
    "input_layernorm": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "post_attention_layernorm": ("mlp/gate_proj", "mlp/up_proj"),
}
_OUTPUTS = ("self_attn/o_proj", "mlp/down_proj")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["signs", "factors"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``Q = diag(signs) (factors[0] x factors[1] x ...)``.

    ``x`` is the Kronecker product: ``n`` times the sum of the factors' sizes operations per vector
    instead of ``n**2``.

    Attributes:
      signs: float32 ``(n,)``, each 1 or -1.
      factors: Orthogonal float32 ``(m, m)``; the product of their sizes is ``n``.
    """

    signs: Array
    factors: tuple[Array, ...]

    @property
    def size(self) -> int:
        """``n``."""
        return self.signs.shape[0]


def random_hadamard(size: int, seed: int = 0) -> Rotation:
    """A Hadamard matrix with random signs.

    Sizes that are no power of two get a random orthogonal matrix for their odd factor: the 7 of
    3584 = 7 * 512.

    Args:
      size: Channels.
      seed: Decides the signs and the orthogonal matrix.

    Raises:
      ValueError: If ``size`` is not positive.
    """
    if size < 1:
        raise ValueError(f"{size=} must be positive")
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.asarray([-1, 1], np.float32), size)
    factors = []
    rest = size & -size  # the largest power of two in it
    if (odd := size // rest) > 1:
        q, r = np.linalg.qr(rng.normal(size=(odd, odd)))
        factors.append(q * np.sign(np.diag(r)))  # makes it uniform over all rotations
    while rest > 1:
        part = min(rest, _LARGEST_FACTOR)
        factors.append(_hadamard(part))
        rest //= part
    return Rotation(jnp.asarray(signs), tuple(jnp.asarray(f, jnp.float32) for f in factors))


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def rotate(x: Array, rotation: Rotation, axis: int = -1) -> Array:
    """``x Q`` along the last axis, or ``Q.T x`` along the first of a matrix.

    Args:
      x: An array whose ``axis`` is a multiple of ``rotation.size``; each piece of that size is
        rotated alone.
      rotation: ``Q``.
      axis: Which axis.

    Returns:
      float32, the shape of ``x``.

    Raises:
      ValueError: If the size of the axis does not fit.
    """
    n = rotation.size
    if x.shape[axis] % n:
        raise ValueError(
            f"axis {axis} of shape {x.shape} is no multiple of the rotation's size {n}; make the "
            "rotation for this model's hidden size (or head size)"
        )
    moved = jnp.moveaxis(x, axis, -1)
    y = moved.astype(jnp.float32).reshape(-1, n) * rotation.signs[None, :]
    y = y.reshape(-1, *(f.shape[0] for f in rotation.factors))
    for factor in rotation.factors:
        # Takes the first of the remaining axes and puts its result last: after all factors the
        # axes are in order again.
        y = jnp.tensordot(y, factor, axes=((1,), (0,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y.reshape(moved.shape), -1, axis)


@jax.jit
def rotate_embedding(table: Array, rotation: Rotation) -> Array:
    """The embedding ``(vocab, hidden)`` of the rotated model, float32."""
    return rotate(table, rotation)


@jax.jit
def rotate_inputs(kernel: Array, norm: Array, rotation: Rotation) -> Array:
    """``Q.T diag(norm) kernel``, float32: a kernel behind a norm whose weight becomes one."""
    scaled = kernel.astype(jnp.float32) * norm.astype(jnp.float32)[:, None]
    return rotate(scaled, rotation, axis=0)


@jax.jit
def rotate_block(
    params: Mapping[str, Any], residual: Rotation, heads: Rotation | None = None
) -> dict[str, Any]:
    """A decoder block in the rotated residual stream.

    Args:
      params: Its parameters, plain arrays: ``params["self_attn"]["q_proj"]["kernel"]``, ...
      residual: Rotation of the residual stream, of the hidden size.
      heads: Rotation of every value head, of the head size; None leaves values as they are.

    Returns:
      The same tree, float32, norms before projections all ones. Norms of queries and keys are
      untouched.

    Raises:
      ValueError: If a rotation has another size than what it is for.
    """
    _check_plain(params)
    flat: dict[str, Any] = {
        f"{part}/{name}": dict(leaves) if isinstance(leaves, Mapping) else leaves
        for part, modules in params.items()
        for name, leaves in modules.items()
    }
    for norm, members in _INPUTS.items():
        weight = flat[f"{norm}/weight"]
        _check_size(weight.shape[0], residual)
        for member in members:
            flat[member]["kernel"] = rotate_inputs(flat[member]["kernel"], weight, residual)
        flat[f"{norm}/weight"] = jnp.ones_like(weight)
    for member in _OUTPUTS:  # kernel and, where there is one, bias
        flat[member] = {name: rotate(leaf, residual) for name, leaf in flat[member].items()}
    if heads is not None:
        values, out = flat["self_attn/v_proj"], flat["self_attn/o_proj"]
        flat["self_attn/v_proj"] = {name: rotate(leaf, heads) for name, leaf in values.items()}
        out["kernel"] = rotate(out["kernel"], heads, axis=0)
    result: dict[str, Any] = {}
    for path, leaves in flat.items():
        part, name = path.split("/")
        result.setdefault(part, {})[name] = leaves
    return jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), result)


def rotate_decoder(
    params: Mapping[str, Any], residual: Rotation, heads: Rotation | None = None
) -> dict[str, Any]:
    """A whole model with a rotated residual stream; it computes the same logits.

    Args:
      params: Parameters of ``Decoder``, plain arrays.
      residual: Rotation of the hidden size.
      heads: See ``rotate_block``.

    Returns:
      float32 parameters which always have an ``lm_head``: run them with a config whose
      ``tie_word_embeddings`` is False.

    Raises:
      ValueError: If parameters are quantized, or a rotation has another size than what it is for.
    """
    _check_plain(params)
    model = params["model"]
    table, norm = model["embed_tokens"]["embedding"], model["norm"]["weight"]
    _check_size(norm.shape[0], residual)
    head = params["lm_head"]["kernel"] if "lm_head" in params else table.T
    rotated: dict[str, Any] = {
        name: rotate_block(block, residual, heads)
        for name, block in model.items()
        if name.startswith("layers_")
    }
    rotated["embed_tokens"] = {"embedding": rotate_embedding(table, residual)}
    rotated["norm"] = {"weight": jnp.ones_like(norm, jnp.float32)}
    return {"model": rotated, "lm_head": {"kernel": rotate_inputs(head, norm, residual)}}


def _check_size(hidden_size: int, rotation: Rotation) -> None:
    if hidden_size != rotation.size:
        raise ValueError(
            f"the residual stream has {hidden_size} channels and the rotation {rotation.size}; "
            f"use random_hadamard({hidden_size})"
        )


def _check_plain(params: Any) -> None:
    if any(map(is_quantized, jax.tree_util.tree_leaves(params, is_leaf=is_quantized))):
        raise ValueError("quantized weights cannot be rotated; rotate first, then quantize")
