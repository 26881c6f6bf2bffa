"""Choice of a backend: the same rules for every op."""

from __future__ import annotations

import jax

BACKENDS = ("xla", "mosaic_gpu")


def choose_backend(op: str, backend: str | None, mosaic_gpu_reason: str | None) -> str:
    """The backend to run, or the error that says why it cannot.

    Args:
      op: Name of the op, for messages.
      backend: What the caller asked for; None chooses the fastest supported one. In a process with
        several devices that is XLA, which can divide its own ops between them and not the kernels.
      mosaic_gpu_reason: Why the Mosaic GPU kernel cannot run on these arguments; None if it can.

    Returns:
      ``"xla"`` or ``"mosaic_gpu"``.

    Raises:
      ValueError: If the name is unknown.
      NotImplementedError: If the named backend cannot run; the message holds the reason.
    """
    if backend is None:
        alone = jax.local_device_count() == 1
        return "mosaic_gpu" if mosaic_gpu_reason is None and alone else "xla"
    if backend not in BACKENDS:
        raise ValueError(f"unknown {backend=}; choose one of {BACKENDS} or None for automatic")
    if backend == "mosaic_gpu" and mosaic_gpu_reason is not None:
        raise NotImplementedError(f"{op}: mosaic_gpu cannot run here: {mosaic_gpu_reason}")
    return backend
