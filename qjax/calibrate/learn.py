"""Learn roundings and scales of one block by gradient descent on the block's output."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.calibrate.linears import Batch, Tree, apply_block, get_at, run_block, set_at
from qjax.calibration.learned_rounding import (
    Grid,
    Rounding,
    finish_rounding,
    init_rounding,
    rounded,
)
from qjax.models.decoder import DecoderLayer
from qjax.typing import Array

ROWS = 8
"""Sequences per update, as AutoRound takes."""
_SCALE_RATE = 5e-3


class Learned(NamedTuple):
    """The block after learning, and its relative output error before and after."""

    params: Tree
    before: float
    after: float


def learn_block(
    module: DecoderLayer,
    original: Tree,
    params: Tree,
    batches: Sequence[Batch],
    paths: Sequence[str],
    *,
    steps: int,
    offsets: bool,
    seed: int = 0,
) -> Learned:
    """Learn the scales of a quantized block and, if asked, the rounding of every weight.

    The aim is the output of the original block on the original activations (on the given ones
    where a batch has none). A token counts by its error relative to its size: the next block
    normalises it. Updates are Adam's for scales, and for roundings the sign of the gradient with a
    rate of ``1 / steps``, so that with its linear decay no weight moves further than half a code
    (AutoRound). What does not lower the error over all batches is not kept.

    Args:
      module: The block.
      original: Its parameters before quantization, scaled as those of ``params`` were.
      params: Quantized kernels, which learning starts from, and the other parameters.
      batches: What enters the block.
      paths: The quantized kernels, ``"mlp/up_proj/kernel"``.
      steps: Updates.
      offsets: Learn the roundings too; the start then is rounding to nearest on the grid of
        ``params``.
      seed: Which sequences come when.

    Returns:
      The best parameters found, kernels with the structure of those in ``params``.
    """
    grids: dict[str, Grid] = {}
    learned: dict[str, Rounding] = {}
    for path in paths:
        weight = get_at(original, path) if offsets else None
        grids[path], learned[path] = init_rounding(weight, get_at(params, path))
    rest = params
    for path in paths:  # an array has to stand where the learned kernel will
        rest = set_at(rest, path, jnp.zeros((), jnp.float32))
    x, valid, target = _data(module, original, batches)
    first = learned
    before = _whole_error(module, rest, grids, learned, batches, target)
    state = _optimizer(learned).init(_split(learned))
    rng, order = np.random.default_rng(seed), np.zeros((0,), np.int64)
    rows = min(ROWS, len(x))
    for step in range(steps):
        if len(order) < rows:
            order = rng.permutation(len(x))
        picks, order = jnp.asarray(order[:rows]), order[rows:]
        decay = 1 - step / steps
        rates = (jnp.float32(decay / steps), jnp.float32(_SCALE_RATE * decay))
        data = (x, valid, target)
        learned, state = _update(module, rest, grids, learned, state, data, picks, rates)
    after = _whole_error(module, rest, grids, learned, batches, target)
    if not after < before:  # NaN too
        learned, after = first, before
    for path in paths:
        params = set_at(params, path, finish_rounding(grids[path], learned[path]))
    return Learned(params, before, after)


def _data(
    module: DecoderLayer, original: Tree, batches: Sequence[Batch]
) -> tuple[Array, Array, Array]:
    """All sequences: inputs, which tokens count, and outputs of the original block."""
    targets = []
    for batch in batches:
        x = batch.x if batch.original is None else batch.original
        targets.append(run_block(module, original, x, batch.valid)[0])
    return (
        jnp.concatenate([batch.x for batch in batches]),
        jnp.concatenate([batch.valid for batch in batches]),
        jnp.concatenate(targets),
    )


def _error(
    module: DecoderLayer,
    rest: Tree,
    grids: Mapping[str, Grid],
    learned: Mapping[str, Rounding],
    x: Array,
    valid: Array,
    target: Array,
) -> tuple[Array, Array]:
    """Sum over tokens of the squared relative error, and their number."""
    for path, grid in grids.items():
        rest = set_at(rest, path, rounded(grid, learned[path]))
    out = apply_block(module, rest, x, valid)[0].astype(jnp.float32)
    target = target.astype(jnp.float32)
    size = jnp.sum(target * target, axis=-1)
    error = jnp.sum((out - target) ** 2, axis=-1) / jnp.where(size > 0, size, jnp.float32(1))
    return jnp.sum(jnp.where(valid, error, 0.0)), jnp.sum(valid).astype(jnp.float32)


_batch_error = functools.partial(jax.jit, static_argnames=("module",))(_error)


def _whole_error(
    module: DecoderLayer,
    rest: Tree,
    grids: Mapping[str, Grid],
    learned: Mapping[str, Rounding],
    batches: Sequence[Batch],
    target: Array,
) -> float:
    total = count = 0.0
    begin = 0
    for batch in batches:
        end = begin + len(batch.x)
        part = target[begin:end]
        error, tokens = _batch_error(module, rest, grids, learned, batch.x, batch.valid, part)
        total, count, begin = total + float(error), count + float(tokens), end
    return (total / max(count, 1.0)) ** 0.5


def _split(learned: Mapping[str, Rounding]) -> dict[str, dict[str, Array]]:
    """Parameters by kind: optax tells their rules apart by it."""
    kinds = {"stretch": {path: x.stretch for path, x in learned.items()}}
    if any(x.offset is not None for x in learned.values()):
        kinds["offset"] = {p: x.offset for p, x in learned.items() if x.offset is not None}
    return kinds


def _optimizer(learned: Mapping[str, Rounding]) -> optax.GradientTransformation:
    rules: dict[Hashable, optax.GradientTransformation] = {
        "stretch": optax.scale_by_adam(b1=0.9, b2=0.99),
        "offset": optax.scale_by_sign(),
    }
    kinds = _split(learned)
    return optax.partition({kind: rules[kind] for kind in kinds}, {kind: kind for kind in kinds})


@functools.partial(jax.jit, static_argnames=("module",))
def _update(
    module: DecoderLayer,
    rest: Tree,
    grids: dict[str, Grid],
    learned: dict[str, Rounding],
    state: Any,
    data: tuple[Array, Array, Array],
    picks: Array,
    rates: tuple[Array, Array],
) -> tuple[dict[str, Rounding], Any]:
    x, valid, target = (jnp.take(array, picks, axis=0) for array in data)

    def loss(learned: dict[str, Rounding]) -> Array:
        error, count = _error(module, rest, grids, learned, x, valid, target)
        return error / jnp.maximum(count, 1.0)

    grads = _split(jax.grad(loss)(learned))
    # optax raises decay rates to an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        steps: Any
        steps, state = _optimizer(learned).update(grads, state)
    new = {}
    for path, old in learned.items():
        offset = old.offset
        if offset is not None:
            offset = offset - rates[0] * steps["offset"][path]
        new[path] = Rounding(offset, old.stretch - rates[1] * steps["stretch"][path])
    return new, state
