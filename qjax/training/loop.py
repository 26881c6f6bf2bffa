"""Training a small decoder from scratch: batches, optimizer, step, loop, checkpoints.

Everything a step depends on is a function of (seed, step) and of the state, so a run that is
interrupted and resumed from its checkpoint continues bit for bit as if it had not been (with a step
budget; a time budget follows the clock). Parameters and optimizer state are float32; the model
computes in the dtype its module was built with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from qjax.training.optimizers import adamw, muon_with_adam

PyTree = Any
ApplyFn = Callable[[PyTree, jax.Array, jax.Array], jax.Array]  # params, tokens, positions -> logits


@dataclass(frozen=True)
class TrainingConfig:
    """What a run is made of.

    ``max_steps`` and ``max_seconds`` are budgets, None for no limit; the first one spent ends it.
    """

    batch_size: int = 8
    seq_len: int = 512
    max_steps: int | None = None
    max_seconds: float | None = None
    optimizer: str = "muon"  # "muon" (matrices; AdamW for the rest) | "adamw"
    learning_rate: float = 3e-3
    warmup: float = 0.02  # fraction of the budget
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError(
                "max_steps and max_seconds are both None; set at least one so that the run ends"
            )
        for name in (
            "batch_size",
            "seq_len",
            "max_steps",
            "max_seconds",
            "learning_rate",
            "clip_norm",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more, and finite")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63)")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer={self.optimizer!r} must be 'muon' or 'adamw'")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup={self.warmup} is a fraction of the budget and must be in [0, 1)"
            )


class Teacher(NamedTuple):
    """A model to imitate: its function and its parameters."""

    apply_fn: ApplyFn
    params: PyTree


class TrainingState(NamedTuple):
    """``step`` updates have been made, in ``elapsed`` seconds over all sessions of the run."""

    params: PyTree
    opt_state: PyTree
    step: int
    elapsed: float


class StepMetrics(NamedTuple):
    """One update: its number (from 1), the loss before it, what it cost."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    elapsed: float
    progress: float  # fraction of the budget used


def init_params(module: Any, seed: int) -> PyTree:
    """Float32 parameters: normal(0.02), smaller where a projection writes into the residual stream.

    The scale ``1 / sqrt(2 * layers)`` of ``o_proj`` and ``down_proj`` keeps the variance of the
    residual stream independent of depth (GPT-2). Norm weights start at one, biases at zero.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda key: module.init(key, tokens, tokens), jax.random.key(0))[
        "params"
    ]
    num_layers = sum(name.startswith("layers_") for name in shapes["model"])
    key = jax.random.key(seed)

    def leaf(index: int, path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/weight"):
            return jnp.ones(shape.shape, jnp.float32)
        if name.endswith("/bias"):
            return jnp.zeros(shape.shape, jnp.float32)
        residual = "o_proj" in name or "down_proj" in name
        std = 0.02 / math.sqrt(2 * num_layers) if residual else 0.02
        return std * jax.random.normal(jax.random.fold_in(key, index), shape.shape, jnp.float32)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(treedef, [leaf(i, path, x) for i, (path, x) in enumerate(leaves)])


def init_state(module: Any, config: TrainingConfig, params: PyTree | None = None) -> TrainingState:
    """The state before the first step: fresh parameters unless some are given."""
    params = init_params(module, config.seed) if params is None else params
    return TrainingState(params, jax.jit(make_optimizer(config).init)(params), 0, 0.0)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Gradient clipping and the chosen optimizer, for a learning rate of one."""
    if config.optimizer == "adamw":
        rule = adamw(config.weight_decay)
    else:
        rule = muon_with_adam(config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine down to zero at ``progress == 1``."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    rest = min(1.0, (progress - warmup) / (1.0 - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * rest))


def sample_batch(tokens: np.ndarray, config: TrainingConfig, step: int, bos_id: int) -> np.ndarray:
    """Rows ``[bos, tokens[o : o + seq_len]]`` at random offsets: int32 ``[batch, seq_len + 1]``.

    Every row starts with bos, which is how prompts start when the model is used. The offsets depend
    on ``(config.seed, step)`` only.
    """
    rng = np.random.default_rng((config.seed, step))
    offsets = rng.integers(0, len(tokens) - config.seq_len + 1, config.batch_size)
    rows = tokens[offsets[:, None] + np.arange(config.seq_len)]
    return np.concatenate([np.full((config.batch_size, 1), bos_id), rows], axis=1).astype(np.int32)


def next_token_loss(apply_fn: ApplyFn, params: PyTree, batch: jax.Array) -> jax.Array:
    """Mean cross entropy in nats of ``batch[:, 1:]`` given what precedes, float32 scalar."""
    tokens, targets = batch[:, :-1], batch[:, 1:]
    positions = jnp.broadcast_to(
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape
    )
    logits = apply_fn(params, tokens, positions).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def distillation_loss(
    apply_fn: ApplyFn, params: PyTree, teacher: Teacher, batch: jax.Array
) -> jax.Array:
    """Mean divergence KL(teacher || model) in nats over the next tokens, float32 scalar.

    All that the teacher knows about a position is a target, not only the one token that followed.
    """
    tokens = batch[:, :-1]
    positions = jnp.broadcast_to(
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape
    )
    wanted = teacher.apply_fn(teacher.params, tokens, positions).astype(jnp.float32)
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(wanted))
    found = jax.nn.log_softmax(apply_fn(params, tokens, positions).astype(jnp.float32))
    return jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1).mean()


def make_train_step(
    apply_fn: ApplyFn, config: TrainingConfig, teacher: Teacher | None = None
) -> Callable[..., Any]:
    """Jitted ``(params, opt_state, batch, rate) -> (params, opt_state, loss)``, state donated.

    With a teacher the loss is the divergence from it.
    """
    optimizer = make_optimizer(config)

    def step(
        params: PyTree,
        opt_state: PyTree,
        batch: jax.Array,
        learning_rate: jax.Array,
        teacher_params: PyTree,
    ) -> Any:
        def loss_of(params: PyTree) -> jax.Array:
            if teacher is None:
                return next_token_loss(apply_fn, params, batch)
            guide = Teacher(teacher.apply_fn, teacher_params)
            return distillation_loss(apply_fn, params, guide, batch)

        loss, grads = jax.value_and_grad(loss_of)(params)
        # optax raises decay rates to an integer count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        updates = jax.tree.map(lambda u: u * learning_rate, updates)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    # An argument: as constants of the program the teacher's weights would be compiled into it.
    guide = None if teacher is None else teacher.params

    def call(params: PyTree, opt_state: PyTree, batch: Any, learning_rate: Any) -> Any:
        return jitted(params, opt_state, batch, learning_rate, guide)

    return call


def mean_loss(
    apply_fn: ApplyFn,
    params: PyTree,
    tokens: np.ndarray,
    config: TrainingConfig,
    *,
    bos_id: int,
) -> tuple[float, int]:
    """Loss over consecutive windows of ``seq_len`` tokens, each after bos; and how many tokens.

    The text is cut to a whole number of batches, or to whole windows if it is shorter than one.
    """
    windows = len(tokens) // config.seq_len
    batch_size = min(config.batch_size, windows)
    if batch_size == 0:
        raise ValueError(f"{len(tokens)=} tokens are fewer than {config.seq_len=}; give more text")
    rows = tokens[: windows * config.seq_len].reshape(windows, config.seq_len)
    loss_fn = jax.jit(lambda p, batch: next_token_loss(apply_fn, p, batch))
    losses = []
    for start in range(0, windows - batch_size + 1, batch_size):
        batch = np.full((batch_size, config.seq_len + 1), bos_id, np.int32)
        batch[:, 1:] = rows[start : start + batch_size]
        losses.append(float(loss_fn(params, batch)))
    return float(np.mean(losses)), len(losses) * batch_size * config.seq_len


def train(
    state: TrainingState,
    train_step: Callable[..., Any],
    tokens: np.ndarray,
    config: TrainingConfig,
    *,
    bos_id: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[TrainingState, StepMetrics]]:
    """Runs updates until a budget is spent, yielding the state and the metrics after each.

    The state that was passed in (and each earlier one) is donated: keep only the latest.

    Raises:
      ValueError: If the data is shorter than one sequence, or the loss stops being finite.
    """
    if len(tokens) < config.seq_len:
        raise ValueError(
            f"{len(tokens)=} tokens are fewer than {config.seq_len=}; give more text or a shorter "
            "sequence"
        )
    params, opt_state, step, elapsed = state
    started = clock() - elapsed
    while (progress := budget_used(config, step, elapsed)) < 1.0:
        rate = config.learning_rate * learning_rate_factor(progress, config.warmup)
        batch = sample_batch(tokens, config, step, bos_id)
        params, opt_state, loss = train_step(params, opt_state, batch, np.float32(rate))
        step, loss = step + 1, float(loss)
        if not math.isfinite(loss):
            raise ValueError(
                f"{loss=} at {step=} is not finite; lower learning_rate={config.learning_rate}"
            )
        elapsed = clock() - started
        metrics = StepMetrics(
            step,
            loss,
            rate,
            config.batch_size * config.seq_len,
            elapsed,
            budget_used(config, step, elapsed),
        )
        yield TrainingState(params, opt_state, step, elapsed), metrics


def budget_used(config: TrainingConfig, step: int, elapsed: float) -> float:
    """Fraction of the step or time budget spent, whichever is further."""
    used_steps = step / config.max_steps if config.max_steps else 0.0
    used_seconds = elapsed / config.max_seconds if config.max_seconds else 0.0
    return max(used_steps, used_seconds)


class TrainingCheckpoints:
    """Orbax checkpoints of a run under ``directory``; the last two are kept."""

    def __init__(self, directory: str | Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def save(self, state: TrainingState) -> None:
        """Writes ``state``; an interrupted write leaves the previous checkpoint in force."""
        if self._manager.latest_step() != state.step:
            self._manager.save(state.step, args=ocp.args.StandardSave(_flatten(state)))

    def restore(self, like: TrainingState) -> TrainingState | None:
        """The latest state, or None if there is none yet.

        Raises:
          ValueError: If what is stored has other names, shapes or dtypes than ``like`` (model or
          optimizer changed).
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flatten(like))
        # Compared before orbax starts to read, which it does in many threads.
        stored = dict(self._manager.item_metadata(step).tree)
        for name in sorted(stored.keys() | wanted.keys()):
            old, new = (
                None if x is None else (x.shape, str(np.dtype(x.dtype)))
                for x in (stored.get(name), wanted.get(name))
            )
            if old != new:
                raise ValueError(
                    f"the checkpoint of step {step} does not fit this model and optimizer: {name} "
                    f"is {old} there and {new} here; use the settings it was made with, or another "
                    "output directory"
                )
        stored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        arrays = {k: v for k, v in stored.items() if k not in ("step", "elapsed")}
        treedef = jax.tree.structure((like.params, like.opt_state))
        params, opt_state = jax.tree.unflatten(
            treedef, [arrays[k] for k in _flatten(like) if k in arrays]
        )
        return TrainingState(params, opt_state, int(stored["step"]), float(stored["elapsed"]))

    def close(self) -> None:
        """Waits for the last write."""
        self._manager.close()


def _flatten(state: TrainingState) -> dict[str, Any]:
    # A flat dict by path: independent of the classes optax happens to keep its state in.
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return named | {
        "step": np.asarray(state.step, np.int64),
        "elapsed": np.asarray(state.elapsed, np.float64),
    }
