"""What the program of one device does about the others that hold the rest of a model.

Under ``jax.shard_map`` every device runs the decoder on its own part of the weights, with shapes of
its own: some of the heads, of the MLP's features and of the vocabulary. Three things are left to do
together, and they stand here: to sum what layers cut along their inputs contribute, to look up
tokens whose embedding another device holds, and to gather logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.typing import Array, DType


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """The devices among which a model is cut.

    Attributes:
      axis: Name of the mesh axis.
      devices: Its size.
    """

    axis: str
    devices: int

    def of_vocabulary(self, vocab_size: int) -> TensorParallel | None:
        """None if the vocabulary cannot be cut: each device holds all of it."""
        return self if vocab_size % self.devices == 0 else None

    def share(self, size: int) -> int:
        """What one device has of ``size`` things.

        Raises:
          ValueError: If they cannot be cut evenly.
        """
        if size % self.devices:
            raise ValueError(f"{size} cannot be cut over {self.devices} devices")
        return size // self.devices

    def embed(self, table: Array, tokens: Array, vocab_size: int, dtype: DType) -> Array:
        """Rows of an embedding of which this device has a part.

        Args:
          table: ``(vocab / devices, hidden)``.
          tokens: int32 ``(b, t)``, the same on all devices.
          vocab_size: Rows of the whole.
          dtype: Of the result.

        Returns:
          ``(b, t, hidden)``, the same on all devices. Ids outside the vocabulary give NaN.
        """
        rows = table.shape[0]
        row = tokens - jax.lax.axis_index(self.axis) * rows
        own = ((row >= 0) & (row < rows))[..., None]
        x = jnp.take(table, jnp.clip(row, 0, rows - 1), axis=0).astype(dtype)
        # All but one are zeros, so the sum is exact in any type.
        x = jax.lax.psum(jnp.where(own, x, jnp.zeros((), dtype)), self.axis)
        known = ((tokens >= 0) & (tokens < vocab_size))[..., None]
        return jnp.where(known, x, jnp.full((), jnp.nan, dtype))

    def gather(self, logits: Array) -> Array:
        """``(..., vocab / devices)`` to ``(..., vocab)``, the same on all devices."""
        return jax.lax.all_gather(logits, self.axis, axis=logits.ndim - 1, tiled=True)


def reorder_inputs(x: Array, kernel: Any, axis: str) -> tuple[Array, Any]:
    """Undo the activation order of a kernel whose inputs are cut over devices.

    Its groups were formed after sorting, so a device's rows belong to inputs that lie on all of
    them: these are gathered, and the device takes its own.

    Args:
      x: ``(..., k / devices)``: the inputs in their own order, as the layer before leaves them.
      kernel: ``QuantizedArray`` or ``PackedWeight`` ``(k / devices, n)`` with a ``perm`` that
        counts over all ``k``.
      axis: The mesh axis.

    Returns:
      ``(..., k / devices)`` inputs in the order of the rows, and the kernel without ``perm``.
    """
    x = jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
    return jnp.take(x, kernel.perm, axis=-1), dataclasses.replace(kernel, perm=None)


def sum_over_devices(y: Array, axis: str, dtype: DType, *, splits: bool) -> Array:
    """The sum of what all devices contribute to a product.

    Added up and sent in the layer's own type, as is usual: half the bytes of float32.

    Args:
      y: ``(..., n)``, or ``(s, ..., n)`` partial sums.
      axis: The mesh axis.
      dtype: Type of the result.
      splits: Whether ``y`` has the axis of partial sums; one is left then.
    """
    if splits and y.shape[0] > 1:
        y = y.sum(0, keepdims=True)
    return jax.lax.psum(y.astype(dtype), axis)
