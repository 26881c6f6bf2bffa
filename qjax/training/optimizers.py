"""Optimizers for training from scratch: Muon for the projection matrices, AdamW for the rest.

All of them give the update for a learning rate of one, so that the training step can multiply by
the rate of the moment, which may follow the clock.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any

# Quintic iteration which brings singular values in (0, 1] to within about 0.3 of one in five steps
# (Jordan 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """Running mean of the gradients, float32."""

    momentum: PyTree


def muon(
    weight_decay: float, *, beta: float = 0.95, steps: int = 5
) -> optax.GradientTransformation:
    """Orthogonalised momentum for a tree of matrices, for a learning rate of one.

    The update is the nearest orthogonal matrix to the Nesterov momentum, scaled to the root mean
    square 0.2 that AdamW's updates have, so that one learning rate and one weight decay serve both.
    Needs fewer tokens than AdamW for the same loss. Matrices of equal shape (up to a transpose) are
    iterated as one batch in bfloat16: the rounding is far below what the inexact iteration itself
    leaves.

    References:
      Jordan, Muon (2024); Liu et al., Muon is Scalable for LLM Training (arXiv:2502.16982).
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: PyTree, state: MuonState, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        if params is None:
            raise ValueError(
                "muon needs the parameters for weight decay; call update(grads, state, params)"
            )
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)
        leaves, treedef = jax.tree.flatten(nesterov)
        directions = jax.tree.unflatten(treedef, _orthogonalize_all(leaves, steps))
        updates = jax.tree.map(
            lambda d, p: -(0.2 * math.sqrt(max(p.shape)) * d + weight_decay * p), directions, params
        )
        return updates, MuonState(momentum)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _orthogonalize_all(matrices: list[jax.Array], steps: int) -> list[jax.Array]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    out = list(matrices)
    for shape, members in groups.items():
        # Wide form: the iteration multiplies square matrices of the smaller side.
        stack = jnp.stack(
            [matrices[i] if matrices[i].shape == shape else matrices[i].T for i in members]
        )
        for i, direction in zip(members, newton_schulz(stack, steps), strict=True):
            out[i] = direction if matrices[i].shape == shape else direction.T
    return out


def newton_schulz(x: jax.Array, steps: int = 5) -> jax.Array:
    """About the nearest orthogonal matrices: ``U @ V.T`` of the singular value decomposition.

    Args:
      x: float32 ``[n, rows, columns]`` with ``rows <= columns``.
      steps: Iterations.

    Returns:
      float32 ``[n, rows, columns]`` with singular values in about ``[0.7, 1.2]``; zero matrices
      stay zero.
    """
    a, b, c = _NEWTON_SCHULZ
    norm = jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True))
    # A norm of all zeros, or one that underflowed, must not give NaN.
    x = (x / jnp.maximum(norm, 1e-20)).astype(jnp.bfloat16)

    def product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    for _ in range(steps):
        gram = product("nij,nkj->nik", x, x)
        narrow = gram.astype(jnp.bfloat16)
        poly = b * gram + c * product("nij,njk->nik", narrow, narrow)
        x = (
            a * x.astype(jnp.float32) + product("nij,njk->nik", poly.astype(jnp.bfloat16), x)
        ).astype(jnp.bfloat16)
    return x.astype(jnp.float32)


def adamw(weight_decay: float) -> optax.GradientTransformation:
    """AdamW for a learning rate of one; weight decay on matrices only.

    That is not on norms and biases, nor on the scales of quantization-aware training.
    """

    def decays(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        return leaf.ndim == 2 and not name.startswith("qat_")

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            weight_decay, lambda params: jax.tree_util.tree_map_with_path(decays, params)
        ),
        optax.scale(-1.0),
    )


def muon_with_adam(weight_decay: float) -> optax.GradientTransformation:
    """``muon`` for the projections inside the layers; Adam for embeddings, head, norms and biases.

    Rows of an embedding are looked up rather than multiplied, so orthogonality means nothing there.
    """

    def labels(params: PyTree) -> PyTree:
        def label(path: Any, leaf: Any) -> str:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return (
                "muon"
                if "/layers_" in name and name.endswith("/kernel") and leaf.ndim == 2
                else "adam"
            )

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"muon": muon(weight_decay), "adam": adamw(0.0)}, labels)
